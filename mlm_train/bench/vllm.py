"""`bench vllm`: time per token of our models in vLLM, over that of its own Llama of as many active weights.

Both engines of a pair live at the same time, each in a process of its own; one works while the other waits.
Weights are random (vLLM's dummy ones); tokens are drawn from the whole vocabulary, so that rows are looked up
as widely as they can be.
"""

import argparse
import importlib.util
import os
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mlm_train.bench import report
from mlm_train.bench.random_table import write_random_table
from mlm_train.bench.worker_process import WorkerProcess, serve_orders
from mlm_train.checkpoint.hf.config import config_json, read_config
from mlm_train.config import ModelConfig
from mlm_train.errors import UserError
from mlm_train.tol.format.schemes import Scheme
from mlm_train.utils.arguments import refuse_below_one
from mlm_train.utils.files import write_json

PRESETS: dict[str, dict[str, int]] = {  # the paper's 1B shape, with a vocabulary of the quickstart's kind
    "1b": {"vocab_size": 32768, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32},
    "tiny": {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}
KINDS = ("memory", "flex")
SMALLEST = 1  # intermediate_size of a Llama that stands for one without FFN; vLLM takes it
PROMPT = 16  # ids of a prompt
PARTITION_ROWS = 4096
BLOCK = 128  # positions of a block of the cache of keys and values
DTYPE = "bfloat16"
SEED = 1234
# One process per engine: an engine in processes of its own would poll while it waits.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


def bench_vllm(args: argparse.Namespace) -> int:
    """Measure, print and write the report."""
    if args.worker:
        return serve_orders(Engine)
    refuse_below_one(args, "runs", "batch", "tokens")
    report.check_outputs(args)
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed here: run this in its environment (docs/vllm.md)")
    os.environ.update(ENVIRONMENT)
    machine = report.machine()
    with tempfile.TemporaryDirectory(prefix="bench-vllm-", dir=args.folder) as folder:
        seconds = _measure(Path(folder), args)
    rows = [
        report.row(f"{name}.token", [1e3 * one for one in values], "ms") for name, values in seconds.items()
    ]
    ratios = {
        f"vllm_over_vllm_llama_{kind}": statistics.median(
            ours / theirs for ours, theirs in zip(seconds[kind], seconds[f"llama_{kind}"], strict=True)
        )
        for kind in KINDS
    }
    _show(rows, ratios, machine)
    if args.json is not None:
        shape = ", ".join(f"{name} {size:,}" for name, size in PRESETS[args.preset].items())
        notes = [f"{shape}; {DTYPE}", f"decoding steps of {args.batch} sequences, tier {args.tier}"]
        report.write_report(Path(args.json), machine, rows, ratios, notes)
    return 0


def models(preset: str) -> dict[str, ModelConfig]:
    """The models by name; llama_X has as many active weights as X."""
    flex = _config(preset, "flex", SMALLEST, flex_beta=1)
    assert flex.compute_intermediate_size is not None
    return {
        "memory": _config(preset, "memory", SMALLEST),  # FFN-M's width does not matter: it is looked up
        "llama_memory": _config(preset, "base", SMALLEST),
        "flex": flex,
        "llama_flex": _config(preset, "base", flex.compute_intermediate_size),
    }


def _config(preset: str, kind: str, width: int, **fields: Any) -> ModelConfig:
    tree = PRESETS[preset] | {"kind": kind, "intermediate_size": width, "max_position_embeddings": 2048}
    return ModelConfig.model_validate(tree | fields)


def _measure(folder: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a decoding step, by model and turn: ours and its Llama in turn, one kind after the other."""
    configs = models(args.preset)
    row = 2 * configs["memory"].num_hidden_layers * configs["memory"].hidden_size
    needed, free = row * configs["memory"].vocab_size, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"--folder has {free / 1e9:.1f} GB free and the table needs {needed / 1e9:.1f}")
    write_random_table(folder / "tol", configs["memory"], Scheme(dtype=DTYPE))
    seconds: dict[str, list[float]] = {}
    for kind in KINDS:
        pair = {name: configs[name] for name in (kind, f"llama_{kind}")}
        seconds |= {name: [] for name in pair}
        with ExitStack() as stack:
            engines = {}
            for name, config in pair.items():
                engines[name] = _started(name, config, folder, args)
                stack.callback(engines[name].kill)
            for turn in track(range(args.runs + 1), kind, console=Console(stderr=True), transient=True):
                for name in sorted(engines, reverse=turn % 2 == 1):
                    step = engines[name].ask("step", tokens=args.tokens, seed=SEED + turn)["seconds"]
                    if turn:  # the first turn warms up
                        seconds[name].append(step)
            for engine in engines.values():
                engine.end()
    return seconds


def _started(name: str, config: ModelConfig, folder: Path, args: argparse.Namespace) -> WorkerProcess:
    """The process of a model's engine, ready."""
    (folder / name).mkdir()
    write_json(folder / name / "config.json", config_json(config, DTYPE))
    engine = WorkerProcess(name, "bench", "vllm", "--worker")
    tol = {"folder": str(folder / "tol"), "tier": args.tier} if config.has_memory else None
    sizes = {"batch": args.batch, "length": PROMPT + 1 + args.tokens}
    engine.ask("start", model=str(folder / name), tol=tol, compile=args.compile, **sizes)
    return engine


class Engine:
    """An engine of vLLM in this process."""

    def __init__(self, order: dict[str, Any]) -> None:
        from vllm import LLM

        tol, compiles = order["tol"], order["compile"]
        self.batch, length = order["batch"], -(-order["length"] // BLOCK) * BLOCK
        config = read_config(order["model"])
        per_token = 2 * 2 * config.num_hidden_layers * config.kv_heads * config.attention_head_dim
        self.llm = LLM(
            order["model"],
            dtype=DTYPE,
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_num_seqs=self.batch,
            max_num_batched_tokens=max(length, PROMPT * self.batch),  # all prompts in one step
            max_model_len=length,
            kv_cache_memory_bytes=per_token * length * (self.batch + 1),
            enforce_eager=tol is not None or not compiles,
            additional_config={} if tol is None else {"tol": tol},
        )
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()

    def do(self, order: dict[str, Any]) -> dict[str, Any]:
        """start: nothing more. step: seconds of a decoding step, a mean over `tokens` of them."""
        if order["do"] == "start":
            return {}
        from vllm import SamplingParams

        engine, steps = self.llm.llm_engine, order["tokens"]
        sampling = SamplingParams(max_tokens=1 + steps, ignore_eos=True, detokenize=False)  # temperature 1
        generator = torch.Generator().manual_seed(order["seed"])
        drawn = torch.randint(self.vocabulary, (self.batch, PROMPT), generator=generator)
        for number, ids in enumerate(drawn.tolist()):
            engine.add_request(f"{order['seed']}-{number}", {"prompt_token_ids": ids}, sampling)
        engine.step()  # all prompts, and their first new tokens
        started = time.perf_counter()
        for _ in range(steps):
            engine.step()
        taken = time.perf_counter() - started
        assert not engine.has_unfinished_requests()
        return {"seconds": taken / steps}


def _show(rows: list[dict[str, Any]], ratios: dict[str, float], machine: dict[str, Any]) -> None:
    console = Console(width=110, soft_wrap=True)
    table = Table("a decoding step", "ms", "min", "max")
    for row in rows:
        name = row["name"].removesuffix(".token")
        table.add_row(name, *(f"{row[key]:.2f}" for key in ("median", "min", "max")))
    console.print(table, soft_wrap=False)
    for name, value in ratios.items():
        console.print(f"{name} = {value:.4g}")
    console.print(report.describe(machine))
