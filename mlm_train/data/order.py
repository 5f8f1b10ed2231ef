"""The order of samples in closed form: nothing as long as an epoch is made or kept, on any rank."""

import hashlib
import heapq
from collections.abc import Sequence

import numpy as np

ORDER = 1  # counts changes of what is computed here: checkpoints know it, and go on with no other
ROUNDS = 8  # of the network below; its keys are a hash of 64 bytes


def shuffled(places: np.ndarray, size: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Where each epoch's permutation of range(size) sends places, int64 [n], of epochs, int64 [n].

    A permutation follows from (seed, epoch) alone: a Feistel network over the next power of two, walked
    until it falls below `size` (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    bits = max(2, (size - 1).bit_length())
    known, which = np.unique(epochs, return_inverse=True)
    keys = np.stack([_keys(seed, int(epoch)) for epoch in known])
    numbers = places.astype(np.uint64)
    walking = np.arange(len(numbers))
    while walking.size:
        numbers[walking] = _network(numbers[walking], bits, keys[which[walking]])
        walking = walking[numbers[walking] >= size]
    return numbers.astype(np.int64)


def _keys(seed: int, epoch: int) -> np.ndarray:
    """uint64 [ROUNDS]: the same on every machine and with every version of numpy."""
    return np.frombuffer(hashlib.blake2b(f"{seed} {epoch}".encode()).digest(), dtype="<u8")


def _network(numbers: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of range(2**bits), at numbers uint64 [n], by keys uint64 [n, ROUNDS]."""
    upper, lower = bits - bits // 2, bits // 2
    left, right = numbers >> lower, numbers & ((1 << lower) - 1)
    for key in keys.T:
        left, right = right, left ^ (_mixed(right + key) >> (64 - upper))
        upper, lower = lower, upper
    return (left << lower) | right


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Every bit of a uint64 depends on all of its bits (the end of splitmix64)."""
    numbers = (numbers ^ (numbers >> 30)) * 0xBF58476D1CE4E5B9
    numbers = (numbers ^ (numbers >> 27)) * 0x94D049BB133111EB
    return numbers ^ (numbers >> 31)


class Interleaving:
    """Which source the n-th sample is taken from, and which of that source's samples it is.

    After any n samples each source has given within one sample of shares[i] * n / sum(shares). Sample k of
    a source is due in steps k/w to (k + 1)/w, w its share of one; of those that have begun, the one that
    ends first is taken, which meets all of these times (earliest deadline first, unit jobs). The pattern
    repeats after sum(shares) samples.
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
        """Sources, and places within them, of samples int64 [n]."""
        rounds, places = np.divmod(numbers, self.period)
        sources = self._sources[places]
        return sources, rounds * self.shares[sources] + self._earlier[places]

    def counts(self, number: int) -> list[int]:
        """Samples of each source among the first `number`."""
        rounds, rest = divmod(number, self.period)
        begun = np.bincount(self._sources[:rest], minlength=len(self.shares))
        return (rounds * self.shares + begun).tolist()


def _by_deadline(shares: list[int], period: int) -> np.ndarray:
    """The source of each of `period` samples, int64."""
    begins: list[list[tuple[int, int]]] = [[] for _ in range(period)]
    for source, share in enumerate(shares):
        for sample in range(share):
            deadline = -(-(sample + 1) * period // share)
            begins[sample * period // share].append((deadline, source))
    waiting: list[tuple[int, int]] = []
    taken = []
    for begun in begins:
        for job in begun:
            heapq.heappush(waiting, job)
        taken.append(heapq.heappop(waiting)[1])
    return np.array(taken, dtype=np.int64)
