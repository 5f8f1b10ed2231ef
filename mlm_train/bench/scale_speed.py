"""`bench scale --speed`: whole training steps on four processes of this machine, by engine and placement."""

import statistics
import time
from typing import Any

import psutil
from rich.console import Console
from rich.progress import track

from mlm_train.bench import report
from mlm_train.bench.built import SEED
from mlm_train.bench.memory_in_use import HostMemory
from mlm_train.bench.train_presets import PRESETS, Preset
from mlm_train.config import Config
from mlm_train.config.load import parse_config
from mlm_train.data.prepared import PreparedData
from mlm_train.data.samples import Samples
from mlm_train.errors import UserError
from mlm_train.model.initial import fill_initial
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.build import build_engine, build_executor, build_model
from mlm_train.parallel.launch.launcher import launch_ranks
from mlm_train.train.batches import step_batches
from mlm_train.train.step import Trainer
from mlm_train.utils.host_memory import return_freed

RANKS = 4
_FSDP = {"engine": "fsdp", "reshard_after_forward": False}
# Config sections parallel and memory.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deepspeed": ({"zero_stage": 1}, {"mode": "table"}),
    "fsdp": (_FSDP, {"mode": "table"}),
    "owned": (_FSDP, {"mode": "table", "placement": "owned"}),
}
# Config section train of a rank with little memory: nothing but weights and their state is large. What the C
# library would keep though it is free (utils/host_memory.py) is not counted: it is returned at once.
LEAN: dict[str, Any] = {"micro_batch_size": 1, "activation_checkpointing": "full", "loss_chunk_size": 128}
# Launches: steps of two variants alternate; one alone, LEAN, shows its memory.
LAUNCHES = (("deepspeed", "fsdp"), ("fsdp", "owned"), ("fsdp",), ("owned",))


def measure_speed(data: str, preset: str, runs: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Report rows and ratios. Raises UserError where the ranks failed."""
    seconds: dict[str, dict[str, list[float]]] = {}
    peaks: dict[str, float] = {}
    for variants in LAUNCHES:
        alone = len(variants) == 1
        order = {"data": data, "preset": preset, "variants": variants, "runs": 1 if alone else runs}
        command = ["bench", "scale", "--speed-worker"]
        found = report.by_worker(order, lambda file, words=command: launch_ranks([*words, file], RANKS))  # type: ignore[misc]
        if isinstance(found, int):
            raise UserError(f"--speed: the processes of {' and '.join(variants)} ended with code {found}")
        if alone:
            peaks[variants[0]] = found["peak"]
        else:
            seconds["_over_".join(variants)] = found["seconds"]
    rows = [
        report.row(f"speed.{pair}.{name}.step", values, "s")
        for pair, by_variant in seconds.items()
        for name, values in by_variant.items()
    ]
    rows += [report.row(f"speed.{name}.peak", [peak], "bytes") for name, peak in peaks.items()]
    medians = {
        pair: {name: statistics.median(values) for name, values in by_variant.items()}
        for pair, by_variant in seconds.items()
    }
    engines, placements = medians["deepspeed_over_fsdp"], medians["fsdp_over_owned"]
    return rows, {
        "fsdp_over_deepspeed": engines["deepspeed"] / engines["fsdp"],
        "owned_over_replicated_speed": placements["fsdp"] / placements["owned"],
        "owned_over_replicated_peak_memory": peaks["owned"] / peaks["fsdp"],
    }


def work(order_file: str) -> int:
    """Run on a rank: alternate steps of the ordered variants; rank 0 writes the result."""
    order = report.read_order(order_file)
    preset, data = PRESETS[order["preset"]], PreparedData.open(order["data"])
    imported = psutil.Process().memory_info().rss
    alone = len(order["variants"]) == 1
    train = LEAN if alone else {"micro_batch_size": preset.micro_batch}
    configs = {name: _config(preset, name, data.vocab_size, train) for name in order["variants"]}
    trainers = {name: _trainer(config, alone) for name, config in configs.items()}
    runtime = next(iter(trainers.values())).runtime
    samples = Samples(data.split("train"), preset.sequence, SEED)
    size = RANKS * train["micro_batch_size"]
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    steps = track(
        range(order["runs"] + 1), " and ".join(trainers), console=Console(stderr=True),
        disable=not runtime.is_rank_0,
    )  # fmt: skip
    for step in steps:  # the first one allocates
        batches = step_batches(samples, step * size, size, train["micro_batch_size"], runtime.topology)
        for name, trainer in trainers.items():
            runtime.barrier()
            started = time.perf_counter()
            trainer.step(batches, 1e-4)
            slowest = max(runtime.gather(lambda since=started: time.perf_counter() - since))  # type: ignore[misc]
            if step:
                seconds[name].append(slowest)
    peak = max(runtime.gather(lambda: HostMemory().peak() - imported))
    if runtime.is_rank_0:
        report.write_result(order_file, {"seconds": seconds, "peak": peak})
    runtime.barrier()
    processes.stop()
    return 0


def _config(preset: Preset, variant: str, vocabulary: int, train: dict[str, Any]) -> Config:
    """One micro-batch per rank and step; train: of that config section."""
    parallel, memory = VARIANTS[variant]
    return parse_config(
        {
            "model": {
                "kind": "memory",
                "vocab_size": vocabulary,
                "hidden_size": preset.hidden,
                "num_hidden_layers": preset.layers,
                "num_attention_heads": preset.heads,
                "intermediate_size": preset.ffn,
                "max_position_embeddings": preset.sequence,
            },
            "data": {"path": "none", "sequence_length": preset.sequence},
            "parallel": parallel,
            "memory": memory,
            "train": {
                "output": "none",
                "steps": 1,
                "device": "cpu",
                "global_batch_size": RANKS * train["micro_batch_size"],
                **train,
            },
        }
    )


def _trainer(config: Config, lean: bool) -> Trainer:
    """With the initial weights of SEED; lean: the process keeps no memory that is free."""
    runtime = processes.start(config)
    if lean:
        return_freed()
    model = build_model(config, runtime)
    executor = build_executor(model, config, runtime)
    engine = build_engine(model, executor, config, runtime)
    engine.fill(lambda held: fill_initial(held, config.model, SEED))
    engine.refresh_model()
    return Trainer(engine, executor, runtime)
