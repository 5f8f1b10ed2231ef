"""`mlm-train checkpoint`: list, verify, fetch and prune the checkpoints of a run."""

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlm_train.errors import UserError, escaped
from mlm_train.utils.arguments import add_action
from mlm_train.utils.urls import is_url, redacted

if TYPE_CHECKING:
    from mlm_train.checkpoint.keep import Keep, Manifests
    from mlm_train.checkpoint.manifest import Manifest

HELP = """List, verify, fetch and prune the checkpoints of a run.

examples:
  mlm-train checkpoint list runs/micro
  mlm-train checkpoint verify runs/micro
  mlm-train checkpoint fetch s3://bucket/runs/micro copies/micro
  mlm-train checkpoint prune runs/micro --keep-latest-k 1 --dry-run"""

_LIST_HELP = """Show steps, tokens, sizes, validation losses, why each is kept (newest,
checkpoint.keep_interval, best), and the parallel layout that wrote it. Only file sizes are checked; at a
URL (checkpoint.url) only manifests are read.

examples:
  mlm-train checkpoint list runs/micro
  mlm-train checkpoint list s3://bucket/runs/micro"""

_VERIFY_HELP = """Read every file and compare its checksum. A damaged file: exit code 2 and a line naming it.

examples:
  mlm-train checkpoint verify runs/micro
  mlm-train checkpoint verify runs/micro/checkpoints/step-00000100
  mlm-train checkpoint verify s3://bucket/runs/micro"""

_FETCH_HELP = """Copy a checkpoint from a URL (checkpoint.url) into a folder, and compare its checksums.

Give FOLDER to export, evaluate, checkpoint.warm_start, or anything else that reads a run. A run with
checkpoint.url resumes from there without it.

examples:
  mlm-train checkpoint fetch s3://bucket/runs/micro copies/micro                    # the newest one
  mlm-train checkpoint fetch s3://bucket/runs/micro/step-00000100 copies/micro"""

_PRUNE_HELP = """Delete all but the newest checkpoints, and the leftovers of killed saves.

Checkpoints that the run's config keeps (checkpoint.keep_interval and checkpoint.keep_best_k) stay, unless
--keep-interval and --keep-best-k override it. The newest checkpoint is verified first; if it is damaged,
nothing is deleted. The folder of a run in training is locked: set checkpoint.keep_latest_k there instead.

examples:
  mlm-train checkpoint prune runs/micro --dry-run
  mlm-train checkpoint prune runs/micro --keep-latest-k 3
  mlm-train checkpoint prune runs/micro --keep-interval 0 --keep-best-k 1"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `list`, `verify`, `fetch` and `prune`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listed = add_action(actions, "list", "list a run's checkpoints", _LIST_HELP)
    listed.add_argument("run", metavar="RUN", help="a run's folder, or its checkpoint.url")
    listed.add_argument("--json", action="store_true", help="write a JSON list instead of a table")
    verify = add_action(actions, "verify", "read every file and compare its checksum", _VERIFY_HELP)
    verify.add_argument(
        "path",
        metavar="PATH",
        help="a run's folder or checkpoint.url (all of its checkpoints), one checkpoint, or RUN/best",
    )
    fetch = add_action(actions, "fetch", "copy a checkpoint from a URL into a folder", _FETCH_HELP)
    fetch.add_argument("url", metavar="URL", help="a run's checkpoint.url, or one checkpoint there")
    fetch.add_argument("folder", metavar="FOLDER", help="new folder, or one of earlier copies")
    prune = add_action(actions, "prune", "delete all but the newest", _PRUNE_HELP)
    prune.add_argument("run", metavar="RUN", help="a run's folder")
    prune.add_argument(
        "--keep-latest-k",
        type=int,
        metavar="N",
        default=1,
        help="number of newest checkpoints to keep (default 1)",
    )
    for name, what in (("interval", "those whose step is a multiple of N"), ("best-k", "the N best")):
        text = f"also keep {what}; 0: none (default: the run's checkpoint.keep_{name.replace('-', '_')})"
        prune.add_argument(f"--keep-{name}", type=int, metavar="N", help=text)
    prune.add_argument("--dry-run", action="store_true", help="show what would be deleted, delete nothing")


def run(args: argparse.Namespace) -> int:
    """Run the chosen action. Returns 0, or 2 where `verify` finds a damaged checkpoint."""
    if args.action == "list":
        rows = _rows_at(args.run) if is_url(args.run) else _rows(_step_folders(Path(args.run)))
        return _list(rows, args.json)
    if args.action == "verify":
        return _verify_at(args.path) if is_url(args.path) else _verify(Path(args.path))
    if args.action == "fetch":
        return _fetch(args.url, args.folder)
    if is_url(args.run):
        raise UserError(f"{redacted(args.run)} is a URL; give a run's folder: a run prunes its own URL")
    return _prune(Path(args.run), args)


def _step_folders(path: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, also without a manifest. UserError where there is none."""
    from mlm_train.checkpoint.folders import resolve, step_folders

    return step_folders(resolve(path).parent)


def _list(rows: list[dict[str, Any]], as_json: bool) -> int:
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = ("step", "tokens", "GiB", "written", "by", "validation", "kept as", "whole")
    table = Table(*columns, box=box.SIMPLE, title=Text(escaped(rows[0]["folder"].rpartition("/")[0])))
    for row in rows:
        cells = (f"{row['step']:,}", f"{row['tokens']:,}", f"{row['bytes'] / 2**30:.3g}")
        loss = "" if row["validation_loss"] is None else f"{row['validation_loss']:.4f}"
        kept = ", ".join(row["kept"])
        table.add_row(*cells, row["written"], row["layout"], loss, kept, Text(escaped(row["fault"] or "yes")))
    Console(width=140, soft_wrap=True).print(table, soft_wrap=False)
    return 0


def _rows(folders: list[Path]) -> list[dict[str, Any]]:
    """A table row per checkpoint; the newest one's config decides which are kept on purpose."""
    from mlm_train.checkpoint.keep import Manifests

    manifests = Manifests()
    reasons = _run_keeps(folders[-1], manifests).reasons(folders, manifests)
    return [
        _row(folder, manifests) | {"validation_loss": _loss(folder, manifests), "kept": reasons[folder]}
        for folder in folders
    ]


def _loss(folder: Path, manifests: "Manifests") -> float | None:
    evaluation = manifests.evaluation(folder)
    return None if evaluation is None else evaluation.validation.loss


def _rows_at(url: str) -> list[dict[str, Any]]:
    """_rows of the committed checkpoints at a URL."""
    from mlm_train.checkpoint.fetch import committed_at, opened
    from mlm_train.checkpoint.keep import Keep, Manifests, step_of
    from mlm_train.checkpoint.load import config_of

    store, _ = opened(url)
    manifests = Manifests(lambda folder: store.manifest(folder.name))
    folders, rows = [Path(name) for name in committed_at(store)], []
    try:
        keep = Keep.of(config_of(manifests.of(folders[-1])).checkpoint)
    except UserError:
        keep = Keep(1)
    reasons = keep.reasons(folders, manifests)
    for folder in folders:
        row: dict[str, Any] = {"folder": store.at(folder.name), "step": step_of(folder), "written": ""}
        try:
            row |= _described(manifests.of(folder)) | {"fault": None}
        except UserError as error:
            row |= {"tokens": 0, "bytes": 0, "layout": "?", "fault": str(error)}
        rows.append(row | {"validation_loss": _loss(folder, manifests), "kept": reasons[folder]})
    return rows


def _run_keeps(newest: Path, manifests: "Manifests") -> "Keep":
    """What the config in a run's newest checkpoint keeps; where that is damaged, only the newest."""
    from mlm_train.checkpoint.keep import Keep
    from mlm_train.checkpoint.load import config_of
    from mlm_train.checkpoint.manifest import verify_files

    try:
        manifest = manifests.of(newest)
        verify_files(newest, manifest, hashes=False)
        return Keep.of(config_of(manifest).checkpoint)
    except UserError:
        return Keep(1)


def _row(folder: Path, manifests: "Manifests") -> dict[str, Any]:
    """A table row; `fault`: the message about a missing file or one of another size, else None."""
    from mlm_train.checkpoint.keep import step_of
    from mlm_train.checkpoint.manifest import MANIFEST, verify_files

    step = step_of(folder)
    row: dict[str, Any] = {"folder": str(folder), "step": step, "tokens": 0, "bytes": 0, "layout": "?"}
    written_last = folder / MANIFEST if (folder / MANIFEST).is_file() else folder
    row["written"] = datetime.fromtimestamp(written_last.stat().st_mtime).isoformat(" ", "seconds")
    try:
        manifest = manifests.of(folder)
        verify_files(folder, manifest, hashes=False)
    except UserError as error:
        return row | {"fault": str(error)}
    return row | _described(manifest) | {"fault": None}


def _described(manifest: "Manifest") -> dict[str, Any]:
    """What a table row takes from a manifest."""
    from mlm_train.checkpoint.load import config_of

    parallel = config_of(manifest).parallel
    return {
        "tokens": manifest.progress.tokens,
        "bytes": sum(entry.bytes for entry in manifest.files),
        "layout": f"{manifest.world} ranks, TP{parallel.tensor} PP{parallel.pipeline} {parallel.engine_name}",
    }


def _verify(path: Path) -> int:
    """Verify one checkpoint or all of a run. Returns 2 where one is damaged."""
    from rich.console import Console
    from rich.progress import track

    from mlm_train.checkpoint.folders import names_one, resolve
    from mlm_train.checkpoint.load import open_checkpoint

    folder = resolve(path)
    folders = [folder] if folder == path or names_one(path) else _step_folders(path)
    code = 0
    for folder in track(folders, "reading", console=Console(stderr=True), transient=True):
        try:
            manifest = open_checkpoint(folder)
        except UserError as error:
            print(f"mlm-train: {escaped(str(error))}", file=sys.stderr)
            code = 2
            continue
        _say_whole(str(folder), manifest)
    return code


def _say_whole(where: str, manifest: "Manifest") -> None:
    size = sum(entry.bytes for entry in manifest.files)
    print(f"{where}: whole, {len(manifest.files)} files, {size / 2**30:.2f} GiB")


def _verify_at(url: str) -> int:
    """_verify of one checkpoint at a URL, or of all."""
    from mlm_train.checkpoint.fetch import committed_at, opened
    from mlm_train.checkpoint.manifest import Damaged
    from mlm_train.utils.files import finished

    store, chosen = opened(url)
    code = 0
    for name in [chosen] if chosen is not None else committed_at(store):
        try:
            manifest = store.manifest(name)
            faults = finished(store.verify(name, manifest.every_file))
        except Damaged as error:
            faults = [error.fault]
        for fault in faults:
            print(f"mlm-train: {escaped(fault)}; remove {store.at(name)}", file=sys.stderr)
            code = 2
        if not faults:
            _say_whole(store.at(name), manifest)
    return code


def _fetch(url: str, folder: str) -> int:
    """Fetch a checkpoint."""
    from mlm_train.checkpoint.fetch import fetch_checkpoint

    if not is_url(url):
        raise UserError(f"{url} is not a URL; copy a folder with `cp -r`")
    if is_url(folder):
        raise UserError(f"{redacted(folder)} is a URL; name a folder: a checkpoint is read from there")
    print(f"{fetch_checkpoint(url, Path(folder))}: whole, copied from {redacted(url)}")
    return 0


def _prune(path: Path, args: argparse.Namespace) -> int:
    """Prune under the run's lock, after verifying the newest checkpoint."""
    from mlm_train.checkpoint.folders import committed, delete, remove_partials, write_names
    from mlm_train.checkpoint.keep import NEWEST, Keep, Manifests
    from mlm_train.checkpoint.load import config_of, open_checkpoint
    from mlm_train.utils.files import locked, writing

    for option, value, least in (
        ("--keep-latest-k", args.keep_latest_k, 1),
        ("--keep-interval", args.keep_interval, 0),
        ("--keep-best-k", args.keep_best_k, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{option} {value}: give at least {least}")
    root = _step_folders(path)[0].parent
    with locked(root.parent, "being trained"), writing(root):
        own = Keep.of(config_of(open_checkpoint(_step_folders(path)[-1])).checkpoint)
        every = own.every if args.keep_interval is None else args.keep_interval
        best = own.best if args.keep_best_k is None else args.keep_best_k
        keep = Keep(args.keep_latest_k, every, best)
        manifests = Manifests()
        kept = keep.reasons(committed(root), manifests)
        # First, so that none names a folder that is deleted.
        named = args.dry_run or write_names(root, keep, manifests)
        for folder, reasons in kept.items():
            if NEWEST in reasons:
                continue
            if reasons:
                print(f"kept {folder}: {', '.join(reasons)}")
                continue
            if not args.dry_run:
                delete(folder)
            print(f"{'would delete' if args.dry_run else 'deleted'} {folder}")
        if not args.dry_run:
            remove_partials(root)
        if not named:
            write_names(root, keep, manifests)
    print(f"{sum(map(bool, kept.values()))} of {len(kept)} checkpoints kept in {root}")
    return 0
