"""Token-by-token generation of one sequence or of a batch, with any memory source."""

import itertools
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.inference.cache import KVCache
from mlm_train.inference.cpu_decode import CpuDecode
from mlm_train.inference.generation import Generation
from mlm_train.inference.sampling import Sampling, choose
from mlm_train.inference.text import Decodes
from mlm_train.model.source import EarlySource, MemorySource
from mlm_train.model.transformer import Transformer

PREFILL_CHUNK = 512  # columns of a forward


@dataclass
class Timing:
    """Wall time of one batch in milliseconds. The first new token of each sequence counts as prefill."""

    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    decode_steps: int = 0

    @property
    def decode_ms_per_token(self) -> float | None:
        """Mean over the steps after the first; None where there were none."""
        return self.decode_ms / self.decode_steps if self.decode_steps else None


class Decoder:
    """A model and the source of FFN-M: a ToL, or a source that computes it (None for a base model).

    memory_scale: alpha, the factor on FFN-M's output, instead of the model's: one number, or one per layer.
    dropped_layers: numbers of layers whose FFN-M adds nothing. ends: the ids that end a text. The given model
    stays as it is. Raises UserError where a base model is to be scaled, and for layers that it does not have.
    """

    def __init__(
        self,
        model: Transformer,
        source: MemorySource | None,
        memory_scale: float | Sequence[float] | None = None,
        dropped_layers: Collection[int] = (),
        ends: Collection[int] = (),
    ) -> None:
        scales = scales_of(model.config, memory_scale, dropped_layers)
        self.model = model if scales is None else model.scaled(scales)
        self.source, self.ends = source, ends
        self.timing = Timing()
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self._cpu = CpuDecode.of(self.model)
        self._early = source if isinstance(source, EarlySource) else None

    def begin(self, ids: Sequence[int], sampling: Sampling, tokenizer: Decodes | None = None) -> Generation:
        """A generation after the prompt `ids`, for `run`; with its text where there is a tokenizer.

        Raises UserError for an empty prompt, a prompt that fills the context, ids out of the vocabulary, and
        stop strings without a tokenizer.
        """
        config = self.model.config
        if not ids:
            raise UserError("the prompt has no tokens; give at least one")
        for token in ids:
            if not 0 <= token < config.vocab_size:
                raise UserError(
                    f"prompt id {token} is not in the vocabulary; ids are 0 to {config.vocab_size - 1}"
                )
        room = config.max_position_embeddings - len(ids)
        if room < 1:
            raise UserError(
                f"{len(ids)} prompt tokens leave no room in the model's "
                f"max_position_embeddings={config.max_position_embeddings}; shorten the prompt"
            )
        stop_ids = {*sampling.stop_ids, *(() if sampling.ignore_eos else self.ends)}
        limit = min(sampling.max_new_tokens, room)
        return Generation(list(ids), sampling, limit, config.vocab_size, stop_ids, tokenizer)

    def generate(self, ids: Sequence[int], **sampling: Any) -> Iterator[int]:
        """Generate tokens after `ids` one by one; `sampling`: the fields of Sampling.

        Raises UserError at once, as Sampling and `begin` do.
        """
        generation = self.begin(ids, Sampling(**sampling))
        steps = self.run([generation])
        return (generation.ids[-1] for count, _ in enumerate(steps, 1) if len(generation.ids) == count)

    def run(self, batch: Sequence[Generation], following: Sequence[Generation] = ()) -> Iterator[None]:
        """Extend a batch by a token each, again and again, until all have ended; yield after each step.

        Each gets the tokens that it would get alone (up to rounding). following: the next batch; an
        EarlySource is asked for the beginning of it once this one's prompts are read. `timing` is that of
        the latest call.
        """
        self.timing = Timing()
        start = time.perf_counter()
        rows = _longest_first(batch)
        longest, most = len(rows[0].prompt), max(row.limit for row in rows)
        padding = [longest - len(row.prompt) for row in rows]
        cache = KVCache(self.model.config, longest + most, padding, self.dtype, self.device)
        chunks = prefill_chunks(rows)
        self._request(chunks[0])  # before the second chunk's rows, which would delay it
        for chunk, next_chunk in itertools.pairwise(chunks):
            self._request(next_chunk)
            self._hidden(chunk, cache)
        self._extend(rows, self.next_logits(chunks[-1], cache))
        self.timing.prefill_ms = 1e3 * (time.perf_counter() - start)
        self._request(prefill_chunks(_longest_first(following))[0] if following else None)
        while True:
            going = [row for row, generation in enumerate(rows) if generation.finish_reason is None]
            yield
            if not going:
                return
            start = time.perf_counter()
            if len(going) < len(rows):
                rows = [rows[row] for row in going]
                cache.keep(going)
            self._extend(rows, self.next_logits(torch.tensor([[row.ids[-1]] for row in rows]), cache))
            self.timing.decode_ms += 1e3 * (time.perf_counter() - start)
            self.timing.decode_steps += 1

    def _extend(self, rows: Sequence[Generation], logits: Tensor) -> None:
        """Choose the next tokens by logits [rows, vocabulary]."""
        choices = choose(logits, [row.sampler for row in rows])
        for row, choice in zip(rows, choices, strict=True):
            row.add(choice)

    @torch.no_grad()
    def next_logits(self, ids: Tensor, cache: KVCache) -> Tensor:
        """ids int64 [rows, columns], after what is cached -> logits [rows, vocabulary] after them."""
        if self._cpu is not None and self._cpu.takes(ids, cache):
            return self._cpu.logits(*self.model.open(ids, self.source), cache)
        return self.model.head(self._hidden(ids, cache)[:, -1])

    @torch.no_grad()
    def _hidden(self, ids: Tensor, cache: KVCache) -> Tensor:
        """ids int64 [rows, columns], after what is cached -> the normed hidden state of all columns."""
        return self.model.hidden(ids.to(self.device), self.source, cache)

    def _request(self, ids: Tensor | None) -> None:
        if self._early is not None and ids is not None:
            self._early.request(ids)

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after each of the ids: fp32 [sequence, vocabulary], on the model's device."""
        return self.model(torch.tensor([list(ids)], device=self.device), self.source)[0].float()


def _longest_first(batch: Sequence[Generation]) -> list[Generation]:
    return sorted(batch, key=lambda generation: -len(generation.prompt))


def prefill_chunks(rows: Sequence[Generation]) -> list[Tensor]:
    """Prompts, the longest first, padded on the left, in chunks of columns: int64 [rows, columns].

    A row is in no chunk that is nothing but padding to it: the first chunks have fewer rows. Each is padded
    with its own first token, so that no memory is read that no prompt needs.
    """
    longest = len(rows[0].prompt)
    padding = [longest - len(row.prompt) for row in rows]
    ids = torch.tensor([row.prompt[:1] * pad + row.prompt for row, pad in zip(rows, padding, strict=True)])
    return [
        chunk[: sum(pad < min(start + PREFILL_CHUNK, longest) for pad in padding)]
        for start, chunk in zip(itertools.count(0, PREFILL_CHUNK), ids.split(PREFILL_CHUNK, 1), strict=False)
    ]


def scales_of(
    config: ModelConfig, memory_scale: float | Sequence[float] | None, dropped_layers: Collection[int]
) -> list[float] | None:
    """alpha per layer; None where nothing differs from the model's. Raises UserError, as Decoder says."""
    if memory_scale is None and not dropped_layers:
        return None
    layers = config.num_hidden_layers
    if not config.has_memory:
        name = "dropped_layers" if memory_scale is None else "memory_scale"
        raise UserError(f"{name}: a base model has no FFN-M; leave it out, or give a memory or flex model")
    for layer in dropped_layers:
        if not 0 <= layer < layers:
            raise UserError(f"dropped_layers {layer}: the model's layers are 0 to {layers - 1}")
    if memory_scale is None:
        scales = [config.alpha(layer) for layer in range(layers)]
    elif isinstance(memory_scale, int | float):
        scales = [float(memory_scale)] * layers
    else:
        scales = [float(scale) for scale in memory_scale]
    if len(scales) != layers or not all(abs(scale) < float("inf") for scale in scales):
        raise UserError(f"memory_scale {memory_scale}: give one finite number, or {layers}, one per layer")
    return [0.0 if layer in dropped_layers else scale for layer, scale in enumerate(scales)]
