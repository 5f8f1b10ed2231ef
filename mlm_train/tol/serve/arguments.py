"""Options of the commands that serve a model from a table."""

import argparse
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_train.utils.units import size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlm_train.model.source import MemorySource
    from mlm_train.tol.serve.store import StoreOptions


def add_tol_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--tol` and how the table is served."""
    parser.add_argument(
        "--tol",
        metavar="TOLDIR",
        help="folder written by `mlm-train tol build`: FFN-M is looked up, its weights are never loaded",
    )
    parser.add_argument(
        "--tol-tier",
        choices=("resident", "shared", "disk"),
        default="shared",
        help="where its rows are: in memory; in mapped files, one copy for all processes of a node; or on "
        "disk, read when they are needed (default %(default)s)",
    )
    parser.add_argument(
        "--tol-lock", action="store_true", help="tier shared: read the files in and keep them in memory"
    )
    parser.add_argument(
        "--tol-cache", type=size, default=0, metavar="SIZE", help="tier disk: memory for rows, such as 512MB"
    )
    parser.add_argument(
        "--tol-hot",
        metavar="DATA",
        help="tier disk: the cache holds the tokens most frequent in this folder of `data prepare` (default: "
        "those used last)",
    )
    parser.add_argument(
        "--tol-direct", action="store_true", help="tier disk: reads leave the page cache alone"
    )
    parser.add_argument(
        "--tol-patch", action="append", default=[], metavar="FILE", help="apply a patch; may be repeated"
    )


def add_counters_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--tensorboard`, for `counted`."""
    parser.add_argument(
        "--tensorboard",
        metavar="DIR",
        help="write what the table's counters count in each batch there: rows, hits, bytes, waits",
    )


def store_options(args: argparse.Namespace, *also: str) -> "StoreOptions":
    """How the table is to be served. UserError for options without effect; also: the command's own ones."""
    from mlm_train.errors import UserError
    from mlm_train.tol.serve.store import StoreOptions

    options = ("tol_lock", "tol_cache", "tol_hot", "tol_direct", "tol_patch", *also)
    given = ["tol_tier"] * (args.tol_tier != "shared") + [
        name for name in options if getattr(args, name, None)
    ]
    if given and args.tol is None:
        raise UserError(
            f"--{given[0].replace('_', '-')} has no effect without a table: give --tol TOLDIR too"
        )
    hot = None
    if args.tol_hot is not None:
        if not args.tol_cache:
            raise UserError("--tol-hot chooses what --tol-cache holds: give --tol-cache SIZE too")
        from mlm_train.tol.serve.frequency import most_frequent_in

        hot = most_frequent_in(args.tol_hot)
    return StoreOptions(
        tier=args.tol_tier, lock=args.tol_lock, cache_bytes=args.tol_cache, hot=hot, direct=args.tol_direct
    )


@contextmanager
def counted(source: "MemorySource | None", folder: str | None) -> "Iterator[Callable[[], None]]":
    """What to call after each batch, for the counters of --tensorboard `folder`; None: nothing is written."""
    from mlm_train.tol.serve.source import TolSource

    if folder is None or not isinstance(source, TolSource):
        yield lambda: None
        return
    from mlm_train.tol.serve.events import CounterEvents

    with closing(CounterEvents(source.store.counters, Path(folder))) as events:
        yield events.after_batch
