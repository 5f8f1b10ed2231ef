"""Write a checkpoint: each rank its own rectangles of logical tensors, rank 0 the manifest last."""

import shutil
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_train import __version__
from mlm_train.checkpoint.folders import PARTIAL, commit, make_partial, step_folder
from mlm_train.checkpoint.index_file import merged, write_index
from mlm_train.checkpoint.keep import Keep
from mlm_train.checkpoint.manifest import FORMAT, VERSION, Validation, write_manifest
from mlm_train.checkpoint.shards import RNG, NonFinite, Written, write_shard
from mlm_train.config import Config
from mlm_train.errors import UserError
from mlm_train.model.counts import count_parameters
from mlm_train.model.logical import LogicalSlice
from mlm_train.parallel.engine.base import Engine
from mlm_train.parallel.engine.optimizer_state import STATE, copy_state, optimizer_steps
from mlm_train.parallel.runtime import Runtime
from mlm_train.utils.files import writing
from mlm_train.utils.run_lock import Attempt, refuse_superseded

FP32, GIB = 4, 2**30


@dataclass(frozen=True)
class Snapshot:
    """A run's state at the end of a step, copied to host memory, so that training can continue meanwhile."""

    step: int
    state: Sequence[LogicalSlice]  # what this rank writes, in host memory
    manifest: dict[str, Any]  # without `files` and `index`
    keep: Keep  # which checkpoints of the run are kept
    bytes: int  # approximate, of all ranks


def take_snapshot(
    engine: Engine,
    runtime: Runtime,
    config: Config,
    progress: dict[str, Any],
    data: dict[str, Any],
    validation: Validation | None = None,
    room: list[Tensor] | None = None,
) -> Snapshot:
    """Copy the state for a checkpoint of `progress["step"]`; every rank calls it.

    `data` describes the training data: `fingerprint`, `order` of its samples, and `eod_id` for exports.
    `validation`: of these same weights. `room`: memory of an earlier snapshot that is on disk (copy_to_host).
    """
    state = copy_state(engine, room)
    if runtime.is_rank_0:
        rng = torch.get_rng_state()
        state.append(LogicalSlice(RNG, rng.shape, (0,), rng))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "tool": f"mlm-train {__version__}",
        "progress": progress | {"optimizer_steps": optimizer_steps(engine)},
        "validation": None if validation is None else validation.model_dump(),
        "data": data,
        "config": config.model_dump(mode="json", exclude_none=True),
        "world": runtime.topology.world,
    }
    size = len(STATE) * FP32 * count_parameters(config.model).stored
    return Snapshot(progress["step"], state, manifest, Keep.of(config.checkpoint), size)


def write_checkpoint(root: Path, snapshot: Snapshot, runtime: Runtime) -> Path:
    """Write and commit a checkpoint; every rank calls it. Returns its folder.

    A kill at any moment leaves the older checkpoints intact: the new folder has a temporary name
    until its manifest is on disk. Raises UserError on every rank where any rank could not write.
    """
    final = step_folder(root, snapshot.step)
    partial = root / f"{PARTIAL}{final.name}{Attempt.suffix()}"
    marker = runtime.marker
    marker.at("space")
    runtime.broadcast(lambda: _prepare(partial, snapshot))
    try:
        written: list[Written] = []
        # As long as all ranks write on, however slowly, none waits longer for another than for a round.
        with closing(_write_shard(partial, runtime.topology.rank, snapshot, written)) as work:
            runtime.in_rounds("write", work)
        marker.at("commit")
        # The index is rank 0's work: no other needs what the files of all ranks have.
        every = runtime.gather_on_rank_0(written)
        runtime.broadcast(lambda: _finish(partial, final, snapshot, [one for of in every for one in of]))
    except UserError:
        runtime.broadcast(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise
    return final


def _write_shard(
    partial: Path, rank: int, snapshot: Snapshot, written: list[Written]
) -> Generator[None, None, None]:
    """Write this rank's file, if it has something to write, and append it to `written`.

    Raises UserError for non-finite values: no run can resume from them, and a good checkpoint would go.
    """
    if not snapshot.state:
        return
    try:
        with writing(partial.parent):
            written.append(
                (yield from write_shard(partial / f"shard-{rank:05d}.safetensors", snapshot.state))
            )
    except NonFinite as error:
        raise UserError(
            f"the state after step {snapshot.step} holds infinity or NaN in {error}: "
            "restart from the newest checkpoint"
        ) from None


def _finish(partial: Path, final: Path, snapshot: Snapshot, files: Sequence[Written]) -> None:
    """Write index and manifest and commit, unless a newer attempt of the job has taken over."""
    with writing(final.parent):
        names, places = [one.entry.file for one in files], [one.places for one in files]
        index = write_index(partial, names, merged(places))
        entries = {"files": [one.entry.model_dump() for one in files], "index": index.model_dump()}
        write_manifest(partial, snapshot.manifest | entries)
        refuse_superseded(final.parent.parent)
        commit(partial, final, snapshot.keep)


def _prepare(partial: Path, snapshot: Snapshot) -> None:
    """Make an empty folder. UserError where the disk has too little space."""
    if (free := make_partial(partial, snapshot.bytes)) is not None:
        raise UserError(
            f"the checkpoint of step {snapshot.step} needs {snapshot.bytes / GIB:.3g} GiB, but "
            f"{partial.parent} has {free / GIB:.3g} GiB free: free space, or choose another train.output"
        )
