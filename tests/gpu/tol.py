"""Token-wise lookups and generation on the device, against the CPU."""

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from mlm_train.checkpoint.hf.folder import write_folder
from mlm_train.checkpoint.reading.logical_folder import open_model
from mlm_train.config import ModelConfig
from mlm_train.inference.decode import Decoder
from mlm_train.memory import make_source
from mlm_train.model.logical import named_pieces
from mlm_train.model.source import MemorySource
from mlm_train.model.transformer import Transformer
from mlm_train.tol.build.builder import Build
from mlm_train.tol.build.row_source import EMBEDDING, ComputedRows, ffn_m_weights
from mlm_train.tol.format.layout import TableSpec
from mlm_train.tol.format.schemes import PlainDtype
from mlm_train.tol.serve.disk import DiskStore
from mlm_train.tol.serve.parts import cut
from mlm_train.tol.serve.source import TolSource
from mlm_train.tol.serve.store import RowStore, StoreOptions
from tests.gpu.checks import BF16_FACTOR, Figures, within
from tests.parallel.reference import relative_error
from tests.partitions import random_table

FP32 = 1e-5  # relative error
PROMPT = [5, 80, 2, 2, 61, 9, 33]
NEW_TOKENS = 24


def random_model(device: str = "cpu", **fields: object) -> Transformer:
    """A model with all weights random, including norms; the same on every device."""
    shapes = {"vocab_size": 601, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    given = {"kind": "memory", "intermediate_size": 88, "num_key_value_heads": 2, **shapes, **fields}
    model = Transformer(ModelConfig.model_validate(given)).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(3)
    for name, weight in named_pieces(model):
        weight.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2, generator=generator)
    return model.to(device)


def rows(device: str) -> Figures:
    """FFN-M of embedding rows, as a build's worker computes it."""
    model = random_model()
    with tempfile.TemporaryDirectory() as name:
        write_folder(Path(name) / "model", model.config, named_pieces(model))
        found = {
            f"{on} {dtype}": _rows(Path(name) / "model", dtype, on)
            for dtype in ("float32", "bfloat16")
            for on in {"cpu", device}
        }
    x0 = model.double().embed(torch.arange(model.config.vocab_size))
    exact = {str(layer): block.ffn_m(x0) for layer, block in model.memory_blocks().items()}
    error = {name: relative_error(values, exact) for name, values in found.items()}
    figures: Figures = {"fp32": error[f"{device} float32"], "bf16": error[f"{device} bfloat16"]}
    figures["bf16-alone"] = error["cpu bfloat16"]
    return within(figures, {"fp32": FP32, "bf16": BF16_FACTOR * error["cpu bfloat16"]})


def _rows(folder: Path, dtype: PlainDtype, device: str) -> dict[str, Tensor]:
    """FFN-M of the whole vocabulary, by layer."""
    with open_model(folder) as opened:
        layers = range(opened.config.num_hidden_layers)
        weights = dict(zip(layers, ffn_m_weights(opened.tensors, opened.config, layers, dtype), strict=True))
        source = ComputedRows(opened, weights, dtype, device)
        count = opened.shape(EMBEDDING)[0]
        return {str(layer): values for layer, values in zip(layers, source.values(0, count), strict=True)}


def build(device: str) -> Figures:
    """A table from Ray's workers, and the tokens that are generated from it."""
    model = random_model()
    with tempfile.TemporaryDirectory() as name:
        exported, table = Path(name) / "model", Path(name) / "table"
        write_folder(exported, model.config, named_pieces(model))
        spec = TableSpec(dtype="float32")
        Build(exported, table, spec, compute="float32", partitions=3, device=device).run(workers=1)
        source = TolSource.open_folder(table, model.config, StoreOptions(verify="full"))
        ids = torch.arange(model.config.vocab_size)
        x0 = model.embed(ids)
        read = source.open(ids, x0)
        exact = {str(layer): block.ffn_m(x0) for layer, block in model.memory_blocks().items()}
        error = relative_error({layer: read(int(layer)) for layer in exact}, exact)
        assert _tokens(model.to(device), source) == _tokens(random_model()), "other tokens than computed"
    return within({"rows fp32": error}, {"fp32": FP32})


def serving(device: str) -> Figures:
    """Every tier's layers are those of the CPU, and none waits for the device.

    From disk a layer waits for its own part: the other parts are read once the first one's layers were had.
    """
    config = ModelConfig(  # rows of 64 KiB: two parts
        kind="memory", vocab_size=96, hidden_size=4096, num_hidden_layers=4, num_attention_heads=1,
        intermediate_size=8,
    )  # fmt: skip
    ids = torch.tensor([[*range(90), 3, 7]])
    with tempfile.TemporaryDirectory() as name:
        table = random_table(Path(name), 96, config.num_hidden_layers, config.hidden_size)
        expected = _layers(TolSource.open_folder(table, config), ids, torch.zeros(*ids.shape, 4096))
        figures: Figures = {}
        for tier in ("resident", "shared", "disk"):
            source = TolSource.open_folder(table, config, StoreOptions(tier), device)
            x0 = torch.zeros(*ids.shape, 4096, device=device)
            rest = threading.Event()
            with _held(source.store, rest) if tier == "disk" else contextlib.nullcontext():
                read = source.open(ids.to(device), x0)
                with _without_waiting(device):
                    found = [read(layer) for layer in (0, 1)]
                    rest.set()
                    found += [read(layer) for layer in range(2, config.num_hidden_layers)]
            pairs = zip(found, expected, strict=True)
            figures[tier] = max(float((ours.cpu() - theirs).abs().max()) for ours, theirs in pairs)
            source.store.close()
    return within(figures, dict.fromkeys(figures, 0.0))


def _layers(source: TolSource, ids: Tensor, x0: Tensor) -> list[Tensor]:
    read = source.open(ids, x0)
    return [read(layer) for layer in range(4)]


@contextlib.contextmanager
def _held(store: RowStore, rest: threading.Event) -> Iterator[None]:
    """Hold up the reads of all parts but the first one until `rest` is set."""
    assert isinstance(store, DiskStore)
    first, read = cut(90, store._size)[1], store._files.read

    def held(file: int, at: int, into: memoryview) -> None:
        if (at - store._offsets[file]) % store._size >= first:
            assert rest.wait(60), "a layer of the first part waited for another part"
        read(file, at, into)

    with patch.object(store._files, "read", held):
        yield


@contextlib.contextmanager
def _without_waiting(device: str) -> Iterator[None]:
    """Fail where the body waits for the device, if that can be told."""
    module = None if device == "cpu" else torch.get_device_module(device)
    if not hasattr(module, "set_sync_debug_mode"):
        yield
        return
    module.synchronize()
    module.set_sync_debug_mode("error")
    try:
        yield
    finally:
        module.set_sync_debug_mode("default")


def generation(device: str) -> Figures:
    """Tokens of the device are those of the CPU; so are the logits of a whole sequence, within rounding."""
    figures: Figures = {}
    for fields in ({"kind": "base"}, {"kind": "memory"}, {"kind": "flex", "flex_beta": 3}):
        logits = []
        for on in ("cpu", device):
            model = random_model(on, **fields)
            ids = torch.tensor([PROMPT * 3], device=on)
            with torch.no_grad():
                logits.append({"logits": model(ids, _computed(model)).cpu()})
        name = str(fields["kind"])
        figures[f"{name} fp32"] = relative_error(logits[1], logits[0])
        found, expected = (_tokens(random_model(on, **fields)) for on in (device, "cpu"))
        assert found == expected, f"{name}: other tokens than on the CPU"
    return within(figures, {"fp32": FP32})


def _tokens(model: Transformer, source: MemorySource | None = None) -> list[int]:
    """What a model generates; without a source, FFN-M is computed."""
    return list(Decoder(model, source or _computed(model)).generate(PROMPT, max_new_tokens=NEW_TOKENS))


def _computed(model: Transformer) -> MemorySource | None:
    return make_source("unique", model.memory_blocks()) if model.config.has_memory else None
