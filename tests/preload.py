"""Imports of every rank of a distributed test, done once in the server that ranks are forked from."""

import torch

import tests.parallel.parity_cases  # noqa: F401
from mlm_train.parallel.engine.deepspeed_zero import _load_deepspeed

_load_deepspeed(torch.device("cpu"))
