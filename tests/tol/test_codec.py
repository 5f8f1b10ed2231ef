"""Encoded rows: read back by an independent reader of docs/tol-format.md, as precise as types allow."""

import itertools
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from mlm_train.tol.format import codec
from mlm_train.tol.format.codec import NotFinite, decode
from mlm_train.tol.format.cpu_codec import decode_rows
from mlm_train.tol.format.schemes import LEVELS, Dtype, Encoding, Scheme, layout
from mlm_train.utils import native
from tests.commands import ROOT

HIDDEN = 75  # odd, and no multiple of a group
SCHEMES = [
    Scheme(dtype="bfloat16"),
    Scheme(dtype="float32", rank=5),
    Scheme(dtype="int8", group_size=64),
    Scheme(dtype="int8", group_size=16, symmetric=False, rank=33),
    Scheme(dtype="int4", group_size=32),
    Scheme(dtype="int4", group_size=64, symmetric=False),
    Scheme(dtype="int4", group_size=8, rank=7),
    Scheme(dtype="float16", rank=1),
]


def encode(scheme: Scheme, values: Tensor) -> Tensor:
    width = values.shape[1] if scheme.rank is None else HIDDEN
    out = torch.randint(256, (len(values), scheme.bytes(width)), dtype=torch.uint8)
    codec.encode(scheme, values, out)
    return out


def random_values(rows: int, width: int, seed: int = 0) -> Tensor:
    """Rows of very different size, some groups of one sign, some of zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator) * torch.logspace(-3, 2, rows).unsqueeze(1)
    values[1::4] = values[1::4].abs() + 0.5
    values[2::4, : width // 2] = 0.0
    return values


def read_by_hand(row: bytes, encoding: Encoding, hidden: int) -> list[Fraction]:
    """A reader of one row in plain Python, from the format's description alone."""
    width = encoding.rank or hidden
    if encoding.dtype == "bfloat16":
        halves = struct.unpack_from(f"<{width}H", row, encoding.codes)
        return [Fraction(struct.unpack("<f", struct.pack("<I", half << 16))[0]) for half in halves]
    if encoding.dtype in ("float16", "float32"):
        letter = {"float16": "e", "float32": "f"}[encoding.dtype]
        return [Fraction(x) for x in struct.unpack_from(f"<{width}{letter}", row, encoding.codes)]
    values = []
    for i in range(width):
        assert encoding.group_size is not None and encoding.scales is not None
        group = i // encoding.group_size
        (scale,) = struct.unpack_from("<e", row, encoding.scales + 2 * group)
        zero = 0 if encoding.zeros is None else struct.unpack_from("<b", row, encoding.zeros + group)[0]
        if encoding.dtype == "int8":
            (code,) = struct.unpack_from("<b", row, encoding.codes + i)
        else:
            byte = row[encoding.codes + i // 2]
            code = (byte >> 4 if i % 2 else byte & 15) - 8
        values.append((code - zero) * Fraction(scale))
    return values


def test_layers_of_a_row_are_where_the_format_puts_them() -> None:
    encodings = layout(SCHEMES, HIDDEN)
    total = sum(scheme.bytes(HIDDEN) for scheme in SCHEMES)
    parts = [random_values(9, scheme.width(HIDDEN), seed) for seed, scheme in enumerate(SCHEMES)]
    rows = torch.cat([encode(scheme, part) for scheme, part in zip(SCHEMES, parts, strict=True)], 1)
    assert rows.shape == (9, total) and rows.dtype == torch.uint8
    spans = sorted(span for encoding in encodings for span in encoding.spans(HIDDEN))
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] <= total
    for encoding in encodings:
        assert min(start for start, _ in encoding.spans(HIDDEN)) % 16 == 0
        values = decode(encoding, rows, HIDDEN)
        for row, found in zip(rows, values.double().tolist(), strict=True):
            true = [float(value) for value in read_by_hand(row.numpy().tobytes(), encoding, HIDDEN)]
            assert np.allclose(found, true, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("group_size", [1, 7, 64, 100])
def test_one_pass_gives_the_same_bits(dtype: Dtype, group_size: int) -> None:
    for symmetric, width in itertools.product((True, False), (HIDDEN, 64)):
        scheme = Scheme(dtype=dtype, group_size=group_size, symmetric=symmetric)
        encoding = layout([Scheme(dtype="bfloat16"), scheme], width)[1]
        values = random_values(9, width) * torch.tensor([1e-6, 1.0, 10.0]).repeat(3).unsqueeze(1)
        rows = torch.zeros(18, 2 * width + 16 + scheme.bytes(width) + 8, dtype=torch.uint8)[::2]
        codec.encode(scheme, values, rows[:, -scheme.bytes(width) - 8 :])
        encoding = encoding.moved(rows.shape[1] - scheme.bytes(width) - 8 - encoding.spans(width)[0][0])
        true = decode(encoding, rows, width)
        for wanted, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
            found = decode_rows(encoding, rows, width, wanted)
            assert found is not None and torch.equal(found.view(bits), true.to(wanted).view(bits))


def test_where_one_pass_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Scheme(dtype="int8", group_size=8)
    (encoding,), rows = layout([scheme], 16), encode(scheme, random_values(2, 16))
    assert decode_rows(encoding, rows, 16, torch.float32) is not None
    assert decode_rows(encoding, rows, 16, torch.float16) is None
    assert decode_rows(encoding, rows.T.contiguous().T, 16, torch.float32) is None
    (plain,) = layout([Scheme(dtype="bfloat16")], 16)
    assert decode_rows(plain, rows, 16, torch.bfloat16) is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.compiled_library.cache_clear()
    assert decode_rows(encoding, rows, 16, torch.float32) is None
    native.compiled_library.cache_clear()


def test_the_example_of_the_page() -> None:
    """Our codec writes its bytes and reads its values, and so does the reader by hand."""
    page = (ROOT / "docs/tol-format.md").read_text().partition("### An example")[2]
    stored, held = ("".join(block) for block in _blocks(page)[:2])
    row = bytes.fromhex(stored)
    layers = [[float(word) for word in line.split()] for line in held.strip().splitlines()]
    schemes = [
        Scheme(dtype="int4", group_size=4, symmetric=False),
        Scheme(dtype="int8", group_size=4),
        Scheme(dtype="bfloat16", rank=2),
    ]
    encodings = layout(schemes, 6)
    assert [(e.scales, e.zeros, e.codes) for e in encodings] == [(0, 4, 6), (16, None, 20), (None, None, 32)]
    rows = torch.tensor([list(row)], dtype=torch.uint8)
    for encoding, layer in zip(encodings, layers, strict=True):
        assert decode(encoding, rows, 6)[0].tolist() == layer
        assert [float(value) for value in read_by_hand(row, encoding, 6)] == layer
    given = [[0.5, 1.5, -0.25, 1.0, 3.0, -1.0], [0.75, -1.27, 0.01, 0.3, -2.0, 1.0], [1.5, -0.25]]
    parts = []
    for scheme, values in zip(schemes, given, strict=True):
        parts.append(torch.empty(1, scheme.bytes(6), dtype=torch.uint8))
        codec.encode(scheme, torch.tensor([values]), parts[-1])
    assert bytes(torch.cat(parts, 1)[0].tolist()) == row


def _blocks(page: str) -> list[list[str]]:
    """The indented blocks of a Markdown text."""
    groups = itertools.groupby(page.splitlines(keepends=True), lambda line: line.startswith("    "))
    return [list(lines) for indented, lines in groups if indented]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.dtype}-{scheme.symmetric}")
def test_values_are_as_close_as_the_type_allows(scheme: Scheme) -> None:
    values = random_values(40, scheme.width(HIDDEN))
    (encoding,) = layout([scheme], HIDDEN)
    found = decode(encoding, encode(scheme, values), HIDDEN).float()
    error = (found - values).abs()
    if scheme.group_size is None:
        info = torch.finfo(found.dtype if scheme.dtype == "float32" else getattr(torch, scheme.dtype))
        assert (error <= info.eps / 2 * values.abs() + info.smallest_normal * info.eps).all()
        return
    lowest, highest = LEVELS[scheme.dtype]
    for start in range(0, values.shape[1], scheme.group_size):
        group = values[:, start : start + scheme.group_size]
        low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
        step = torch.maximum(-low, high) / -lowest
        if not scheme.symmetric:
            step = (high - low) / (highest - lowest)
        worst = error[:, start : start + scheme.group_size].square().mean(1).sqrt()
        # Without clipping the error is at most half a step, at the upper end one step (one code less there,
        # or a rounded zero); clipping is chosen if the mean square is smaller. 1e-6: scales below float16's.
        assert (worst <= 1.01 * step + 1e-6).all()
        assert (worst[step == 0.0] == 0.0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_for_a_scale_is_not_worse_than_the_full_range(
    symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = Scheme(dtype="int4", group_size=64, symmetric=symmetric)
    (encoding,) = layout([scheme], 640)
    values = torch.randn(50, 640, generator=torch.Generator().manual_seed(1))

    def errors() -> Tensor:
        error = decode(encoding, encode(scheme, values), 640) - values
        return error.square().unflatten(1, (-1, 64)).sum(-1)

    searched = errors()
    monkeypatch.setattr("mlm_train.tol.format.codec._FACTORS", {"int4": (1.0,)})
    full = errors()
    assert (searched <= full * (1 + 1e-6)).all() and searched.sum() < 0.95 * full.sum()


def test_more_bits_and_smaller_groups_err_less() -> None:
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    values *= torch.logspace(-1, 1, 256)

    def error(**fields: object) -> float:
        scheme = Scheme.model_validate(fields)
        (encoding,) = layout([scheme], 256)
        return float((decode(encoding, encode(scheme, values), 256) - values).norm() / values.norm())

    int4 = [error(dtype="int4", group_size=size) for size in (16, 64, 256)]
    int8 = [error(dtype="int8", group_size=size) for size in (16, 64, 256)]
    assert (
        int8 == sorted(int8)
        and int4 == sorted(int4)
        and all(8 * eight < four for eight, four in zip(int8, int4, strict=True))
    )
    assert error(dtype="int4", group_size=64, symmetric=False) < int4[1]


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_values_that_a_type_cannot_hold_are_rejected(dtype: str, bad: float) -> None:
    values = random_values(10, HIDDEN)
    values[6, 70] = bad
    scheme = Scheme(dtype=dtype, group_size=None if dtype == "float16" else 64)
    with pytest.raises(NotFinite) as caught:
        encode(scheme, values)
    assert (caught.value.row, caught.value.dtype) == (6, dtype)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", LEVELS)
def test_a_group_wider_than_a_row_is_the_row(dtype: str, symmetric: bool) -> None:
    """Bytes and memory are the same: nothing beyond the row is allocated."""
    values = random_values(40, HIDDEN)
    given = {"dtype": dtype, "symmetric": symmetric}
    exact, wide = (Scheme.model_validate(given | {"group_size": size}) for size in (HIDDEN, 2**31 - 1))
    assert exact.sizes(HIDDEN) == wide.sizes(HIDDEN)
    size = sum(exact.sizes(HIDDEN))
    assert torch.equal(encode(exact, values)[:, :size], encode(wide, values)[:, :size])
    assert torch.equal(
        *(decode(layout([one], HIDDEN)[0], encode(exact, values), HIDDEN) for one in (exact, wide))
    )


def test_schemes_that_mean_nothing() -> None:
    for fields in ({"dtype": "int8"}, {"dtype": "bfloat16", "group_size": 64}, {"dtype": "int4", "rank": 0}):
        with pytest.raises(ValueError, match=r"group_size|greater than"):
            Scheme.model_validate(fields)
    with pytest.raises(ValueError, match="zeros to those"):
        Encoding(dtype="int8", group_size=64, symmetric=False, scales=0, codes=8)
