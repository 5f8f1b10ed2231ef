"""What the ranks of the parity test run: cases against the one-process reference."""

from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import Schedule1F1B

from mlm_train.config import Config
from mlm_train.memory import TableSource, make_source
from mlm_train.memory.rows import add_rows
from mlm_train.model.initial import initialise
from mlm_train.model.logical import Piece, Target, named_pieces
from mlm_train.model.loss import count_labels, loss_sums
from mlm_train.model.transformer import Transformer
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.build import build_engine, build_executor, build_model
from mlm_train.parallel.engine.base import Engine
from mlm_train.parallel.engine.copies import Copies
from mlm_train.parallel.engine.fsdp import EMBEDDING, FsdpEngine
from mlm_train.parallel.ffn_m.owned import RowGroup
from mlm_train.parallel.ffn_m.shares import DataParallelSharing
from mlm_train.parallel.mesh.sharded import local
from mlm_train.parallel.pipeline import executor as pipeline
from mlm_train.parallel.pipeline.x0 import LocalRows
from mlm_train.train.batches import MicroBatch
from mlm_train.train.schedule import learning_rate
from mlm_train.train.step import Trainer
from tests.parallel.layouts import BF16_MODES, MODES
from tests.parallel.reference import (
    EOD,
    global_batch,
    logical_gradients,
    relative_error,
    sharpen,
    tiny_config,
    train_reference,
)

STEPS = 3


def run_cases(cases: list[dict]) -> list[dict[str, float]]:
    """Errors of each case: loss, norm, gradients of the first step, weights after the third."""
    return [run_case(**case) for case in cases]


def run_case(model: dict, mode: str | None, micro_batch: int, **sections: dict) -> dict[str, float]:
    """Run one case on all ranks; return its errors."""
    if mode is not None:
        sections = sections | {"memory": MODES[mode]}
    train = sections.pop("train", {}) | {"micro_batch_size": micro_batch}
    config = tiny_config(model, train=train, **sections)
    runtime = processes.start(config)
    trainer = make_trainer(config, runtime)
    reference = _reference(config)
    error = {"loss": 0.0, "norm": 0.0}
    for step in range(STEPS):
        batches = my_batches(runtime, step, config)
        if step == 0:
            error["gradients"] = _first_gradients(trainer, batches, reference["gradients"])
            error["loss"] = abs(trainer.evaluate(batches) / reference["losses"][0] - 1)
        result = trainer.step(batches, learning_rate(config, step))
        error["loss"] = max(error["loss"], abs(result.loss / reference["losses"][step] - 1))
        error["norm"] = max(error["norm"], abs(result.grad_norm / reference["norms"][step] - 1))
    weights = assembled(trainer.engine.pieces, whole_weights(trainer.engine))
    error["weights"] = relative_error(weights, reference["weights"])
    error["alone"] = reference["alone"]
    return error


REFERENCES: dict[str, dict] = {}


def _reference(config: Config) -> dict:
    """The one-process run of a config, computed on rank 0 and shared by cases that differ in layout, mode or
    micro-batch.

    `alone`: the weights' error of one fp32 process. AdamW divides by the gradients' magnitude, so a model may
    be ill-conditioned in any layout.
    """
    key = repr((config.model, config.optimizer, config.schedule, config.train.global_batch_size, config.data))
    if key not in REFERENCES:
        shared: list = [None]
        if dist.get_rank() == 0:
            exact = train_reference(config, STEPS)
            alone = train_reference(config, STEPS, torch.float32)
            shared = [exact | {"alone": relative_error(alone["weights"], exact["weights"])}]
        dist.broadcast_object_list(shared)
        REFERENCES[key] = shared[0]
    return REFERENCES[key]


def _network(config: Config) -> Transformer:
    network = Transformer(config.model)
    initialise(network, config.model, config.train.seed)
    sharpen(network)
    return network


def make_trainer(config: Config, runtime: processes.Runtime) -> Trainer:
    """A new trainer of a config, with sharpened weights."""
    whole = dict(named_pieces(_network(config)))
    network = build_model(config, runtime, EOD)
    executor = build_executor(network, config, runtime)
    engine = build_engine(network, executor, config, runtime)

    def fill(held: Iterable[Target]) -> None:
        for target in held:
            target.view.copy_(target.piece.cut(whole[target.piece.name]))

    engine.fill(fill)
    engine.refresh_model()
    return Trainer(engine, executor, runtime)


def whole_weights(engine: Engine) -> dict[str, Tensor]:
    """The model's own weights (not the optimizer's copy) by parameter, gathered under ZeRO-3.

    Under FSDP a rank's rows of them.
    """
    if isinstance(engine, FsdpEngine):
        return {name: _as_stored(engine, name, shard.detach()) for name, shard in engine.shards.items()}
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(engine.model.parameters()), enabled=engine.stage == 3):
        return {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}


def whole_gradients(engine: Engine) -> dict[str, Tensor]:
    """The averaged gradients by parameter, gathered from the ranks that hold them; of its rows under FSDP."""
    if isinstance(engine, FsdpEngine):
        found = {name: engine.shards[name] for name in engine.rows} | {
            name: parameter for name, parameter in engine.parameters.items() if name not in engine.rows
        }
        return {name: _as_stored(engine, name, local(found[name].grad)) for name in engine.shards}
    from deepspeed.utils import safe_get_full_grad

    read = (lambda parameter: parameter.grad) if engine.stage == 0 else safe_get_full_grad
    return {name: read(parameter).clone() for name, parameter in engine.model.named_parameters()}


def _as_stored(engine: FsdpEngine, name: str, rows: Tensor) -> Tensor:
    """A copy of a rank's rows, in the order of a checkpoint."""
    if engine.order is not None and name == EMBEDDING:
        return engine.order.to_checkpoint(rows)
    return rows.clone()


def assembled(local: list[Piece], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole logical tensors, on every rank's CPU, from the pieces that the ranks hold in their parameters."""
    mine = [
        (piece.name, piece.shape, piece.offset, piece.of(values[piece.parameter]).contiguous().cpu())
        for piece in local
    ]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    whole: dict[str, Tensor] = {}
    for name, shape, offset, part in (entry for entries in gathered for entry in entries):
        target = whole.setdefault(name, torch.full(shape, float("nan"), dtype=part.dtype))
        target[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))] = part
    return whole


def my_batches(runtime: processes.Runtime, step: int, config: Config) -> list[MicroBatch]:
    """This rank's micro-batches of a global batch: contiguous rows, so that masks differ by rank."""
    size, micro_batch = config.train.global_batch_size, config.train.micro_batch_size
    share = size // runtime.topology.data
    mine = slice(runtime.topology.data_rank * share, (runtime.topology.data_rank + 1) * share)
    pairs = zip(*(tensor[mine].split(micro_batch) for tensor in global_batch(step, size)), strict=True)
    return [MicroBatch(*pair) for pair in pairs]


def _first_gradients(trainer: Trainer, batches: list[MicroBatch], reference: dict) -> float:
    """Run the backward only, compare its gradients with the reference, and drop them."""
    trainer.backward(batches)
    engine = trainer.engine
    mine = assembled(engine.pieces, whole_gradients(engine))
    if isinstance(engine, FsdpEngine):
        for parameter in (*engine.parameters.values(), *engine.rows.values()):
            parameter.grad = None
    else:
        engine.zero.optimizer.zero_grad()
    return relative_error(mine, reference)


def run_bf16_cases(
    model: dict, modes: list[str], micro_batch: int, seeds: int, parallel: dict, device: str = "auto"
) -> dict[str, float]:
    """Median error of bf16 gradients: of each mode in this layout, and of one process alone on a CPU.

    modes: of MODES or BF16_MODES; of a base model "none".
    """
    distances: dict[str, list[float]] = {name: [] for name in [*modes, "alone"]}
    for seed in range(seeds):
        train = {"micro_batch_size": micro_batch, "precision": "bf16", "seed": seed, "loss_chunk_size": 13}
        sections = {"train": train | {"device": device}, "parallel": parallel}
        config = tiny_config(model, **sections)
        runtime = processes.start(config)
        reference = train_reference(config, 1)["gradients"]
        for mode in modes:
            memory = {} if mode == "none" else {"memory": (MODES | BF16_MODES)[mode]}
            trainer = make_trainer(tiny_config(model, **memory, **sections), runtime)
            batches = my_batches(runtime, 0, config)
            distances[mode].append(_first_gradients(trainer, batches, reference))
        distances["alone"].append(_alone_bf16(config, reference))
    return {name: float(torch.tensor(values).median()) for name, values in distances.items()}


def _alone_bf16(config: Config, reference: dict) -> float:
    """One process, per_token, the whole batch at once, under autocast."""
    network = _network(config)
    ids, labels = global_batch(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(ids, make_source("per_token", network.memory_blocks()))
    sums = loss_sums(logits, labels)
    ((sums.cross_entropy + config.train.z_loss * sums.z) / count_labels(labels)).backward()
    return relative_error(logical_gradients(network), reference)


_sum_over_ranks = Trainer._sum_over_ranks


def _count_alone(self: Trainer, values: Tensor) -> Tensor:
    """Sum over data parallel, except for the count of labels, the only scalar."""
    if values.dim() == 0:
        return values * self.runtime.topology.data
    return _sum_over_ranks(self, values)


def _without_anchors(*args: Any) -> TableSource:
    """Tables whose lookups lead to no parameter that requires a gradient."""
    table = TableSource(*args)
    for anchor in table.anchors.values():
        anchor.requires_grad_(False)
    return table


_collect = DataParallelSharing.collect


def _collect_own(self: DataParallelSharing, rows: Tensor) -> Tensor:
    """Collect the gradients of rows that this rank computed itself, zeros for those of the others."""
    rank = dist.get_rank(self.group)
    start = sum(self.requested[:rank])
    own = self.order[start : start + self.requested[rank]]
    return _collect(self, torch.zeros_like(rows).index_copy(0, own, rows[own]))


_gradients = RowGroup.gradients


def _gradients_of_own(self: RowGroup) -> list[tuple[int, Tensor]]:
    """Gradients of owned rows from this rank's own lookups alone."""
    self.work.wait()
    rank = self.placement.rank
    sent = self.messages.sent
    own = slice(sum(sent[:rank]), sum(sent[: rank + 1]))
    alone = torch.zeros_like(self.home)
    alone[own] = self.home[own]
    self.home = alone
    return _gradients(self)


_reduce = Copies.reduce


def _reduce_alone(self: Copies, scale: float) -> None:
    """Gradients of copies without those of the other holders."""
    joins, self.joins = self.joins, False
    _reduce(self, scale)
    self.joins = joins


MISTAKES: dict[str, Callable[[], Any]] = {
    "labels counted on each rank alone": lambda: patch.object(Trainer, "_sum_over_ranks", _count_alone),
    "norms not summed over positions": lambda: patch("mlm_train.parallel.build.sum_replicated"),
    "norms not summed in each pass": lambda: patch("mlm_train.parallel.build.sum_replicated_each_pass"),
    "tied heads not summed": lambda: patch.object(pipeline.PipelineExecutor, "_sum_tied", lambda self: None),
    "rows of x0 not summed over positions": lambda: patch.object(
        LocalRows, "give_back", lambda self, gradient: self.embedded.backward(gradient)
    ),
    "gradients scaled by the schedule": lambda: patch.dict(
        pipeline.SCHEDULES, {"1f1b": lambda *args, scale_grads, **rest: Schedule1F1B(*args, **rest)}
    ),
    "lookups without anchors": lambda: patch("mlm_train.memory.TableSource", _without_anchors),
    "gradients of shared rows not sent": lambda: patch.object(DataParallelSharing, "collect", _collect_own),
    "gradients of owned rows not sent": lambda: patch.object(RowGroup, "gradients", _gradients_of_own),
    "gradients of a layer's owners not summed": lambda: patch.object(Copies, "reduce", _reduce_alone),
}


def run_mistaken(cases: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Errors of each case with its mistake in the code."""
    found = {}
    for mistake, case in cases.items():
        with MISTAKES[mistake]():
            found[mistake] = run_case(**case)
    return found


def count_lookups(model: dict, parallel: dict) -> list[int]:
    """Backward calls of x0's lookups on this rank, in total after a step, an evaluation, another step."""
    config = tiny_config(model, parallel=parallel, train={"micro_batch_size": 2})
    runtime = processes.start(config)
    trainer = make_trainer(config, runtime)
    found = []
    with patch("mlm_train.memory.rows.add_rows", wraps=add_rows) as counted:
        for work in (trainer.step, trainer.evaluate, trainer.step):
            batches = my_batches(runtime, len(found), config)
            work(batches, 1e-3) if work == trainer.step else work(batches)
            found.append(counted.call_count)
    return found
