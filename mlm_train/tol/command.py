"""`mlm-train tol`: build and verify token-wise lookups."""

import argparse
import json
import sys

from mlm_train.arguments import add_action

HELP = """Build and verify token-wise lookups (ToL): FFN-M's output for every token of the vocabulary.

examples:
  mlm-train tol build exports/run1 --output tol/run1
  mlm-train tol verify tol/run1 --model exports/run1"""

_BUILD_HELP = """Compute FFN-M for the whole vocabulary on Ray and write it as a ToL folder.

A build that was killed goes on where it stopped: run the same command again. With --ray-address the
model and the output must lie on storage that every node sees under the same path.

examples:
  mlm-train tol build exports/run1 --output tol/run1
  mlm-train tol build exports/run1 --output tol/run1 --dtype float16 --workers 8
  mlm-train tol build /shared/run1 --output /shared/tol1 --workers 64 --ray-address auto"""

_VERIFY_HELP = """Check a ToL folder: coverage, sizes, SHA-256, finite values; with --model also the values.

Exit code 2 and one line for each damaged range of rows.

examples:
  mlm-train tol verify tol/run1
  mlm-train tol verify tol/run1 --model exports/run1 --sample 1000"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `build` and `verify`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = add_action(actions, "build", "compute FFN-M for every token", _BUILD_HELP)
    build.add_argument("model", metavar="MODEL", help="folder written by `mlm-train export`")
    build.add_argument("--output", metavar="DIR", required=True, help="folder to write; new or unfinished")
    build.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="type of the stored numbers (default %(default)s)",
    )
    build.add_argument(
        "--partitions",
        type=int,
        metavar="N",
        help="files, each a range of the vocabulary (default: about 512 MB each, at least 8)",
    )
    build.add_argument(
        "--workers", type=int, metavar="N", default=2, help="single-threaded processes (default %(default)s)"
    )
    build.add_argument("--ray-address", metavar="A", help="use a running Ray cluster, such as auto")
    verify = add_action(actions, "verify", "check a ToL folder", _VERIFY_HELP)
    verify.add_argument("folder", metavar="DIR", help="folder written by `mlm-train tol build`")
    verify.add_argument("--model", metavar="MODEL", help="the export it was built from: recompute its rows")
    verify.add_argument("--sample", type=int, metavar="N", help="recompute N random rows instead of all")
    verify.add_argument("--json", action="store_true", help="write one JSON object instead of a line")


def run(args: argparse.Namespace) -> int:
    """Exit code 0, or 2 when verify finds damage."""
    return _build(args) if args.action == "build" else _verify(args)


def _build(args: argparse.Namespace) -> int:
    from mlm_train.tol.build import build_tol

    index = build_tol(args.model, args.output, args.dtype, args.partitions, args.workers, args.ray_address)
    size = sum(partition.bytes for partition in index.partitions)
    print(
        f"{args.output}: {index.vocab_size} rows of {len(index.layers)} layers x {index.hidden_size} in "
        f"{index.dtype}, {size / 1e9:.3f} GB in {len(index.partitions)} partitions"
    )
    return 0


def _verify(args: argparse.Namespace) -> int:
    from mlm_train.tol.verify import verify_tol

    report = verify_tol(args.folder, args.model, args.sample)
    for damage in report.damages:
        print(f"damaged: {damage}", file=sys.stderr)
    code = 2 if report.damages else 0
    if args.json:
        counts = {"rows": report.index.vocab_size, "recomputed": report.recomputed}
        errors = {"max_abs_error": report.max_abs_error, "max_rel_error": report.max_rel_error}
        print(json.dumps(counts | errors | {"damages": [str(damage) for damage in report.damages]}))
        return code
    rows = report.index.vocab_size
    values = ""
    if args.model is not None:
        values = (
            f"; {report.recomputed} rows recomputed, largest error {report.max_abs_error:.2e} "
            f"({report.max_rel_error:.2e} of the row's largest value)"
        )
    verdict = "damaged: build it again" if report.damages else "whole"
    print(f"{args.folder}: {rows} rows in {len(report.index.partitions)} partitions, {verdict}{values}")
    return code
