"""Former field names: accepted in files that this program wrote, rejected with the new name elsewhere."""

from collections.abc import Callable
from typing import Any

from mlm_train.errors import UserError

# Former dotted name -> current one. A field stays in its section; a renamed section keeps its fields.
RENAMED: dict[str, str] = {
    "parallel.schedule": "parallel.pipeline_schedule",
    "parallel.zero": "parallel.zero_stage",
    "memory.shared": "memory.placement",
    "optimizer.clip": "optimizer.max_grad_norm",
    "train.global_batch": "train.global_batch_size",
    "train.micro_batch": "train.micro_batch_size",
    "train.ramp": "train.batch_size_warmup",
    "train.recompute": "train.activation_checkpointing",
    "train.loss_chunk": "train.loss_chunk_size",
    "train.evaluate_every": "train.eval_interval",
    "train.evaluate_samples": "train.eval_samples",
    "train.watchdog": "train.watchdog_timeout",
    "train.skip_limit": "train.max_skipped_steps",
    "train.spike.limit": "train.spike.max_rollbacks",
    "checkpoint.every": "checkpoint.interval",
    "checkpoint.keep": "checkpoint.keep_latest_k",
    "checkpoint.keep_every": "checkpoint.keep_interval",
    "checkpoint.keep_best": "checkpoint.keep_best_k",
    "checkpoint.background": "checkpoint.async_save",
    "monitor.tensorboard": "monitor.writers",
    "monitor.log_every": "monitor.log_interval",
    "monitor.stragglers_every": "monitor.straggler_interval",
}
# Former name -> conversion of its value, for fields of RENAMED whose values changed too.
VALUES: dict[str, Callable[[Any], Any]] = {
    "memory.shared": lambda shared: "shared" if shared else None,
    "monitor.tensorboard": lambda on: ["tensorboard"] if on else [],
}


def with_new_names(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """A copy of a config written by some version of this program, with former names replaced.

    source: where the config stands. Raises UserError if a field is given under both names.
    """
    tree = _copied(tree)
    for old, new in RENAMED.items():
        section, before, after = _lookup(tree, old, new)
        if before not in section:
            continue
        if after in section:
            _refuse(source, old)
        value = section.pop(before)
        section[after] = VALUES[old](value) if old in VALUES else value
    return tree


def refuse_old_names(tree: dict[str, Any], source: str) -> None:
    """Raise UserError with the current name of a field that `tree` gives under its former one."""
    for old, new in RENAMED.items():
        section, before, _ = _lookup(tree, old, new)
        if before in section:
            _refuse(source, old)


def _lookup(tree: dict[str, Any], old: str, new: str) -> tuple[dict[str, Any], str, str]:
    """The section of a field (empty if missing), and the field's former and current name in it."""
    *sections, before = old.split(".")
    node: Any = tree
    for name in sections:
        node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}, before, new.rpartition(".")[2]


def _copied(tree: dict[str, Any]) -> dict[str, Any]:
    """A copy of the sections; other values are shared."""
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in tree.items()}


def _refuse(source: str, old: str) -> None:
    raise UserError(f"{source}: {old} was renamed: write {RENAMED[old]}")
