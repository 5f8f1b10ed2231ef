"""What a plan assumes of hardware that it cannot see."""

import argparse
import math
from dataclasses import dataclass

from mlm_train.errors import UserError


@dataclass(frozen=True)
class Assumption:
    """A figure that the plan takes on trust: an option with a default."""

    option: str
    default: float
    meaning: str

    def of(self, args: argparse.Namespace) -> float:
        """Its value; UserError where it is out of range."""
        return positive(self.option, getattr(args, self.option.replace("-", "_")))


def positive(option: str, value: float) -> float:
    """The value; UserError where it is not above zero and finite."""
    if not 0 < value < math.inf:
        raise UserError(f"--{option} {value:g}: give a number above 0")
    return value


ASSUMPTIONS = (
    Assumption("vram-gb", 24, "VRAM, GB; the KV cache is left out"),
    Assumption("vram-gbs", 1000, "VRAM's bandwidth, GB/s"),
    Assumption("ram-gb", 64, "RAM, GB"),
    Assumption("ram-gbs", 25, "from RAM to the device, GB/s (16 lanes of PCIe 4)"),
    Assumption("nvme-gb", 1000, "NVMe, GB"),
    Assumption("nvme-gbs", 5, "from NVMe to the device, GB/s"),
    Assumption("nvme-latency-us", 100, "a random read from NVMe, microseconds"),
    Assumption("nvme-reads", 32, "random reads from NVMe under way at once"),
    Assumption("tflops", 100, "products of the device that decodes, TFLOP/s"),
    Assumption("distinct", 1, "distinct tokens of a decoded step / its batch; 1 is the worst for a ToL"),
    Assumption("write-gbs", 1, "writing the ToL, GB/s"),
)
