"""The report of --dry-run: shapes, parameters, memory and FLOPs."""

import math

from rich.console import Console
from rich.table import Table

from mlm_train.config import Config
from mlm_train.model.counts import count_parameters, train_flops_per_token
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.plan.ffn_m import choose, expected_by_law, nominal_speeds
from mlm_train.plan.fit import GIB, check_memory
from mlm_train.plan.memory import rank_memory


def print_plan(config: Config, topology: Topology, console: Console, rank_gib: float | None = None) -> None:
    """Print what a run would allocate and compute on each rank, and whether rank_gib are enough for it.

    memory.mode=auto is decided for ordinary text and a nominal device; the run itself measures. Raises
    UserError where weights and their state alone exceed rank_gib.
    """
    if config.memory is not None and config.memory.mode == "auto":
        speeds, text = nominal_speeds(config), expected_by_law(config, topology)
        budget = (config.memory.budget_gib or math.inf) * GIB
        config, reason = choose(config, topology, text, speeds, budget)
        console.print(f"{reason}\n(nominal speeds, ordinary text: the run measures its own)")
    console.print(_shapes(config))
    console.print(_run(config, topology))
    memory = rank_memory(config, topology)
    table = Table(f"memory per rank, {config.parallel.engine_name}", "GiB", title_justify="left")
    estimated = ("buckets", "tables", "activations")
    for name, size in zip(memory._fields, memory, strict=True):
        table.add_row(name + " (estimate)" * (name in estimated), f"{size / GIB:.3f}")
    table.add_row("total", f"{memory.total / GIB:.3f}")
    console.print(table)
    if rank_gib is not None:
        check_memory(config, topology, int(rank_gib * GIB))
        left = rank_gib - memory.total / GIB
        fix = "see train.micro_batch_size and train.activation_checkpointing"
        console.print(
            f"fits in {rank_gib:g} GiB with {left:.1f} left"
            if left >= 0
            else f"without activations it fits in {rank_gib:g} GiB, they may need {-left:.1f} more: {fix}"
        )


def _shapes(config: Config) -> Table:
    """Table of the logical tensors of one layer and outside the layers."""
    from mlm_train.model.logical import named_pieces
    from mlm_train.model.transformer import Transformer
    from mlm_train.model.unfilled import unfilled

    with unfilled():  # shapes only, nothing is allocated
        one_layer = config.model.model_copy(update={"num_hidden_layers": 1})
        model = Transformer(one_layer)
    table = Table("tensor", "shape", "count")
    for name, weight in named_pieces(model):
        repeats = config.model.num_hidden_layers if ".layers." in name else 1
        shape = " x ".join(str(size) for size in weight.shape)
        table.add_row(name.replace("layers.0", "layers.*"), shape, str(repeats))
    return table


def _run(config: Config, topology: Topology) -> Table:
    counts, train = count_parameters(config.model), config.train
    tokens = train.global_batch_size * config.data.sequence_length
    flops = train_flops_per_token(config.model, config.data.sequence_length)
    table = Table("quantity", "value")
    rows = {
        "parameters, total (no embeddings)": f"{counts.total:,}",
        "parameters, active (no FFN-M)": f"{counts.active:,}",
        "parameters, embedding + head": f"{counts.embedding + counts.head:,}",
        "processes": f"{topology.world} (data {topology.data} x tensor {topology.tensor} "
        f"x pipeline {topology.pipeline})",
        "batch": f"{train.global_batch_size} sequences = {train.micro_batch_size} per micro-batch "
        f"x {topology.data} ranks x {topology.micro_batches(train)} accumulated",
        "tokens per step": f"{tokens:,}",
        "tokens, total": f"{tokens * train.steps:,}"
        + (" at most (warm-up)" if train.batch_size_warmup else ""),
        "FLOPs per token (per-token FFN-M)": f"{flops:.3e}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
