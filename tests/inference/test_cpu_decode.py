"""Decoding in C++: as near to a float64 model as torch's bfloat16 is, and taken where it applies."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from mlm_train.inference import cpu_decode
from mlm_train.inference.cache import KVCache
from mlm_train.inference.cpu_decode import CpuDecode
from mlm_train.inference.decode import Decoder
from mlm_train.inference.generation import Generation
from mlm_train.inference.sampling import Sampling
from mlm_train.inference.trace import traced
from mlm_train.model.linear import Linear
from mlm_train.model.source import MemoryReader
from mlm_train.model.transformer import Transformer
from tests.inference.test_decode import complete, random_model, source_of

# Sizes that are no multiples of the C++'s blocks of 4 rows and 128 elements.
ODD = {"hidden_size": 150, "num_attention_heads": 3, "intermediate_size": 75, "num_hidden_layers": 2}
MODELS: list[dict[str, Any]] = [
    {"kind": "base"},
    {"kind": "base", "num_key_value_heads": 2, "tie_word_embeddings": True},
    {"kind": "base", **ODD},
    {"kind": "memory", "num_key_value_heads": 1, "memory_scale": [1.0, 0.5, 0.0]},
    {"kind": "memory", **ODD},
    {"kind": "flex", "flex_beta": 3, "num_key_value_heads": 2},
    {"kind": "flex", "flex_beta": 1, "memory_scale": 0.3, **ODD},
    {"kind": "flex", "flex_beta": 1, "compute_input": "post_attention"},
    {"kind": "flex", "flex_beta": 1, "compute_form": "linear", **ODD},
    {"kind": "flex", "flex_beta": 3, "compute_form": "linear", "compute_input": "post_attention"},
]
IDS = torch.randint(97, (1, 30), generator=torch.Generator().manual_seed(3))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def decoder_of(model: Transformer) -> Decoder:
    return Decoder(model, source_of(model))


def plain(decoder: Decoder) -> Decoder:
    """One that decodes with torch's operations."""
    other = copy.copy(decoder)
    other._cpu = None
    return other


def fed(decoder: Decoder, ids: Tensor, prompt: int) -> tuple[Tensor, KVCache]:
    """Logits [columns, vocabulary] after the first `prompt` columns and after each later one; the cache."""
    cache = KVCache(decoder.model.config, ids.shape[1] + 1, dtype=decoder.dtype)
    chunks = [ids[:, :prompt], *ids[:, prompt:].split(1, 1)]
    return torch.cat([decoder.next_logits(chunk, cache) for chunk in chunks]), cache


@pytest.mark.parametrize("fields", MODELS, ids=str)
def test_as_exact_as_torch(fields: dict[str, Any]) -> None:
    for prompt in (1, 9):  # the first of one token is decoded into an empty cache
        check(fields, IDS, prompt)


@pytest.mark.parametrize("count", [2, 5])  # and more than there are heads
def test_threads(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_decode, "GRAIN", 1)
    with threads(count):
        check(MODELS[-2], IDS[:, :12], 9)


def check(fields: dict[str, Any], ids: Tensor, prompt: int) -> None:
    model = random_model(**fields).bfloat16()
    exact, ours = decoder_of(copy.deepcopy(model).double()), decoder_of(model)
    assert ours._cpu is not None and exact._cpu is None
    wanted, wanted_cache = fed(exact, ids, prompt)
    error, cached = [], []
    for decoder in (ours, plain(ours)):
        logits, cache = fed(decoder, ids, prompt)
        error.append((logits - wanted).abs().mean())
        pairs = zip(cache.layers()[:2], wanted_cache.layers()[:2], strict=True)
        cached.append(sum((a - b)[..., : cache.length, :].abs().mean() for a, b in pairs))
    assert error[0] < 1.3 * error[1] < 0.1 * wanted.abs().mean()
    assert cached[0] < 1.3 * cached[1]


def test_where_it_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(kind="memory").bfloat16()
    decoder = decoder_of(model)
    assert decoder._cpu is not None
    taken: list[int] = []
    inner = decoder._cpu.logits

    def noted(x0: Tensor, read: Any, cache: KVCache) -> Tensor:
        taken.append(cache.length)
        return inner(x0, read, cache)

    monkeypatch.setattr(decoder._cpu, "logits", noted)
    sampling = Sampling(max_new_tokens=5)
    alone, other = [5, 80, 2, 61], [9, 33]
    complete(decoder, decoder.begin(alone, sampling))
    assert taken == [4, 5, 6, 7]  # the first new token is the prompt's, which is read at once
    taken.clear()
    complete(decoder, decoder.begin(alone, sampling), decoder.begin(other, sampling))
    assert not taken
    shorter = Sampling(max_new_tokens=2)
    complete(decoder, decoder.begin(alone, sampling), decoder.begin(other, shorter))
    assert len(taken) == 3  # the one that goes on alone
    taken.clear()
    with traced(model) as trace:  # its hooks are called
        complete(decoder, decoder.begin(alone, sampling))
    assert not taken
    assert sum(event["name"] == "layer 2" for event in trace._events) == 5
    complete(decoder, decoder.begin(alone, sampling))
    assert len(taken) == 4


class Rows:
    """A memory source of one tensor, for all layers."""

    def __init__(self, row: Tensor) -> None:
        self.row = row

    def open(self, ids: Tensor, x0: Any) -> MemoryReader:
        return lambda layer: self.row


def test_rows_of_any_layout() -> None:
    model = random_model(kind="memory").bfloat16()
    both = torch.randn(1, 1, 64)
    halves = both[..., ::2], both.bfloat16()[..., ::2]
    for row in (*halves, torch.ones(1, 1, 1).bfloat16().expand(1, 1, 32)):
        strided, whole = (Decoder(model, Rows(rows)) for rows in (row, row.bfloat16().contiguous()))
        assert strided._cpu is not None and not row.is_contiguous()
        assert torch.equal(fed(strided, IDS, 1)[0], fed(whole, IDS, 1)[0])
    for source in (Rows(torch.ones(1, 1, 5)), None):
        with pytest.raises((RuntimeError, AssertionError)):
            fed(Decoder(model, source), IDS, 1)


def test_torchs_defaults_have_no_effect() -> None:
    decoder = decoder_of(random_model(kind="flex", flex_beta=3).bfloat16())
    logits, cache = fed(decoder, IDS, 29)
    cache.crop(29)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)  # as while a library makes its models
        with torch.device("meta"):
            again = decoder.next_logits(IDS[:, 29:], cache)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(again[0], logits[-1])


def test_models_and_caches_that_it_does_not_know() -> None:
    model = random_model(kind="base").bfloat16()
    decoder = decoder_of(model)
    assert decoder._cpu is not None
    cache = KVCache(model.config, 4, dtype=torch.float32)
    assert not decoder._cpu.takes(IDS[:, :1], cache)

    class Doubled(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    changed = copy.deepcopy(model)
    changed.block(1).self_attn.o_proj.__class__ = Doubled
    assert decoder_of(changed)._cpu is None
    assert CpuDecode.of(model.part([1, 2], heads=True)) is None
    mixed = copy.deepcopy(model)
    mixed.block(1).float()
    assert CpuDecode.of(mixed) is None


def test_weights_are_kept() -> None:
    """Those whose addresses the C++ has, when a parameter gets other data."""
    decoder = decoder_of(random_model(kind="base").bfloat16())
    logits = fed(decoder, IDS, 1)[0]
    for weight in decoder.model.layers.parameters():
        weight.data = weight.data.clone()
    taken_over = [torch.full_like(weight, torch.nan) for weight in decoder.model.parameters()]
    assert torch.equal(fed(decoder, IDS, 1)[0], logits) and taken_over


def texts(decoder: Decoder, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
    batch: list[Generation] = [
        decoder.begin(prompt, Sampling(max_new_tokens=limit))
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    return [generation.ids for generation in complete(decoder, *batch)]


@pytest.mark.parametrize("limits", [[2, 20], [20, 2]])
def test_after_a_batch(limits: list[int]) -> None:
    """A row that goes on alone has columns of padding that others had, or had its own cut off."""
    decoder = decoder_of(random_model(kind="flex", flex_beta=1, num_key_value_heads=2).bfloat16())
    prompts = [[5, 80, 2, 61, 7, 7, 1], [9, 33]]
    assert texts(decoder, prompts, limits) == texts(plain(decoder), prompts, limits)


def test_after_a_crop() -> None:
    decoder = decoder_of(random_model(kind="base").bfloat16())
    logits, cache = fed(decoder, IDS, 9)
    cache.crop(12)
    again = [decoder.next_logits(column, cache) for column in IDS[:, 12:].split(1, 1)]
    assert torch.equal(torch.cat(again), logits[4:])


def test_numbers_that_are_none_and_large_ones() -> None:
    model = random_model(kind="base").bfloat16()
    decoder = decoder_of(model)
    model.block(1).mlp.gate_up_proj.weight.mul_(1e3)  # type: ignore[union-attr, operator]
    logits = fed(decoder, IDS, 1)[0]
    assert logits.isfinite().all()
    assert (logits - fed(plain(decoder), IDS, 1)[0]).abs().max() < 0.2 * logits.abs().max()
    model.block(0).mlp.down_proj.weight[3, 5] = torch.nan  # type: ignore[union-attr, index]
    assert fed(decoder, IDS, 1)[0].isnan().all()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlm_train.utils import native

    native.compiled_library.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    decoder = decoder_of(random_model(kind="base").bfloat16())
    assert decoder._cpu is None
    assert len(texts(decoder, [[5, 80]], [4])[0]) == 4
    native.compiled_library.cache_clear()
