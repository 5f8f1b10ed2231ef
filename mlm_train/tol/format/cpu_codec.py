"""Decoding int8 and int4 rows on a CPU in one pass (cpu_codec.cpp), to the bits of codec.decode.

With torch a row passes through the caches a dozen times, and for a token's row the operations take longer to
start than to run.
"""

import ctypes
from ctypes import POINTER, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from mlm_train.tol.format.schemes import LEVELS, Encoding
from mlm_train.utils.native import compiled_library

SOURCE = Path(__file__).with_name("cpu_codec.cpp")
GRAIN = 2**16  # values per thread: fewer take longer to share than to decode


class _Field(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in ("bits", "width", "group", "scales", "zeros", "codes"))


def decode_rows(encoding: Encoding, rows: Tensor, hidden: int, dtype: torch.dtype) -> Tensor | None:
    """Decode a layer of rows uint8 [n, row bytes] to its values [n, width] in float32 or bfloat16.

    None for what it does not do (other types, devices and layouts), and where there is no compiler.
    """
    if (
        encoding.dtype not in LEVELS
        or rows.device.type != "cpu"
        or rows.stride(1) != 1
        or dtype not in (torch.float32, torch.bfloat16)
    ):
        return None
    library = compiled_library(SOURCE)
    if library is None:
        return None
    library.decode.argtypes = [POINTER(_Field), c_void_p, *(c_int64 for _ in range(4)), c_void_p]
    assert encoding.group_size is not None and encoding.scales is not None
    width = encoding.width(hidden)
    field = _Field(
        bits=8 if encoding.dtype == "int8" else 4,
        width=width,
        group=encoding.group_size,
        scales=encoding.scales,
        zeros=-1 if encoding.zeros is None else encoding.zeros,
        codes=encoding.codes,
    )
    out = rows.new_empty(len(rows), width, dtype=dtype)
    threads = max(1, min(torch.get_num_threads(), out.numel() // GRAIN))
    is_bfloat16 = int(dtype == torch.bfloat16)
    library.decode(field, rows.data_ptr(), len(rows), rows.stride(0), threads, is_bfloat16, out.data_ptr())
    return out
