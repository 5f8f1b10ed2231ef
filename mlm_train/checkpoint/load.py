"""Read a checkpoint: verify it, check that it fits the config, load it into model and optimizer."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from mlm_train.checkpoint.index import CheckpointIndex, read_index
from mlm_train.checkpoint.manifest import MANIFEST, Manifest, read_manifest, verify_files
from mlm_train.checkpoint.reading.slices import read_slices
from mlm_train.checkpoint.shards import RNG
from mlm_train.config import Config, ModelConfig
from mlm_train.config.load import parse_config
from mlm_train.config.renamed import with_new_names
from mlm_train.data.order import ORDER
from mlm_train.errors import UserError
from mlm_train.model.logical import LogicalSlice, Target
from mlm_train.parallel.engine.base import Engine
from mlm_train.parallel.engine.optimizer_state import STATE, Restored, set_optimizer_steps
from mlm_train.parallel.runtime import Runtime
from mlm_train.utils.checks import Check
from mlm_train.utils.files import finished


def open_checkpoint(folder: Path, verify: Check = "full") -> Manifest:
    """Verify a checkpoint folder. Returns its manifest; raises UserError naming what is damaged."""
    manifest = read_manifest(folder)
    if verify != "none":
        verify_files(folder, manifest, hashes=verify == "full")
    return manifest


def config_of(manifest: Manifest) -> Config:
    """The config of the run that wrote a checkpoint, of whatever version."""
    return parse_config(with_new_names(manifest.config, MANIFEST))


def check_fits(folder: Path | str, manifest: Manifest, config: Config, fingerprint: str) -> None:
    """Raise UserError where a run would continue with another model, other data, or another sample order."""
    written = config_of(manifest)
    check_same_model(folder, written.model, config.model)
    for section, field in (("data", "sequence_length"), ("train", "seed")):
        old, new = (getattr(getattr(c, section), field) for c in (written, config))
        if old != new:
            raise UserError(
                f"{section}.{field}={new} but checkpoint {folder} was written with {old}: "
                f"its position in the data would be wrong; set {section}.{field}={old} or a new train.output"
            )
    if manifest.data.order != ORDER:
        raise UserError(
            f"checkpoint {folder} was written by a version of mlm-train with another order of samples: its "
            "position in the data would be wrong; continue with that version, or with another train.output "
            f"and checkpoint.warm_start={folder}"
        )
    accepted = config.checkpoint.accept_data
    if manifest.data.fingerprint != fingerprint and not _names(accepted, fingerprint):
        raise UserError(
            f"checkpoint {folder} was written with other data, or another blend (fingerprints differ): use "
            "that data, another train.output, checkpoint.warm_start, or continue with this data by "
            f"checkpoint.accept_data=sha256:{fingerprint[:12]}"
        )


def _names(accepted: str | None, fingerprint: str) -> bool:
    """Whether config field checkpoint.accept_data names this data."""
    return accepted is not None and fingerprint.startswith(accepted.removeprefix("sha256:"))


def check_same_model(folder: Path | str, written: ModelConfig, model: ModelConfig) -> None:
    """Raise UserError naming the first field in which the model of a checkpoint or an export differs."""
    old, new = written.model_dump(), model.model_dump()
    for name in sorted(old.keys() - {"init_std", "flex_beta"}):  # the size that flex_beta gives is compared
        if old[name] != new[name]:
            raise UserError(
                f"{folder} holds another model: model.{name} is {old[name]} there and {new[name]} here; "
                "use its model section, or name another folder"
            )


def check_steps(folder: Path | str, manifest: Manifest, config: Config) -> None:
    """Raise UserError for a train.steps that the run has passed."""
    done = manifest.progress.step
    if config.train.steps < done:
        raise UserError(
            f"train.steps={config.train.steps} but checkpoint {folder} is at step {done}: "
            "ask for more steps, or name another train.output"
        )


def load_training_state(folder: Path, manifest: Manifest, engine: Engine, runtime: Runtime) -> None:
    """Load weights, moments and RNG state from a verified checkpoint; every rank calls it.

    Rank 0 reads the index; each rank then reads its own elements, from the files that hold some.
    Raises UserError on every rank where any rank could not read.
    """
    index = runtime.broadcast(lambda: index_of(folder, manifest))
    slices = []
    if runtime.is_rank_0:
        stored = index.stored(RNG)
        rng = torch.empty(stored.shape, dtype=stored.dtype)
        slices = [LogicalSlice(RNG, rng.shape, (0,), rng)]
    _restore(engine, STATE, index, runtime, slices)
    torch.set_rng_state(runtime.broadcast(lambda: rng))
    set_optimizer_steps(engine, manifest.progress.optimizer_steps)


def load_engine_weights(read: Callable[[], CheckpointIndex], engine: Engine, runtime: Runtime) -> None:
    """Load the weights alone, as load_training_state does; `read` on rank 0 reads the index."""
    _restore(engine, ("weight",), runtime.broadcast(read), runtime)


def _restore(
    engine: Engine,
    keys: Sequence[str],
    index: CheckpointIndex,
    runtime: Runtime,
    more: Sequence[LogicalSlice] = (),
) -> None:
    """Read the state of `keys` and `more` slices; every rank calls it."""
    restored = Restored(engine, keys)
    runtime.in_rounds(f"read {index.folder.name}", read_slices(index, [*restored.slices, *more]))
    restored.finish()


def index_of(folder: Path, manifest: Manifest) -> CheckpointIndex:
    """What is where in a checkpoint's files. Raises UserError as read_index does."""
    return read_index(folder, manifest.files, manifest.index)


def load_weights(folder: Path, manifest: Manifest, held: Iterable[Target]) -> None:
    """Load weights from a checkpoint into pieces of a model, in this process alone."""
    slices = (
        LogicalSlice(f"weight/{target.piece.name}", target.piece.shape, target.piece.offset, target.view)
        for target in held
    )
    finished(read_slices(index_of(folder, manifest), slices))
