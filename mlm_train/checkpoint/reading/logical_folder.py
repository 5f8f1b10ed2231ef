"""A model on disk, whatever wrote it: an export, a checkpoint, or a run's folder (its newest checkpoint).

Logical tensors are read by slice, so that no model has to be built to look at a part of its weights.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from mlm_train.checkpoint.folders import names_one, resolve
from mlm_train.checkpoint.hf.config import config_json
from mlm_train.checkpoint.hf.files import first_id, special_tokens
from mlm_train.checkpoint.hf.folder import (
    FolderTensors,
    fingerprint,
    open_tensors,
    read_config,
    verify_folder,
)
from mlm_train.checkpoint.manifest import Manifest, verify_files
from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.model.transformer import Transformer
from mlm_train.model.unfilled import unfilled
from mlm_train.utils.arguments import MODEL_KINDS
from mlm_train.utils.checks import Check

if TYPE_CHECKING:
    from mlm_train.data.tokenizer import Tokenizer

_HASHED_AT_ONCE = 2**24  # bytes


class ModelFolder:
    """What a user's path stands for.

    `path`: the export, or the checkpoint that was chosen. A run that goes on has a newer one soon, so other
    processes are to open this path. `manifest`: of a checkpoint. `digests`: SHA-256 of an export's files, by
    name, where they were compared.
    """

    def __init__(self, path: Path, config: ModelConfig, manifest: Manifest | None) -> None:
        self.path, self.config, self.manifest = path, config, manifest
        self.digests: Mapping[str, str] = {}

    @property
    def home(self) -> Path:
        """Where its tokenizer lies, if anywhere: the export, or the folder of a checkpoint's run."""
        return self.path if self.manifest is None else self.path.absolute().parent.parent

    def tokenizer(self) -> "Tokenizer":
        """The one that lies there; UserError where none does."""
        from mlm_train.data.tokenizer import tokenizer_of

        return tokenizer_of(self.home, None if self.manifest is None else self.manifest.data.eod_id)

    @property
    def bos_id(self) -> int | None:
        """The id that texts begin with: of a run's data, or as an export's files say; None: no such."""
        return first_id(self.home) if self.manifest is None else self.manifest.data.bos_id

    def begin(self, add_bos: bool | None, place: Path) -> int | None:
        """What to put before a text: bos_id (add_bos None), nothing (False), or what there is (True).

        place: a folder with the model's tokenizer. Raises UserError where add_bos is True and it has no such.
        """
        from mlm_train.data.tokenizer import tokenizer_of

        if add_bos is False:
            return None
        if self.bos_id is not None:
            return self.bos_id
        return tokenizer_of(place).require_bos_id() if add_bos else None

    @property
    def ends(self) -> tuple[int, ...]:
        """Every id that ends a text: of an export's files, or of a run's data and what it started from."""
        end = None if self.manifest is None else self.manifest.data.eod_id
        return special_tokens(self.home).ended_by(end).eos


class OpenedModel(ModelFolder):
    """A model's config and logical tensors by export name; a context manager."""

    def __init__(self, folder: ModelFolder, tensors: FolderTensors) -> None:
        super().__init__(folder.path, folder.config, folder.manifest)
        self.digests, self.tensors = folder.digests, tensors

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

    def load(self, with_memory: bool = True, dtype: torch.dtype = torch.float32) -> Transformer:
        """The whole model, or all but FFN-M, in eval mode on the CPU, without gradients."""
        with unfilled():
            model = Transformer(self.config, with_memory)
        model.to(dtype).to_empty(device="cpu").requires_grad_(False)
        self.tensors.fill(model)
        return model.eval()

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 that names the model, wherever its folder lies. All weights are read.

        Of an export: over its files (hf_folder.fingerprint). Of a checkpoint: over what an export's
        config.json says and the logical weights. The manifest's checksums would cost nothing, but they
        change with the layout that wrote the files and with the optimizer's moments; the weights are a
        third of the bytes that verifying a checkpoint reads anyway.
        """
        return fingerprint(self.path, self.digests) if self.manifest is None else self._of_weights()

    def _of_weights(self) -> str:
        total = hashlib.sha256(json.dumps(config_json(self.config), sort_keys=True).encode())
        for name in self.tensors.names():
            shape = self.shape(name)
            total.update(f"\n{name} {list(shape)} {self.dtype(name)}\n".encode())
            at_once = max(1, _HASHED_AT_ONCE // (4 * shape[1:].numel()))
            for start in range(0, shape[0], at_once):
                total.update(self.rows(name, start, start + at_once).numpy().tobytes())
        return total.hexdigest()


def open_model(
    model: str | Path | ModelFolder,
    needs_ffn_m: bool = False,
    verify: Check = "full",
    with_memory: bool = True,
) -> OpenedModel:
    """Open an export, a checkpoint or a run's newest checkpoint, or what find_model has found and compared.

    `needs_ffn_m`, `verify`: see find_model. `with_memory=False`: an export may lack the weights of FFN-M.
    Raises UserError for what is no model, damaged, or copied by half.
    """
    folder = model if isinstance(model, ModelFolder) else find_model(model, verify, needs_ffn_m)
    if folder.manifest is None:
        tensors = open_tensors(folder.path)
    else:
        from mlm_train.checkpoint.reading.joined import open_joined

        tensors = open_joined(folder.path, folder.manifest.files)
    tensors.check(folder.config, with_memory)
    return OpenedModel(folder, tensors)


def load_model(
    model: str | Path | ModelFolder, with_memory: bool = True, dtype: torch.dtype = torch.float32
) -> Transformer:
    """The model of what open_model opens.

    `with_memory=False` builds and reads everything but FFN-M, which a ToL then serves.
    """
    with open_model(model, with_memory=with_memory) as opened:
        return opened.load(with_memory, dtype)


def read_model_config(path: str | Path) -> ModelConfig:
    """The config of what open_model opens; its weights are not read. Raises UserError."""
    return find_model(path).config


def find_model(path: str | Path, verify: Check = "sizes", needs_ffn_m: bool = False) -> ModelFolder:
    """What open_model opens: its config, and its files compared with their manifest as far as `verify` says.

    `needs_ffn_m`: refuse a base model. Raises UserError.
    """
    path = Path(path)
    folder = _exported(path) if _looks_exported(path) else _checkpoint(path)
    if needs_ffn_m and not folder.config.has_memory:
        raise UserError(f"{path} is a base model and has no FFN-M; give a memory or flex model")
    if folder.manifest is None:
        folder.digests = verify_folder(folder.path, verify)
    elif verify != "none":
        verify_files(folder.path, folder.manifest.files, hashes=verify == "full")
    return folder


def _exported(path: Path) -> ModelFolder:
    return ModelFolder(path, read_config(path), None)


def _checkpoint(path: Path) -> ModelFolder:
    # Slow to import: it brings torch.distributed.checkpoint.
    from mlm_train.checkpoint.load import config_of, open_checkpoint

    if not path.is_dir() and not names_one(path):
        raise UserError(f"{path} is no folder; give {MODEL_KINDS}")
    try:
        folder = resolve(path)
    except UserError as error:
        reason = error if names_one(path) else f"{path} holds no model"
        raise UserError(f"{reason}; give {MODEL_KINDS}") from None
    manifest = open_checkpoint(folder, "none")
    return ModelFolder(folder, config_of(manifest).model, manifest)


def _looks_exported(path: Path) -> bool:
    """Whether an export is meant, be it a damaged one: half of it may be missing."""
    return (path / "config.json").exists() or any(path.glob("model*.safetensors*"))
