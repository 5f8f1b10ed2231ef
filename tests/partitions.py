"""One partition of a ToL from rows in memory, as a builder's worker writes it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mlm_train.tol.disk import Stream, buffers
from mlm_train.tol.format import Partition
from mlm_train.tol.partition import RowShape
from mlm_train.tol.place import Folder


def write_partition(
    path: Path, rows: tuple[int, int], shape: RowShape, chunks: Sequence[Tensor]
) -> Partition:
    """Write `chunks` of rows, [n, ...] of any type, one after another, as one partition."""
    place, count = Folder(path.parent), rows[1] - rows[0]
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
