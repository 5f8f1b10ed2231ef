"""`mlm-train checkpoint`: list, verify and prune the checkpoints of a run."""

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from mlm_train.arguments import add_action
from mlm_train.errors import UserError, escaped

HELP = """The checkpoints of a run: which there are, whether they are whole, and fewer of them.

examples:
  mlm-train checkpoint list runs/micro
  mlm-train checkpoint verify runs/micro
  mlm-train checkpoint prune runs/micro --keep 1 --dry-run"""

_LIST_HELP = """Steps, tokens, sizes and the layouts that wrote them; files are only looked for, not read.

example:
  mlm-train checkpoint list runs/micro"""

_VERIFY_HELP = """Read every file and compare its checksum. Exit code 2 and one line naming the damaged file.

examples:
  mlm-train checkpoint verify runs/micro
  mlm-train checkpoint verify runs/micro/checkpoints/step-00000100"""

_PRUNE_HELP = """Delete all but the newest checkpoints, and what killed saves left behind.

The newest one that stays is verified first: where it is damaged nothing is deleted. A run that is
being trained keeps its folder to itself, see config field checkpoint.keep for that.

examples:
  mlm-train checkpoint prune runs/micro --dry-run
  mlm-train checkpoint prune runs/micro --keep 3"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `list`, `verify` and `prune`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listed = add_action(actions, "list", "which checkpoints a run has", _LIST_HELP)
    listed.add_argument("run", metavar="RUN", help="a run's folder")
    listed.add_argument("--json", action="store_true", help="write a JSON list instead of a table")
    verify = add_action(actions, "verify", "read and compare every file", _VERIFY_HELP)
    verify.add_argument("path", metavar="PATH", help="a run's folder (all of its checkpoints) or one of them")
    prune = add_action(actions, "prune", "delete all but the newest", _PRUNE_HELP)
    prune.add_argument("run", metavar="RUN", help="a run's folder")
    prune.add_argument("--keep", type=int, metavar="N", default=1, help="checkpoints to keep (default 1)")
    prune.add_argument("--dry-run", action="store_true", help="say what would go, delete nothing")


def run(args: argparse.Namespace) -> int:
    """0; 2 where a checkpoint is damaged."""
    if args.action == "list":
        return _list(Path(args.run), args.json)
    if args.action == "verify":
        return _verify(Path(args.path))
    return _prune(Path(args.run), args.keep, args.dry_run)


def _found(path: Path) -> list[Path]:
    """Checkpoints of a run, oldest first, those without a manifest too; UserError where there is none."""
    from mlm_train.checkpoint.folders import resolve, step_folders

    return step_folders(resolve(path).parent)


def _list(path: Path, as_json: bool) -> int:
    rows = [_row(folder) for folder in _found(path)]
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0
    from rich import box
    from rich.console import Console
    from rich.table import Table

    columns = ("step", "tokens", "GiB", "written", "by", "whole")
    table = Table(*columns, box=box.SIMPLE, title=str(_found(path)[0].parent))
    for row in rows:
        cells = (f"{row['step']:,}", f"{row['tokens']:,}", f"{row['bytes'] / 2**30:.3g}")
        table.add_row(*cells, row["written"], row["layout"], row["fault"] or "yes")
    Console(width=110, soft_wrap=True).print(table, soft_wrap=False)
    return 0


def _row(folder: Path) -> dict[str, Any]:
    """What the table says of one; `fault`: a file that is missing or of another size."""
    from mlm_train.checkpoint.load import config_of, open_checkpoint
    from mlm_train.checkpoint.manifest import MANIFEST

    step = int(folder.name.removeprefix("step-"))
    row: dict[str, Any] = {"folder": str(folder), "step": step, "tokens": 0, "bytes": 0, "layout": "?"}
    last = folder / MANIFEST if (folder / MANIFEST).is_file() else folder
    row["written"] = datetime.fromtimestamp(last.stat().st_mtime).isoformat(" ", "seconds")
    try:
        manifest = open_checkpoint(folder, "sizes")
    except UserError as error:
        return row | {"fault": str(error)}
    parallel = config_of(manifest).parallel
    row |= {
        "tokens": manifest.progress.tokens,
        "bytes": sum(entry.bytes for entry in manifest.files),
        "layout": f"{manifest.world} ranks, TP{parallel.tensor} PP{parallel.pipeline} ZeRO-{parallel.zero}",
    }
    return row | {"fault": None}


def _verify(path: Path) -> int:
    """All of a run's, or one; 2 where one is damaged."""
    from rich.console import Console
    from rich.progress import track

    from mlm_train.checkpoint.folders import resolve
    from mlm_train.checkpoint.load import open_checkpoint

    newest = resolve(path)
    folders = [path] if newest == path else _found(path)
    code = 0
    for folder in track(folders, "reading", console=Console(stderr=True), transient=True):
        try:
            manifest = open_checkpoint(folder)
        except UserError as error:
            print(f"mlm-train: {escaped(str(error))}", file=sys.stderr)
            code = 2
            continue
        size = sum(entry.bytes for entry in manifest.files)
        print(f"{folder}: whole, {len(manifest.files)} files, {size / 2**30:.2f} GiB")
    return code


def _prune(path: Path, keep: int, dry_run: bool) -> int:
    """Under the run's lock; the newest is verified before anything goes."""
    from mlm_train.checkpoint.folders import committed, delete, remove_partials
    from mlm_train.checkpoint.load import open_checkpoint
    from mlm_train.files import locked, writing

    if keep < 1:
        raise UserError(f"--keep {keep}: give at least 1")
    root = _found(path)[0].parent
    with locked(root.parent, "being trained"), writing(root):
        open_checkpoint(_found(path)[-1])
        folders = committed(root)
        for folder in folders[:-keep]:
            if not dry_run:
                delete(folder)
            print(f"{'would delete' if dry_run else 'deleted'} {folder}")
        if not dry_run:
            remove_partials(root)
    print(f"{min(keep, len(folders))} of {len(folders)} checkpoints stay in {root}")
    return 0
