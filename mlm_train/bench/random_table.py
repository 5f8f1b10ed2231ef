"""A ToL of random rows, of any shape and encoding, for benchmarks that need its size and not its sense."""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mlm_train.config import ModelConfig
from mlm_train.tol.format.codec import encode
from mlm_train.tol.format.index import Partition, Provenance, TolIndex, row_bytes, summary
from mlm_train.tol.format.index_file import write_index
from mlm_train.tol.format.partition import RowShape
from mlm_train.tol.format.schemes import Scheme, layout
from mlm_train.tol.storage.local import LocalFolder

PARTITION_ROWS = 8192
DRAWN_ROWS = 256  # they are repeated


def write_random_table(folder: Path, config: ModelConfig, scheme: Scheme) -> Path:
    """Write a table for models of `config` into a new folder; every layer is stored by `scheme`."""
    folder.mkdir(parents=True)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    fields = layout([scheme] * layers, hidden)
    tree = {
        "vocab_size": config.vocab_size,
        "num_layers": layers,
        "hidden_size": hidden,
        "layers": list(range(layers)),
        "source": Provenance(checkpoint="", created="", tool_version=""),
    }
    if scheme.quantised:
        shape = RowShape.packed(row_bytes(fields, hidden, plain=False))
        tree |= summary(fields) | {"encodings": fields}
    else:
        shape = RowShape.plain(scheme.dtype, layers, hidden)
        tree |= {"dtype": scheme.dtype}
    rows = torch.zeros(DRAWN_ROWS, shape.size, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    for part in rows.split(shape.size // layers, 1):
        encode(scheme, torch.randn(DRAWN_ROWS, hidden, generator=generator), part)
    edges = [*range(0, config.vocab_size, PARTITION_ROWS), config.vocab_size]
    parts = [_write(folder, edge, shape, rows) for edge in itertools.pairwise(edges)]
    write_index(LocalFolder(folder), TolIndex.model_validate(tree | {"partitions": parts}))
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
