"""Tests of zero-bubble schedules, which an old torch does not run: they are left out there, and say so."""

import pytest
import torch

from mlm_train.config.parallel import ZERO_BUBBLE
from mlm_train.parallel.runtime import ZERO_BUBBLE_TORCH, has_zero_bubble

_NEEDED = ".".join(map(str, ZERO_BUBBLE_TORCH))


def runs_here(schedule: str | None) -> bool:
    """Whether this torch has a schedule, given by its name or as an override of the config."""
    return has_zero_bubble() or (schedule or "").rpartition("=")[2] not in ZERO_BUBBLE


def skip_the_rest(*left_out: str) -> None:
    """Skip what is left of a test, if anything was left out for the want of a newer torch."""
    if left_out:
        pytest.skip(f"needs torch {_NEEDED}, this is {torch.__version__}: {', '.join(left_out)}")
