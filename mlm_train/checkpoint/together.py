"""Compare files with their checksums on all ranks together."""

from collections import ChainMap
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlm_train.checkpoint.digests import Unit, first_fault, hashed, units
from mlm_train.parallel.runtime import Runtime
from mlm_train.utils.records import FileRecord


def first_hash_fault(folder: Path, files: Sequence[FileRecord], runtime: Runtime) -> str | None:
    """What is wrong with the content of the first damaged file, naming it, on every rank; None: nothing.

    Every rank calls it with the same files and hashes a part of them. Raises UserError, on every rank, where
    one cannot be read.
    """
    found: dict[Unit, bytes] = {}

    def work() -> Iterator[None]:
        mine = dealt(units(files), runtime.topology.world)[runtime.topology.rank]
        found.update((yield from hashed(folder, files, mine)))

    runtime.in_rounds(f"verify {folder.name}", work())
    of_ranks = runtime.gather(lambda: found)
    return first_fault(folder, files, dict(ChainMap(*of_ranks)))


def dealt(work: Sequence[Unit], ranks: int) -> list[list[Unit]]:
    """The units that each rank hashes: as many bytes each, one after the other.

    So a rank hashes what it has written and will read, and its node need not fetch these bytes twice.
    """
    shares: list[list[Unit]] = [[] for _ in range(ranks)]
    total, done = max(sum(unit.size for unit in work), 1), 0
    for unit in work:
        shares[min((2 * done + unit.size) * ranks // (2 * total), ranks - 1)].append(unit)
        done += unit.size
    return shares
