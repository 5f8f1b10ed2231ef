"""Decoding equals the full forward, alone and in batches; scales of FFN-M; limits."""

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.inference import decode
from mlm_train.inference.decode import Decoder, prefill_chunks
from mlm_train.inference.generation import Generation
from mlm_train.inference.sampling import Sampling
from mlm_train.memory import make_source
from mlm_train.model.logical import named_pieces
from mlm_train.model.source import EarlySource, MemoryReader, MemorySource
from mlm_train.model.transformer import Transformer

KINDS = [
    {"kind": "base"},
    {"kind": "base", "num_key_value_heads": 2},
    {"kind": "memory", "num_key_value_heads": 1},
    {"kind": "flex", "flex_beta": 3, "num_key_value_heads": 2},
    {"kind": "flex", "flex_beta": 1, "compute_form": "linear", "compute_input": "post_attention"},
]
PROMPT = [5, 80, 2, 2, 61, 9, 33]


def random_model(**fields: Any) -> Transformer:
    torch.manual_seed(11)
    shapes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = ModelConfig.model_validate(
        {"intermediate_size": 44, "max_position_embeddings": 40, **shapes, **fields}
    )
    model = Transformer(config).requires_grad_(False).eval()
    for name, weight in named_pieces(model):
        weight.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    return model


def source_of(model: Transformer) -> MemorySource | None:
    return make_source("unique", model.memory_blocks()) if model.config.has_memory else None


def complete(decoder: Decoder, *batch: Generation) -> list[Generation]:
    """Run a batch to its end."""
    for _ in decoder.run(batch):
        pass
    return list(batch)


@pytest.mark.parametrize("fields", KINDS)
def test_greedy_is_the_full_forwards_argmax(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(**fields)
    ids = list(PROMPT)
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids]), source_of(model))[0, -1].argmax()))
    for chunk in (512, 3):
        monkeypatch.setattr(decode, "PREFILL_CHUNK", chunk)
        decoder = Decoder(model, source_of(model))
        assert list(decoder.generate(PROMPT, max_new_tokens=12)) == ids[len(PROMPT) :]
    assert decoder.timing.prefill_ms > 0 and decoder.timing.decode_steps == 11
    new = ids[len(PROMPT) :]
    stopped = new.index(new[5])
    assert list(decoder.generate(PROMPT, max_new_tokens=12, stop_ids=[96, new[5]])) == new[:stopped]
    decoder = Decoder(model, source_of(model), ends=[new[5]])
    assert list(decoder.generate(PROMPT, max_new_tokens=12)) == new[:stopped]
    assert list(decoder.generate(PROMPT, max_new_tokens=12, ignore_eos=True)) == new
    logits = model(torch.tensor([ids]), source_of(model))[0]
    assert torch.equal(decoder.logits(ids), logits)


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, seed=7, logprobs=2),
    Sampling(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=2),
]


@pytest.mark.parametrize(("fields", "chunk"), [(KINDS[1], 5), (KINDS[3], 512), (KINDS[3], 5)])
def test_a_batch_gives_what_each_prompt_gives_alone(
    fields: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "PREFILL_CHUNK", chunk)
    model = random_model(**fields)
    decoder, draw = Decoder(model, source_of(model)), random.Random(1)
    prompts = [draw.choices(range(97), k=length) for length in (3, 17, 1, 9, 9, 12)]
    for sampling in SAMPLINGS:
        each = [dataclasses.replace(sampling, max_new_tokens=most) for most in (5, 9, 20, 1, 12, 30)]
        alone = [
            complete(decoder, decoder.begin(prompt, one))[0]
            for prompt, one in zip(prompts, each, strict=True)
        ]
        # End ids at different places, so that rows drop out of the batch in the middle too.
        ends = {alone[2].ids[3], alone[4].ids[-2]}
        mixed = [dataclasses.replace(one, stop_ids=ends) if i % 2 == 0 else one for i, one in enumerate(each)]
        for options in (each, mixed):
            pairs = list(zip(prompts, options, strict=True))
            batch = complete(decoder, *(decoder.begin(*pair) for pair in pairs))
            for (prompt, one), found in zip(pairs, batch, strict=True):
                expected = complete(decoder, decoder.begin(prompt, one))[0]
                assert (found.ids, found.finish_reason) == (expected.ids, expected.finish_reason)
                for ours, theirs in zip(found.logprobs or [], expected.logprobs or [], strict=True):
                    assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)


def test_chunks_leave_out_padding() -> None:
    decoder = Decoder(random_model(kind="base", max_position_embeddings=4096), None)
    rows = [decoder.begin([length % 97] * length, Sampling()) for length in (1300, 700, 5)]
    chunks = prefill_chunks(rows)
    assert [tuple(chunk.shape) for chunk in chunks] == [(1, 512), (2, 512), (3, 276)]
    assert chunks[1].unique().tolist() == sorted({1300 % 97, 700 % 97})


class Announced:
    """A source that notes what it is asked for, and which layers are read."""

    def __init__(self, source: MemorySource) -> None:
        self.source, self.calls = source, list[tuple[str, list[list[int]]]]()
        self.layers = set[int]()

    def request(self, ids: Tensor) -> None:
        """Note ids."""
        self.calls.append(("request", ids.tolist()))

    def open(self, ids: Tensor, x0: Any) -> MemoryReader:
        """Note ids, and open them."""
        self.calls.append(("open", ids.tolist()))
        read = self.source.open(ids, x0)

        def noted(layer: int) -> Tensor:
            self.layers.add(layer)
            return read(layer)

        return noted


def test_an_early_source_is_asked_for_the_next_chunk_and_the_next_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode, "PREFILL_CHUNK", 3)
    model = random_model(kind="memory")
    computed = source_of(model)
    assert computed is not None and not isinstance(computed, EarlySource)
    source = Announced(computed)
    decoder = Decoder(model, source)
    first, second = (decoder.begin(prompt, Sampling(max_new_tokens=2)) for prompt in (PROMPT, [1, 2, 3, 4]))
    for _ in decoder.run([first], [second]):
        pass
    assert source.calls == [
        ("request", [PROMPT[:3]]),
        ("request", [PROMPT[3:6]]), ("open", [PROMPT[:3]]),
        ("request", [PROMPT[6:]]), ("open", [PROMPT[3:6]]),
        ("open", [PROMPT[6:]]),
        ("request", [[1, 2, 3]]), ("open", [first.ids[:1]]),
    ]  # fmt: skip


def test_memory_scale_and_dropped_layers() -> None:
    """As a model with that config, and the given model stays as it is."""
    model = random_model(kind="flex", flex_beta=2, memory_scale=[1.0, 0.7, 1.0])
    before = model(torch.tensor([PROMPT]), source_of(model))
    cases: list[tuple[Any, list[int], list[float]]] = [
        (0.5, [], [0.5, 0.5, 0.5]),
        ([1, 2, -0.5], [], [1.0, 2.0, -0.5]),
        (None, [0, 2], [0.0, 0.7, 0.0]),
        (3.0, [1], [3.0, 0.0, 3.0]),
    ]
    for memory_scale, dropped, alphas in cases:
        decoder = Decoder(model, source_of(model), memory_scale, dropped)
        other = random_model(kind="flex", flex_beta=2, memory_scale=alphas)
        expected = other(torch.tensor([PROMPT]), source_of(other))[0]
        assert torch.equal(decoder.logits(PROMPT), expected)
        assert decoder.model.config.memory_scale == alphas
        greedy = list(Decoder(other, source_of(other)).generate(PROMPT, max_new_tokens=9))
        assert list(decoder.generate(PROMPT, max_new_tokens=9)) == greedy
        assert set(decoder.model.parameters()) == set(model.parameters())
    source = Announced(make_source("unique", model.memory_blocks()))
    Decoder(model, source, dropped_layers=[0, 2]).logits(PROMPT)
    assert source.layers == {1}
    assert torch.equal(model(torch.tensor([PROMPT]), source_of(model)), before)
    assert model.config.memory_scale == [1.0, 0.7, 1.0]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("base", {"memory_scale": 1.0}, "memory_scale: a base model has no FFN-M"),
        ("base", {"dropped_layers": [0]}, "dropped_layers: a base model has no FFN-M"),
        ("memory", {"dropped_layers": [0, 3]}, "dropped_layers 3: the model's layers are 0 to 2"),
        ("memory", {"memory_scale": [1.0, 1.0]}, "give one finite number, or 3"),
        ("memory", {"memory_scale": float("nan")}, "give one finite number, or 3"),
    ],
)
def test_bad_scales(kind: str, options: dict[str, Any], message: str) -> None:
    model = random_model(kind=kind)
    with pytest.raises(UserError, match=message):
        Decoder(model, source_of(model), **options)


def test_what_fits_into_the_context_is_made() -> None:
    decoder = Decoder(random_model(kind="base"), None)
    room = 40 - len(PROMPT)
    whole = list(decoder.generate(PROMPT, max_new_tokens=room))
    assert len(whole) == room
    for wanted in (40, 10**30):
        assert list(decoder.generate(PROMPT, max_new_tokens=wanted)) == whole
    nearly = [*PROMPT, *whole[:-1]]
    assert list(decoder.generate(nearly, max_new_tokens=7)) == whole[-1:]


def test_seeds_and_extreme_temperatures() -> None:
    decoder = Decoder(random_model(kind="base"), None)
    greedy = list(decoder.generate(PROMPT, max_new_tokens=20))
    warm = [list(decoder.generate(PROMPT, max_new_tokens=20, temperature=1.0, seed=s)) for s in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    assert list(decoder.generate(PROMPT, max_new_tokens=20, temperature=5.0, top_p=1e-6)) == greedy
    assert list(decoder.generate(PROMPT, max_new_tokens=20, temperature=1e-30)) == greedy


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "no tokens"),
        ([97], {}, "prompt id 97"),
        ([-1], {}, "prompt id -1"),
        ((PROMPT * 40)[:40], {}, "max_position_embeddings=40"),
        (PROMPT, {"max_new_tokens": 0}, "at least 1"),
        (PROMPT, {"stop": "a"}, "needs a tokenizer"),
    ],
)
def test_bad_input(prompt: list[int], options: dict[str, Any], message: str) -> None:
    decoder = Decoder(random_model(kind="base"), None)
    with pytest.raises(UserError, match=message):
        decoder.generate(prompt, **options)
    assert len(list(decoder.generate(PROMPT, max_new_tokens=33))) == 33
