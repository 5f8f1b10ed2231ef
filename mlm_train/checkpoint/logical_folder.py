"""A model on disk, whatever wrote it: an export, a checkpoint, or a run's folder (its newest checkpoint).

Logical tensors are read by slice, so that no model has to be built to look at a part of its weights.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from mlm_train.checkpoint.folders import resolve
from mlm_train.checkpoint.hf_config import config_json
from mlm_train.checkpoint.hf_folder import (
    FolderTensors,
    fingerprint,
    open_tensors,
    read_config,
)
from mlm_train.checkpoint.manifest import verify_files
from mlm_train.config import ModelConfig
from mlm_train.errors import UserError

_HASHED_AT_ONCE = 2**24  # bytes
_KINDS = "an export, a run's folder, or one of its checkpoints (step-*)"


class OpenedModel:
    """A model's config and logical tensors by export name; a context manager.

    `path`: the export, or the checkpoint that was chosen. A run that goes on has a newer one soon, so other
    processes are to open this path. `manifest`: of a checkpoint.
    """

    def __init__(
        self, path: Path, config: ModelConfig, tensors: FolderTensors, manifest: dict[str, Any] | None = None
    ) -> None:
        self.path, self.config, self.tensors, self.manifest = path, config, tensors, manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tensors.__exit__(kind, error, trace)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its stored type."""
        return self.tensors.tensor(name)

    def rows(self, name: str, start: int, stop: int | None) -> Tensor:
        """Rows [start, stop) of a tensor; nothing else is read."""
        return self.tensors.rows(name, start, stop)

    def shape(self, name: str) -> torch.Size:
        """A tensor's shape, from headers alone."""
        return self.tensors.shape(name)

    def dtype(self, name: str) -> str:
        """A tensor's stored type in the format's words, such as BF16."""
        return self.tensors.dtype(name)

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 that names the model, wherever its folder lies. All weights are read.

        Of an export: over its files (hf_folder.fingerprint). Of a checkpoint: over what an export's
        config.json says and the logical weights. The manifest's checksums would cost nothing, but they
        change with the layout that wrote the files and with the optimizer's moments; the weights are a
        third of the bytes that verifying a checkpoint reads anyway.
        """
        return fingerprint(self.path) if self.manifest is None else self._of_weights()

    def _of_weights(self) -> str:
        total = hashlib.sha256(json.dumps(config_json(self.config), sort_keys=True).encode())
        for name in self.tensors.names():
            shape = self.shape(name)
            total.update(f"\n{name} {list(shape)} {self.dtype(name)}\n".encode())
            at_once = max(1, _HASHED_AT_ONCE // (4 * shape[1:].numel()))
            for start in range(0, shape[0], at_once):
                total.update(self.rows(name, start, start + at_once).numpy().tobytes())
        return total.hexdigest()


def open_model(path: str | Path, needs_ffn_m: bool = False, verify: bool = True) -> OpenedModel:
    """Open an export, a checkpoint (every checksum is compared first) or a run's newest checkpoint.

    `needs_ffn_m`: refuse a base model. `verify=False`: for a checkpoint that this command has verified
    already; sizes of files are still compared. Raises UserError for what is no model, damaged, or copied
    by half.
    """
    path = Path(path)
    folder, manifest, config = _described(path)
    if needs_ffn_m and not config.has_memory:
        raise UserError(f"{path} is a base model and has no FFN-M; give a memory or flex model")
    if manifest is None:
        tensors = open_tensors(folder)
    else:
        from mlm_train.checkpoint.joined import open_joined

        if verify:
            verify_files(folder, manifest["files"])
        tensors = open_joined(folder, manifest)
    tensors.check(config)
    return OpenedModel(folder, config, tensors, manifest)


def read_model_config(path: str | Path) -> ModelConfig:
    """The config of what open_model opens; its weights are not read. Raises UserError."""
    return _described(Path(path))[2]


def _described(path: Path) -> tuple[Path, dict[str, Any] | None, ModelConfig]:
    """The folder that holds the weights, a checkpoint's manifest, the model; checksums are not compared."""
    if _looks_exported(path):
        return path, None, read_config(path)
    # Slow to import: it brings torch.distributed.checkpoint.
    from mlm_train.checkpoint.load import config_of, open_checkpoint

    if not path.is_dir():
        raise UserError(f"{path} is no folder; give {_KINDS}")
    try:
        folder = resolve(path)
    except UserError:
        raise UserError(f"{path} holds no model; give {_KINDS}") from None
    manifest = open_checkpoint(folder, hashes=False)
    return folder, manifest, config_of(manifest).model


def _looks_exported(path: Path) -> bool:
    """Whether an export is meant, be it a damaged one: half of it may be missing."""
    return (path / "config.json").exists() or any(path.glob("model*.safetensors*"))
