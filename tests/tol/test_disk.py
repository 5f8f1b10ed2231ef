"""Writing past the page cache: every byte in its place and hashed, for all sizes and file systems."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mlm_train.tol.format.partition import ALIGNMENT, RowShape
from mlm_train.tol.storage import direct_io as disk
from mlm_train.tol.storage.direct_io import BLOCK, FileSink, Stream, UncachedFile, buffers
from mlm_train.tol.storage.local import LocalFolder
from mlm_train.utils.files import sha256_of
from tests.partitions import write_partition

MIB = 2**20


def no_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulate a file system without direct writing."""
    opened = os.open

    def refused(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", refused)


@pytest.mark.parametrize("system", ["direct", "cached"])
@pytest.mark.parametrize("row_bytes", [4096, 1000, 7])
def test_a_stream(system: str, row_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if system == "cached":
        no_direct(monkeypatch)
    shape, counts = RowShape.packed(row_bytes), [3 * MIB // row_bytes, 2 * MIB // row_bytes + 1, 1, 5]
    random = torch.Generator().manual_seed(row_bytes)
    chunks = [torch.randint(256, (count, row_bytes), dtype=torch.uint8, generator=random) for count in counts]
    storage, header = LocalFolder(tmp_path), shape.header(sum(counts))
    draft = storage.draft("rows", shape.file_bytes(sum(counts)), header)
    with Stream(storage.sink(draft, header), header, buffers(max(counts), row_bytes)) as stream:
        for chunk in chunks:
            stream.rows(len(chunk)).copy_(chunk)
            stream.put(len(chunk))
        digest = stream.finish()
    found = (tmp_path / draft).read_bytes()
    assert found == shape.header(sum(counts)) + b"".join(chunk.numpy().tobytes() for chunk in chunks)
    assert (len(found), sha256_of(tmp_path / draft)) == (stream.bytes, digest)


def test_long_writes_go_past_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except their last, incomplete block, and writes that start within a block."""
    path, data, written = tmp_path / "file", buffers(2 * MIB + 5, 1)[0].numpy().reshape(-1), []
    data[:] = np.random.default_rng(0).integers(256, size=data.size, dtype=np.uint8)
    path.touch()
    pwrite = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda file, view, at: written.append((at, len(view))) or pwrite(file, view, at)
    )
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip(f"{tmp_path} is on a file system without direct writing")
    with UncachedFile(path, os.O_WRONLY) as file:
        file.write(data, 0)
        assert written == [(0, 2 * MIB)]
        file.write(data, 3 * MIB + 1)
        file.write(data[:BLOCK], 8 * MIB)
        file.sync()
        assert written == [(0, 2 * MIB)]
    found = path.read_bytes()
    assert found[: data.size] == found[3 * MIB + 1 :][: data.size] == data.tobytes()
    assert found[8 * MIB :] == data[:BLOCK].tobytes()


def test_direct_writing_that_fails_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening with O_DIRECT succeeds and writing fails: the bytes are written through the cache."""
    path, data = tmp_path / "file", buffers(2 * MIB, 1)[0].numpy().reshape(-1)
    data[:] = 7
    path.touch()

    def refused(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "pwrite", refused)
    with UncachedFile(path, os.O_WRONLY) as file:
        file.write(data, 0)
    assert path.read_bytes() == data.tobytes()


def test_a_full_disk_is_raised_by_the_next_call(tmp_path: Path) -> None:
    class Full(FileSink):
        def append(self, data: np.ndarray) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").touch()
    for late in (False, True):
        with (
            Stream(Full(tmp_path / "file"), b"", buffers(4, 10)) as stream,
            pytest.raises(OSError, match="No space"),
        ):
            for _ in range(1 if late else 3):
                stream.rows(4).zero_()
                stream.put(4)
            stream.finish()


def test_a_partition_of_chunks(tmp_path: Path) -> None:
    chunks = [torch.randn(5, 2, 8), torch.randn(3, 2, 8)]
    shape = RowShape.plain("float32", 2, 8)
    partition = write_partition(tmp_path / "rows", (10, 18), shape, chunks)
    found = (tmp_path / "rows").read_bytes()
    assert found[ALIGNMENT:] == torch.cat(chunks).numpy().tobytes() and [tmp_path / "rows"] == list(
        tmp_path.iterdir()
    )
    assert (partition.bytes, partition.sha256) == (len(found), sha256_of(tmp_path / "rows"))
    assert disk.BLOCK == ALIGNMENT  # so that the first row may be written directly
