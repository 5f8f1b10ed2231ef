"""Sizes in bytes, as people write them and read them."""

import argparse


def size(text: str) -> int:
    """An option's bytes, such as 40MB, 3.2GB, 512MiB or 500000; the type of an argument of argparse."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        found = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 40MB or 3.2GB") from None
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least one byte")
    return found


def in_units(size: float) -> str:
    """Bytes in the largest decimal unit that leaves one or more: 1 byte, 634.66 kB, 11.63 GB."""
    value, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    if unit == "bytes":
        return "1 byte" if round(size) == 1 else f"{size:,.0f} bytes"
    return f"{value:.2f} {unit}"
