"""Write a checkpoint: logical tensors through torch.distributed.checkpoint, manifest last."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlm_train import __version__
from mlm_train.checkpoint.folders import PARTIAL, commit, step_folder
from mlm_train.checkpoint.manifest import MANIFEST, describe_file
from mlm_train.checkpoint.tensors import LogicalPart, write_tensors
from mlm_train.config import Config
from mlm_train.errors import UserError
from mlm_train.files import write_json
from mlm_train.parallel.engine import Engine
from mlm_train.parallel.optimizer_state import gather_state, optimizer_steps
from mlm_train.parallel.runtime import Runtime

FORMAT = "mlm-checkpoint"
VERSION = 1


def logical_state(engine: Engine) -> dict[str, Tensor]:
    """`weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` of the logical tensors this rank writes, fp32."""
    whole = gather_state(engine)
    return {
        f"{key}/{piece.name}": LogicalPart.of(piece, piece.of(tensors[piece.parameter]).contiguous())
        for key, tensors in whole.items()
        for piece in engine.pieces
        if piece.parameter in tensors
    }


def save_checkpoint(
    root: Path,
    engine: Engine,
    runtime: Runtime,
    config: Config,
    progress: dict[str, Any],
    data: dict[str, Any],
) -> Path:
    """Write and commit the checkpoint of `progress["step"]`; every rank calls it. Returns its folder.

    `data` names what was trained on: `fingerprint`, and `eod_id` for exports.
    A kill at any moment leaves the older checkpoints as they were: the new folder has another name
    until its manifest is on disk.
    """
    final = step_folder(root, progress["step"])
    partial = root / f"{PARTIAL}{final.name}"
    runtime.everywhere(lambda: _fresh(partial))
    place = runtime.place  # each part may take long of its own
    try:
        place.at("gather")
        state = logical_state(engine)
        state["rng"] = torch.get_rng_state()
        place.at("write")
        write_tensors(partial, state)
        place.at("checksums")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "tool": f"mlm-train {__version__}",
            "progress": progress | {"optimizer_steps": optimizer_steps(engine)},
            "data": data,
            "config": config.model_dump(mode="json", exclude_none=True),
            "world": runtime.topology.world,
            "files": _describe_together(partial, runtime),
        }
        place.at("commit")
        runtime.everywhere(lambda: _finish(partial, manifest, final, config.checkpoint.keep))
    except UserError:
        runtime.everywhere(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise
    return final


def _finish(partial: Path, manifest: dict[str, Any], final: Path, keep: int) -> None:
    """The manifest, then the name."""
    write_json(partial / MANIFEST, manifest)
    commit(partial, final, keep)


def _fresh(partial: Path) -> None:
    """An empty folder of that name: the reader takes every file in it."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _describe_together(folder: Path, runtime: Runtime) -> list[dict[str, Any]]:
    """Sizes and checksums of all files, each rank hashing its share."""
    names = runtime.everywhere(lambda: sorted(path.name for path in folder.iterdir()))
    mine = names[runtime.topology.rank :: runtime.topology.world]
    shares = runtime.together(lambda: [describe_file(folder, name) for name in mine])
    return sorted((entry for share in shares for entry in share), key=lambda entry: entry["file"])
