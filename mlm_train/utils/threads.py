"""Work done by a few threads: reading, hashing and writing release Python's lock."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def begun(work: Callable[[], Result]) -> Future[Result]:
    """Start work that may never return, in a thread that ends with the process."""
    future: Future[Result] = Future()

    def attempt() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=attempt, daemon=True).start()
    return future


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yield the result of `work` on each item, in order, or raise its failure.

    Twice as many items as threads are under way at most; none is when the iterator ends, however it ends.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, "checkpoint") as pool:
        try:
            for item in items:
                if len(pending) == 2 * threads:
                    yield pending.popleft().result()
                pending.append(pool.submit(work, item))
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
