"""Imports of the processes that tests start, done once in the server that they are forked from."""

import torch

import tests.parallel.parity_cases
import tests.train.lives  # noqa: F401
from mlm_train.parallel.engine.deepspeed_zero import _load_deepspeed

_load_deepspeed(torch.device("cpu"))
