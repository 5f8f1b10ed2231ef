"""Read a checkpoint: verify it, check that it fits, put it into model and optimizer."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlm_train.checkpoint.manifest import read_manifest, verify_files
from mlm_train.checkpoint.save import FORMAT, VERSION
from mlm_train.checkpoint.tensors import LogicalPart, read_tensors
from mlm_train.config import Config
from mlm_train.config.load import parse_config
from mlm_train.errors import UserError
from mlm_train.model.logical import pieces
from mlm_train.parallel.engine import Engine
from mlm_train.parallel.optimizer_state import STATE, scatter_state


def open_checkpoint(folder: Path, hashes: bool = True) -> dict[str, Any]:
    """The verified manifest of a checkpoint folder. Raises UserError naming what is damaged."""
    manifest = read_manifest(folder, FORMAT, VERSION)
    verify_files(folder, manifest["files"], hashes)
    return manifest


def config_of(manifest: dict[str, Any]) -> Config:
    """The config of the run that wrote a checkpoint."""
    return parse_config(manifest["config"])


def check_fits(folder: Path, manifest: dict[str, Any], config: Config, fingerprint: str) -> None:
    """Refuse to continue a run with another model, other data, or another order of samples."""
    written = config_of(manifest)
    check_same_model(folder, written, config)
    for section, field in (("data", "sequence_length"), ("train", "seed")):
        old, new = (getattr(getattr(c, section), field) for c in (written, config))
        if old != new:
            raise UserError(
                f"{section}.{field}={new} but checkpoint {folder} was written with {old}: "
                f"its place in the data would be wrong; set {section}.{field}={old} or another train.output"
            )
    if manifest["data"]["fingerprint"] != fingerprint:
        raise UserError(
            f"data.path={config.data.path} is not the data of checkpoint {folder} (fingerprints differ): "
            "use that data, another train.output, or checkpoint.warm_start"
        )


def check_same_model(folder: Path, written: Config, config: Config) -> None:
    """UserError naming the first model field in which a checkpoint differs."""
    old, new = written.model.model_dump(), config.model.model_dump()
    for name in sorted(old):
        if name != "init_std" and old[name] != new[name]:
            raise UserError(
                f"checkpoint {folder} is of another model: model.{name} is {old[name]} there and "
                f"{new[name]} here; use its config or another train.output"
            )


def check_steps(folder: Path, manifest: dict[str, Any], config: Config) -> None:
    """Refuse a target that the run has passed."""
    done = manifest["progress"]["step"]
    if config.train.steps < done:
        raise UserError(
            f"train.steps={config.train.steps} but checkpoint {folder} is at step {done}: "
            "ask for more steps, or name another train.output"
        )


def load_training_state(folder: Path, manifest: dict[str, Any], engine: Engine) -> None:
    """Fill weights, moments and RNG; every rank calls it. The manifest is verified already."""
    whole = {
        key: {name: torch.zeros(shape, dtype=torch.float32) for name, shape in engine.shapes.items()}
        for key in STATE
    }
    wanted: dict[str, Tensor] = {}
    for key in STATE:
        for piece in engine.pieces:
            target = piece.of(whole[key][piece.parameter]).fill_(float("nan"))
            wanted[f"{key}/{piece.name}"] = LogicalPart.of(piece, target)
    wanted["rng"] = torch.get_rng_state()
    read_tensors(folder, wanted)
    torch.set_rng_state(wanted["rng"])
    scatter_state(engine, whole, manifest["progress"]["optimizer_steps"])


def load_weights(folder: Path, model: nn.Module) -> None:
    """Fill a model's weights, or this rank's share of them, from a checkpoint; needs no processes."""
    parameters = dict(model.named_parameters())
    wanted: dict[str, Tensor] = {}
    for piece in pieces(model):
        target = piece.of(parameters[piece.parameter].detach()).fill_(float("nan"))
        wanted[f"weight/{piece.name}"] = LogicalPart.of(piece, target)
    read_tensors(folder, wanted, alone=True)
