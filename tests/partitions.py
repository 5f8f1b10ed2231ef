"""A ToL, and one partition of it, from rows in memory, as a builder's worker writes it."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mlm_train.checkpoint.hf.folder import fingerprint
from mlm_train.model.transformer import Transformer
from mlm_train.tol.format.index import Partition, Provenance, TolIndex
from mlm_train.tol.format.index_file import write_index
from mlm_train.tol.format.layout import Layout
from mlm_train.tol.format.partition import RowShape
from mlm_train.tol.format.schemes import Scheme
from mlm_train.tol.storage.direct_io import Stream, buffers
from mlm_train.tol.storage.local import LocalFolder


def write_partition(
    path: Path, rows: tuple[int, int], shape: RowShape, chunks: Sequence[Tensor]
) -> Partition:
    """Write `chunks` of rows, [n, ...] of any type, one after another, as one partition."""
    place, count = LocalFolder(path.parent), rows[1] - rows[0]
    header = shape.header(count)
    draft = place.draft(path.name, shape.file_bytes(count), header)
    try:
        room = buffers(max(map(len, chunks)), shape.size)
        with Stream(place.sink(draft, header), header, room) as stream:
            for chunk in chunks:
                stream.rows(len(chunk)).copy_(chunk.contiguous().view(torch.uint8).flatten(1))
                stream.put(len(chunk))
            digest = stream.finish()
        place.name_draft(draft, path.name, stream.bytes)
        return Partition(file=path.name, rows=rows, bytes=stream.bytes, sha256=digest)
    except BaseException:
        place.remove(draft)
        raise


def write_table(
    folder: Path, model: Transformer, export: Path, cuts: Sequence[int], with_embeddings: bool = False
) -> Path:
    """The ToL of an exported model in fp32, its partitions cut at these rows."""
    folder.mkdir()
    blocks, x0 = model.memory_blocks(), model.embed_tokens.weight
    table = torch.stack([block.ffn_m(x0) for block in blocks.values()], dim=1)
    if not with_embeddings:
        parts = _write_rows(folder, table, cuts)
        _write_index(folder, table, parts, list(blocks), fingerprint(export))
        return folder
    schemes = [Scheme(dtype="float32")] * len(blocks)
    layout = Layout(hidden_size=x0.shape[1], layers=list(blocks), schemes=schemes, embedding="float32")
    rows = torch.cat([x0.unsqueeze(1), table], dim=1)
    parts = _write_rows(folder, rows, cuts, layout.shape)
    fields = {"encodings": layout.fields, "embedding": layout.embedding_field}
    _write_index(folder, table, parts, list(blocks), fingerprint(export), **fields)
    return folder


def random_table(
    folder: Path, vocabulary: int, layers: int = 2, hidden: int = 16, cuts: Sequence[int] = ()
) -> Path:
    """A ToL of random fp32 rows of no model, its partitions cut at these rows."""
    folder.mkdir(exist_ok=True)
    table = torch.randn(vocabulary, layers, hidden, generator=torch.Generator().manual_seed(0))
    parts = _write_rows(folder, table, cuts)
    _write_index(folder, table, parts, list(range(layers)), "")
    return folder


def _write_rows(
    folder: Path, table: Tensor, cuts: Sequence[int], shape: RowShape | None = None
) -> list[Partition]:
    shape = shape or RowShape.plain("float32", table.shape[1], table.shape[2])
    return [
        write_partition(folder / f"{start}.safetensors", (start, stop), shape, [table[start:stop]])
        for start, stop in itertools.pairwise((0, *cuts, len(table)))
    ]


def _write_index(
    folder: Path, table: Tensor, parts: list[Partition], layers: list[int], checkpoint: str, **fields: object
) -> None:
    source = Provenance(checkpoint=checkpoint, created="", tool_version="")
    shapes = {"vocab_size": len(table), "num_layers": len(layers), "hidden_size": table.shape[2]}
    index = {"dtype": "float32", "layers": layers, "partitions": parts, "source": source, **shapes} | fields
    write_index(LocalFolder(folder), TolIndex.model_validate(index))
