"""Log-likelihood of raw text: each document on its own, in rolling windows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from mlm_train.data.documents import TextSource, find_sources
from mlm_train.data.tokenizer import Tokenizer
from mlm_train.errors import UserError
from mlm_train.evaluate.likelihood import Request, likelihoods, rolling_windows
from mlm_train.evaluate.score import Score, bytes_in, words_in
from mlm_train.model.source import MemorySource
from mlm_train.model.transformer import Transformer

BATCHES = 64  # sorted by length at a time


@dataclass(frozen=True)
class TextScorer:
    """Scores documents with a model and a source of FFN-M.

    prefix: the id before a document's first token. length: most ids that the model reads at once. stride: see
    rolling_windows. batch_size: windows per forward pass.
    """

    model: Transformer
    source: MemorySource | None
    tokenizer: Tokenizer
    prefix: int
    length: int
    stride: int
    batch_size: int

    def score(
        self,
        sources: Mapping[str, Sequence[TextSource]],
        after_batch: Callable[[], object] = lambda: None,
    ) -> dict[str, Score]:
        """A score for each name. UserError for a document that cannot be read, and where none has text."""
        scores = dict.fromkeys(sources, Score())
        waiting: list[tuple[str, Request]] = []

        def flush() -> None:
            found = likelihoods(
                self.model, self.source, [window for _, window in waiting], self.batch_size, after_batch
            )
            for (name, window), one in zip(waiting, found, strict=True):
                scores[name] += Score(one.logprob, len(window.labels))
            waiting.clear()

        for name, text in _documents(sources):
            tokens = [
                token for chunk in self.tokenizer.chunks(text) for token in self.tokenizer.encode(chunk)
            ]
            if not tokens:
                continue
            scores[name] += Score(words=words_in(text), bytes=bytes_in(text))
            for window in rolling_windows(tokens, self.prefix, self.length, self.stride):
                waiting.append((name, window))
                if len(waiting) == BATCHES * self.batch_size:
                    flush()
        flush()
        for name, score in scores.items():
            if not score.tokens:
                raise UserError(f"--text {name} has no text: give documents that are not empty")
        return scores


def text_sources(inputs: Sequence[str], split: str, text_key: str) -> dict[str, list[TextSource]]:
    """The files of each input; of a folder with its own train and validation file that of `split` alone.

    Raises UserError for an input that cannot be found, has no text, or is given twice.
    """
    if twice := [name for name in inputs if inputs.count(name) > 1]:
        raise UserError(f"--text {twice[0]} is given twice: give it once")
    return {
        name: [source for source in find_sources([name], text_key).sources if source.split in (None, split)]
        for name in inputs
    }


def _documents(sources: Mapping[str, Sequence[TextSource]]) -> Iterator[tuple[str, str]]:
    """Names and documents, with a progress bar in bytes on a terminal."""
    files = [(name, source) for name, each in sources.items() for source in each]
    sizes = [source.size for _, source in files]
    size = None if None in sizes else sum(size or 0 for size in sizes)
    with _bar(size) as advance:
        for name, source in files:
            for document in source.read():
                yield name, document.text
                advance(document.size)


@contextmanager
def _bar(size: int | None) -> Iterator[Callable[[float], None]]:
    columns = (TextColumn("evaluate"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("evaluate", total=size)
        yield lambda done: bar.advance(task, done)
