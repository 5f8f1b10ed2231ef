"""Encode batches of texts in several processes, with the results in the order of the input."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from mlm_train.data.tokenizer import Tokenizer
from mlm_train.errors import UserError
from mlm_train.utils.signals import deaf_children, held


class EncodedBatch(Protocol):
    """Anything that holds texts; returned together with their ids."""

    @property
    def texts(self) -> list[str]: ...


AnyBatch = TypeVar("AnyBatch", bound=EncodedBatch)


def encode_in_order(
    batches: Iterator[AnyBatch], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[AnyBatch, list[np.ndarray]]]:
    """Each batch with one int32 array of ids per text.

    The result does not depend on `workers`. At most 4 batches per worker are held in memory.
    Raises UserError where a worker process was killed.
    """
    if workers == 1:
        for batch in batches:
            yield batch, _encode(tokenizer, batch.texts)
        return
    resource_tracker.ensure_running()  # before deaf_children: its start unblocks SIGINT
    with held():  # a semaphore whose creation is interrupted would be reported as leaked
        pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(tokenizer.path, tokenizer.eod_id),
        )
    waiting: deque[tuple[AnyBatch, Future[list[np.ndarray]]]] = deque()
    try:
        for batch in batches:
            with deaf_children():  # the first submit starts the processes
                waiting.append((batch, pool.submit(_encode_here, batch.texts)))
            if len(waiting) == 4 * workers:
                yield _finished(waiting)
        while waiting:
            yield _finished(waiting)
    except BrokenProcessPool:
        raise UserError(
            "a tokenizing process was killed, most likely for lack of memory; "
            f"use fewer --workers than {workers}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(waiting: "deque[tuple[AnyBatch, Future[Any]]]") -> tuple[AnyBatch, list[np.ndarray]]:
    batch, future = waiting.popleft()
    return batch, future.result()


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    return [np.array(ids, dtype=np.int32) for ids in tokenizer.encode_batch(texts)]


_tokenizer: Tokenizer  # set in worker processes only


def _start_worker(path: Path, eod_id: int) -> None:
    global _tokenizer
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _tokenizer = Tokenizer.load(path, eod=eod_id)


def _exit_with_parent() -> None:
    """Exit when the main process is gone: workers of a killed one would wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_here(texts: list[str]) -> list[np.ndarray]:
    return _encode(_tokenizer, texts)
