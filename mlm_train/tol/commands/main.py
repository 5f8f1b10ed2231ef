"""`mlm-train tol`: building, compressing, verifying and inspecting token-wise lookups."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mlm_train.errors import UserError, escaped
from mlm_train.tol.commands.fetch import add_fetch, run_fetch
from mlm_train.tol.commands.inspect import add_inspect, run_inspect
from mlm_train.tol.commands.options import add_storage_arguments, given, table_spec_of
from mlm_train.tol.commands.patch import add_patch, run_patch
from mlm_train.tol.storage.urls import refuse_url_output
from mlm_train.utils.arguments import MODEL_KINDS, add_action
from mlm_train.utils.checks import add_verify
from mlm_train.utils.units import in_units, size

if TYPE_CHECKING:
    from mlm_train.data.prepared import PreparedData
    from mlm_train.evaluate.scorer import Scorer
    from mlm_train.tol.build.builder import Build
    from mlm_train.tol.format.index import TolIndex
    from mlm_train.tol.storage.node_folders import NodeFolder

BUILT = "bfloat16"  # default type of a build

HELP = """Token-wise lookups (ToL): FFN-M's output for every token of the vocabulary.

examples:
  mlm-train tol build exports/run1 --output tol/run1
  mlm-train tol compress tol/run1 --output tol/run1-int4 --dtype int4
  mlm-train tol fetch s3://bucket/tol/run1 /scratch/run1
  mlm-train tol verify tol/run1 --model exports/run1
  mlm-train tol inspect tol/run1 --model exports/run1"""

_BUILD_HELP = """Compute FFN-M for the whole vocabulary on Ray and write it as a ToL folder.

A killed build resumes where it stopped: run the same command again. With --ray-address the model and the
output must be on storage that every node sees under the same path. The output may also be a URL (s3://,
gs://, sftp:// or any other that fsspec supports), accessed with each node's own credentials.

examples:
  mlm-train tol build exports/run1 --output tol/run1
  mlm-train tol build exports/run1 --output tol/run1 --dtype int4 --group-size 32
  mlm-train tol build exports/run1 --output tol/run1 --dtype int8 --budget 3.2GB
  mlm-train tol build exports/run1 --output tol/run1 --with-embeddings
  mlm-train tol build /shared/run1 --output '$TMPDIR/tol1' --each-node --ray-address auto
  mlm-train tol build /shared/run1 --output /shared/tol1 --workers 64 --ray-address auto
  mlm-train tol build exports/run1 --output s3://bucket/tol/run1"""

_COMPRESS_HELP = """Write a table in fewer bytes: fewer bits, low rank, fewer layers, or all of them.

Streams through the table on Ray; a killed compression resumes where it stopped.

examples:
  mlm-train tol compress tol/run1 --output tol/run1-int8 --dtype int8
  mlm-train tol compress tol/run1 --output tol/run1-r512 --dtype bfloat16 --rank 512
  mlm-train tol compress tol/run1 --output tol/run1-r512 --dtype bfloat16 --rank 512 --weigh-by data/mine
  mlm-train tol compress tol/run1 --output tol/run1-1gb --budget 1GB
  mlm-train tol compress tol/run1 --output tol/run1-1gb --dtype int8 --budget 1GB --drop 11-13"""

_VERIFY_HELP = """Check a ToL folder: coverage, sizes, SHA-256 and non-finite values; with --model all values.
At a URL: sizes and SHA-256.

Damage: exit code 2, and one line per damaged range of rows.

examples:
  mlm-train tol verify tol/run1
  mlm-train tol verify tol/run1 --model exports/run1 --sample 1000"""


_ALLOCATE_HELP = """Choose for each layer among fewer bits, low rank and dropping it, by cost in perplexity.

Measures every option for every layer on text (--samples windows of the training split), finds and prints
the best mixes for a range of sizes, and measures the chosen one on the validation split, next to uniform
tables of the same size. `tol compress --allocation FILE` then writes the table. A killed study resumes after
the last measured batch: run the same command again.

examples:
  mlm-train tol allocate tol/run1 --model exports/run1 --data data/mine --budget 1.5GB --output mix.json
  mlm-train tol allocate tol/run1 --model exports/run1 --data data/mine --tolerance 0.5% --output mix.json
  mlm-train tol compress tol/run1 --allocation mix.json --output tol/run1-mix"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = add_action(actions, "build", "compute FFN-M for every token", _BUILD_HELP)
    build.add_argument("model", metavar="MODEL", help=MODEL_KINDS)
    add_storage_arguments(build, default=BUILT)
    build.add_argument(
        "--compute",
        choices=("auto", "float32", "bfloat16"),
        help="type of FFN-M's matmuls (default auto: that of the weights)",
    )
    build.add_argument(
        "--with-embeddings",
        action="store_true",
        help="rows also hold the token's embedding, in the type of the weights: serving then needs no "
        "embedding in memory",
    )
    build.add_argument("--device", default="cpu", help="where FFN-M runs: cpu or cuda (default %(default)s)")
    add_verify(build, "the model")
    compress = add_action(actions, "compress", "write a table in fewer bytes", _COMPRESS_HELP)
    compress.add_argument("table", metavar="TOL", help="folder written by `mlm-train tol build`")
    compress.add_argument("--model", metavar="MODEL", help=f"with --evaluate, its model: {MODEL_KINDS}")
    add_storage_arguments(compress, default=None)
    for action in (build, compress):
        _add_work_arguments(action)
    _add_allocate_arguments(
        add_action(actions, "allocate", "choose how each layer is stored", _ALLOCATE_HELP)
    )
    verify = add_action(actions, "verify", "check a ToL folder", _VERIFY_HELP)
    verify.add_argument("folder", metavar="DIR|URL", help="output of `mlm-train tol build`")
    verify.add_argument("--model", metavar="MODEL", help=f"recompute rows with it: {MODEL_KINDS}")
    verify.add_argument("--sample", type=int, metavar="N", help="recompute N random rows (default: all)")
    verify.add_argument("--json", action="store_true", help="write one JSON object instead of a line")
    add_inspect(actions)
    add_fetch(actions)
    add_patch(actions)


def _add_work_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weigh-by",
        metavar="DATA",
        help="with --rank or --budget: least error over the tokens of this data's training split, not over "
        "the rows of the vocabulary",
    )
    parser.add_argument(
        "--output", metavar="DIR|URL", required=True, help="folder to write; new or unfinished"
    )
    parser.add_argument(
        "--partitions",
        type=int,
        metavar="N",
        help="files, each a range of the vocabulary (default: about 512 MB each, at least 8)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", default=2, help="processes, one per GPU (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads per worker (default 1)")
    parser.add_argument(
        "--evaluate", metavar="DATA", help="also report perplexity on the validation split of this data"
    )
    parser.add_argument(
        "--repair", action="store_true", help="rebuild the damaged partitions of a finished --output"
    )
    parser.add_argument("--ray-address", metavar="A", help="use a running Ray cluster, such as auto")
    parser.add_argument(
        "--each-node",
        action="store_true",
        help="--output is a node-local folder: built on this node, then copied to all others",
    )


def _add_allocate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="TOL", help="a table in a plain type, from `tol build`")
    parser.add_argument("--model", metavar="MODEL", required=True, help=f"its model: {MODEL_KINDS}")
    parser.add_argument("--data", metavar="DIR", required=True, help="output of `data prepare`")
    parser.add_argument(
        "--budget", type=size, metavar="SIZE", help="most bytes of the table's files, such as 1.5GB"
    )
    parser.add_argument(
        "--tolerance", metavar="P%", help="find the smallest table whose perplexity grows at most this much"
    )
    parser.add_argument("--output", metavar="FILE", required=True, help="JSON for `compress --allocation`")
    parser.add_argument("--plot", metavar="FILE", help="a PNG of sizes and perplexities")
    parser.add_argument("--samples", type=int, default=64, help="windows to measure on (default %(default)s)")
    parser.add_argument("--sequence-length", type=int, metavar="N", help="default: the model's maximum")
    parser.add_argument(
        "--micro-batch-size", type=int, default=8, help="windows per pass (default %(default)s)"
    )
    add_verify(parser, "the table, of --data and --model,", "sizes, of --model full")


def run(args: argparse.Namespace) -> int:
    """Run the action. Exit code 0, or 2 if `verify` finds damage."""
    if args.action == "inspect":
        return run_inspect(args)
    if args.action == "verify":
        return _verify(args)
    if args.action == "patch":
        return run_patch(args)
    if args.action == "fetch":
        return run_fetch(args)
    if args.action == "allocate":
        from mlm_train.tol.commands.allocate import allocate

        return allocate(args)
    if args.each_node and args.ray_address is None:
        raise UserError("--each-node needs --ray-address: name the cluster whose nodes get the table")
    if args.repair:
        return _repair(args)
    if args.action == "compress" and args.model is not None and args.evaluate is None:
        raise UserError("--model belongs to --evaluate: give --evaluate DATA too, or leave --model out")
    build = _compression(args) if args.action == "compress" else _build(args)
    scorer = _scorer(args, build)  # before the build, to reject bad input early
    if (index := build.finished()) is not None:
        print(f"{build.storage} is finished already: {describe(index)}")
    else:
        print(f"{build.storage}: {describe(build.run(args.workers, args.ray_address))}")
    _copy(build, args)
    if scorer is not None:
        print(_compared(args, build, scorer))
    return 0


def _copy(build: "Build", args: argparse.Namespace) -> None:
    """With --each-node: copy the table to all other nodes."""
    if not args.each_node:
        return
    from mlm_train.tol.storage.node_folders import NodeFolder
    from mlm_train.tol.tools.copy_to_nodes import copy_to_nodes

    assert isinstance(build.storage, NodeFolder)
    count = copy_to_nodes(build.storage, args.ray_address)
    print(f"copied to {count} other node{'' if count == 1 else 's'}")


def _storage(args: argparse.Namespace) -> "str | NodeFolder":
    """The storage to write a table to."""
    if not args.each_node:
        return str(args.output)
    from mlm_train.tol.storage.node_folders import NodeFolder

    refuse_url_output(args.output, "--each-node writes one on each node")
    return NodeFolder(args.output)


def _scorer(args: argparse.Namespace, build: "Build") -> "Scorer | None":
    if args.evaluate is None:
        return None
    refuse_url_output(args.output, "--evaluate reads the table there")
    from mlm_train.evaluate.scorer import Scorer
    from mlm_train.tol.format.index import check_fits
    from mlm_train.tol.format.index_file import read_index

    if build.job.model is not None:
        # The checkpoint that the build has verified: a running training may have a newer one.
        return Scorer(build.job.model, args.evaluate, with_memory=True, verify="sizes")
    if args.model is None:
        raise UserError("--evaluate needs --model: the model that the table was built from")
    scorer = Scorer(args.model, args.evaluate)
    check_fits(Path(args.table), read_index(args.table), scorer.config)
    return scorer


def _compared(args: argparse.Namespace, build: "Build", scorer: "Scorer") -> str:
    """The change of perplexity by the table, as one line."""
    from mlm_train.tol.serve.source import TolSource

    if args.action == "build":
        reference, what = scorer.computed, "FFN-M computed"
    else:
        reference, what = TolSource.open_folder(args.table, scorer.config), str(args.table)
    exact = scorer.score(reference).perplexity
    score = scorer.score(TolSource.open_folder(str(build.storage), scorer.config))
    return (
        f"perplexity {exact:.4f} with {what}, {score.perplexity:.4f} with {args.output}: "
        f"{score.perplexity / exact - 1:+.3%} over {score.tokens:,} tokens"
    )


def _repair(args: argparse.Namespace) -> int:
    from mlm_train.tol.build.builder import Build

    unused = given(args) or given(args, ("partitions", "threads", "evaluate", "weigh_by"))
    unused = unused or given(
        args, ("model",) if args.action == "compress" else ("compute", "verify", "with_embeddings")
    )
    if unused:
        raise UserError(f"--repair rebuilds {args.output} as it was: leave {unused} out")
    model, table = (None, args.table) if args.action == "compress" else (args.model, None)
    device = "cpu" if args.action == "compress" else args.device
    build = Build.like_index(_storage(args), model, table, device)
    rebuilt = build.repair(args.workers, args.ray_address)
    for partition in rebuilt:
        print(f"rebuilt: {partition.file}, rows [{partition.rows[0]}, {partition.rows[1]})")
    were = "s were" if len(rebuilt) != 1 else " was"
    print(f"{build.storage}: {len(rebuilt)} partition{were} damaged; the table is intact now")
    _copy(build, args)
    return 0


def describe(index: "TolIndex") -> str:
    """Describe a table in one line."""
    how = index.dtype if index.group_size is None else f"{index.dtype} by {index.group_size}"
    if index.rank is not None:
        ranks = [rank for rank in index.rank if rank is not None]
        how += f", rank {min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else f", rank {ranks[0]}"
    known = [error for error in index.errors or () if error is not None]
    lost = f", relative error {min(known):.2e} to {max(known):.2e} per layer" if known else ""
    layers = f"{len(index.layers)} layer" + "s" * (len(index.layers) != 1)
    if index.embedding is not None:
        how += f", with embeddings in {index.embedding.dtype}"
    if missing := [str(layer) for layer in range(index.num_layers) if layer not in index.layers]:
        lost += f"; dropped, read as 0: layer{'s' * (len(missing) > 1)} {', '.join(missing)}"
    return (
        f"{index.vocab_size} rows of {layers} x {index.hidden_size} in {how}, "
        f"{in_units(index.bytes)} in {len(index.partitions)} partitions{lost}"
    )


def _build(args: argparse.Namespace) -> "Build":
    from mlm_train.checkpoint.reading.logical_folder import read_model_config
    from mlm_train.tol.build.builder import Build

    config = read_model_config(args.model)
    spec = table_spec_of(args, list(range(config.num_hidden_layers)), config.hidden_size, BUILT)
    return Build(
        args.model,
        _storage(args),
        spec,
        partitions=args.partitions,
        compute=args.compute or "auto",
        threads=1 if args.threads is None else args.threads,
        device=args.device,
        verify=args.verify or "full",
        with_embeddings=args.with_embeddings,
        text=_text(args),
    )


def _text(args: argparse.Namespace) -> "PreparedData | None":
    from mlm_train.data.prepared import PreparedData

    return None if args.weigh_by is None else PreparedData.open(args.weigh_by)


def _compression(args: argparse.Namespace) -> "Build":
    from mlm_train.tol.build.builder import Build
    from mlm_train.tol.format.index_file import read_index

    index = read_index(args.table)
    spec = table_spec_of(args, index.layers, index.hidden_size)
    return Build(
        None,
        _storage(args),
        spec,
        table=args.table,
        partitions=args.partitions,
        threads=1 if args.threads is None else args.threads,
        text=_text(args),
    )


def _verify(args: argparse.Namespace) -> int:
    from mlm_train.tol.tools.verify import verify_tol

    report = verify_tol(args.folder, args.model, args.sample)
    for damage in report.damages:
        print(f"damaged: {escaped(str(damage))}", file=sys.stderr)
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
    verdict = f"damaged: {report.fix}" if report.damages else "intact"
    print(f"{args.folder}: {rows} rows in {len(report.index.partitions)} partitions, {verdict}{values}")
    return code
