"""A model and prepared data, opened once and scored with one or several memory sources."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch

from mlm_train.checkpoint.reading.logical_folder import ModelFolder, open_model
from mlm_train.config import ModelConfig
from mlm_train.data.prepared import PreparedData
from mlm_train.data.tokenizer import tokenizer_file
from mlm_train.errors import UserError
from mlm_train.evaluate.perplexity import Perplexity, measure_perplexity
from mlm_train.evaluate.windows import Windows
from mlm_train.memory import make_source
from mlm_train.model.source import MemorySource
from mlm_train.model.transformer import Transformer
from mlm_train.utils.checks import Check
from mlm_train.utils.files import sha256_of


def window_length(config: ModelConfig, asked: int | None) -> int:
    """Tokens per window: those of --sequence-length, or the model's maximum. UserError for more than that."""
    longest = config.max_position_embeddings
    if asked is not None and asked > longest:
        raise UserError(
            f"--sequence-length {asked} is longer than the model's max_position_embeddings={longest}"
        )
    return longest if asked is None else asked


class Scorer:
    """A model (an export, a run's newest checkpoint, or a checkpoint) and windows of text.

    length: tokens per window, by default the model's maximum. count: number of windows, by default all.
    with_memory: load FFN-M, so that it can be computed. embeds=False: without the embedding, for a table
    that has it. verify: how much of model and data is compared with
    their manifests (default: full for the model, sizes for the data). add_bos: see
    ModelFolder.id_before_text; not for data prepared with --add-bos. scales: alpha per layer instead of the
    model's. Raises UserError for invalid numbers, and for data with another tokenizer or with more ids than
    the model has.
    """

    def __init__(
        self,
        model: str | Path | ModelFolder,
        data: str | Path | PreparedData,
        split: str = "validation",
        length: int | None = None,
        count: int | None = None,
        micro_batch: int = 8,
        with_memory: bool = False,
        verify: Check | None = None,
        add_bos: bool | None = None,
        embeds: bool = True,
        scales: Sequence[float] | None = None,
    ) -> None:
        self.data = data if isinstance(data, PreparedData) else PreparedData.open(data, verify or "sizes")
        self._opened = open_model(model, verify=verify or "full", with_memory=with_memory, embeds=embeds)
        self._with_memory, self._embeds, self._scales = with_memory, embeds, scales
        self.config: ModelConfig = self._opened.config
        self._length, self._micro_batch = window_length(self.config, length), micro_batch
        self._add_bos = add_bos
        self.windows = self.windows_of(split, count)

    def windows_of(
        self, split: str, count: int | None = None, data: PreparedData | None = None, spread: bool = False
    ) -> Windows:
        """Windows of another split, count or folder than those of `score`; spread: see Windows.

        Raises UserError for data that are not the model's, as for the first ones.
        """
        data = self.data if data is None else data
        _check_tokenizer(self._opened.home, data)
        if data.vocab_size > self.config.vocab_size:
            raise UserError(
                f"{data.path} has {data.vocab_size} ids, but {self._opened.path} has "
                f"{self.config.vocab_size}: prepare the data with the model's tokenizer"
            )
        bos_id = _id_before_windows(self._opened, data, self._add_bos)
        if bos_id is not None and bos_id >= self.config.vocab_size:
            raise UserError(
                f"{self._opened.path}: its texts begin with id {bos_id}, which is not in its vocabulary"
            )
        return Windows(data, split, self._length, count, self._micro_batch, bos_id, spread)

    @property
    def folder(self) -> ModelFolder:
        """Where the model is."""
        return self._opened

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint; see OpenedModel.fingerprint. Before `model` is read, which closes it."""
        return self._opened.fingerprint

    @cached_property
    def model(self) -> Transformer:
        """The model, loaded on first use: what runs before may need the memory."""
        with self._opened:
            model = self._opened.load(self._with_memory, embeds=self._embeds)
        return model if self._scales is None else model.scaled(self._scales)

    @property
    def computed(self) -> MemorySource | None:
        """FFN-M computed with the model's own weights; None for a base model."""
        return make_source("unique", self.model.memory_blocks()) if self.config.has_memory else None

    @torch.inference_mode()
    def score(
        self,
        source: MemorySource | None,
        after_batch: Callable[[], object] = lambda: None,
        windows: Windows | None = None,
    ) -> Perplexity:
        """Perplexity with FFN-M from `source`, of other windows where given.

        after_batch: called after each micro-batch.
        """
        windows = self.windows if windows is None else windows
        return measure_perplexity(self.model, source, windows.batches(show=True), after_batch)


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
