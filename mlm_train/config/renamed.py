"""Fields that had another name: what runs wrote under it is read, what people write is refused by name."""

from collections.abc import Callable
from typing import Any

from mlm_train.errors import UserError

# Dotted name, as it was -> as it is. A field stays in its section; a section brings its fields along.
RENAMED: dict[str, str] = {
    "parallel.schedule": "parallel.pipeline_schedule",
    "parallel.zero": "parallel.zero_stage",
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
# Old name -> what its value is called today, for a field of RENAMED whose values changed too.
VALUES: dict[str, Callable[[Any], Any]] = {
    "monitor.tensorboard": lambda on: ["tensorboard"] if on else [],
}


def with_new_names(tree: dict[str, Any], source: str) -> dict[str, Any]:
    """A config that some version of this program wrote, under today's names. Changes nothing in `tree`.

    source: where it stands, for the UserError where a field is there under both names.
    """
    tree = _copied(tree)
    for old, new in RENAMED.items():
        section, before, after = _place(tree, old, new)
        if before not in section:
            continue
        if after in section:
            _refuse(source, old)
        value = section.pop(before)
        section[after] = VALUES[old](value) if old in VALUES else value
    return tree


def refuse_old_names(tree: dict[str, Any], source: str) -> None:
    """UserError naming the new name of a field that stands in `tree` under its old one."""
    for old, new in RENAMED.items():
        section, before, _ = _place(tree, old, new)
        if before in section:
            _refuse(source, old)


def _place(tree: dict[str, Any], old: str, new: str) -> tuple[dict[str, Any], str, str]:
    """The section of a field, an empty one where it is not there, and the field's two names in it."""
    *sections, before = old.split(".")
    node: Any = tree
    for name in sections:
        node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}, before, new.rpartition(".")[2]


def _copied(tree: dict[str, Any]) -> dict[str, Any]:
    """With sections of its own; what is no section is shared."""
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in tree.items()}


def _refuse(source: str, old: str) -> None:
    raise UserError(f"{source}: {old} was renamed: write {RENAMED[old]}")
