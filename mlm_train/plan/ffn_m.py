"""The cost per step of each execution of FFN-M on a rank, and memory.mode=auto: the cheapest that fits.

Seconds are estimated from measured speeds (plan/speeds.py) and expected distinct ids; work that all modes
share (attention, FFN-C, head) is left out. Work in a pipeline schedule waits in its bubble, tables do not.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlm_train.config import Config
from mlm_train.config.load import parse_config
from mlm_train.errors import UserError
from mlm_train.memory.step_rows import BLOCK_ROWS
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.parallel.pipeline.stages import most_layers
from mlm_train.plan.activations import compute_bytes

FP32 = 4
MARGIN = 1.1  # a step may hold more distinct ids than expected


class Distinct(NamedTuple):
    """Expected distinct ids per micro-batch, per step of a data-parallel rank, and per step of all ranks."""

    micro_batch: float
    step: float
    all_ranks: float

    @classmethod
    def of(cls, ids: Sequence[Tensor], ranks: int = 1) -> "Distinct":
        """Count distinct ids. `ids`: of each micro-batch of a step, dealt round-robin to the ranks."""
        distinct = [batch.unique() for batch in ids]
        return cls(
            micro_batch=sum(map(len, distinct)) / len(distinct),
            step=len(torch.cat(distinct[::ranks]).unique()),
            all_ranks=len(torch.cat(distinct).unique()),
        )


class Speeds(NamedTuple):
    """Seconds on this device, at the model's shape and precision; links in bytes per second."""

    forward_start: float  # per call of FFN-M without autograd
    forward_row: float  # per row of such a call
    pass_start: float  # per forward and backward
    pass_row: float  # per row of a forward and backward
    lookup: float  # per position: its row read, its gradient added
    sort: float  # per token, finding the distinct ids
    tensor_link: float  # all-reduce between tensor-parallel ranks
    data_link: float  # all-to-all between data-parallel ranks
    tensor_latency: float = 0.0  # seconds before the first byte of either
    data_latency: float = 0.0

    def forward(self, rows: float, calls: int = 1) -> float:
        """Seconds of FFN-M's forward over `rows` rows in `calls` calls."""
        return calls * self.forward_start + rows * self.forward_row

    def passes(self, rows: float, calls: int = 1) -> float:
        """Seconds of forward and backward over `rows` rows in `calls` calls."""
        return calls * self.pass_start + rows * self.pass_row


# Distinct ids / tokens of English text, by tokens, at vocabularies of 32k and 131k.
TEXT_TOKENS = (2**11, 2**14, 2**16, 2**18, 2**20)
TEXT_RATIOS = {2**15: (0.25, 0.19, 0.12, 0.06, 0.02), 2**17: (0.32, 0.23, 0.15, 0.08, 0.035)}
# For plans made on another machine than the run: a device of 1e14 FLOP/s and 1e12 bytes per second.
NOMINAL_FLOPS, NOMINAL_BYTES, NOMINAL_LINK, NOMINAL_CALL = 1e14, 1e12, 2e10, 2e-5


def expected_by_law(config: Config, topology: Topology) -> Distinct:
    """Expected distinct ids of ordinary text, for a plan without the data."""
    step = config.train.global_batch_size * config.data.sequence_length
    sizes = (_positions(config), step // topology.data, step)
    return Distinct(*(distinct_ids(size, config.model.vocab_size) for size in sizes))


def distinct_ids(tokens: int, vocabulary: int) -> float:
    """Expected distinct ids in `tokens` tokens of text, interpolated between measured ratios."""
    small, large = TEXT_RATIOS
    at = [np.interp(np.log(tokens), np.log(TEXT_TOKENS), np.log(TEXT_RATIOS[v])) for v in (small, large)]
    between = np.clip(np.log(vocabulary / small) / np.log(large / small), 0.0, 1.0)
    ratio = float(np.exp(at[0] + between * (at[1] - at[0])))
    return min(ratio * tokens, float(vocabulary))


def nominal_speeds(config: Config) -> Speeds:
    """Speeds of a nominal device: a backward costs two forwards, lookups run at memory bandwidth."""
    hidden = config.model.hidden_size
    flops = 6 * hidden * config.model.intermediate_size / config.parallel.tensor
    return Speeds(
        forward_start=NOMINAL_CALL,
        forward_row=flops / NOMINAL_FLOPS,
        pass_start=3 * NOMINAL_CALL,
        pass_row=3 * flops / NOMINAL_FLOPS,
        lookup=6 * FP32 * hidden / NOMINAL_BYTES,
        sort=1e-9,
        tensor_link=NOMINAL_LINK if config.parallel.tensor > 1 else float("inf"),
        data_link=NOMINAL_LINK,
    )


class MemoryChoice(NamedTuple):
    """The config with the chosen mode, and a log line with the reason."""

    config: Config
    reason: str


def table_bytes_per_layer(config: Config, distinct: float) -> float:
    """Bytes of a layer's table, in the precision of FFN-M's matrix multiplications, and its fp32 gradient."""
    return distinct * config.model.hidden_size * (compute_bytes(config) + FP32)


def kept_bytes_per_layer(config: Config, rows: float) -> float:
    """Bytes of the activations that FFN-M of `rows` rows keeps for its backward."""
    hidden, keys = config.model.hidden_size, 4 * config.model.intermediate_size / config.parallel.tensor
    return rows * (compute_bytes(config) * (keys + hidden) + 2 * FP32 * hidden)


def table_bytes(config: Config, topology: Topology, distinct: Distinct) -> float:
    """Bytes of all tables of this rank, and of the activations that they keep."""
    if config.memory is None:
        return 0.0
    layers = most_layers(config, topology)
    tables = config.memory.tabled(layers) * table_bytes_per_layer(config, distinct.step)
    return tables + _kept(config, topology) * kept_bytes_per_layer(
        config, _kept_rows(config, topology, distinct)
    )


def _own_rows(config: Config, topology: Topology, distinct: Distinct) -> float:
    """Number of a table's rows that this rank computes, on average over its layers.

    An owner computes rows of whole FFN-Ms: as many times fewer, where tensor-parallel ranks share one.
    """
    assert config.memory is not None
    alone = config.memory.placement in (None, "replicated")
    return distinct.step if alone else distinct.all_ranks / topology.data


def _kept(config: Config, topology: Topology) -> int:
    """Layers of this rank whose tables keep activations."""
    assert config.memory is not None
    layers = most_layers(config, topology)
    most = ceil(layers / topology.stage_ranks) if config.memory.owned else layers
    return min(config.memory.kept(layers), most)


def _kept_rows(config: Config, topology: Topology, distinct: Distinct) -> float:
    """Rows of whose FFN-M activations are kept, per layer that keeps them, in units of this rank's slice."""
    assert config.memory is not None
    owned = config.memory.owned
    return distinct.all_ranks * topology.tensor if owned else _own_rows(config, topology, distinct)


def seconds(config: Config, topology: Topology, distinct: Distinct, speeds: Speeds) -> float:
    """Estimated seconds per step of FFN-M on this rank, as executed by `config.memory`."""
    assert config.memory is not None
    layers, mode = most_layers(config, topology), config.memory.mode
    tabled = config.memory.tabled(layers)
    kept = _kept(config, topology)
    if config.memory.owned:  # on every rank
        kept = min(tabled, kept * topology.stage_ranks)
    total = _weight_seconds(config, topology, speeds)
    total += kept * _table_layer(config, topology, distinct, speeds, kept=True)
    total += (tabled - kept) * _table_layer(config, topology, distinct, speeds, kept=False)
    if tabled < layers:
        total += (layers - tabled) * _layer(config, topology, distinct, speeds, mode == "per_token")
    if mode != "per_token":
        total += topology.micro_batches(config.train) * _positions(config) * speeds.sort
    return total


def _positions(config: Config) -> int:
    return config.train.micro_batch_size * config.data.sequence_length


def _bubble(config: Config, topology: Topology) -> float:
    """Factor by which a pipeline's bubble prolongs work in its schedule: 1 + (p - 1) / (v m)."""
    waiting = (topology.pipeline - 1) / config.parallel.stages_per_rank
    return 1 + waiting / topology.micro_batches(config.train)


def _all_reduce_seconds(config: Config, rows: float, speeds: Speeds) -> float:
    """All-reduces of FFN-M's output and of its input's gradient between tensor-parallel ranks."""
    return 2 * (speeds.tensor_latency + FP32 * rows * config.model.hidden_size / speeds.tensor_link)


def _layer(config: Config, topology: Topology, distinct: Distinct, speeds: Speeds, per_token: bool) -> float:
    """Seconds of a layer in all micro-batches: at every position, or once per distinct id."""
    rows = _positions(config) if per_token else distinct.micro_batch
    once = speeds.passes(rows) + _all_reduce_seconds(config, rows, speeds)
    if config.train.activation_checkpointing == "full":
        once += speeds.forward(rows)
    if not per_token:
        once += _positions(config) * speeds.lookup
    return topology.micro_batches(config.train) * once * _bubble(config, topology)


def _table_layer(config: Config, topology: Topology, distinct: Distinct, speeds: Speeds, kept: bool) -> float:
    """Seconds of a layer's table, its lookups and its backward, and of the exchange of rows between ranks."""
    assert config.memory is not None
    rows, exchange = _own_rows(config, topology, distinct), 0.0
    if config.memory.placement in ("shared", "owned"):
        ranks = topology.stage_ranks if config.memory.owned else topology.data
        others = (ranks - 1) / ranks
        exchange = others * table_bytes_per_layer(config, distinct.step) / speeds.data_link
        # Rows out and gradients home; owned ones of several layers together, here as if always of two.
        exchange += speeds.data_latency * (1 if config.memory.owned else 2)
    calls = ceil(rows / BLOCK_ROWS)
    lookups = topology.micro_batches(config.train) * _positions(config) * speeds.lookup
    own = speeds.passes(rows, calls) + _all_reduce_seconds(config, rows, speeds)
    if not kept:
        own += speeds.forward(rows, calls) + 0.5 * _all_reduce_seconds(config, rows, speeds)
    return own + exchange + lookups * _bubble(config, topology)


def _weight_seconds(config: Config, topology: Topology, speeds: Speeds) -> float:
    """Sums of FFN-M's gradients over data parallel, and gathers of its weights, by which placements differ.

    Only with engine=fsdp, the one that has owned layers: with another all modes have the same.
    """
    memory = config.memory
    if memory is None or config.parallel.engine != "fsdp" or topology.data == 1:
        return 0.0
    layers, model = most_layers(config, topology), config.model
    bytes_of_layer = 3 * model.hidden_size * model.intermediate_size * (FP32 + compute_bytes(config))
    dense = (layers - memory.tabled(layers) if memory.owned else layers) * bytes_of_layer / topology.tensor
    # A layer's owners have sums and gathers among themselves, a rank those of one layer or two.
    divided = memory.owned and memory.tabled(layers) % topology.stage_ranks != 0
    return (dense + divided * bytes_of_layer) * (topology.data - 1) / topology.data / speeds.data_link


def choose(
    config: Config, topology: Topology, distinct: Distinct, speeds: Speeds, budget: float
) -> MemoryChoice:
    """Decide memory.mode=auto. `budget`: maximum bytes of this rank's tables."""
    configs = {_name(candidate): candidate for candidate in _candidates(config, topology, distinct, budget)}
    costs = {name: seconds(candidate, topology, distinct, speeds) for name, candidate in configs.items()}
    # Compared with three digits: of equal ones the simplest, which comes first.
    best, *_ = cheapest = sorted(costs, key=lambda name: float(f"{costs[name]:.3g}"))
    ranking = ", ".join(f"{name} {_rounded(costs[name])}" for name in cheapest)
    rows = f"{distinct.micro_batch:,.0f} distinct ids per micro-batch, {distinct.step:,.0f} per step"
    chosen = configs[best]
    size = table_bytes(chosen, topology, distinct)
    tables = f"; tables {size / 2**20:,.0f} MiB per rank" if size else ""
    whole = most_layers(config, topology) * table_bytes_per_layer(config, MARGIN * distinct.step)
    if whole > budget:
        tables += f"; whole tables would take {whole / 2**20:,.0f} MiB of the {budget / 2**20:,.0f} allowed"
    estimate = f"estimated FFN-M seconds per step {ranking}"
    return MemoryChoice(
        chosen, f"memory.mode=auto chose {best}{_settings(chosen)}: {estimate} ({rows}){tables}"
    )


def _name(config: Config) -> str:
    """A candidate's name in the ranking."""
    assert config.memory is not None
    placement = config.memory.placement
    return config.memory.mode + (f" {placement}" if placement not in (None, "replicated") else "")


def _settings(config: Config) -> str:
    """A chosen config's numbers of layers, in parentheses where it has any."""
    assert config.memory is not None
    counts = {name: getattr(config.memory, name) for name in ("table_layers", "kept_layers")}
    settings = ", ".join(f"{name}={count}" for name, count in counts.items() if count)
    return f" ({settings})" if settings else ""


def _rounded(cost: float) -> str:
    return f"{cost:.3f}" if cost >= 1e-3 else f"{cost:.2g}"


def _candidates(config: Config, topology: Topology, distinct: Distinct, budget: float) -> list[Config]:
    """Configs that the rest of the config allows and the budget holds; tables of fewer layers where needed.

    Whole tables keep the activations of as many layers as still fit, unless layers are recomputed anyway.
    """
    layers = most_layers(config, topology)
    fitting = int(min(budget / table_bytes_per_layer(config, MARGIN * distinct.step), layers))
    sections: list[dict[str, object]] = [{"mode": "per_token"}, {"mode": "unique"}]
    if fitting >= 1:
        left = budget - fitting * table_bytes_per_layer(config, MARGIN * distinct.step)
        for placement in _placements(config, topology):
            section: dict[str, object] = {"mode": "table", "placement": placement}
            try:
                candidate = with_memory(config, section)
            except UserError:
                continue
            rows = MARGIN * _kept_rows(candidate, topology, distinct)
            kept = int(min(left / kept_bytes_per_layer(config, rows), layers))
            if fitting < layers:
                section["table_layers"] = fitting
            elif kept and not _recomputes_layers(config):
                section["kept_layers"] = kept
            sections.append(section)
    candidates = []
    for section in sections:
        try:
            candidates.append(with_memory(config, section))
        except UserError:  # not possible with this layout
            continue
    return candidates


def _placements(config: Config, topology: Topology) -> list[str | None]:
    """Values of memory.placement that this layout has a use for; None: the default."""
    owned = config.parallel.engine == "fsdp" and topology.data > 1
    return [None, *(["shared"] if topology.data > 1 else []), *(["owned"] if owned else [])]


def _recomputes_layers(config: Config) -> bool:
    """Whether some stage uses full activation checkpointing."""
    return any(
        config.train.activation_checkpointing_of(stage) == "full" for stage in range(config.parallel.stages)
    )


def with_memory(config: Config, section: dict[str, object]) -> Config:
    """The config with another section `memory`. UserError where that does not fit the rest."""
    return parse_config(config.model_dump(mode="json", exclude_none=True) | {"memory": section})
