"""`mlm-train tol fetch`."""

import argparse
from typing import TYPE_CHECKING

from mlm_train.utils.arguments import add_action
from mlm_train.utils.units import in_units

if TYPE_CHECKING:
    from mlm_train.utils.arguments import Actions

_HELP = """Copy a table from a URL or folder into a folder from which a model can serve.

Every file is checked while it is written; the index is written last. Run the same command again to resume a
killed copy, or to repair a folder that was damaged later.

examples:
  mlm-train tol fetch s3://bucket/tol/run1 /scratch/run1
  srun --ntasks-per-node=1 mlm-train tol fetch s3://bucket/tol/run1 /scratch/run1     # a copy on each node"""


def add_fetch(actions: "Actions") -> None:
    """Add the action."""
    parser = add_action(actions, "fetch", "copy a table from a URL", _HELP)
    parser.add_argument("source", metavar="URL", help="the --output of `tol build`: a URL or a folder")
    parser.add_argument("folder", metavar="DIR", help="folder to write; new, unfinished, or damaged")


def run_fetch(args: argparse.Namespace) -> int:
    """Fetch, print a summary, and return exit code 0."""
    from mlm_train.tol.storage.urls import refuse_url_output
    from mlm_train.tol.tools.fetch import fetch_tol
    from mlm_train.utils.urls import redacted

    refuse_url_output(args.folder, "a copy is read from there")
    index = fetch_tol(args.source, args.folder)
    print(
        f"{args.folder}: {index.vocab_size} rows in {len(index.partitions)} partitions, "
        f"{in_units(index.bytes)}, copied from {redacted(args.source)}"
    )
    return 0
