"""Sampling: its parameters, and choosing tokens from logits."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mlm_train.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How one sequence goes on, and when it ends. Raises UserError for a value out of range.

    temperature: 0 takes the most likely token; top_k and top_p then have no effect.
    top_k: the number of most likely tokens to sample from; 0: all.
    top_p: sample from the fewest most likely tokens whose probabilities add up to this.
    repetition_penalty: divides the logits of tokens of the prompt and the new text, multiplies negative ones.
    seed: of this sequence alone, whatever else is in its batch.
    max_new_tokens: a full context ends earlier.
    stop: text that ends it and is no part of it, or several.
    stop_ids: ids that end it, beside the model's own; ignore_eos leaves those out.
    logprobs: how many of the most likely tokens to report with each new one; None: no log-probabilities.
    They are of the model's distribution, before any filter.

    Filters apply in the order of Hugging Face transformers: repetition penalty, temperature, top_k, top_p.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 64
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        rules = {
            "temperature": (0 <= self.temperature < math.inf, "0 (the most likely token) or more"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "more than 0; 1 has no effect"),
            "seed": (0 <= self.seed < 2**63, "0 to 2^63 - 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "stop": (all(stop), "texts that are not empty"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "0 or more"),
        }
        for name, (holds, fix) in rules.items():
            if not holds:
                raise UserError(f"{name} {getattr(self, name)!r}: give {fix}")


class Logprob(NamedTuple):
    """Natural logarithm of a new token's probability, and (id, logarithm) of the most likely tokens."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


class Choice(NamedTuple):
    """A chosen token; its Logprob where it was asked for."""

    id: int
    logprob: Logprob | None = None


class Sampler:
    """Chooses the tokens of one sequence after `prompt`, with a random generator of its own."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int], vocab_size: int) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._seen: Tensor | None = None  # bool [vocabulary]
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[list(prompt)] = True

    @property
    def takes_argmax(self) -> bool:
        """Whether the most likely token is all that is asked for."""
        return self.sampling.temperature == 0 and self._seen is None and self.sampling.logprobs is None

    def choose(self, logits: Tensor) -> Choice:
        """logits fp32 [vocabulary], on the CPU."""
        token = self._token(logits)
        if self._seen is not None:
            self._seen[token] = True
        if self.sampling.logprobs is None:
            return Choice(token)
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(min(self.sampling.logprobs, len(logprobs)))
        best = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return Choice(token, Logprob(token, float(logprobs[token]), best))

    def _token(self, logits: Tensor) -> int:
        scores = filtered(logits, self.sampling, self._seen)
        if self.sampling.temperature == 0:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """Choose a token for each row of logits [rows, vocabulary]."""
    if all(sampler.takes_argmax for sampler in samplers):
        return [Choice(token) for token in logits.max(-1).indices.tolist()]  # faster than argmax
    on_cpu = logits.float().cpu()
    return [sampler.choose(row) for sampler, row in zip(samplers, on_cpu, strict=True)]


def filtered(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """The scores to sample from, logits up to a constant; -inf for tokens that are filtered out.

    logits fp32 [vocabulary]; seen bool [vocabulary]: the tokens that the repetition penalty is for.
    """
    penalty = sampling.repetition_penalty
    if seen is not None:
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.temperature == 0:
        return logits
    # Subtract the maximum first, so that a tiny temperature does not overflow.
    scores = (logits - logits.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], -math.inf)
    if sampling.top_p < 1:
        probability, tokens = scores.softmax(-1).sort(descending=True, stable=True)
        beyond = probability.cumsum(-1) - probability >= sampling.top_p
        scores[tokens[beyond]] = -math.inf
    return scores
