"""`mlm-train bench`: measure this machine."""

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mlm_train.bench.checkpoint_command import add_checkpoint, run_checkpoint
from mlm_train.bench.serving_command import SERVING, add_serving
from mlm_train.bench.starting_command import STARTING, add_starting
from mlm_train.errors import UserError
from mlm_train.utils.arguments import add_action, refuse_below_one

if TYPE_CHECKING:
    from mlm_train.utils.arguments import Actions

HELP = """Measure this machine: alternating runs, medians.

examples:
  mlm-train bench train --data runs/bench/data --preset a --json train.a.json
  mlm-train bench x0 --stages 2 4 --json x0.json
  mlm-train bench loss --json loss.json
  mlm-train bench data --data runs/bench/data --json data.json
  mlm-train bench tol --folder /scratch --json tol.json
  mlm-train bench vllm --json vllm.json"""

_TRAIN_HELP = """Measure speed, memory and FLOPs of a training step: base, memory, flex, transformers' Llama.

Each variant has its own process; one at a time runs one micro-batch, alternating. Presets: a (12 layers,
hidden 768, 16,384 tokens per step), b (8 layers, hidden 1,024, 65,536 tokens per step), 1b (for a GPU: the
paper's 1B shape, sequences of 8,192, vocabulary 128,256), tiny (for tests). All variants use the same text,
and those of one kind the same weights; exit code 1 if losses or gradients of one kind differ. On a CPU all
processes exist at the same time: preset a needs about 20 GiB, or fewer --variants. On a GPU they run one
after another, memory is that of torch's allocator, and the engine is fsdp, which needs torch alone.

examples:
  mlm-train data collect --source /usr/share/doc/linux-doc-6.1/html --output runs/bench/text
  mlm-train data prepare --input runs/bench/text --output runs/bench/data --tokenizer train:32768
  mlm-train bench train --data runs/bench/data --preset a --json train.a.json --plot train.a.png
  mlm-train bench train --data runs/bench/data --preset b --variants base memory.table noffn --runs 4
  mlm-train bench train --data data/mine --preset 1b --device cuda --compile --json train.1b.json"""

_AUTO_HELP = """Compare the choice of memory.mode=auto with every measured mode, on six small shapes.

Forward and backward of a whole step on one CPU process, the modes alternating; ids drawn from a Zipf
distribution, for one shape from a uniform one. `over best` is the median of the mode that auto chooses over
the smallest median.

examples:
  mlm-train bench auto
  mlm-train bench auto --runs 9 --json auto.json"""

_SCALE_HELP = """Count what a rank sends and holds in a training step of worlds that are not there.

The trainer's own step runs as one rank of 8 to 4096, with torch's fake process group and fake tensors:
bytes are counted at the collectives' arguments and compared with the formulas of docs/scale.md. The ids of
all ranks come from --data. Nothing of that is timed; --speed times whole steps on this machine.

examples:
  mlm-train bench scale --data runs/data --json scale.json --plot scale.png
  mlm-train bench scale --data runs/data --shapes 7b
  mlm-train bench scale --data runs/data --speed runs/small-data"""
_X0_HELP = """Count and time the three transports of x0 to the stages of a pipeline.

For each number of stages that many gloo processes train a small memory model: real steps, forward and
backward, no optimizer. The traffic of x0 is counted where tensors are handed to torch.distributed, as a
step's traffic minus that of the same step of a model without FFN-M, and compared with the formula.
Exit code 1 if they differ, or if the transports' losses do. Processes that share cores or memory make
timings noisy.

examples:
  mlm-train bench x0
  mlm-train bench x0 --stages 2 4 --runs 15 --data runs/quickstart/data --json x0.json
  mlm-train bench x0 --stages 2 --pipeline-schedule interleaved_1f1b"""

_LOSS_HELP = """Compare the chunked head and loss, which never holds all logits, with the plain one.

Forward and backward over random inputs, the two methods alternating, each run in a process of its own. Peak
memory is the rise of the process's peak resident set during the run, less the weight's gradient.
Exit code 1 if the losses or gradients of the two methods differ.

examples:
  mlm-train bench loss
  mlm-train bench loss --vocabulary 32000 --tokens 2048 --precision fp32 --runs 5 --json loss.json"""

_DATA_HELP = """Compare samples per second of our loader and of megatron-core's GPTDataset, on the same files.

One process, the two alternating, batches of ids and labels; `start` is the time to the first sample.

examples:
  mlm-train bench data --data runs/quickstart/data --sequence-length 256
  mlm-train bench data --data runs/bench/data --runs 9 --json data.json"""

_TOL_HELP = """Compare a ToL build from random weights with bare matrix multiplications and plain writing.

Before and after the build, matrix multiplications and FFN-M alternate in as many fresh processes as the
build has workers; partitions and plain files are written alternately. Presets: 1b (the paper's: 24 layers,
hidden 2,048, FFN 5,464, vocabulary 128,256; 18 GB in --folder, removed at the end), tiny (for tests).

examples:
  mlm-train bench tol --preset 1b --folder /scratch --json tol.json --plot tol.png
  mlm-train bench tol --preset 1b --layers 2 --vocabulary 8192"""

_PROFILE_HELP = """Show where the time of a training step goes, by groups of operations.

Forward and backward of a step's micro-batches on one CPU process, with FFN-M's tables, without the optimizer;
ids drawn from a Zipf distribution. The default shape has 110 million parameters.

examples:
  mlm-train bench profile base
  mlm-train bench profile table --compile --json table.json
  mlm-train bench profile unique --layers 2 --hidden 128 --heads 2 --ffn 256 --vocabulary 1000"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmarks."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_train(actions)
    _add_x0(actions)
    _add_scale(actions)
    add_starting(actions)
    add_serving(actions)
    _add_profile(actions)
    auto = add_action(actions, "auto", "compare memory.mode=auto with every mode", _AUTO_HELP)
    auto.add_argument("--runs", type=int, metavar="N", default=7, help="timed steps per mode (default 7)")
    auto.add_argument("--shapes", nargs="+", metavar="NAME", help="default: all six")
    auto.add_argument("--json", metavar="FILE", help="write the figures to a JSON file")
    add_checkpoint(actions)
    _add_data(actions)
    _add_tol(actions)
    loss = add_action(actions, "loss", "compare the chunked head and loss with the plain one", _LOSS_HELP)
    sizes = (
        ("vocabulary", 128256, "vocabulary size"),
        ("hidden", 1024, "hidden size"),
        ("tokens", 4096, "tokens"),
    )
    _add_sizes(loss, sizes)
    loss.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="default bf16")
    loss.add_argument("--chunk", type=int, metavar="N", help="tokens per chunk; default: as in training")
    loss.add_argument("--runs", type=int, metavar="N", default=5, help="runs per method (default 5)")
    loss.add_argument("--json", metavar="FILE", help="write the figures to a JSON file")
    loss.add_argument("--worker", help=argparse.SUPPRESS)  # for the process of a run


def _add_sizes(parser: argparse.ArgumentParser, sizes: Iterable[tuple[str, int, str]]) -> None:
    """Add options for whole numbers: name, default, meaning."""
    for name, default, meaning in sizes:
        parser.add_argument(
            f"--{name}", type=int, metavar="N", default=default, help=f"{meaning} (default {default})"
        )


def _add_data(actions: "Actions") -> None:
    data = add_action(actions, "data", "compare our loader with megatron-core's", _DATA_HELP)
    data.add_argument("--data", metavar="DIR", required=True, help="folder of `data prepare`")
    sizes = (
        ("sequence-length", 2048, "tokens per sample"),
        ("batch", 8, "samples per batch"),
        ("samples", 4096, "samples per run"),
        ("runs", 9, "runs per loader"),
    )
    _add_sizes(data, sizes)
    data.add_argument("--json", metavar="FILE", help="write the figures to a JSON file")


def _add_tol(actions: "Actions") -> None:
    tol = add_action(actions, "tol", "compare a ToL build with bare matrix multiplications", _TOL_HELP)
    tol.add_argument("--preset", choices=("1b", "tiny"), default="1b", help="model shape (default 1b)")
    for name in ("layers", "hidden", "ffn", "vocabulary"):
        tol.add_argument(f"--{name}", type=int, metavar="N", help="default: the preset's")
    sizes = (
        ("workers", 2, "workers of the build"),
        ("threads", 1, "threads per worker"),
        ("runs", 3, "measurements before and after the build"),
    )
    _add_sizes(tol, sizes)
    tol.add_argument("--folder", metavar="DIR", default=".", help="folder on the disk to measure (default .)")
    tol.add_argument("--keep", action="store_true", help="keep the model and its table in --folder")
    tol.add_argument("--json", metavar="FILE", help="write the figures to a JSON file")
    tol.add_argument("--plot", metavar="FILE", help="plot the figures to a PNG")


def _add_profile(actions: "Actions") -> None:
    profile = add_action(actions, "profile", "show where a training step's time goes", _PROFILE_HELP)
    profile.add_argument(
        "mode",
        choices=("base", "per_token", "unique", "table", "kept"),
        help="a base model, or an execution of FFN-M; kept: a table that keeps its activations",
    )
    sizes = (
        ("layers", 12, "layers"),
        ("hidden", 768, "hidden size"),
        ("heads", 12, "attention heads"),
        ("ffn", 2048, "width of the FFN, or of FFN-M"),
        ("vocabulary", 32768, "vocabulary size"),
        ("sequence", 1024, "tokens per sequence"),
        ("sequences", 2, "sequences per micro-batch"),
        ("micro-batches", 8, "micro-batches per step"),
    )
    _add_sizes(profile, sizes)
    profile.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="default bf16")
    profile.add_argument("--compile", action="store_true", help="as train.compile does")
    profile.add_argument("--json", metavar="FILE", help="write the figures to a JSON file")


def _add_train(actions: "Actions") -> None:
    train = add_action(actions, "train", "measure a training step of every kind and mode", _TRAIN_HELP)
    train.add_argument("--preset", metavar="NAME", default="a", help="a, b, 1b or tiny (default a)")
    train.add_argument(
        "--data", metavar="DIR", help="folder of `data prepare`, with the preset's vocabulary size"
    )
    train.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    train.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="default bf16")
    train.add_argument(
        "--runs", type=int, metavar="N", default=8, help="timed micro-batches per variant (default 8)"
    )
    train.add_argument(
        "--passes",
        type=int,
        metavar="N",
        default=3,
        help="passes: timed begins, finishes and whole steps; micro-batches are spread over them (default 3)",
    )
    train.add_argument("--variants", nargs="+", metavar="NAME", help="default: the preset's")
    train.add_argument("--tokens", type=int, metavar="T", help="tokens per step (default: the preset's)")
    train.add_argument(
        "--steps-of",
        type=int,
        nargs="+",
        metavar="T",
        help="tokens per step for the ratio of memory to base (default 4k, 16k, 64k)",
    )
    train.add_argument(
        "--validate",
        nargs="*",
        metavar="NAME",
        help="variants whose whole step is timed too (default: two for preset a)",
    )
    train.add_argument("--compile", action="store_true", help="also measure ours with train.compile")
    train.add_argument("--json", metavar="FILE", help="write the figures to a JSON file")
    train.add_argument("--plot", metavar="FILE", help="plot the figures to a PNG")
    train.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # a variant's process


def _add_x0(actions: "Actions") -> None:
    x0 = add_action(actions, "x0", "compare the transports of x0 between pipeline stages", _X0_HELP)
    x0.add_argument(
        "--stages", type=int, nargs="+", metavar="S", default=[2, 4], help="pipeline ranks (default: 2 4)"
    )
    x0.add_argument("--runs", type=int, metavar="N", default=9, help="timed steps per transport (default 9)")
    x0.add_argument("--pipeline-schedule", choices=("gpipe", "1f1b", "interleaved_1f1b"), default="1f1b")
    x0.add_argument(
        "--data", metavar="DIR", help="folder of `data prepare`; default: ids drawn from a Zipf distribution"
    )
    x0.add_argument("--json", metavar="FILE", help="write the figures to a JSON file")
    x0.add_argument("--worker", help=argparse.SUPPRESS)  # for the ranks


def _add_scale(actions: "Actions") -> None:
    text = "count a step of 1B, 7B and 70B models in worlds of up to 4096 ranks"
    scale = add_action(actions, "scale", text, _SCALE_HELP)
    scale.add_argument("--data", metavar="DIR", help="folder of `data prepare`, best of a large vocabulary")
    scale.add_argument("--shapes", nargs="+", metavar="NAME", help="1b, 7b, 70b (default: all)")
    scale.add_argument(
        "--tokens", type=int, metavar="N", default=4 * 2**20, help="tokens per step, all ranks (default 4M)"
    )
    scale.add_argument(
        "--speed", metavar="DIR", help="also time steps on four processes, with data of this folder"
    )
    scale.add_argument(
        "--preset", choices=("a", "tiny"), default="a", help="the shape of --speed (default a)"
    )
    scale.add_argument("--runs", type=int, default=7, metavar="N", help="timed steps of --speed (default 7)")
    scale.add_argument("--json", metavar="FILE", help="write the figures to a JSON file")
    scale.add_argument("--plot", metavar="FILE", help="plot the figures to a PNG")
    scale.add_argument("--speed-worker", help=argparse.SUPPRESS)  # for its ranks
    scale.add_argument("--worker", help=argparse.SUPPRESS)  # for one world


def run(args: argparse.Namespace) -> int:
    """Run a benchmark. Returns 0, or 1 if a count differs from its formula or two methods' results differ."""
    if args.action == "train":
        return _run_train(args)
    if args.action == "checkpoint":
        return run_checkpoint(args)
    if args.action == "loss":
        return _run_loss(args)
    if args.action == "auto":
        from mlm_train.bench.auto import bench_auto

        return bench_auto(args.runs, args.shapes, args.json)
    if args.action == "data":
        from mlm_train.bench.data import Size, bench_data

        size = Size(args.sequence_length, args.batch, args.samples, args.runs)
        return bench_data(args.data, size, args.json)
    if args.action == "tol":
        from mlm_train.bench.tol import bench_tol

        return bench_tol(args)
    if args.action in SERVING:
        return SERVING[args.action](args)
    if args.action in STARTING:
        return STARTING[args.action](args)
    if args.action == "scale":
        return _run_scale(args)
    if args.action == "profile":
        from mlm_train.bench.profile import bench_profile

        return bench_profile(args)
    if args.worker:
        from mlm_train.bench.x0_ranks import work

        return work(args.worker)
    refuse_below_one(args, "runs")
    from mlm_train.bench.x0 import bench_x0

    return bench_x0(args.stages, args.runs, args.pipeline_schedule, args.data, args.json)


def _run_scale(args: argparse.Namespace) -> int:
    """Returns 0, or 1 where bytes differ from their formula."""
    if args.worker:
        from mlm_train.bench.scale_world import work

        return work(args.worker)
    if args.speed_worker:
        from mlm_train.bench.scale_speed import work as time_steps

        return time_steps(args.speed_worker)
    if args.data is None:
        raise UserError("bench scale needs --data DIR, a folder of `mlm-train data prepare`")
    from mlm_train.bench.scale import bench_scale

    return bench_scale(args)


def _run_train(args: argparse.Namespace) -> int:
    """Returns 0, or 1 if variants of one kind differ."""
    if args.worker:
        from mlm_train.bench.train_worker import work

        return work()
    if args.data is None:
        raise UserError("bench train needs --data DIR, a folder of `mlm-train data prepare`")
    from mlm_train.bench.train import Options, bench_train

    names = (
        "preset",
        "data",
        "precision",
        "runs",
        "passes",
        "variants",
        "tokens",
        "steps_of",
        "validate",
        "compile",
        "device",
        "json",
        "plot",
    )
    return bench_train(Options(**{name: getattr(args, name) for name in names}))


def _run_loss(args: argparse.Namespace) -> int:
    """Returns 0, or 1 if the two methods differ."""
    from mlm_train.bench import loss

    if args.worker:
        return loss.work(args.worker)
    refuse_below_one(args, "runs")
    names = ("vocabulary", "hidden", "tokens", "precision", "chunk")
    return loss.bench_loss({name: getattr(args, name) for name in names}, args.runs, args.json)
