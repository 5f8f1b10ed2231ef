"""Encoding of one layer of a token's row: plain floats, or group-wise int8 and int4.

A layer of a row holds `width` values: the hidden size, or the layer's rank where it is cut to low rank.
Integers: value = (code - zero) * scale, with a float16 scale per group of `group_size` neighbouring values
(the last group may be shorter) and an int8 zero point if not symmetric. int8 codes are signed; int4 packs two
codes per byte, the low half first, code = nibble - 8. An encoded row holds its layers one after another, each
at a multiple of ALIGNMENT bytes: scales, zeros, codes.
"""

import torch
from torch import Tensor

from mlm_train.errors import UserError
from mlm_train.tol.format.schemes import LEVELS, Encoding, Scheme

TORCH_DTYPE: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
# Factors on a group's range that the search for its scale tries: at four bits clipping a little is best.
_FACTORS = {"int8": (1.0,), "int4": (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}


def encode(scheme: Scheme, values: Tensor, out: Tensor) -> None:
    """Encode values [n, width] as one layer of n rows into `out`, uint8 [n, scheme.bytes or more].

    Raises NotFinite if a value or a group's scale is not finite in this type.
    """
    if not scheme.quantised:
        fields = [values.to(TORCH_DTYPE[scheme.dtype])]
    else:
        scales, zeros, codes = _quantise(scheme, values.float())
        if scheme.dtype == "int4":
            codes = _pack(codes)
        fields = [scales, codes] if zeros is None else [scales, zeros, codes]
    if not all_finite(fields[0]):
        raise NotFinite(int((~fields[0].isfinite()).any(1).nonzero()[0]), scheme.dtype)
    start = 0
    for field in fields:
        data = field.contiguous().view(torch.uint8)
        out[:, start : start + data.shape[1]] = data
        start += data.shape[1]
    out[:, start:] = 0


def rounded(scheme: Scheme, values: Tensor) -> Tensor:
    """Values [n, width] after `encode` and `decode`, in fp32; not finite where `encode` would raise."""
    if scheme.group_size is None:
        return values.to(TORCH_DTYPE[scheme.dtype]).float()
    scales, zeros, codes = _quantise(scheme, values.float())
    spread = grouped(codes.float(), scheme.group_size)
    if zeros is not None:
        spread = spread - zeros.float().unsqueeze(-1)
    return (spread * scales.float().unsqueeze(-1)).flatten(1)[:, : values.shape[1]]


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # The sum is cheap, but may overflow.
    return bool(values.sum().isfinite()) or bool(torch.stack(values.aminmax()).isfinite().all())


class NotFinite(UserError):
    """A row that a type cannot hold; a caller that knows its token raises an error that names it."""

    def __init__(self, row: int, dtype: str) -> None:
        super().__init__(f"row {row} is not finite in {dtype}")
        self.row, self.dtype = row, dtype


def decode(encoding: Encoding, rows: Tensor, hidden: int) -> Tensor:
    """Decode a layer of rows uint8 [n, row bytes] to its values [n, width], in fp32 or the plain type."""

    def field(start: int, size: int, dtype: torch.dtype) -> Tensor:
        part, item = rows[:, start : start + size], dtype.itemsize
        aligned = part.storage_offset() % item == 0 and part.stride(0) % item == 0
        return (part if aligned else part.contiguous()).view(dtype)

    scale_bytes, zero_bytes, code_bytes = encoding.sizes(hidden)
    if encoding.group_size is None:
        return field(encoding.codes, code_bytes, TORCH_DTYPE[encoding.dtype])
    assert encoding.scales is not None
    width = encoding.width(hidden)
    codes = field(encoding.codes, code_bytes, torch.uint8 if encoding.dtype == "int4" else torch.int8)
    if encoding.dtype == "int4":
        codes = _unpack(codes, width)
    spread = grouped(codes.float(), encoding.group_size)
    if encoding.zeros is not None:
        spread = spread - field(encoding.zeros, zero_bytes, torch.int8).float().unsqueeze(-1)
    scaled = spread * field(encoding.scales, scale_bytes, torch.float16).float().unsqueeze(-1)
    return scaled.flatten(1)[:, :width]


def grouped(values: Tensor, size: int) -> Tensor:
    """Split values into groups: [n, width] -> [n, groups, size], zero-padded.

    A size above the width becomes the width, so that padding takes no memory.
    """
    size = min(size, values.shape[1])
    missing = -values.shape[1] % size
    return torch.nn.functional.pad(values, (0, missing)).unflatten(1, (-1, size))


def _pack(codes: Tensor) -> Tensor:
    """Pack int4 codes, int8 [n, width], into uint8 [n, ceil(width / 2)]."""
    nibbles = (torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)) + 8).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def _unpack(packed: Tensor, width: int) -> Tensor:
    """Reverse _pack."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :width]
    return nibbles.to(torch.int8) - 8


def _quantise(scheme: Scheme, values: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Quantise values [n, width] to scales float16 [n, groups], zeros int8 [n, groups] or None, and codes.

    codes: int8 [n, width]. Each group takes the factor on its range with the smallest squared error.
    """
    assert scheme.group_size is not None
    spread = grouped(values, scheme.group_size)
    full, middle = _ranges(scheme, spread)
    factors = _FACTORS[scheme.dtype]
    best, least = torch.full_like(full, factors[0]), torch.full_like(full, torch.inf)
    for factor in factors if len(factors) > 1 else ():
        scales, zeros = _rounded(scheme, full * factor, middle)
        error = _codes(scheme, spread, scales, zeros)
        error = error.sub_(zeros).mul_(scales).sub_(spread).square_().sum(-1, keepdim=True)
        best = torch.where(error < least, factor, best)
        least = torch.minimum(error, least)
    scales, zeros = _rounded(scheme, full * best, middle)
    codes = _codes(scheme, spread, scales, zeros).to(torch.int8).flatten(1)[:, : values.shape[1]]
    offsets = None if scheme.symmetric else zeros.squeeze(-1).to(torch.int8)
    return scales.squeeze(-1).to(torch.float16), offsets, codes


def _ranges(scheme: Scheme, spread: Tensor) -> tuple[Tensor, Tensor]:
    """The scales that clip no value, and the middle of each range, of groups `spread` [n, groups, size].

    Each [n, groups, 1].
    """
    lowest, highest = LEVELS[scheme.dtype]
    low, high = spread.amin(-1, keepdim=True), spread.amax(-1, keepdim=True)
    if not scheme.symmetric:
        low, high = low.clamp_(max=0.0), high.clamp_(min=0.0)  # zero must have a code
        return (high - low) / (highest - lowest), (low + high) / 2
    if lowest == -highest:
        scales = torch.maximum(high, -low) / highest
    else:  # there is one more negative code: a negative scale gives it to the positive values
        scales = torch.where(high > -low, high, low) / lowest
    return scales, torch.zeros_like(scales)


def _rounded(scheme: Scheme, scales: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros rounded as they are stored, in fp32."""
    scales = scales.to(torch.float16).float()
    if scheme.symmetric:
        return scales, middle
    lowest, highest = LEVELS[scheme.dtype]
    return scales, ((lowest + highest) / 2 - middle * _inverse(scales)).round_().clamp_(lowest, highest)


def _inverse(scales: Tensor) -> Tensor:
    """1 / scale; 0 where the scale is 0, so that the codes are 0."""
    return torch.where(scales == 0.0, 0.0, 1.0 / scales)


def _codes(scheme: Scheme, spread: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The nearest codes, in fp32."""
    return (spread * _inverse(scales)).add_(zeros).round_().clamp_(*LEVELS[scheme.dtype])
