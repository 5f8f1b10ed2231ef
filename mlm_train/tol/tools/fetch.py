"""Copying a table from a URL or folder into a folder: checked while it is written, and resumable."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

from mlm_train.errors import UserError
from mlm_train.tol.format.index import FETCHED, INDEX, TableFile, TolIndex
from mlm_train.tol.format.index_file import index_bytes, is_intact, parse_index
from mlm_train.tol.storage.base import StorageReader, check_space, refuse_used, remove_drafts
from mlm_train.tol.storage.direct_io import Stream, buffers
from mlm_train.tol.storage.local import LocalFolder
from mlm_train.tol.storage.resolve import storage_at
from mlm_train.tol.storage.urls import refuse_url
from mlm_train.utils.progress import ByteProgress
from mlm_train.utils.url_folder import BLOCK_BYTES


def fetch_tol(source: str | Path, folder: str | Path) -> TolIndex:
    """Copy a table; its index is the last file. Intact files of an interrupted copy are kept.

    Damaged files of a folder that holds the table already are replaced. Raises UserError for a folder with
    other contents, too little space, and a source that does not match its index.
    """
    refuse_url(folder)
    origin, target = storage_at(source), LocalFolder(Path(folder).absolute())
    if origin.address == target.address:
        raise UserError(f"{target} would be copied to itself; name another folder")
    return copy_table(origin, target)


def copy_table(origin: StorageReader, target: LocalFolder) -> TolIndex:
    """Copy a table as fetch_tol does, between opened storages."""
    data = index_bytes(origin)
    index = parse_index(data, origin.at(INDEX))
    with target.locked("being fetched"):
        _begin(target, data, origin)
        missing = [file for file in index.files if not is_intact(target, file)]
        needed = sum(file.bytes for file in missing)
        check_space(target, needed)
        done = index.bytes - needed
        with ByteProgress("fetch", index.bytes) as progress:
            for file in missing:
                if not _copy(origin, target, file, lambda count: progress.show(done + count)):  # noqa: B023
                    raise UserError(
                        f"{origin.at(file.file)} is damaged: its SHA-256 differs from the index; repair it "
                        f"with {index.repair}, then fetch again: intact files are kept"
                    )
                done += file.bytes
        target.write(INDEX, data)
        target.remove(FETCHED)
    return index


def _begin(target: LocalFolder, index: bytes, origin: StorageReader) -> None:
    """Record the index that is copied; UserError if the folder holds anything else."""
    known = [data for data in (target.read(INDEX), target.read(FETCHED)) if data is not None]
    if any(data != index for data in known):
        raise UserError(f"{target} holds another table than {origin}; remove it or name a new folder")
    if not known:
        refuse_used(target, FETCHED)
        target.write(FETCHED, index)
    remove_drafts(target)


def _copy(origin: StorageReader, target: LocalFolder, file: TableFile, report: Callable[[int], None]) -> bool:
    """Copy a file; return whether its SHA-256 is right. `report`: called with the bytes copied so far."""
    draft = target.draft(file.file, file.bytes)
    try:
        with Stream(target.sink(draft), b"", buffers(BLOCK_BYTES, 1)) as stream:
            for block in origin.blocks(file.file):
                if stream.bytes + len(block) > file.bytes:
                    break  # larger than the index says: the digest will differ
                buffer = stream.rows(len(block))
                buffer[:, 0] = torch.frombuffer(bytearray(block), dtype=torch.uint8)
                stream.put(len(block))
                report(stream.bytes)
            digest = stream.finish()
        if digest == file.sha256:
            target.name_draft(draft, file.file, file.bytes)
        return digest == file.sha256
    finally:
        with contextlib.suppress(OSError):
            target.remove(draft)
