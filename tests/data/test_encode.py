"""Encoding in several processes: the order of the input, and processes that are killed."""

import multiprocessing
import threading
from dataclasses import dataclass

import numpy as np
import pytest

from mlm_train.data.encode import encode_in_order
from mlm_train.data.prepared import PreparedData
from mlm_train.data.tokenizer import Tokenizer, tokenizer_of
from mlm_train.errors import UserError


@dataclass
class Batch:
    texts: list[str]


@pytest.fixture
def tokenizer(prepared: PreparedData) -> Tokenizer:
    return tokenizer_of(prepared.path)


def test_results_are_in_order_and_the_same_with_any_number(tokenizer: Tokenizer) -> None:
    batches = [Batch([f"number {i}", "x" * (i % 7)]) for i in range(30)]
    alone = list(encode_in_order(iter(batches), tokenizer, 1))
    together = list(encode_in_order(iter(batches), tokenizer, 3))
    for (batch, ids), (other, others) in zip(alone, together, strict=True):
        assert batch is other and all(map(np.array_equal, ids, others))
    assert not multiprocessing.active_children()


def test_a_process_killed_at_any_moment_is_one_line(tokenizer: Tokenizer) -> None:
    """Also while it writes a result that is longer than what a pipe holds."""
    batches = (Batch(["many words " * 50_000]) for _ in range(1000))
    encoded = encode_in_order(batches, tokenizer, 2)
    next(encoded)
    for delay, child in enumerate(multiprocessing.active_children()):
        threading.Timer(0.1 * delay, child.kill).start()
    with pytest.raises(UserError, match="a tokenizing process was killed"):
        for _ in encoded:
            pass
    assert not multiprocessing.active_children()
