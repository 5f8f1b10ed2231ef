"""Encode batches of texts in several processes, with the results in the order of the input.

Each process has a connection of its own. concurrent.futures' processes share one for their results: where one
is killed as it writes a long result, by a lack of memory or a signal, the pool waits for the rest forever.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol, TypeVar

import numpy as np

from mlm_train.data.tokenizer import Tokenizer
from mlm_train.errors import UserError
from mlm_train.utils.signals import deaf_children


class EncodedBatch(Protocol):
    """Anything that holds texts; returned together with their ids."""

    @property
    def texts(self) -> list[str]: ...


AnyBatch = TypeVar("AnyBatch", bound=EncodedBatch)
Ids = list[np.ndarray]


def encode_in_order(
    batches: Iterator[AnyBatch], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[AnyBatch, Ids]]:
    """Each batch with one int32 array of ids per text.

    The result does not depend on `workers`. At most 4 batches per worker are held in memory.
    Raises UserError where a worker process was killed.
    """
    if workers == 1:
        for batch in batches:
            yield batch, _encode(tokenizer, batch.texts)
        return
    resource_tracker.ensure_running()  # before deaf_children: its start unblocks SIGINT
    started: list[_Worker] = []
    idle: SimpleQueue[_Worker] = SimpleQueue()
    waiting: deque[tuple[AnyBatch, Future[Ids]]] = deque()
    threads = ThreadPoolExecutor(workers)  # each waits for one worker
    try:
        for batch in batches:
            with deaf_children():
                if len(started) < workers:
                    started.append(_Worker(tokenizer))
                    idle.put(started[-1])
                waiting.append((batch, threads.submit(_encode_in_one, idle, batch.texts)))
            if len(waiting) == 4 * workers:
                yield _finished(waiting)
        while waiting:
            yield _finished(waiting)
    except _KilledError:
        raise UserError(
            "a tokenizing process was killed, most likely for lack of memory; "
            f"use fewer --workers than {workers}"
        ) from None
    finally:
        for worker in started:
            worker.kill()  # ends the wait of its thread, too
        threads.shutdown(cancel_futures=True)


def _finished(waiting: "deque[tuple[AnyBatch, Future[Ids]]]") -> tuple[AnyBatch, Ids]:
    batch, future = waiting.popleft()
    return batch, future.result()


def _encode_in_one(idle: "SimpleQueue[_Worker]", texts: list[str]) -> Ids:
    worker = idle.get()
    try:
        return worker.encode(texts)
    finally:
        idle.put(worker)


class _KilledError(Exception):
    """A worker process is gone."""


class _Worker:
    """A process that encodes, one batch at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, tokenizer.path, tokenizer.eod_id)
        self._process = context.Process(target=_work, args=arguments, daemon=True)
        self._process.start()
        theirs.close()  # with it, reading from a process that was killed would wait forever

    def encode(self, texts: list[str]) -> Ids:
        """Ids of each text. Raises the worker's exception, and _KilledError where it is gone."""
        try:
            self._connection.send(texts)
            found: Ids | Exception = self._connection.recv()
        except (EOFError, OSError):
            raise _KilledError from None
        if isinstance(found, Exception):
            raise found
        return found

    def kill(self) -> None:
        """End the process at once: it holds nothing that others need."""
        self._process.kill()
        self._process.join()


def _work(connection: "Connection[Ids | Exception, list[str]]", path: Path, eod_id: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    try:
        tokenizer = Tokenizer.load(path, eod=eod_id)
        while True:
            texts = connection.recv()
            try:
                connection.send(_encode(tokenizer, texts))
            except Exception as error:
                connection.send(error)
    except (EOFError, OSError):  # the main process is gone
        return


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Ids:
    return [np.array(ids, dtype=np.int32) for ids in tokenizer.encode_batch(texts)]
