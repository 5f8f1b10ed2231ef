"""Windows of prepared data, as batches for a model and as the text that they are of."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mlm_train.data.prepared import PreparedData
from mlm_train.data.samples import Samples
from mlm_train.data.tokenizer import Tokenizer
from mlm_train.errors import UserError
from mlm_train.evaluate.score import bytes_in, words_in
from mlm_train.utils.progress import tracked


class Windows:
    """`count` windows of a split (None: all), `length` tokens each. UserError for numbers below 1.

    bos_id: put before each window, whose own tokens are then the labels; None: labels are the next tokens.
    spread: the windows are spread evenly over the split, as a run's validation samples are; else the first.
    """

    def __init__(
        self,
        data: PreparedData,
        split: str,
        length: int,
        count: int | None,
        micro_batch: int,
        bos_id: int | None = None,
        spread: bool = False,
    ) -> None:
        for name, value in (
            ("sequence-length", length),
            ("samples", count),
            ("micro-batch-size", micro_batch),
        ):
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: give at least 1")
        self.samples, self.micro_batch = Samples(data.split(split), length, None), micro_batch
        self._data, self._bos_id, self._spread = data, bos_id, spread
        available = self.samples.samples_per_epoch
        self.count = available if count is None else min(count, available)

    def batches(self, show: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids, labels), int64 [micro_batch, length]; with `show`, a progress bar on a terminal."""
        starts = range(0, self.count, self.micro_batch)
        for start in tracked(starts, "evaluate", show):
            tokens = self.tokens(range(start, min(start + self.micro_batch, self.count)))
            yield tokens[:, :-1], tokens[:, 1:]

    def tokens(self, numbers: Sequence[int]) -> Tensor:
        """Windows with their labels, int64 [len(numbers), length + 1]."""
        places = list(numbers)
        if self._spread:
            places = [number * self.samples.samples_per_epoch // self.count for number in numbers]
        windows = torch.from_numpy(self.samples.windows(places))
        if self._bos_id is None:
            return windows
        return torch.cat([torch.full_like(windows[:, :1], self._bos_id), windows[:, :-1]], dim=1)

    def text_size(self, tokenizer: Tokenizer) -> tuple[int, int]:
        """Words and bytes of the labels, decoded document by document.

        Of a document that the windows hold in part, that part. Windows beside each other are one text, those
        that are spread are each their own. Tokens that begin or end documents have no text.
        """
        words = size = 0
        marks = {self._data.eod_id, self._data.bos_id}
        piece: list[int] = []

        def end() -> None:
            nonlocal words, size
            text = tokenizer.decode(piece) if piece else ""
            words, size = words + words_in(text), size + bytes_in(text)
            piece.clear()

        for _, labels in self.batches():
            for row in labels.tolist():
                for token in row:
                    if token in marks:
                        end()
                    else:
                        piece.append(token)
                if self._spread:
                    end()
        end()
        return words, size
