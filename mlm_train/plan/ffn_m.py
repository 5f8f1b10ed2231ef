"""What each way of executing FFN-M costs a rank in a step, and memory.mode=auto: the cheapest that fits.

Seconds are counted from measured speeds (plan/speeds.py) and expected distinct ids; what the ways share
(attention, FFN-C, head) is left out. Work inside a pipeline's schedule waits in its bubble, tables do not.
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
from mlm_train.memory.table import ROWS
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.parallel.pipeline.stages import most_layers
from mlm_train.plan.activations import compute_bytes

FP32 = 4
MARGIN = 1.1  # a step may hold more distinct ids than expected


class Distinct(NamedTuple):
    """Expected distinct ids of a micro-batch, of a data-parallel rank's step, and of all ranks' step."""

    micro_batch: float
    step: float
    all_ranks: float

    @classmethod
    def of(cls, ids: Sequence[Tensor], ranks: int = 1) -> "Distinct":
        """Counted; `ids` of each micro-batch of a step, dealt in turn to so many data-parallel ranks."""
        found = [some.unique() for some in ids]
        return cls(
            micro_batch=sum(map(len, found)) / len(found),
            step=len(torch.cat(found[::ranks]).unique()),
            all_ranks=len(torch.cat(found).unique()),
        )


class Speeds(NamedTuple):
    """Seconds on this device, at the model's shape and precision; links in bytes a second."""

    forward_start: float  # a call of FFN-M without graph
    forward_row: float  # and each of its rows
    pass_start: float  # forward and backward
    pass_row: float
    lookup: float  # a position's row read, and its gradient added
    sort: float  # a token among the distinct ids
    tensor_link: float  # all-reduced between ranks that share layers
    data_link: float  # exchanged between data-parallel ranks

    def forward(self, rows: float, calls: int = 1) -> float:
        """Seconds of FFN-M over rows, in so many calls."""
        return calls * self.forward_start + rows * self.forward_row

    def passes(self, rows: float, calls: int = 1) -> float:
        """Forward and backward."""
        return calls * self.pass_start + rows * self.pass_row


# Distinct ids over tokens of English text, at vocabularies of 32k and 131k pieces.
TEXT_TOKENS = (2**11, 2**14, 2**16, 2**18, 2**20)
TEXT_RATIOS = {2**15: (0.25, 0.19, 0.12, 0.06, 0.02), 2**17: (0.32, 0.23, 0.15, 0.08, 0.035)}
# For plans made elsewhere than the run: a device of 1e14 FLOP/s that streams 1e12 bytes a second.
NOMINAL_FLOPS, NOMINAL_BYTES, NOMINAL_LINK, NOMINAL_CALL = 1e14, 1e12, 2e10, 2e-5


def expected_by_law(config: Config, topology: Topology) -> Distinct:
    """Distinct ids as in ordinary text, for a plan without the data."""
    step = config.train.global_batch_size * config.data.sequence_length
    sizes = (_positions(config), step // topology.data, step)
    return Distinct(*(distinct_ids(size, config.model.vocab_size) for size in sizes))


def distinct_ids(tokens: int, vocabulary: int) -> float:
    """Of so many tokens of text, by interpolation between measured ratios."""
    small, large = TEXT_RATIOS
    at = [np.interp(np.log(tokens), np.log(TEXT_TOKENS), np.log(TEXT_RATIOS[v])) for v in (small, large)]
    between = np.clip(np.log(vocabulary / small) / np.log(large / small), 0.0, 1.0)
    ratio = float(np.exp(at[0] + between * (at[1] - at[0])))
    return min(ratio * tokens, float(vocabulary))


def nominal_speeds(config: Config) -> Speeds:
    """Where nothing can be measured: a backward pass of two forwards, lookups as fast as memory."""
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
    """A decided config and why."""

    config: Config
    reason: str


def table_bytes_per_layer(config: Config, distinct: float) -> float:
    """A table in the precision of FFN-M's products and its fp32 gradient."""
    return distinct * config.model.hidden_size * (compute_bytes(config) + FP32)


def kept_bytes_per_layer(config: Config, rows: float) -> float:
    """What FFN-M of so many rows keeps for its backward: its products, their inputs, an fp32 output."""
    hidden, keys = config.model.hidden_size, 4 * config.model.intermediate_size / config.parallel.tensor
    return rows * (compute_bytes(config) * (keys + hidden) + 2 * FP32 * hidden)


def table_bytes(config: Config, topology: Topology, distinct: Distinct) -> float:
    """Of all tables of this rank, and of the activations that they keep."""
    if config.memory is None:
        return 0.0
    layers = most_layers(config, topology)
    tables = config.memory.tabled(layers) * table_bytes_per_layer(config, distinct.step)
    rows = _own_rows(topology, distinct, config.memory.shared)
    return tables + config.memory.kept(layers) * kept_bytes_per_layer(config, rows)


def _own_rows(topology: Topology, distinct: Distinct, shared: bool) -> float:
    """Rows of a table that this rank computes."""
    return distinct.all_ranks / topology.data if shared else distinct.step


def seconds(config: Config, topology: Topology, distinct: Distinct, speeds: Speeds) -> float:
    """FFN-M's share of a step on this rank, as `config.memory` executes it."""
    assert config.memory is not None
    layers, mode = most_layers(config, topology), config.memory.mode
    tabled = config.memory.tabled(layers)
    kept = config.memory.kept(layers)
    found = kept * _table_layer(config, topology, distinct, speeds, kept=True)
    found += (tabled - kept) * _table_layer(config, topology, distinct, speeds, kept=False)
    if tabled < layers:
        found += (layers - tabled) * _layer(config, topology, distinct, speeds, mode == "per_token")
    if mode != "per_token":
        found += topology.micro_batches(config.train) * _positions(config) * speeds.sort
    return found


def _positions(config: Config) -> int:
    return config.train.micro_batch_size * config.data.sequence_length


def _bubble(config: Config, topology: Topology) -> float:
    """How much longer work in a schedule takes than it is: (p - 1) / (v m) of it is waiting."""
    waiting = (topology.pipeline - 1) / config.parallel.stages_per_rank
    return 1 + waiting / topology.micro_batches(config.train)


def _summed(config: Config, rows: float, speeds: Speeds) -> float:
    """Between ranks that share layers: FFN-M's output, and the gradient of its input."""
    return 2 * FP32 * rows * config.model.hidden_size / speeds.tensor_link


def _layer(config: Config, topology: Topology, distinct: Distinct, speeds: Speeds, everywhere: bool) -> float:
    """A layer in all micro-batches: at every position, or once per distinct id of each."""
    rows = _positions(config) if everywhere else distinct.micro_batch
    once = speeds.passes(rows) + _summed(config, rows, speeds)
    if config.train.activation_checkpointing == "full":
        once += speeds.forward(rows)
    if not everywhere:
        once += _positions(config) * speeds.lookup
    return topology.micro_batches(config.train) * once * _bubble(config, topology)


def _table_layer(config: Config, topology: Topology, distinct: Distinct, speeds: Speeds, kept: bool) -> float:
    """A layer's table, its lookups, its backward; shared: a part of all ranks' rows, and the exchange."""
    assert config.memory is not None
    rows, exchange = _own_rows(topology, distinct, config.memory.shared), 0.0
    if config.memory.shared:
        others = (topology.data - 1) / topology.data
        exchange = others * table_bytes_per_layer(config, distinct.step) / speeds.data_link
    calls = ceil(rows / ROWS)
    lookups = topology.micro_batches(config.train) * _positions(config) * speeds.lookup
    own = speeds.passes(rows, calls) + _summed(config, rows, speeds)
    if not kept:
        own += speeds.forward(rows, calls) + 0.5 * _summed(config, rows, speeds)
    return own + exchange + lookups * _bubble(config, topology)


def choose(
    config: Config, topology: Topology, distinct: Distinct, speeds: Speeds, budget: float
) -> MemoryChoice:
    """memory.mode=auto decided. `budget`: bytes that this rank's tables may take."""
    configs = {_name(candidate): candidate for candidate in _candidates(config, topology, distinct, budget)}
    costs = {name: seconds(one, topology, distinct, speeds) for name, one in configs.items()}
    # As they are shown: where two are alike, the simpler one, which comes first.
    best, *_ = cheapest = sorted(costs, key=lambda name: float(f"{costs[name]:.3g}"))
    ranking = ", ".join(f"{name} {costs[name]:.3g} s" for name in cheapest)
    rows = f"{distinct.micro_batch:,.0f} distinct ids a micro-batch, {distinct.step:,.0f} a step"
    chosen = configs[best]
    size = table_bytes(chosen, topology, distinct)
    tables = f"; tables {size / 2**20:,.0f} MiB a rank" if size else ""
    whole = most_layers(config, topology) * table_bytes_per_layer(config, MARGIN * distinct.step)
    if whole > budget:
        tables += f"; whole tables would take {whole / 2**20:,.0f} MiB of the {budget / 2**20:,.0f} allowed"
    return MemoryChoice(chosen, f"memory.mode=auto -> {best}: FFN-M a step {ranking} ({rows}){tables}")


def _name(config: Config) -> str:
    assert config.memory is not None
    memory = config.memory
    layers = f" of {memory.table_layers} layers" if memory.table_layers else ""
    kept = f" keeping {memory.kept_layers} layers" if memory.kept_layers else ""
    return memory.mode + layers + (" shared" if memory.shared else "") + kept


def _candidates(config: Config, topology: Topology, distinct: Distinct, budget: float) -> list[Config]:
    """What the rest of the config allows and the budget holds; tables of fewer layers where not of all.

    Whole tables keep the activations of as many layers as still fit; not where layers are to be computed
    again anyway.
    """
    layers = most_layers(config, topology)
    fitting = int(min(budget / table_bytes_per_layer(config, MARGIN * distinct.step), layers))
    sections: list[dict[str, object]] = [{"mode": "per_token"}, {"mode": "unique"}]
    if fitting >= 1:
        left = budget - fitting * table_bytes_per_layer(config, MARGIN * distinct.step)
        for shared in (False, True) if topology.data > 1 else (False,):
            section: dict[str, object] = {"mode": "table", "shared": shared}
            rows = MARGIN * _own_rows(topology, distinct, shared)
            kept = int(min(left / kept_bytes_per_layer(config, rows), layers))
            if fitting < layers:
                section["table_layers"] = fitting
            elif kept and not _recomputes_layers(config):
                section["kept_layers"] = kept
            sections.append(section)
    found = []
    for section in sections:
        try:
            found.append(with_memory(config, section))
        except UserError:  # does not go with this layout
            continue
    return found


def _recomputes_layers(config: Config) -> bool:
    """Whether some stage keeps no activations of a layer but its input."""
    return any(
        config.train.activation_checkpointing_of(stage) == "full" for stage in range(config.parallel.stages)
    )


def with_memory(config: Config, section: dict[str, object]) -> Config:
    """The config with another section `memory`. UserError where it does not go with the rest."""
    return parse_config(config.model_dump(mode="json", exclude_none=True) | {"memory": section})
