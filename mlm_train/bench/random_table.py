"""A ToL of random rows, of any shape and encoding, for benchmarks that need its size and not its sense."""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mlm_train.config import ModelConfig
from mlm_train.tol.format.codec import encode
from mlm_train.tol.format.index import Partition, Provenance, TolIndex, summary
from mlm_train.tol.format.index_file import write_index
from mlm_train.tol.format.layout import Layout
from mlm_train.tol.format.partition import RowShape
from mlm_train.tol.format.schemes import PlainDtype, Scheme
from mlm_train.tol.storage.local import LocalFolder

PARTITION_ROWS = 8192
DRAWN_ROWS = 256  # they are repeated


def write_random_table(
    folder: Path, config: ModelConfig, scheme: Scheme, embedding: PlainDtype | None = None
) -> Path:
    """Write a table for models of `config` into a new folder.

    Every layer is stored by `scheme`; embedding: the type of x0, None to leave it out.
    """
    folder.mkdir(parents=True)
    layers, hidden = list(range(config.num_hidden_layers)), config.hidden_size
    layout = Layout(hidden_size=hidden, layers=layers, schemes=[scheme] * len(layers), embedding=embedding)
    rows = torch.zeros(DRAWN_ROWS, layout.shape.size, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    for start, stop in itertools.pairwise(layout.edges):
        encode(scheme, torch.randn(DRAWN_ROWS, hidden, generator=generator), rows[:, start:stop])
    if embedding is not None:
        x0 = torch.randn(DRAWN_ROWS, hidden, generator=generator)
        encode(Scheme(dtype=embedding), x0, rows[:, : layout.edges[0]])
    edges = [*range(0, config.vocab_size, PARTITION_ROWS), config.vocab_size]
    tree = {
        "vocab_size": config.vocab_size,
        "num_layers": len(layers),
        "hidden_size": hidden,
        "layers": layers,
        "partitions": [_write(folder, edge, layout.shape, rows) for edge in itertools.pairwise(edges)],
        "source": Provenance(checkpoint="", created="", tool_version=""),
    }
    if layout.plain:
        tree |= {"dtype": scheme.dtype}
    else:
        fields = {"encodings": layout.fields, "embedding": layout.embedding_field}
        tree |= summary(layout.fields) | fields
    write_index(LocalFolder(folder), TolIndex.model_validate(tree))
    return folder


def _write(folder: Path, rows: tuple[int, int], shape: RowShape, drawn: Tensor) -> Partition:
    count, digest, size = rows[1] - rows[0], hashlib.sha256(), 0
    path = folder / f"{rows[0]}.safetensors"
    with path.open("wb") as file:
        for block in itertools.chain([shape.header(count)], _blocks(drawn, count)):
            digest.update(block)
            size += file.write(block)
    return Partition(file=path.name, rows=rows, bytes=size, sha256=digest.hexdigest())


def _blocks(drawn: Tensor, count: int) -> Iterator[bytes]:
    """`count` rows, in blocks of those that were drawn."""
    for start in range(0, count, len(drawn)):
        yield drawn[: min(len(drawn), count - start)].numpy().tobytes()
