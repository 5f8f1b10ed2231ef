"""A training step as one rank of a world that is not there: bytes, exchanges and state, counted.

The rank runs the trainer's own code. Collectives go to torch's fake process group, and weights and
activations are fake tensors, which have shapes and no storage; the ids of all ranks are real, and so are the
split counts that follow from them.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from mlm_train.bench import report
from mlm_train.bench.built import SEED
from mlm_train.bench.scale_presets import World
from mlm_train.config import Config
from mlm_train.data.prepared import PreparedData
from mlm_train.data.samples import Samples
from mlm_train.model.counts import count_parameters
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.build import build_engine, build_executor, build_model
from mlm_train.parallel.engine.fsdp import FsdpEngine
from mlm_train.parallel.ffn_m import embedding, owned
from mlm_train.parallel.ffn_m.owned import OwnedTables
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.parallel.pipeline.stages import my_spans
from mlm_train.parallel.runtime import Runtime
from mlm_train.plan.owned import RowBytes, computed_by, owned_traffic
from mlm_train.train.batches import MicroBatch, step_batches

BF16, FP32 = 2, 4
EXCHANGE = "alltoall_base_"


class Calls(TorchDispatchMode):
    """Collectives of this rank, by axis, operation and dtype: calls, and bytes that the rank sends.

    Of n ranks an all-gather sends its input n - 1 times, a reduce-scatter the (n - 1) / n of its input that
    others sum, an all-reduce twice that, a broadcast or reduce (n - 1) / n of the tensor on average: what a
    ring moves. An all-to-all sends what is for others.
    """

    def __init__(self, axes: dict[str, str]) -> None:
        super().__init__()
        self.axes = axes  # name of a process group -> axis
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self.bytes: Counter[tuple[str, str, str]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func.overloadpacket.__name__, args)
        call: Callable[..., Any] = func
        return call(*args, **(kwargs or {}))

    def _count(self, operation: str, args: Sequence[Any]) -> None:
        boxed = next((arg for arg in args if isinstance(arg, torch.ScriptObject)), None)
        if boxed is None or operation in ("recv_", "barrier"):
            return
        group = dist.ProcessGroup.unbox(boxed)
        ranks = group.size()
        second = operation in (EXCHANGE, "_allgather_base_", "_reduce_scatter_base_")
        tensor = args[1] if second else args[0]
        tensors = [tensor] if isinstance(tensor, Tensor) else list(tensor)
        size = sum(t.numel() * t.element_size() for t in tensors)
        if operation == EXCHANGE:
            rows = args[4]
            own = rows[group.rank()] if rows else len(tensors[0]) // ranks
            size -= own * (size // max(len(tensors[0]), 1))
        elif operation == "_allgather_base_":
            size *= ranks - 1
        elif operation != "send":
            size = size * (ranks - 1) // ranks * (2 if operation == "allreduce_" else 1)
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        key = (self.axes.get(group.group_name, "other"), operation.strip("_"), dtype)
        self.calls[key] += 1
        self.bytes[key] += size


def work(order_file: str) -> int:
    """Count as ordered; write the result beside `order_file`."""
    order = report.read_order(order_file)
    world = World(**order["world"])
    data = PreparedData.open(order["data"])
    config = world.config(data.vocab_size, order["tokens"], order["sequence"])
    report.write_result(order_file, measure(world, config, data))
    return 0


def measure(world: World, config: Config, data: PreparedData) -> dict[str, Any]:
    """Run a step as a rank in the middle of a fake world; returns what it counted."""
    runtime = _join(config, world)
    topology = runtime.topology
    samples = Samples(data.split("train"), config.data.sequence_length, SEED)
    size = config.train.global_batch_size
    asked = [
        _local(torch.cat([b.ids for b in step_batches(samples, 0, size, 1, rank)]), rank)
        for rank in _stage(topology)
    ]
    batches = step_batches(samples, 0, size, 1, topology)
    with _fake_weights() as fake:
        model = build_model(config, runtime)
        executor: Any = build_executor(model, config, runtime)
        engine = build_engine(model, executor, config, runtime)
    assert isinstance(engine, FsdpEngine)
    source = executor.source
    with _known_ids(asked, source if isinstance(source, OwnedTables) else None):
        started = time.perf_counter()
        plan = executor.channel.plan(torch.cat([batch.ids for batch in batches]), len(batches), ahead=False)
        planned = time.perf_counter() - started
    unsharded = _most_unsharded(engine) if topology.pipeline == 1 else None
    # Passes repeat: two short steps tell what one adds. A pipeline needs as many as it has stages.
    few = topology.pipeline
    short, longer = (
        _step(executor, engine, fake, runtime, batches[:passes], plan) for passes in (few, few + 1)
    )
    counted = {
        what: {key: once[key] + (len(batches) - few) * (twice[key] - once[key]) for key in twice}
        for what, once, twice in (
            ("calls", short.calls, longer.calls),
            ("bytes", short.bytes, longer.bytes),
        )
    }
    return {
        "distinct": len(asked[topology.stage_rank]),
        "union": len(torch.cat(asked).unique()),
        "micro_batches": len(batches),
        "calls": _named(counted["calls"]),
        "bytes": _named(counted["bytes"]),
        "state": _state(engine),
        "unsharded_blocks": None if unsharded is None else unsharded[0],
        "plan_seconds": planned,
        "stage_layers": sum(len(span.layers) for span in my_spans(config, topology)),
        "whole_state": 3 * FP32 * count_parameters(config.model).stored,
    } | _formula(source, asked, topology, config)


def _step(
    executor: Any, engine: FsdpEngine, fake: Any, runtime: Runtime, batches: list[MicroBatch], plan: Any
) -> Calls:
    """Count a step of some of its micro-batches, with the rows of all of them."""
    groups, rows = runtime.groups, sum(len(batch.ids) for batch in batches)
    axes = {"tensor": groups.tensor, "pipeline": groups.pipeline, "data": groups.data, "stage": groups.stage}
    index = plan[0] if isinstance(plan, tuple) else plan.index
    cut = (index[:rows], plan[1]) if isinstance(plan, tuple) else replace(plan, index=index[:rows])
    executor.channel.plan = lambda ids, passes, ahead: cut
    with _agreed_stages(), fake, Calls({group.group_name: axis for axis, group in axes.items()}) as calls:
        with engine.accumulating():
            executor.backward(batches, 1.0)
        # A fake tensor has no value to read: a step that waited for the device would end here.
        engine.step(1e-4)
    return calls


def _join(config: Config, world: World) -> Runtime:
    """Become a rank in the middle of the world."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rank = world.ranks // 2 + min(1, world.ranks - 1) if world.ranks > 2 else 0
    os.environ |= {"WORLD_SIZE": str(world.ranks), "RANK": str(rank), "LOCAL_RANK": "0"}
    dist.init_process_group("fake", rank=rank, world_size=world.ranks, store=FakeStore())
    return processes.start(config)


def _stage(topology: Topology) -> list[Topology]:
    """The ranks of this rank's stage."""
    first = topology.pipeline_rank * topology.stage_ranks
    return [
        Topology(topology.world, first + rank, topology.tensor, topology.pipeline)
        for rank in range(topology.stage_ranks)
    ]


def _local(ids: Tensor, rank: Topology) -> Tensor:
    """The distinct ids of a rank's own positions, with sequence parallelism."""
    return ids.chunk(rank.tensor, 1)[rank.tensor_rank].unique()


@contextmanager
def _fake_weights() -> Iterator[Any]:
    """Have modules that get storage inside get fake tensors; yields their mode."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode, to_empty = FakeTensorMode(allow_non_fake_inputs=True), nn.Module.to_empty

    def fake_empty(self: nn.Module, **options: Any) -> nn.Module:
        with mode:
            return to_empty(self, **options)

    with patch.object(nn.Module, "to_empty", fake_empty):
        yield mode


@contextmanager
def _known_ids(asked: list[Tensor], source: OwnedTables | None) -> Iterator[None]:
    """Answer the exchanges of ids, whose ranks are not there, with what the others would send."""

    def wanted(_: Tensor, __: Any) -> list[Tensor]:
        if source is None:
            return asked
        union = torch.cat(asked).unique()
        owners = source.placement.owners
        return [torch.cat((ids, computed_by(union, rank, owners))).unique() for rank, ids in enumerate(asked)]

    with ExitStack() as stack:
        stack.enter_context(patch.object(owned, "gather_ids", lambda ids, group: asked))
        stack.enter_context(patch.object(embedding, "gather_ids", wanted))
        yield


@contextmanager
def _agreed_stages() -> Iterator[None]:
    """Skip the vote of a pipeline's stages on how they learn shapes, which needs answers: ours are given."""
    from torch.distributed.pipelining import schedules, stage

    vote = getattr(schedules._PipelineSchedule, "_warmup_p2p", None)
    if vote is None:  # torch 2.11 has none
        yield
        return

    def agreed(_: Any, stages: Sequence[Any], *__: Any) -> None:
        for one in stages:
            one._inference_mode = stage.InferenceMode.STATIC

    with patch.object(schedules._PipelineSchedule, "_warmup_p2p", agreed):
        yield


def _most_unsharded(engine: FsdpEngine) -> list[int]:
    """A list whose entry will be the largest number of FSDP's blocks that are gathered at once."""
    from mlm_train.model.block import Block

    blocks = [module for module in engine.model.modules() if isinstance(module, Block)]
    most = [0]

    def look(*_: Any) -> None:
        gathered = sum(
            any(group.is_unsharded for group in _groups(block))
            for block in blocks
            if isinstance(block, FSDPModule)
        )
        most[0] = max(most[0], gathered)

    for block in blocks:
        block.self_attn.register_forward_hook(look)
        block.self_attn.register_full_backward_hook(look)
    return most


def _groups(module: FSDPModule) -> list[Any]:
    """FSDP's parameter groups of a module; torch 2.11 has one."""
    state: Any = module._get_fsdp_state()
    return list(getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group])


def _state(engine: FsdpEngine) -> dict[str, int]:
    """Bytes of fp32 weights and moments on this rank, by part of the model, and of whole copies."""
    parts: Counter[str] = Counter()
    owned_names = {name for copies in engine.copies for name in copies.copies}
    for name, shard in engine.shards.items():
        part = "ffn_m" if name in owned_names else "embedding" if name.startswith("embed") else "sharded"
        moments = (value for value in engine.optimizer.state[shard].values() if value.dim())
        parts[part] += sum(t.numel() * t.element_size() for t in (shard, *moments))
    copies = (copy.weight for held in engine.copies for copy in held.copies.values())
    return dict(parts) | {"copies": sum(weight.numel() * weight.element_size() for weight in copies)}


def _formula(source: Any, asked: list[Tensor], topology: Topology, config: Config) -> dict[str, Any]:
    """The bytes of owned rows and weights by formula, and the rows that this rank computes."""
    if not isinstance(source, OwnedTables):
        return {}
    hidden, wide = config.model.hidden_size, config.model.intermediate_size
    weights = [(hidden, 1), (2 * wide, hidden), (hidden, wide)]
    owners, first = source.placement.owners, topology.pipeline_rank == 0
    traffic = owned_traffic(
        asked, topology.stage_rank, owners, hidden, weights, RowBytes(BF16, FP32), own_embedding=first
    )
    computed = source.evaluations(0, 0)
    share = len(torch.cat(asked).unique()) * len(owners.layers) / owners.ranks
    return {"formula": traffic._asdict(), "rows_over_share": computed / share}


def _named(counter: dict[tuple[str, str, str], int]) -> dict[str, int]:
    return {"/".join(key): value for key, value in sorted(counter.items())}
