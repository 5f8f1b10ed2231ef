"""`mlm-train bench store`, `decode`, `overlap` and `vllm`: their options."""

import argparse
from typing import TYPE_CHECKING

from mlm_train.utils.arguments import add_action

if TYPE_CHECKING:
    from mlm_train.utils.arguments import Actions

_STORE_HELP = """Time reads of a ToL's rows, and count what a cache saves.

Rows resident, mapped, and from disk with 1 to 128 reads in flight; cold and warm; in random order and in
sequence. Hit rates of a cache of 0.1, 1 and 10 % of the vocabulary, on real text.

examples:
  mlm-train bench store --tol tol/run1 --data data/mine
  mlm-train bench store --tol tol/run1 --data data/mine --rows 2048 --json store.json --plot store.png"""

_OVERLAP_HELP = """Say how much of the time of a table's reads is behind the computation of layers.

TRACE is a file of `mlm-train generate --trace`, of a model with --tol and --tol-tier disk.

examples:
  mlm-train generate --model exports/run1 --tol tol/run1 --tol-tier disk --prompt "Once" --trace trace.json
  mlm-train bench overlap trace.json --plot overlap.png"""


_VLLM_HELP = """Compare our models in vLLM with vLLM's own Llama of as many active weights.

Time of a decoding step of memory and flex (beta 1), FFN-M looked up, over that of a Llama; the two engines
take turns. Random weights and a random table. Presets: 1b (24 layers, hidden 2,048, vocabulary 32,768; 3.2 GB
in --folder, removed at the end, and 6 GB of memory), tiny (for tests). In vLLM's environment (docs/vllm.md).

examples:
  mlm-train bench vllm --json vllm.json
  mlm-train bench vllm --preset tiny --runs 3 --tier disk"""


def _add_store(actions: "Actions") -> None:
    """Add the action."""
    store = add_action(actions, "store", "time reads of a ToL's rows, by tier and cache", _STORE_HELP)
    store.add_argument("--tol", metavar="DIR", required=True, help="folder of `mlm-train tol build`")
    store.add_argument(
        "--data", metavar="DIR", required=True, help="folder of `data prepare`: its text's ids"
    )
    store.add_argument("--rows", type=int, default=512, metavar="N", help="rows at once (default 512)")
    store.add_argument(
        "--tokens", type=int, default=20_000, metavar="N", help="of the validation text (default 20000)"
    )
    store.add_argument("--runs", type=int, default=5, metavar="N", help="timed reads each (default 5)")
    store.add_argument("--json", metavar="FILE", help="write the figures to a JSON file")
    store.add_argument("--plot", metavar="FILE", help="plot the figures to a PNG")


def _add_vllm(actions: "Actions") -> None:
    vllm = add_action(actions, "vllm", "compare our models in vLLM with its Llama", _VLLM_HELP)
    vllm.add_argument("--preset", choices=("1b", "tiny"), default="1b", help="sizes (default %(default)s)")
    vllm.add_argument("--batch", type=int, default=16, metavar="N", help="sequences at once (default 16)")
    vllm.add_argument("--tokens", type=int, default=32, metavar="N", help="steps of a turn (default 32)")
    vllm.add_argument("--runs", type=int, default=7, metavar="N", help="turns (default 7)")
    vllm.add_argument(
        "--tier", choices=("resident", "shared", "disk"), default="shared", help="as of --tol-tier"
    )
    vllm.add_argument(
        "--compile", action="store_true", help="compile the Llama, as vLLM does by default (default: eager)"
    )
    vllm.add_argument("--folder", default=".", metavar="DIR", help="for the table (default: here)")
    vllm.add_argument("--json", metavar="FILE", help="write the figures to a JSON file")
    vllm.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # an engine's process


_DECODE_HELP = """Time tokens and prompts, and count memory, with random weights in the paper's 1B shapes.

base, Flex-MemoryLLM with 1, 2 and 3 h^2 per layer, MemoryLLM; its table of 16, 8 and 4 bits, in memory and on
disk, with a cache of 0, 1 and 10 % of the vocabulary; transformers' Llama beside. Each is measured in turn,
again and again; the first round is not counted. Needs 24 GB of disk for the tables, and 16 GB of memory.

examples:
  mlm-train bench decode --data data/mine
  mlm-train bench decode --data data/mine --batches 1 --prefills 512 --json decode.json --plot decode.png"""


def _add_decode(actions: "Actions") -> None:
    """Add the action."""
    decode = add_action(actions, "decode", "time decoding and prompts, by kind, table and tier", _DECODE_HELP)
    decode.add_argument("--data", metavar="DIR", help="folder of `data prepare`: its text's ids (required)")
    decode.add_argument("--shape", choices=("1b", "tiny"), default="1b", help="default %(default)s")
    decode.add_argument(
        "--context",
        type=int,
        default=512,
        metavar="N",
        help="tokens before those timed (default %(default)s)",
    )
    decode.add_argument(
        "--steps", type=int, default=8, metavar="N", help="timed tokens per round (default %(default)s)"
    )
    decode.add_argument("--runs", type=int, default=9, metavar="N", help="rounds (default %(default)s)")
    for name, values, what in (("batches", (1, 8, 64), "sequences"), ("prefills", (512, 2048), "tokens")):
        decode.add_argument(
            f"--{name}", type=int, nargs="+", default=values, metavar="N", help=f"{what} at once"
        )
    decode.add_argument("--skip-hf", action="store_true", help="leave transformers out")
    decode.add_argument("--skip-compile", action="store_true", help="leave transformers' compiled Llama out")
    decode.add_argument("--work", metavar="DIR", help="where the tables are written (default: the system's)")
    decode.add_argument("--json", metavar="FILE", help="write the figures to a JSON file")
    decode.add_argument("--plot", metavar="FILE", help="plot the figures to a PNG")
    decode.add_argument("--worker", help=argparse.SUPPRESS)


def _run_decode(args: argparse.Namespace) -> int:
    """Measure. Returns exit code 0. Raises UserError without --data."""
    from mlm_train.bench import decode

    if args.worker:
        return decode.work(args.worker)
    if args.data is None:
        from mlm_train.errors import UserError

        raise UserError("bench decode needs --data DIR, a folder of `mlm-train data prepare`")
    return decode.bench_decode(args)


def _run_store(args: argparse.Namespace) -> int:
    """Measure. Returns exit code 0."""
    from mlm_train.bench.store import bench_store

    return bench_store(args)


def _add_overlap(actions: "Actions") -> None:
    """Add the action."""
    overlap = add_action(actions, "overlap", "say what of a table's reads layers hide", _OVERLAP_HELP)
    overlap.add_argument("trace", metavar="TRACE", help="file of `mlm-train generate --trace`")
    overlap.add_argument(
        "--pass", dest="number", type=int, default=1, metavar="N", help="which forward pass (default 1)"
    )
    overlap.add_argument("--json", metavar="FILE", help="write the figures to a JSON file")
    overlap.add_argument("--plot", metavar="FILE", help="plot reads and layers to a PNG")


def _run_overlap(args: argparse.Namespace) -> int:
    """Measure. Returns exit code 0."""
    from mlm_train.bench.overlap import bench_overlap

    return bench_overlap(args)


def _run_vllm(args: argparse.Namespace) -> int:
    """Measure. Returns exit code 0."""
    from mlm_train.bench.vllm import bench_vllm

    return bench_vllm(args)


# By action.
SERVING = {"store": _run_store, "decode": _run_decode, "overlap": _run_overlap, "vllm": _run_vllm}


def add_serving(actions: "Actions") -> None:
    """Add the actions of SERVING."""
    _add_store(actions)
    _add_decode(actions)
    _add_overlap(actions)
    _add_vllm(actions)
