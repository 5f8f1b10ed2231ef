"""Parse and format sizes in bytes; perplexities."""

import argparse
import math


def size(text: str) -> int:
    """Parse a size such as 40MB, 3.2GB, 512MiB or 500000 to bytes; a type for argparse."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        parsed = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 40MB or 3.2GB") from None
    if parsed < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least one byte")
    return parsed


def in_units(size: float) -> str:
    """Format bytes in the largest fitting decimal unit: 1 byte, 634.66 kB, 11.63 GB."""
    value, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    if unit == "bytes":
        return "1 byte" if round(size) == 1 else f"{size:,.0f} bytes"
    return f"{value:.2f} {unit}"


def perplexity(loss: float) -> float:
    """exp(loss), or infinity if it would overflow."""
    return math.exp(loss) if loss < 700 else math.inf
