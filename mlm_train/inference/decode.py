"""Token-by-token generation with any memory source."""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlm_train.errors import UserError
from mlm_train.inference.cache import KVCache
from mlm_train.model.source import MemorySource
from mlm_train.model.transformer import Transformer

PREFILL_CHUNK = 512


@dataclass
class Timing:
    """Wall time of one generation in milliseconds. The first new token counts as prefill."""

    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    decode_steps: int = 0

    @property
    def decode_ms_per_token(self) -> float | None:
        """Mean over the tokens after the first; None where there were none."""
        return self.decode_ms / self.decode_steps if self.decode_steps else None


class Decoder:
    """A model and the source of FFN-M: a ToL, or a source that computes it (None for a base model)."""

    def __init__(self, model: Transformer, source: MemorySource | None) -> None:
        self.model, self.source = model, source
        self.timing = Timing()

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Collection[int] = (),
    ) -> Iterator[int]:
        """Generate tokens after `ids` one by one, until one of `stop_ids` (not returned) or `max_new_tokens`.

        A full context ends them earlier. temperature 0 takes the most likely token; otherwise tokens are
        sampled with `seed` from the smallest set whose probability reaches top_p. `timing` is that of the
        latest call. Raises UserError immediately for an empty prompt, a prompt that fills the context, ids
        out of the vocabulary, and numbers out of range.
        """
        config = self.model.config
        if not ids:
            raise UserError("the prompt has no tokens; give at least one")
        for token in ids:
            if not 0 <= token < config.vocab_size:
                raise UserError(
                    f"prompt id {token} is not in the vocabulary; ids are 0 to {config.vocab_size - 1}"
                )
        if max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {max_new_tokens}: give at least 1")
        room = self.room(ids)
        if room < 1:
            raise UserError(
                f"{len(ids)} prompt tokens leave no room in the model's "
                f"max_position_embeddings={config.max_position_embeddings}; shorten the prompt"
            )
        if not 0 <= temperature < float("inf"):
            raise UserError(f"--temperature {temperature}: give 0 (greedy) or more")
        if not 0 < top_p <= 1:
            raise UserError(f"--top-p {top_p}: give more than 0 and at most 1")
        self.timing = Timing()
        sampler = _Sampler(temperature, top_p, seed)
        return self._steps(list(ids), min(max_new_tokens, room), sampler, frozenset(stop_ids))

    def room(self, ids: Sequence[int]) -> int:
        """Number of positions that the context has after `ids`."""
        return self.model.config.max_position_embeddings - len(ids)

    def _steps(
        self, ids: list[int], count: int, sampler: "_Sampler", stop_ids: frozenset[int]
    ) -> Iterator[int]:
        weight = next(self.model.parameters())
        cache = KVCache(self.model.config, len(ids) + count, 1, weight.dtype, weight.device)
        start = time.perf_counter()
        for chunk in torch.tensor([ids], device=weight.device).split(PREFILL_CHUNK, dim=1):
            hidden = self._forward(chunk, cache)
        token = sampler(self.model.head(hidden[0, -1]))
        self.timing.prefill_ms = 1e3 * (time.perf_counter() - start)
        for generated in range(1, count + 1):
            if token in stop_ids:
                return
            yield token
            if generated == count:
                return
            start = time.perf_counter()
            hidden = self._forward(torch.tensor([[token]], device=weight.device), cache)
            token = sampler(self.model.head(hidden[0, -1]))
            self.timing.decode_ms += 1e3 * (time.perf_counter() - start)
            self.timing.decode_steps += 1

    @torch.no_grad()
    def _forward(self, ids: Tensor, cache: KVCache) -> Tensor:
        return self.model.hidden(ids, self.source, cache)


class _Sampler:
    """Samples a token from logits [vocabulary]."""

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        logits = logits.detach().float().cpu()
        if self.temperature == 0:
            return int(logits.argmax())
        # Subtract the maximum first, so that a tiny temperature does not overflow.
        probability = ((logits - logits.max()) / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, tokens = probability.sort(descending=True, stable=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p
            probability[tokens[beyond]] = 0.0
        return int(torch.multinomial(probability, 1, generator=self.generator))
