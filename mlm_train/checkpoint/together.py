"""Compare files with their checksums on all ranks together."""

import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlm_train.checkpoint.manifest import hash_fault
from mlm_train.parallel.runtime import Runtime
from mlm_train.utils.records import FileRecord


def first_hash_fault(folder: Path, files: Sequence[FileRecord], runtime: Runtime) -> str | None:
    """What is wrong with the content of the first damaged file, naming it, on every rank; None: nothing.

    Every rank calls it with the same files and reads some of them. Raises UserError, on every rank, where one
    cannot be read.
    """
    faults: dict[int, str] = {}

    def work() -> Iterator[None]:
        for number in dealt(files, runtime.topology.world)[runtime.topology.rank]:
            fault = yield from hash_fault(folder / files[number].file, files[number])
            if fault is not None:
                faults[number] = fault

    runtime.in_rounds(f"verify {folder.name}", work())
    found: dict[int, str] = {}
    for of_rank in runtime.gather(lambda: faults):
        found |= of_rank
    return found[min(found)] if found else None


def dealt(files: Sequence[FileRecord], ranks: int) -> list[list[int]]:
    """Numbers of the files that each rank reads: largest first, each to the rank with the fewest bytes."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for number in sorted(range(len(files)), key=lambda number: -files[number].bytes):
        load, rank = heapq.heappop(loads)
        shares[rank].append(number)
        heapq.heappush(loads, (load + files[number].bytes, rank))
    return shares
