"""Hardware figures that a plan assumes."""

import argparse
import math
from dataclasses import dataclass

from mlm_train.errors import UserError


@dataclass(frozen=True)
class Assumption:
    """An assumed figure: an option with a default."""

    option: str
    default: float
    meaning: str

    def of(self, args: argparse.Namespace) -> float:
        """The option's value. UserError where it is out of range."""
        return positive(self.option, getattr(args, self.option.replace("-", "_")))


def positive(option: str, value: float) -> float:
    """Check that an option's value is finite and above zero. Returns it; raises UserError."""
    if not 0 < value < math.inf:
        raise UserError(f"--{option} {value:g}: give a number above 0")
    return value


ASSUMPTIONS = (
    Assumption("vram-gb", 24, "VRAM, GB; without room for the KV cache"),
    Assumption("vram-gbs", 1000, "VRAM bandwidth, GB/s"),
    Assumption("ram-gb", 64, "RAM, GB"),
    Assumption("ram-gbs", 25, "RAM to device bandwidth, GB/s (16 lanes of PCIe 4)"),
    Assumption("nvme-gb", 1000, "NVMe, GB"),
    Assumption("nvme-gbs", 5, "NVMe to device bandwidth, GB/s"),
    Assumption("nvme-latency-us", 100, "latency of a random NVMe read, microseconds"),
    Assumption("nvme-reads", 32, "concurrent random NVMe reads"),
    Assumption("tflops", 100, "matrix multiplications on the decoding device, TFLOP/s"),
    Assumption(
        "distinct", 1, "distinct tokens / batch size of a decoding step; 1 is the worst case for a ToL"
    ),
    Assumption("write-gbs", 1, "write bandwidth for the ToL, GB/s"),
)
