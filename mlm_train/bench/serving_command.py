"""`mlm-train bench store` and `bench vllm`: their options."""

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

_VLLM_HELP = """Compare our models in vLLM with vLLM's own Llama of as many active weights.

Time of a decoding step of memory and flex (beta 1), FFN-M looked up, over that of a Llama; the two engines
take turns. Random weights and a random table. Presets: 1b (24 layers, hidden 2,048, vocabulary 32,768; 3.2 GB
in --folder, removed at the end, and 6 GB of memory), tiny (for tests). In vLLM's environment (docs/vllm.md).

examples:
  mlm-train bench vllm --json vllm.json
  mlm-train bench vllm --preset tiny --runs 3 --tier disk"""


def add_serving(actions: "Actions") -> None:
    """Add both actions."""
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
    _add_vllm(actions)


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


def run_serving(args: argparse.Namespace) -> int:
    """Measure. Returns exit code 0."""
    if args.action == "vllm":
        from mlm_train.bench.vllm import bench_vllm

        return bench_vllm(args)
    from mlm_train.bench.store import bench_store

    return bench_store(args)
