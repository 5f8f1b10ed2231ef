"""A model on disk: an export, a checkpoint, or a run's folder (its newest checkpoint).

Logical tensors are read by slice, so that parts of the weights can be read without building a model.
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

from mlm_train.checkpoint.folders import names_one, refuse_url, resolve
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
from mlm_train.model.logical import targets
from mlm_train.model.transformer import Transformer
from mlm_train.model.unfilled import unfilled
from mlm_train.utils.arguments import MODEL_KINDS
from mlm_train.utils.checks import Check
from mlm_train.utils.host_memory import use_huge_pages

if TYPE_CHECKING:
    from mlm_train.data.tokenizer import Tokenizer

_HASHED_BYTES = 2**24  # at once


class ModelFolder:
    """The model that a user's path names.

    `path`: the export, or the chosen checkpoint. Other processes must open this path, since a run in progress
    may soon have a newer checkpoint. `manifest`: of a checkpoint, else None. `digests`: SHA-256 of an
    export's files by name, where they were compared.
    """

    def __init__(self, path: Path, config: ModelConfig, manifest: Manifest | None) -> None:
        self.path, self.config, self.manifest = path, config, manifest
        self.digests: Mapping[str, str] = {}

    @property
    def home(self) -> Path:
        """The folder of its tokenizer, if it has one: the export, or the run's folder of a checkpoint."""
        return self.path if self.manifest is None else self.path.absolute().parent.parent

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer in `home`. UserError where there is none."""
        from mlm_train.data.tokenizer import tokenizer_of

        return tokenizer_of(self.home, None if self.manifest is None else self.manifest.data.eod_id)

    @property
    def bos_id(self) -> int | None:
        """The id that texts begin with, from a run's data or an export's files; None: there is none."""
        return first_id(self.home) if self.manifest is None else self.manifest.data.bos_id

    def id_before_text(self, add_bos: bool | None, tokenizer_folder: Path) -> int | None:
        """The id to put before a text, or None for none.

        add_bos None: bos_id. False: None. True: bos_id, or else the tokenizer's. tokenizer_folder: a folder
        with the model's tokenizer. Raises UserError where add_bos is True and neither has one.
        """
        from mlm_train.data.tokenizer import tokenizer_of

        if add_bos is False:
            return None
        if self.bos_id is not None:
            return self.bos_id
        return tokenizer_of(tokenizer_folder).require_bos_id() if add_bos else None

    @property
    def ends(self) -> tuple[int, ...]:
        """All ids that end a text, from an export's files, or a run's data and the import it started from."""
        eod_id = None if self.manifest is None else self.manifest.data.eod_id
        return special_tokens(self.home).ended_by(eod_id).eos


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
        """A whole tensor in its stored dtype."""
        return self.tensors.tensor(name)

    def rows(self, name: str, start: int, stop: int | None) -> Tensor:
        """Rows [start, stop) of a tensor; nothing else is read."""
        return self.tensors.rows(name, start, stop)

    def shape(self, name: str) -> torch.Size:
        """A tensor's shape, from headers alone."""
        return self.tensors.shape(name)

    def dtype(self, name: str) -> str:
        """A tensor's stored dtype as safetensors spells it, such as BF16."""
        return self.tensors.dtype(name)

    def load(
        self, with_memory: bool = True, dtype: torch.dtype = torch.float32, embeds: bool = True
    ) -> Transformer:
        """The model, with or without FFN-M and embedding, in eval mode on the CPU, without gradients."""
        with unfilled():
            model = Transformer(self.config, with_memory, embeds=embeds)
        model.to(dtype).to_empty(device="cpu").requires_grad_(False)
        for weight in model.parameters():
            use_huge_pages(weight.data_ptr(), weight.nbytes)
        self.tensors.fill(targets(model), model.config, model.with_memory, embeds)
        return model.eval()

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 that identifies the model, independent of its folder's path. All weights are read.

        Of an export: over its files (hf.folder.fingerprint). Of a checkpoint: over an export's config.json
        and the logical weights. The manifest's checksums would cost nothing, but change with the layout
        that wrote the files and with the optimizer's moments; the weights are a third of the bytes that
        verifying a checkpoint reads anyway.
        """
        return fingerprint(self.path, self.digests) if self.manifest is None else self._of_weights()

    def _of_weights(self) -> str:
        total = hashlib.sha256(json.dumps(config_json(self.config), sort_keys=True).encode())
        for name in self.tensors.names():
            shape = self.shape(name)
            total.update(f"\n{name} {list(shape)} {self.dtype(name)}\n".encode())
            rows = max(1, _HASHED_BYTES // (4 * shape[1:].numel()))
            for start in range(0, shape[0], rows):
                total.update(self.rows(name, start, start + rows).numpy().tobytes())
        return total.hexdigest()


def open_model(
    model: str | Path | ModelFolder,
    needs_ffn_m: bool = False,
    verify: Check = "full",
    with_memory: bool = True,
    embeds: bool = True,
) -> OpenedModel:
    """Open an export, a checkpoint or a run's newest checkpoint, or a ModelFolder that find_model verified.

    `needs_ffn_m`, `verify`: see find_model. `with_memory=False`: an export may lack the weights of FFN-M;
    `embeds=False`: that of an embedding that is not the head's too. Raises UserError for a folder that holds
    no model, is damaged, or was copied only in part.
    """
    folder = model if isinstance(model, ModelFolder) else find_model(model, verify, needs_ffn_m)
    if folder.manifest is None:
        tensors = open_tensors(folder.path)
    else:
        from mlm_train.checkpoint.reading.joined import open_joined

        tensors = open_joined(folder.path, folder.manifest)
    tensors.check(folder.config, with_memory, embeds)
    return OpenedModel(folder, tensors)


def load_model(
    model: str | Path | ModelFolder,
    with_memory: bool = True,
    dtype: torch.dtype = torch.float32,
    embeds: bool = True,
) -> Transformer:
    """Load the model that open_model opens.

    `with_memory=False`: without FFN-M, which a ToL then serves; `embeds=False`: without the embedding, too.
    """
    with open_model(model, with_memory=with_memory, embeds=embeds) as opened:
        return opened.load(with_memory, dtype, embeds)


def read_model_config(path: str | Path) -> ModelConfig:
    """The config of the model that open_model opens, without reading its weights. Raises UserError."""
    return find_model(path).config


def find_model(path: str | Path, verify: Check = "sizes", needs_ffn_m: bool = False) -> ModelFolder:
    """Find the model that a path names, read its config, and verify its files as far as `verify` requires.

    `needs_ffn_m`: reject a base model. Raises UserError.
    """
    refuse_url(path)
    path = Path(path)
    folder = _exported(path) if _looks_exported(path) else _checkpoint(path)
    if needs_ffn_m and not folder.config.has_memory:
        raise UserError(f"{path} is a base model and has no FFN-M; give a memory or flex model")
    if folder.manifest is None:
        folder.digests = verify_folder(folder.path, verify)
    elif verify != "none":
        verify_files(folder.path, folder.manifest, hashes=verify == "full")
    return folder


def _exported(path: Path) -> ModelFolder:
    return ModelFolder(path, read_config(path), None)


def _checkpoint(path: Path) -> ModelFolder:
    # Slow to import: it loads into engines too.
    from mlm_train.checkpoint.load import config_of, open_checkpoint

    if not path.is_dir() and not names_one(path):
        raise UserError(f"{path} is not a folder; give {MODEL_KINDS}")
    try:
        folder = resolve(path)
    except UserError as error:
        reason = error if names_one(path) else f"{path} holds no model"
        raise UserError(f"{reason}; give {MODEL_KINDS}") from None
    manifest = open_checkpoint(folder, "none")
    return ModelFolder(folder, config_of(manifest).model, manifest)


def _looks_exported(path: Path) -> bool:
    """Whether the path names an export, even one with missing files."""
    return (path / "config.json").exists() or any(path.glob("model*.safetensors*"))
