"""Filters equal transformers'; seeds, log-probabilities and limits."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mlm_train.errors import UserError
from mlm_train.inference.sampling import Sampler, Sampling, choose, filtered

PROMPT = [3, 3, 17, 200]


def theirs(sampling: Sampling) -> LogitsProcessorList:
    """transformers' processors, in the order of its `generate`."""
    made: list[Any] = [RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    if sampling.temperature:
        made.append(TemperatureLogitsWarper(sampling.temperature))
        made += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        made += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return LogitsProcessorList(made)


def random_logits(seed: int) -> Tensor:
    return 4 * torch.randn(251, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.7, 0.8])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (7, 1.0), (0, 0.9), (40, 0.6), (999, 1e-6)])
def test_filters_equal_those_of_transformers(
    repetition_penalty: float, temperature: float, top_k: int, top_p: float
) -> None:
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    seen = torch.zeros(251, dtype=torch.bool)
    seen[PROMPT] = True
    for seed in range(5):
        logits = random_logits(seed)
        expected = theirs(sampling)(torch.tensor([PROMPT]), logits[None].clone())[0]
        found = filtered(logits, sampling, seen if repetition_penalty != 1 else None)
        assert torch.equal(found.isinf(), expected.isinf())
        assert (found.softmax(-1) - expected.softmax(-1)).abs().max() < 1e-6
        if temperature == 0:
            assert choose(logits[None], [Sampler(sampling, PROMPT, 251)])[0].id == int(expected.argmax())


def test_top_k_keeps_equal_tokens_as_transformers_does() -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert filtered(logits, Sampling(1.0, top_k=2)).isinf().tolist() == [False, False, False, True]


def test_the_penalty_is_for_new_tokens_too() -> None:
    sampler = Sampler(Sampling(repetition_penalty=10.0), [0], 3)
    logits = torch.tensor([[5.0, 4.0, 3.0]])
    assert [choose(logits, [sampler])[0].id for _ in range(3)] == [1, 2, 0]


def test_drawing_follows_the_probabilities() -> None:
    sampler = Sampler(Sampling(1.0, top_p=0.7), [], 4)
    logits = torch.tensor([[0.5, 0.15, 0.3, 0.05]]).log()
    drawn = torch.tensor([choose(logits, [sampler])[0].id for _ in range(400)]).bincount(minlength=4) / 400
    assert drawn[1] == drawn[3] == 0 and abs(float(drawn[0]) - 0.625) < 0.1


def test_a_seed_is_of_its_sequence_alone() -> None:
    def draw(*seeds: int) -> list[list[int]]:
        samplers = [Sampler(Sampling(1.0, seed=seed), [], 251) for seed in seeds]
        steps = [choose(random_logits(step).expand(len(seeds), -1), samplers) for step in range(20)]
        return [[choice.id for choice in row] for row in zip(*steps, strict=True)]

    alone = [draw(seed)[0] for seed in (1, 2)]
    assert draw(2, 1, 1) == [alone[1], alone[0], alone[0]] and alone[0] != alone[1]


def test_logprobs_are_of_the_raw_logits() -> None:
    sampling = Sampling(0.3, top_k=5, repetition_penalty=2.0, logprobs=3)
    logits = random_logits(0)
    choice = choose(logits[None].bfloat16(), [Sampler(sampling, PROMPT, 251)])[0]
    exact = logits.bfloat16().float().log_softmax(-1)
    assert choice.logprob is not None and choice.logprob.id == choice.id
    assert choice.logprob.logprob == pytest.approx(float(exact[choice.id]))
    best = exact.sort(descending=True)
    assert [token for token, _ in choice.logprob.top] == best.indices[:3].tolist()
    assert [value for _, value in choice.logprob.top] == pytest.approx(best.values[:3].tolist())
    for count, length in ((0, 0), (1000, 251)):
        sampler = Sampler(dataclasses.replace(sampling, logprobs=count), PROMPT, 251)
        logprob = choose(logits[None], [sampler])[0].logprob
        assert logprob is not None and len(logprob.top) == length


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("seed", -1),
        ("seed", 2**63),
        ("max_new_tokens", 0),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("logprobs", -1),
    ],
)
def test_bad_values(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{name} .*give"):
        Sampling(**{name: value})
    assert Sampling(stop="a").stop == ("a",)
