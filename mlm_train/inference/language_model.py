"""The Python API: a model with its tokenizer, from text to text."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mlm_train.checkpoint.reading.edits import read_edits
from mlm_train.checkpoint.reading.logical_folder import ModelFolder, find_model, load_model
from mlm_train.data.tokenizer import Tokenizer, tokenizer_file
from mlm_train.errors import UserError
from mlm_train.inference.decode import Decoder, scales_of
from mlm_train.inference.generation import Generation
from mlm_train.inference.sampling import Logprob, Sampling
from mlm_train.inference.trace import traced
from mlm_train.memory import make_source
from mlm_train.model.source import MemorySource
from mlm_train.model.transformer import Transformer
from mlm_train.tol.serve.source import TolSource
from mlm_train.tol.serve.store import StoreOptions
from mlm_train.utils.checks import Check

Prompt = str | Sequence[int]
BATCH_SIZE = 16


@dataclass(frozen=True)
class Completion:
    """What came after a prompt.

    text: None where the model has no tokenizer. ids: the new tokens, without the end token; those of a stop
    string are among them. logprobs: one per id, where asked for. finish_reason: "stop" for an end token, a
    stop id or a stop string, "length" for max_new_tokens or a full context. prompt_tokens: their number.
    """

    text: str | None
    ids: list[int]
    logprobs: list[Logprob] | None
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int

    @classmethod
    def of(cls, generation: Generation) -> "Completion":
        """Of a generation that has ended."""
        assert generation.finish_reason is not None
        text = None if generation.text is None else generation.text.text
        return cls(
            text, generation.ids, generation.logprobs, generation.finish_reason, len(generation.prompt)
        )


class LanguageModel:
    """A model that continues texts; `load` makes it.

    decoder: the model and the source of FFN-M. add_bos: whether the begin-of-text token comes before texts
    (None: if the model was trained with it).
    """

    def __init__(
        self, folder: ModelFolder, decoder: Decoder, tokenizer: Tokenizer | None, add_bos: bool | None = None
    ) -> None:
        self.folder, self.decoder = folder, decoder
        self._tokenizer, self._add_bos = tokenizer, add_bos

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. UserError where there is none."""
        return self.folder.tokenizer() if self._tokenizer is None else self._tokenizer

    @cached_property
    def _bos(self) -> list[int]:
        bos_id = self.folder.id_before_text(self._add_bos, self.folder.home)
        return [] if bos_id is None else [bos_id]

    @cached_property
    def prefix_id(self) -> int:
        """The id before the first token of a text: begin of text where texts have it, else end of document.

        Raises UserError where the tokenizer has neither.
        """
        return self._bos[0] if self._bos else self.tokenizer.eod_id

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of a text, after the begin-of-text token where there is one; ids as they are."""
        return [*self._bos, *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else list(prompt)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after each of the ids: fp32 [sequence, vocabulary], on the model's device."""
        return self.decoder.logits(ids)

    def begin(self, prompt: Prompt, sampling: Sampling) -> Generation:
        """A generation for `complete`. Raises UserError for a prompt that cannot be continued."""
        tokenizer = self.tokenizer if sampling.stop else self._tokenizer
        return self.decoder.begin(self.encode(prompt), sampling, tokenizer)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        batch_size: int = BATCH_SIZE,
        seed: int | Sequence[int] = 0,
        **sampling: Any,
    ) -> list[Completion]:
        """Continue one prompt or several, texts or ids: one Completion each, in order.

        batch_size: prompts decoded together; each is continued as it would be alone. seed: one for all, or
        one per prompt. sampling: the other fields of Sampling. Raises UserError, as Sampling and
        Decoder.begin do, before anything is generated.
        """
        many: Sequence[Any] = prompts
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
            many = [prompts]
        seeds = [seed] * len(many) if isinstance(seed, int) else seed
        if len(seeds) != len(many):
            raise UserError(f"seed: {len(seeds)} of them for {len(many)} prompts; give one, or one for each")
        return list(
            self.complete(
                [
                    self.begin(prompt, Sampling(seed=its_own, **sampling))
                    for prompt, its_own in zip(many, seeds, strict=True)
                ],
                batch_size,
            )
        )

    def complete(
        self,
        generations: Sequence[Generation],
        batch_size: int,
        after_batch: Callable[[], object] = lambda: None,
    ) -> Iterator[Completion]:
        """Run generations in batches, in order. Raises UserError at once for a batch_size below 1.

        after_batch: called when a batch has ended.
        """
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: give at least 1")
        return self._complete(generations, batch_size, after_batch)

    def _complete(
        self, generations: Sequence[Generation], batch_size: int, after_batch: Callable[[], object]
    ) -> Iterator[Completion]:
        for start in range(0, len(generations), batch_size):
            batch, following = (
                generations[first : first + batch_size] for first in (start, start + batch_size)
            )
            for _ in self.decoder.run(batch, following):
                pass
            after_batch()
            yield from map(Completion.of, batch)

    def stream(self, prompt: Prompt, **sampling: Any) -> Iterator[str]:
        """Continue one prompt, piece by piece; `sampling`: the fields of Sampling.

        No piece has a part of a character or of a stop string. Raises UserError at once, as `generate` does.
        """
        tokenizer = self.tokenizer  # required here
        generation = self.decoder.begin(self.encode(prompt), Sampling(**sampling), tokenizer)
        return filter(None, self.pieces(generation))

    def pieces(self, generation: Generation) -> Iterator[str]:
        """Run a generation with text; yield what each step makes certain of it."""
        assert generation.text is not None
        return (generation.text.take() for _ in self.decoder.run([generation]))

    @contextmanager
    def trace(self, file: str | Path) -> Iterator[None]:
        """Write a Chrome trace of what is generated in the body: reads of a table, layers, their waits.

        Raises UserError where the file cannot be written.
        """
        with traced(self.decoder.model) as trace:
            yield
        trace.write(Path(file))


def load(
    model: str | Path,
    tol: str | Path | None = None,
    *,
    store: StoreOptions | None = None,
    patches: Sequence[str | Path] = (),
    edits: Sequence[str | Path] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    verify: Check | None = None,
    memory_scale: float | Sequence[float] | None = None,
    dropped_layers: Collection[int] = (),
    add_bos: bool | None = None,
    skip_tokenizer: bool = False,
) -> LanguageModel:
    """Load an export, a run's folder (its newest checkpoint), or one checkpoint.

    tol: a folder written by `tol build`; FFN-M is looked up there, and its weights are not loaded, nor is the
    embedding if the table has it. store: how it is served. patches: files of `tol patch`. edits: of `analyze
    edit`, where FFN-M is computed. dtype: of the
    weights and the KV cache, such as "bfloat16"; default float32. verify: how much of both folders is
    compared with their manifests, "full", "sizes" or "none"; default "full", and "sizes" for tol.
    memory_scale, dropped_layers: see Decoder. add_bos: see LanguageModel. skip_tokenizer: for
    prompts of ids, whose results then have no text. Raises UserError for folders that cannot be read, damage,
    and a tol of another model.
    """
    folder = find_model(model, verify or "full")
    scales_of(folder.config, memory_scale, dropped_layers)  # refuse before anything is loaded
    edited = read_edits(edits, folder, tol)
    target, weights = _device(device), _dtype(dtype)
    tokenizer = None if skip_tokenizer or tokenizer_file(folder.home) is None else folder.tokenizer()
    # The table first, so that a bad one fails before the weights are loaded.
    table = None
    if tol is not None:
        options = dataclasses.replace(store or StoreOptions(), verify=verify or "sizes")
        table = TolSource.of_model(tol, folder, options, target, patches)
    embeds = table is None or not table.has_embeddings
    loaded = load_model(folder, with_memory=table is None, dtype=weights, embeds=embeds).to(target)
    for edit in edited:
        edit.apply(loaded)
    source: MemorySource | None = table
    if table is None and folder.config.has_memory:
        source = make_source("unique", loaded.memory_blocks())
    return with_model(folder, loaded, source, tokenizer, add_bos, memory_scale, dropped_layers)


def with_model(
    folder: ModelFolder,
    model: Transformer,
    source: MemorySource | None,
    tokenizer: Tokenizer | None,
    add_bos: bool | None = None,
    memory_scale: float | Sequence[float] | None = None,
    dropped_layers: Collection[int] = (),
) -> LanguageModel:
    """The LanguageModel of a folder whose model is loaded; see `load`."""
    ends = {*folder.ends, *_eod_ids(tokenizer)}
    decoder = Decoder(model, source, memory_scale, dropped_layers, ends)
    return LanguageModel(folder, decoder, tokenizer, add_bos)


def _device(name: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"device {str(name)!r} cannot be used ({reason}); give cpu, or cuda") from None


def _dtype(name: torch.dtype | str | None) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else name or torch.float32
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"dtype {name!r}: give float32, bfloat16 or float16")
    return dtype


def _eod_ids(tokenizer: Tokenizer | None) -> Iterable[int]:
    """The end-of-document id; nothing where the tokenizer has none."""
    try:
        return [] if tokenizer is None else [tokenizer.eod_id]
    except UserError:
        return []
