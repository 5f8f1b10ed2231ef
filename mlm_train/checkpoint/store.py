"""Checkpoints at a URL: URL/step-00000100/, as in a run's folder.

A store has no rename of a folder. A checkpoint there counts once it has its manifest, which is written after
all files are, and removed before any of them.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mlm_train.checkpoint.digests import Streamed
from mlm_train.checkpoint.folders import NAME
from mlm_train.checkpoint.keep import Keep, Manifests, step_of
from mlm_train.checkpoint.manifest import MANIFEST, Manifest, parse_manifest
from mlm_train.errors import UserError
from mlm_train.utils.files import listed, open_regular, sync, writing
from mlm_train.utils.records import FileRecord
from mlm_train.utils.url_folder import BLOCK_BYTES, UrlFolder, answered, each_answered

Checking = Generator[None, None, list[str]]  # yields after each block; returns what is wrong with files


class CheckpointStore:
    """The checkpoints at a URL. Methods raise UserError, also where the store does not answer."""

    def __init__(self, url: str) -> None:
        self._root = answered(url, lambda: UrlFolder(url))

    def __str__(self) -> str:
        return str(self._root)

    def at(self, name: str) -> str:
        """The URL of a checkpoint."""
        return self._root.at(name)

    def _folder(self, name: str) -> UrlFolder:
        return answered(self.at(name), lambda: UrlFolder(f"{self._root.address}/{name}"))

    def folders(self) -> list[str]:
        """Names of all checkpoints, oldest first, also of those without a manifest."""
        found = answered(str(self), self._root.names)
        return sorted(filter(NAME.fullmatch, found), key=lambda name: step_of(Path(name)))

    def committed(self) -> list[str]:
        """Names of the committed checkpoints, oldest first."""
        return [name for name in self.folders() if self._has_manifest(name)]

    def _has_manifest(self, name: str) -> bool:
        folder = self._folder(name)
        return answered(self.at(name), lambda: folder.size(MANIFEST)) is not None

    def manifest_bytes(self, name: str) -> bytes | None:
        """The text of a checkpoint's manifest; None where it is not committed."""
        folder = self._folder(name)
        return answered(self.at(name), lambda: folder.read(MANIFEST))

    def manifest(self, name: str) -> Manifest:
        """A checkpoint's manifest; raises as read_manifest does."""
        return parse_manifest(self.manifest_bytes(name), self.at(name))

    def withdraw(self, name: str) -> None:
        """Make a checkpoint one that does not count: its files may change."""
        folder = self._folder(name)
        answered(self.at(name), folder.create)
        answered(self.at(name), lambda: folder.remove(MANIFEST))

    def upload(self, source: Path, files: Sequence[FileRecord]) -> Iterator[None]:
        """Write some of a folder's files, even if they are deleted meanwhile; yields after each block."""
        folder = self._folder(source.name)
        with ExitStack() as stack:
            opened = [(entry, stack.enter_context(_opened(source, entry))) for entry in files]
            for entry, file in opened:
                yield from each_answered(
                    folder.at(entry.file), folder.write_blocks(entry.file, entry.bytes, _blocks(file))
                )

    def commit(self, name: str, manifest: bytes) -> None:
        """Write the manifest of a checkpoint whose files are there."""
        folder = self._folder(name)
        answered(self.at(name), lambda: folder.write(MANIFEST, manifest))

    def prune(self, keep: Keep) -> None:
        """Remove checkpoints that are not kept, and what killed uploads have left."""
        committed = [Path(name) for name in self.committed()]
        reasons = keep.reasons(committed, Manifests(lambda folder: self.manifest(folder.name)))
        for name in self.folders():
            if not reasons.get(Path(name)):
                self.withdraw(name)
                answered(self.at(name), self._folder(name).remove_all)

    def download(self, name: str, files: Sequence[FileRecord], target: Path) -> Checking:
        """Copy some of a checkpoint's files into a folder, flushed to disk; else like `verify`."""
        faults = list[str]()
        for entry in files:
            path = listed(target, entry.file, MANIFEST)
            with writing(target), path.open("wb") as file:
                faults += yield from self._read(name, entry, file.write)
                file.flush()
                sync(path)
        return faults

    def verify(self, name: str, files: Sequence[FileRecord]) -> Checking:
        """Read some of a checkpoint's files. Returns what is wrong with each damaged one, naming its URL."""
        faults = list[str]()
        for entry in files:
            faults += yield from self._read(name, entry, lambda _: None)
        return faults

    def _read(self, name: str, entry: FileRecord, use: Callable[[bytes], object]) -> Checking:
        folder, digest, count = self._folder(name), Streamed(entry), 0
        shown = folder.at(entry.file)
        if answered(shown, partial(folder.size, entry.file)) is None:
            return [f"{shown} is missing"]
        blocks = folder.blocks(entry.file)
        while block := answered(shown, partial(next, blocks, b"")):
            use(block)
            digest.update(block)
            count += len(block)
            yield
        if count != entry.bytes:
            return [f"{shown} is damaged: {count} bytes instead of {entry.bytes}"]
        return [] if digest.hexdigest() == entry.sha256 else [f"{shown} is damaged: its checksum differs"]


def mine_of(files: Sequence[FileRecord], rank: int, world: int) -> list[FileRecord]:
    """The files that a rank copies: its own, which its node may have in memory, and some of no rank."""
    own = {f"shard-{number:05d}.safetensors": number for number in range(world)}
    return [entry for number, entry in enumerate(files) if own.get(entry.file, number % world) == rank]


def _opened(folder: Path, entry: FileRecord) -> BinaryIO:
    path = listed(folder, entry.file, MANIFEST)
    try:
        return open_regular(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _blocks(file: BinaryIO) -> Iterator[np.ndarray]:
    while block := file.read(BLOCK_BYTES):
        yield np.frombuffer(block, np.uint8)
