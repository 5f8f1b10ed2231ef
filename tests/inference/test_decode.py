"""Decoding with the cache equals the full forward; sampling and limits."""

from typing import Any

import pytest
import torch

from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.inference import decode
from mlm_train.inference.cache import KVCache
from mlm_train.inference.decode import Decoder
from mlm_train.memory import make_source
from mlm_train.model.logical import named_pieces
from mlm_train.model.source import MemorySource
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
    config = ModelConfig(intermediate_size=44, max_position_embeddings=40, **shapes, **fields)
    model = Transformer(config).requires_grad_(False).eval()
    for name, weight in named_pieces(model):
        weight.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    return model


def source_of(model: Transformer) -> MemorySource | None:
    return make_source("unique", model.memory_blocks()) if model.config.has_memory else None


@pytest.mark.parametrize("fields", KINDS)
@pytest.mark.parametrize("chunks", [[30], [7, 11, 1, 1, 10], [1] * 30])
def test_cache_equals_full_forward(fields: dict[str, Any], chunks: list[int]) -> None:
    model = random_model(**fields)
    ids = torch.randint(0, 97, (2, 30))
    full = model(ids, source_of(model))
    cache = KVCache(model.config, 30, batch=2)
    parts = []
    for chunk in ids.split(chunks, dim=1):
        parts.append(model(chunk, source_of(model), cache))
    assert cache.length == 30
    assert (torch.cat(parts, 1) - full).abs().max() <= 2e-6 * full.abs().max()
    with pytest.raises(ValueError, match="holds 30"):
        model(ids[:, :1], source_of(model), cache)


@pytest.mark.parametrize("fields", KINDS)
def test_greedy_is_the_full_forwards_argmax(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(**fields)
    ids = list(PROMPT)
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids]), source_of(model))[0, -1].argmax()))
    for chunk in (512, 3):
        monkeypatch.setattr(decode, "PREFILL_CHUNK", chunk)
        decoder = Decoder(model, source_of(model))
        assert list(decoder.generate(PROMPT, 12)) == ids[len(PROMPT) :]
    assert decoder.timing.prefill_ms > 0 and decoder.timing.decode_steps == 11
    new = ids[len(PROMPT) :]
    stopped = new.index(new[5])
    assert list(decoder.generate(PROMPT, 12, stop_ids=[96, new[5]])) == new[:stopped]


def test_what_fits_into_the_context_is_made() -> None:
    decoder = Decoder(random_model(kind="base"), None)
    whole = list(decoder.generate(PROMPT, 40 - len(PROMPT)))
    assert len(whole) == decoder.room(PROMPT) == 40 - len(PROMPT)
    for wanted in (40, 10**30):
        assert list(decoder.generate(PROMPT, wanted)) == whole
    nearly = [*PROMPT, *whole[:-1]]
    assert list(decoder.generate(nearly, 7)) == whole[-1:]


def test_drawing() -> None:
    decoder = Decoder(random_model(kind="base"), None)
    greedy = list(decoder.generate(PROMPT, 20))
    warm = [list(decoder.generate(PROMPT, 20, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    assert list(decoder.generate(PROMPT, 20, temperature=5.0, top_p=1e-6)) == greedy
    assert list(decoder.generate(PROMPT, 20, temperature=1e-30)) == greedy
    draw = decode._Sampler(1.0, 0.7, 0)
    logits = torch.tensor([0.5, 0.15, 0.3, 0.05]).log()
    drawn = torch.tensor([draw(logits) for _ in range(400)]).bincount(minlength=4) / 400
    assert drawn[1] == drawn[3] == 0 and abs(float(drawn[0]) - 0.625) < 0.1


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "no tokens"),
        ([97], {}, "prompt id 97"),
        ([-1], {}, "prompt id -1"),
        ((PROMPT * 40)[:40], {}, "max_position_embeddings=40"),
        (PROMPT, {"max_new_tokens": 0}, "at least 1"),
        (PROMPT, {"temperature": -1.0}, "temperature"),
        (PROMPT, {"temperature": float("nan")}, "temperature"),
        (PROMPT, {"top_p": 0.0}, "top-p"),
    ],
)
def test_bad_input(prompt: list[int], options: dict[str, Any], message: str) -> None:
    decoder = Decoder(random_model(kind="base"), None)
    with pytest.raises(UserError, match=message):
        decoder.generate(prompt, **{"max_new_tokens": 5, **options})
    assert len(list(decoder.generate(PROMPT, 33))) == 33
