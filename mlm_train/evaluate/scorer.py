"""A model and windows of text, opened once, to be scored with several memory sources."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mlm_train.checkpoint.hf_folder import load_model, read_config
from mlm_train.data.prepared import PreparedData
from mlm_train.data.samples import Samples
from mlm_train.errors import UserError
from mlm_train.evaluate.perplexity import Perplexity, measure_perplexity
from mlm_train.model.source import MemorySource


class Scorer:
    """The first `count` windows of a split (all where None), `length` tokens each, the model's longest by
    default; the model's FFN-M is left out unless `with_memory`.

    Raises UserError for data of another tokenizer, or with more ids than the model knows.
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
    ) -> None:
        from mlm_train.evaluate.command import check_tokenizer

        folder, prepared = Path(model), PreparedData.open(data)
        self.config = read_config(folder)
        check_tokenizer(folder, prepared)
        if prepared.vocab_size > self.config.vocab_size:
            raise UserError(
                f"{data} has {prepared.vocab_size} ids and {model} knows {self.config.vocab_size}: "
                "prepare the data with the model's tokenizer"
            )
        self.samples = Samples(prepared.split(split), length or self.config.max_position_embeddings, None)
        whole = self.samples.samples_per_epoch
        self.count, self.micro_batch = whole if count is None else min(count, whole), micro_batch
        self.model = load_model(folder, with_memory=with_memory)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids, labels) of the windows."""
        for start in range(0, self.count, self.micro_batch):
            yield self.samples.batch(start, min(self.micro_batch, self.count - start))

    @torch.inference_mode()
    def score(self, source: MemorySource | None) -> Perplexity:
        """Perplexity with FFN-M from that source."""
        return measure_perplexity(self.model, source, self.batches())
