"""The size of a ToL, and whether looking FFN-M up is faster than computing it, before anything is built.

Bytes and FLOPs are exact (without file headers); times follow from bandwidths and speeds that the caller
gives. GB are 1e9 bytes.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import numpy as np

from mlm_train.config import ModelConfig
from mlm_train.model.counts import count_parameters
from mlm_train.tol.format.index import BASIS_ITEM
from mlm_train.tol.format.schemes import GROUP, LEVELS, Scheme

BITS = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.25, "int4": 4.25}  # with a float16 scale per group
BLOCK = 4096  # bytes per NVMe read, at least
LARGEST_BATCH = 2**16  # of the search for where a ToL pays
VRAM, RAM, NVME = "VRAM", "RAM", "NVMe"

Batches = Sequence[int] | np.ndarray  # batch sizes


class StoredAs(NamedTuple):
    """How all layers of a ToL are stored; rank None: not cut."""

    dtype: str
    rank: int | None = None

    def __str__(self) -> str:
        return self.dtype if self.rank is None else f"{self.dtype}, rank {self.rank}"


class Tier(NamedTuple):
    """A memory tier. `bandwidth`: bytes per second to the decoding device."""

    name: str
    capacity: float  # bytes
    bandwidth: float
    latency: float = 0.0  # seconds per random read
    in_flight: float = 1.0  # concurrent random reads
    block: int = 1  # bytes that a read is rounded up to


class Serving(NamedTuple):
    """The decoding machine: its tiers, fastest first, and its speed."""

    tiers: tuple[Tier, Tier, Tier]  # VRAM, RAM, NVMe
    flops: float  # per second
    distinct: float  # distinct tokens of a decode step / its batch size
    weights: str  # type of all weights

    def fits(self, model: ModelConfig, tier: Tier, size: int) -> bool:
        """Whether a tier holds `size` bytes; VRAM also holds the other weights."""
        return size + (other_bytes(model, self.weights) if tier.name == VRAM else 0) <= tier.capacity


class Offer(NamedTuple):
    """A ToL in a tier, compared with FFN-M's weights."""

    stored: StoredAs
    tier: str
    bytes: int
    fits: bool
    seconds: list[float]  # per decode step, one per batch size
    pays: list[tuple[int, int | None]]  # batch sizes [first, stop) at which it is faster; None: no end found


def row_bytes(model: ModelConfig, stored: StoredAs) -> int:
    """Bytes per row, all layers."""
    group = GROUP if stored.dtype in LEVELS else None
    scheme = Scheme.model_validate({"dtype": stored.dtype, "rank": stored.rank, "group_size": group})
    plain = stored.dtype not in LEVELS and stored.rank is None  # layers follow each other without padding
    layer = sum(scheme.sizes(model.hidden_size)) if plain else scheme.bytes(model.hidden_size)
    return model.num_hidden_layers * layer


def basis_bytes(model: ModelConfig, stored: StoredAs) -> int:
    """Bytes of all layers' bases [rank, hidden]."""
    return model.num_hidden_layers * (stored.rank or 0) * model.hidden_size * BASIS_ITEM


def tol_bytes(model: ModelConfig, stored: StoredAs) -> int:
    """Bytes of the table with its bases."""
    return model.vocab_size * row_bytes(model, stored) + basis_bytes(model, stored)


def ffn_m_bytes(model: ModelConfig, dtype: str) -> int:
    """Bytes of the weights that a ToL replaces."""
    return int(count_parameters(model).ffn_m * BITS[dtype] / 8)


def other_bytes(model: ModelConfig, dtype: str) -> int:
    """Bytes of all other weights, with head and embedding: they stay in VRAM either way."""
    counts = count_parameters(model)
    return int((counts.stored - counts.ffn_m) * BITS[dtype] / 8)


def read_bytes(model: ModelConfig, dtype: str) -> int:
    """Bytes of the other weights that a decode step reads: no embedding unless it is tied to the head."""
    counts = count_parameters(model)
    return int((counts.active + (counts.head or counts.embedding)) * BITS[dtype] / 8)


def ffn_m_flops(model: ModelConfig) -> int:
    """FLOPs of FFN-M per token, all layers: three matmuls, without norms and activations."""
    return 6 * model.num_hidden_layers * model.hidden_size * model.intermediate_size


def build_seconds(model: ModelConfig, stored: StoredAs, flops: float, written: float) -> tuple[float, float]:
    """Seconds to compute FFN-M of the vocabulary at `flops` per second, and to write at `written` bytes/s."""
    return model.vocab_size * ffn_m_flops(model) / flops, tol_bytes(model, stored) / written


def rows_of(batches: Batches, distinct: float) -> np.ndarray:
    """Rows that a decode step looks up or computes: one per distinct token of the batch."""
    return np.maximum(1.0, np.asarray(batches) * distinct)


def weights_seconds(model: ModelConfig, serving: Serving, tier: Tier, batches: Batches) -> np.ndarray:
    """Seconds of FFN-M per decode step: moving its weights once or its FLOPs, whichever takes longer."""
    moved = ffn_m_bytes(model, serving.weights) / tier.bandwidth
    return np.maximum(moved, rows_of(batches, serving.distinct) * ffn_m_flops(model) / serving.flops)


def lookup_seconds(
    model: ModelConfig, serving: Serving, stored: StoredAs, tier: Tier, batches: Batches
) -> np.ndarray:
    """Seconds of a ToL per decode step: moving the rows or the latency of reads, whichever takes longer.

    Low rank adds the matmul with the bases, which are in VRAM. Decoding of codes is left out.
    """
    rows = rows_of(batches, serving.distinct)
    moved = rows * ceil(row_bytes(model, stored) / tier.block) * tier.block / tier.bandwidth
    waited = np.maximum(1.0, rows / tier.in_flight) * tier.latency
    if stored.rank is None:
        return np.maximum(moved, waited)
    flops = 2 * model.num_hidden_layers * stored.rank * model.hidden_size
    bases = basis_bytes(model, stored) / serving.tiers[0].bandwidth
    return np.maximum(moved, waited) + np.maximum(bases, rows * flops / serving.flops)


def home_of_weights(model: ModelConfig, serving: Serving) -> Tier | None:
    """The fastest tier that holds FFN-M's weights; None if none does."""
    needed = ffn_m_bytes(model, serving.weights)
    return next((tier for tier in serving.tiers if serving.fits(model, tier, needed)), None)


def compare(
    model: ModelConfig, serving: Serving, home: Tier, stored: Sequence[StoredAs], batches: Batches
) -> list[Offer]:
    """Compare every storage type in every tier with FFN-M's weights in the tier `home`."""
    every = np.arange(1, LARGEST_BATCH + 1)
    weights = weights_seconds(model, serving, home, every)
    offers = []
    for kind in stored:
        for tier in serving.tiers:
            size = tol_bytes(model, kind)
            seconds = lookup_seconds(model, serving, kind, tier, batches).tolist()
            fits = serving.fits(model, tier, size)
            faster = lookup_seconds(model, serving, kind, tier, every) < weights
            offers.append(Offer(kind, tier.name, size, fits, seconds, _spans(faster) if fits else []))
    return offers


def _spans(faster: np.ndarray) -> list[tuple[int, int | None]]:
    """Ranges [first, stop) of batch sizes where it is true; the first element is batch size 1."""
    edges = np.flatnonzero(np.diff(faster, prepend=False, append=False)) + 1
    return [
        (int(first), int(stop) if stop <= len(faster) else None)
        for first, stop in zip(edges[::2], edges[1::2], strict=True)
    ]
