"""Show what prepared data contain: counts, decoded samples, distinct ids per batch."""

import numpy as np
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mlm_train.data.prepared import PreparedData
from mlm_train.data.samples import Samples
from mlm_train.data.tokenizer import tokenizer_of
from mlm_train.errors import escaped
from mlm_train.utils.terminal import shown

BATCH_TOKENS = tuple(k * 1024 for k in (2, 16, 64, 256, 1024, 4096))
BATCHES_AVERAGED = 8


def inspect(data: PreparedData, sequence_length: int, samples: int, console: Console) -> None:
    """Print tables about `data` and the first `samples` samples of the training order."""
    manifest = data.manifest
    console.print(
        f"{escaped(str(data.path))}: {manifest.dtype} tokens, fingerprint {data.fingerprint[:16]}",
        style="bold",
        markup=False,
    )
    console.print(
        f"tokenizer {manifest.tokenizer.file} ({manifest.tokenizer.kind}), "
        f"{data.vocab_size:,} ids, end of document {data.eod_id}",
        markup=False,
    )
    if data.bos_id is not None:
        console.print(f"documents begin with {data.bos_id}")
    console.print(_counts(data, sequence_length))
    train = Samples(data.split("train"), sequence_length, seed=0)
    distinct = distinct_ids(train)
    if distinct:
        console.print(f"distinct ids in batches of {sequence_length}-token samples, in training order")
        console.print(_distinct_table(distinct))
    tokenizer = tokenizer_of(data.path)
    ids, _ = train.batch(0, min(samples, train.samples_per_epoch))
    for number, row in enumerate(ids.tolist()):
        console.print(
            Panel(
                Text(shown(tokenizer.decode(row), console.file)),
                title=f"train sample {number}",
                title_align="left",
            )
        )


def distinct_ids(samples: Samples) -> dict[int, float]:
    """Mean distinct ids / tokens in batches of each of BATCH_TOKENS tokens, in training order.

    This is the fraction of positions that FFN-M or a lookup must compute when repeats are shared.
    """
    ratios: dict[int, float] = {}
    for tokens in BATCH_TOKENS:
        count = tokens // samples.sequence_length
        if 0 < count <= samples.samples_per_epoch:
            batches = min(BATCHES_AVERAGED, samples.samples_per_epoch // count)
            distinct = [np.unique(samples.batch(i * count, count)[0]).size for i in range(batches)]
            ratios[tokens] = sum(distinct) / (batches * count * samples.sequence_length)
    return ratios


def _counts(data: PreparedData, sequence_length: int) -> Table:
    headings = ("split", "documents", "tokens", "samples", "text MB", "bytes / token", "tokens / document")
    table = Table(*headings, box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, split in data.manifest.splits.items():
        table.add_row(
            Text(escaped(name)),
            f"{split.documents:,}",
            f"{split.tokens:,}",
            f"{(split.tokens - 1) // sequence_length:,}",
            f"{split.text_bytes / 1e6:,.1f}",
            f"{split.text_bytes / split.tokens:.2f}",
            f"{split.tokens / split.documents:,.0f}",
        )
    return table


def _distinct_table(distinct: dict[int, float]) -> Table:
    table = Table("tokens per batch", "distinct ids", "distinct / tokens", box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.justify = "right"
    for tokens, ratio in distinct.items():
        table.add_row(f"{tokens:,}", f"{ratio * tokens:,.0f}", f"{ratio:.2%}")
    return table
