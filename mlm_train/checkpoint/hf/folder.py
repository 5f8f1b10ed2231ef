"""Exports: Hugging Face folders of config.json and safetensors weights. No pickle is read or written."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mlm_train.checkpoint.hf import manifest as hf_manifest
from mlm_train.checkpoint.hf.beside import write_missing
from mlm_train.checkpoint.hf.config import config_json, read_config
from mlm_train.checkpoint.hf.files import NO_TOKENS, SpecialTokens, set_add_bos
from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.model.logical import Target, named_pieces, targets
from mlm_train.model.transformer import Transformer
from mlm_train.model.unfilled import unfilled
from mlm_train.utils.checks import Check
from mlm_train.utils.files import listed, new_folder, system_error, write_json
from mlm_train.utils.records import LARGEST, read_json

__all__ = [
    "FolderTensors",
    "config_json",
    "expected_shapes",
    "fill_model",
    "fingerprint",
    "open_tensors",
    "open_weights",
    "read_config",
    "verify_folder",
    "write_folder",
]

AGAIN = "export it again, or copy the folder again"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # transformers would add the adapter's weights to the model's
SHARD_BYTES = 4 * 2**30


def expected_shapes(
    config: ModelConfig, with_memory: bool = True, embeds: bool = True
) -> dict[str, torch.Size]:
    """Name -> shape of every tensor of an export, in the model's order."""
    with unfilled():
        model = Transformer(config, with_memory, embeds=embeds)
    return {name: tensor.shape for name, tensor in named_pieces(model)}


def write_folder(
    path: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    beside: Iterable[str | Path] = (),
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    tokens: SpecialTokens = NO_TOKENS,
    complete: bool = False,
) -> None:
    """Write an export; the folder gets its name only when it is whole.

    `tensors`: export names and logical tensors (`named_pieces(model)`); of an iterable, at most `shard_bytes`
    are held in memory. Equal weights in equal order give equal bytes. `beside`: other files to copy, such as
    the tokenizer's; `complete`: write those that transformers also needs (hf/beside.py). Raises UserError for
    a non-empty folder, a missing file, a full disk, and tensors that do not fit the config.
    """
    path = Path(path)
    copies = [Path(file) for file in beside]
    for file in copies:
        if not file.is_file():
            raise UserError(f"{file} does not exist; give the path of a file")
        if file.stat().st_size > LARGEST:
            raise UserError(f"{file} is larger than {LARGEST} bytes, which no tokenizer is: remove it")
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    with new_folder(path) as draft:
        _write_weights(draft, _checked(pairs, config), dtype, shard_bytes)
        tree = config_json(config, str(dtype).removeprefix("torch."), tokens)
        write_json(draft / "config.json", tree)
        for file in copies:
            shutil.copyfile(file, draft / file.name)
        set_add_bos(draft, tokens)
        if complete:
            write_missing(draft, config, tokens)
        hf_manifest.write_manifest(draft)


def _checked(pairs: Iterable[tuple[str, Tensor]], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    missing = expected_shapes(config)
    for name, tensor in pairs:
        if name not in missing:
            raise UserError(f"tensor {name} does not belong to a {config.kind} model, or occurs twice")
        if tensor.shape != missing[name]:
            raise UserError(f"tensor {name} has shape {list(tensor.shape)}, not {list(missing[name])}")
        del missing[name]
        yield name, tensor
    if missing:
        raise UserError(f"tensor {next(iter(missing))} is missing from the weights to export")


def _write_weights(
    folder: Path, pairs: Iterator[tuple[str, Tensor]], dtype: torch.dtype, shard_bytes: int
) -> None:
    """Write one file, or shards of at most `shard_bytes` (a larger tensor is its own shard) and an index."""
    shards: list[list[str]] = []
    batch: dict[str, Tensor] = {}
    held = total = 0

    def flush() -> None:
        nonlocal held
        try:
            save_file(batch, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        except SafetensorError as error:
            raise system_error(error) from None
        shards.append(list(batch))
        batch.clear()
        held = 0

    for name, tensor in pairs:
        # A copy even where the dtype is right: views of a fused weight share one storage.
        tensor = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        if batch and held + tensor.nbytes > shard_bytes:
            flush()
        batch[name] = tensor
        held += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


class FolderTensors:
    """Lazy access to a folder's logical tensors by export name, memory-mapped; a context manager.

    `file_of`: name -> an object with get_slice, such as an open safetensors file. `fix`: shown for a missing
    tensor.
    """

    def __init__(self, path: Path, file_of: dict[str, Any], fix: str = AGAIN) -> None:
        self.path, self._file_of, self._fix, self._closed = path, file_of, fix, False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file_of.clear()  # a memory map is closed with its last reference
        self._closed = True

    def names(self) -> list[str]:
        """Every tensor's name, sorted. ValueError once it is closed, when there are none."""
        if self._closed:
            raise ValueError(f"the tensors of {self.path} are closed")
        return sorted(self._file_of)

    def shape(self, name: str) -> torch.Size:
        """A tensor's shape, from the header alone."""
        return torch.Size(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's stored dtype as safetensors spells it, such as BF16."""
        return self._slice(name).get_dtype()

    def leave_out(self, name: str) -> None:
        """Ignore a tensor from now on."""
        del self._file_of[name]

    def tensor(self, name: str) -> Tensor:
        """A whole tensor in its stored dtype."""
        return self.rows(name, 0, None)

    def rows(self, name: str, start: int, stop: int | None) -> Tensor:
        """Rows [start, stop) of a tensor; nothing else is read."""
        return self._slice(name)[start:stop]

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise UserError(f"{self.path}: tensor {name} is missing; {self._fix}")
        return self._file_of[name].get_slice(name)

    def check(self, config: ModelConfig, with_memory: bool = True, embeds: bool = True) -> None:
        """Raise UserError naming the first tensor that is missing, surplus or of another shape.

        `with_memory=False`: FFN-M is optional; `embeds=False`: so is an embedding that is not the head's too.
        """
        for name, shape in expected_shapes(config, with_memory, embeds).items():
            if (actual := self.shape(name)) != shape:
                raise UserError(
                    f"{self.path}: tensor {name} has shape {list(actual)}, not {list(shape)} as in the config"
                )
        surplus = sorted(self._file_of.keys() - expected_shapes(config).keys())
        if surplus:
            raise UserError(f"{self.path}: tensor {surplus[0]} does not belong to a {config.kind} model")

    def fill(
        self, held: Iterable[Target], config: ModelConfig, with_memory: bool = True, embeds: bool = True
    ) -> None:
        """Copy tensors into pieces of a model, whatever their dtype and device.

        Raises UserError naming the first tensor that does not fit the model's config.
        """
        self.check(config, with_memory, embeds)
        for target in held:
            target.view.copy_(target.piece.cut(self.tensor(target.piece.name)))


def open_tensors(path: str | Path) -> FolderTensors:
    """Open an export's weights. UserError for a missing or damaged file."""
    path = Path(path)
    file_of: dict[str, Any] = {}
    for file in weight_files(path):
        opened = open_weights(file, AGAIN)
        file_of |= dict.fromkeys(opened.keys(), opened)
    return FolderTensors(path, file_of)


def open_weights(file: Path, fix: str) -> Any:
    """Open a safetensors file, memory-mapped. UserError with `fix` where it is damaged."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, MemoryError) as error:  # MemoryError: the file cannot be mapped
        reason = str(error).replace("\n", " ")
        raise UserError(f"{file} is damaged ({reason}); {fix}") from None


def weight_files(path: Path) -> list[Path]:
    """The files that hold an export's weights, by name. Raises UserError where some are missing."""
    if (path / ADAPTER).exists():
        raise UserError(f"{path / ADAPTER}: adapters are not supported; merge it, and save the whole model")
    if (path / SINGLE).is_file():  # before an index, as in transformers
        return [path / SINGLE]
    if not (path / INDEX).exists():
        raise UserError(f"{path} has no {SINGLE}{_other_weights(path)}")
    weight_map = read_json(path / INDEX, AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path / INDEX} has no weight_map; {AGAIN}")
    files = []
    for name in sorted(set(map(str, weight_map.values()))):
        if not listed(path, name, INDEX, _around(path)).is_file():
            raise UserError(f"{path / name} is listed in {INDEX}, but missing; {AGAIN}")
        files.append(path / name)
    return files


def _around(path: Path) -> Path | None:
    """Where links may lead: in Hugging Face's cache, from snapshots/REVISION to blobs/; None elsewhere."""
    return path.absolute().parents[1] if path.absolute().parent.name == "snapshots" else None


def verify_folder(path: str | Path, check: Check) -> Mapping[str, str]:
    """Compare an export's files with its manifest, if it has one; see hf.manifest.verify_export."""
    path = Path(path)
    if check == "none":
        return {}
    return hf_manifest.verify_export(path, check, [path / "config.json", *weight_files(path)], _around(path))


def _other_weights(path: Path) -> str:
    """What a folder without safetensors holds instead, and the fix."""
    pickles = sorted(path.glob("pytorch_model*.bin")) + sorted(path.glob("*.pth"))
    if not pickles:
        return "; give a folder written by `mlm-train export`, or a Hugging Face Llama's"
    return (
        f", only {pickles[0].name}: a pickle may run code and is never loaded; save the model again with "
        "save_pretrained(..., safe_serialization=True)"
    )


def fill_model(path: str | Path, model: Transformer) -> None:
    """Load an export's weights into a model; see FolderTensors.fill."""
    with open_tensors(path) as tensors:
        tensors.fill(targets(model), model.config, model.with_memory)


def fingerprint(path: str | Path, known: Mapping[str, str] | None = None) -> str:
    """SHA-256 over config.json and the weight files: identifies a model, independent of its folder's path.

    known: current digests of files by name; the other files are read.
    """
    path, known = Path(path), known or {}
    read_config(path)
    files = [path / "config.json", *weight_files(path)]
    digests = {**known, **hf_manifest.digests([file for file in files if file.name not in known])}
    lines = (f"{file.name} {digests[file.name]}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
