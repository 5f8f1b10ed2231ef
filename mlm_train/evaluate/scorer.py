"""A model and prepared data, opened once and scored with one or several memory sources."""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mlm_train.checkpoint.reading.logical_folder import ModelFolder, open_model
from mlm_train.config import ModelConfig
from mlm_train.data.prepared import PreparedData
from mlm_train.data.samples import Samples
from mlm_train.data.tokenizer import tokenizer_file
from mlm_train.errors import UserError
from mlm_train.evaluate.perplexity import Perplexity, measure_perplexity
from mlm_train.memory import make_source
from mlm_train.model.source import MemorySource
from mlm_train.model.transformer import Transformer
from mlm_train.utils.checks import Check
from mlm_train.utils.files import sha256_of


class Windows:
    """The first `count` windows of a split (None: all), `length` tokens each. UserError for numbers below 1.

    bos_id: put before each window, whose own tokens are then the labels; None: labels are the next tokens.
    """

    def __init__(
        self,
        data: PreparedData,
        split: str,
        length: int,
        count: int | None,
        micro_batch: int,
        bos_id: int | None = None,
    ) -> None:
        for name, value in (
            ("sequence-length", length),
            ("samples", count),
            ("micro-batch-size", micro_batch),
        ):
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: give at least 1")
        self.samples, self.micro_batch = Samples(data.split(split), length, None), micro_batch
        self._bos_id = bos_id
        available = self.samples.samples_per_epoch
        self.count = available if count is None else min(count, available)

    def batches(self, show: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids, labels), int64 [micro_batch, length]; with `show`, a progress bar on a terminal."""
        starts = range(0, self.count, self.micro_batch)
        hidden = not (show and sys.stderr.isatty())
        for start in track(starts, "evaluate", console=Console(stderr=True), disable=hidden, transient=True):
            tokens = self.tokens(range(start, min(start + self.micro_batch, self.count)))
            yield tokens[:, :-1], tokens[:, 1:]

    def tokens(self, numbers: Sequence[int]) -> Tensor:
        """Windows with their labels, int64 [len(numbers), length + 1]."""
        windows = torch.from_numpy(self.samples.windows(numbers))
        if self._bos_id is None:
            return windows
        return torch.cat([torch.full_like(windows[:, :1], self._bos_id), windows[:, :-1]], dim=1)


class Scorer:
    """A model (an export, a run's newest checkpoint, or a checkpoint) and windows of text.

    length: tokens per window, by default the model's maximum. count: number of windows, by default all.
    with_memory: load FFN-M, so that it can be computed. embeds=False: without the embedding, for a table
    that has it. verify: how much of model and data is compared with
    their manifests (default: full for the model, sizes for the data). add_bos: see
    ModelFolder.id_before_text; not for data prepared with --add-bos. Raises UserError for invalid numbers,
    and for data with another tokenizer or with more ids than the model has.
    """

    def __init__(
        self,
        model: str | Path,
        data: str | Path,
        split: str = "validation",
        length: int | None = None,
        count: int | None = None,
        micro_batch: int = 8,
        with_memory: bool = False,
        verify: Check | None = None,
        add_bos: bool | None = None,
        embeds: bool = True,
    ) -> None:
        self.data = PreparedData.open(data, verify or "sizes")
        self._opened = open_model(model, verify=verify or "full", with_memory=with_memory, embeds=embeds)
        self._with_memory, self._embeds = with_memory, embeds
        self.config: ModelConfig = self._opened.config
        _check_tokenizer(self._opened.home, self.data)
        if self.data.vocab_size > self.config.vocab_size:
            raise UserError(
                f"{data} has {self.data.vocab_size} ids, but {model} has {self.config.vocab_size}: "
                "prepare the data with the model's tokenizer"
            )
        longest = self.config.max_position_embeddings
        if length is not None and length > longest:
            raise UserError(
                f"--sequence-length {length} is longer than the model's max_position_embeddings={longest}"
            )
        self._length, self._micro_batch = longest if length is None else length, micro_batch
        self._bos_id = _id_before_windows(self._opened, self.data, add_bos)
        if self._bos_id is not None and self._bos_id >= self.config.vocab_size:
            raise UserError(
                f"{model}: its texts begin with id {self._bos_id}, which is not in its vocabulary"
            )
        self.windows = self.windows_of(split, count)

    def windows_of(self, split: str, count: int | None = None) -> Windows:
        """Windows of another split or count than those of `score`."""
        return Windows(self.data, split, self._length, count, self._micro_batch, self._bos_id)

    @property
    def folder(self) -> ModelFolder:
        """Where the model is."""
        return self._opened

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint; see OpenedModel.fingerprint."""
        return self._opened.fingerprint

    @cached_property
    def model(self) -> Transformer:
        """The model, loaded on first use: what runs before may need the memory."""
        with self._opened:
            return self._opened.load(self._with_memory, embeds=self._embeds)

    @property
    def computed(self) -> MemorySource | None:
        """FFN-M computed with the model's own weights; None for a base model."""
        return make_source("unique", self.model.memory_blocks()) if self.config.has_memory else None

    @torch.inference_mode()
    def score(
        self, source: MemorySource | None, after_batch: Callable[[], object] = lambda: None
    ) -> Perplexity:
        """Perplexity with FFN-M from `source`; after_batch: called after each micro-batch."""
        return measure_perplexity(self.model, source, self.windows.batches(show=True), after_batch)


def _id_before_windows(model: ModelFolder, data: PreparedData, add_bos: bool | None) -> int | None:
    """The id to put before each window; None: none."""
    if data.bos_id is not None:
        if add_bos:
            raise UserError(f"--add-bos: {data.path} was already prepared with it; leave it out")
        return None
    return model.id_before_text(add_bos, data.path)


def _check_tokenizer(home: Path, data: PreparedData) -> None:
    """Raise UserError for data from another tokenizer than the model's own."""
    file, used = tokenizer_file(home), data.manifest.tokenizer
    if file is not None and (file.name != used.file or sha256_of(file) != used.sha256):
        raise UserError(
            f"{file} is not the tokenizer of {data.path} (hashes differ): "
            "prepare the data with the model's tokenizer"
        )
