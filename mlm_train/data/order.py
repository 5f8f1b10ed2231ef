"""The order of samples in closed form: no rank ever builds or keeps anything as long as an epoch."""

import hashlib
import heapq
from collections.abc import Sequence

import numpy as np

ORDER = 1  # version of the order computed here: a checkpoint records it, and resumes with no other
ROUNDS = 8  # of the Feistel network; its keys are a hash of 64 bytes


def shuffled(positions: np.ndarray, size: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Each epoch's permutation of range(size) at `positions`; both and `epochs` are int64 [n].

    A permutation follows from (seed, epoch) alone: a Feistel network over the next power of two, walked
    until it falls below `size` (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    bits = max(2, (size - 1).bit_length())
    distinct_epochs, which = np.unique(epochs, return_inverse=True)
    keys = np.stack([_keys(seed, int(epoch)) for epoch in distinct_epochs])
    shuffled = positions.astype(np.uint64)
    walking = np.arange(len(shuffled))
    while walking.size:
        shuffled[walking] = _feistel(shuffled[walking], bits, keys[which[walking]])
        walking = walking[shuffled[walking] >= size]
    return shuffled.astype(np.int64)


def _keys(seed: int, epoch: int) -> np.ndarray:
    """uint64 [ROUNDS]; the same on every machine and with every version of numpy."""
    return np.frombuffer(hashlib.blake2b(f"{seed} {epoch}".encode()).digest(), dtype="<u8")


def _feistel(numbers: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """The permutation of range(2**bits) given by keys uint64 [n, ROUNDS], at numbers uint64 [n]."""
    upper, lower = bits - bits // 2, bits // 2
    left, right = numbers >> lower, numbers & ((1 << lower) - 1)
    for key in keys.T:
        left, right = right, left ^ (_mixed(right + key) >> (64 - upper))
        upper, lower = lower, upper
    return (left << lower) | right


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 numbers: each depends on all of them (the finalizer of splitmix64)."""
    numbers = (numbers ^ (numbers >> 30)) * 0xBF58476D1CE4E5B9
    numbers = (numbers ^ (numbers >> 27)) * 0x94D049BB133111EB
    return numbers ^ (numbers >> 31)


class Interleaving:
    """Which source the n-th sample is taken from, and which of that source's samples it is.

    After any n samples each source has given within one sample of shares[i] * n / sum(shares). Sample k of
    a source of relative share w is due between steps k/w and (k + 1)/w. Of the samples that may be taken, the
    one with the earliest deadline is, which meets all deadlines (earliest deadline first, unit jobs). The
    pattern repeats after sum(shares) samples.
    """

    def __init__(self, shares: Sequence[int]) -> None:
        divisor = int(np.gcd.reduce(shares))
        self.shares = np.array([share // divisor for share in shares], dtype=np.int64)
        self.period = int(self.shares.sum())
        self._sources = _by_deadline(self.shares.tolist(), self.period)
        self._earlier = np.empty(self.period, dtype=np.int64)  # samples of the same source before this one
        for source, share in enumerate(self.shares):
            self._earlier[self._sources == source] = np.arange(share)

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sources, and sample numbers within them, of samples int64 [n]."""
        rounds, positions = np.divmod(numbers, self.period)
        sources = self._sources[positions]
        return sources, rounds * self.shares[sources] + self._earlier[positions]

    def counts(self, number: int) -> list[int]:
        """Samples of each source among the first `number`."""
        rounds, rest = divmod(number, self.period)
        started = np.bincount(self._sources[:rest], minlength=len(self.shares))
        return (rounds * self.shares + started).tolist()


def _by_deadline(shares: list[int], period: int) -> np.ndarray:
    """The source of each of `period` samples, int64 [period]."""
    released: list[list[tuple[int, int]]] = [[] for _ in range(period)]
    for source, share in enumerate(shares):
        for sample in range(share):
            deadline = -(-(sample + 1) * period // share)
            released[sample * period // share].append((deadline, source))
    waiting: list[tuple[int, int]] = []
    taken = []
    for jobs in released:
        for job in jobs:
            heapq.heappush(waiting, job)
        taken.append(heapq.heappop(waiting)[1])
    return np.array(taken, dtype=np.int64)
