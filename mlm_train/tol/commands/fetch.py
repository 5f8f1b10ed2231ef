"""`mlm-train tol fetch`: its words, and what runs."""

import argparse
from typing import TYPE_CHECKING

from mlm_train.utils.arguments import add_action
from mlm_train.utils.units import in_units

if TYPE_CHECKING:
    from mlm_train.utils.arguments import Actions

_HELP = """Copy a table from a URL, or a folder, into a folder from which a model can serve.

Every file is checked while it is written; the index is the last. A copy that was killed goes on where it
stopped, and a folder that was damaged later is made whole: run the same command again.

examples:
  mlm-train tol fetch s3://bucket/tol/run1 /scratch/run1
  srun --ntasks-per-node=1 mlm-train tol fetch s3://bucket/tol/run1 /scratch/run1     # a copy on each node"""


def add_fetch(actions: "Actions") -> None:
    """Add the action."""
    parser = add_action(actions, "fetch", "copy a table from a URL", _HELP)
    parser.add_argument("source", metavar="URL", help="what `tol build --output` was given; or a folder")
    parser.add_argument("folder", metavar="DIR", help="folder to write; new, unfinished, or damaged")


def run_fetch(args: argparse.Namespace) -> int:
    """Exit code 0."""
    from mlm_train.tol.storage.urls import refuse_url_output, shown
    from mlm_train.tol.tools.fetch import fetch_tol

    refuse_url_output(args.folder, "a copy is read from there")
    index = fetch_tol(args.source, args.folder)
    print(
        f"{args.folder}: {index.vocab_size} rows in {len(index.partitions)} partitions, "
        f"{in_units(index.bytes)}, as at {shown(args.source)}"
    )
    return 0
