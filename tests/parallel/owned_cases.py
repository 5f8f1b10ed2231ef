"""What the ranks of the tests of owned FFN-M run: work and bytes of a step, and moves between placements."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mlm_train.bench.traffic import Traffic
from mlm_train.checkpoint.index import read_index
from mlm_train.checkpoint.load import load_training_state, open_checkpoint
from mlm_train.checkpoint.reading.slices import read_tensor
from mlm_train.checkpoint.save import take_snapshot, write_checkpoint
from mlm_train.checkpoint.shards import RNG
from mlm_train.config import ModelConfig
from mlm_train.data.order import ORDER
from mlm_train.model.logical import pieces
from mlm_train.model.transformer import Transformer
from mlm_train.model.unfilled import unfilled
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.ffn_m.owned import OwnedTables
from mlm_train.parallel.mesh.exchange import gather_ids
from mlm_train.plan.owned import RowBytes, owned_traffic
from tests.parallel.layouts import MODES
from tests.parallel.parity_cases import make_trainer, my_batches
from tests.parallel.reference import tiny_config

VOCABULARY, LAYERS = 5000, 3
FSDP = {"engine": "fsdp"}


def count_work(modes: list[str]) -> list[list[dict[str, Any]]]:
    """By mode and rank: FLOPs and rows of FFN-M in a step, bytes sent and by formula, row exchanges."""
    return [_count(mode) for mode in modes]


def _count(mode: str) -> list[dict[str, Any]]:
    model = {"kind": "memory", "vocab_size": VOCABULARY, "num_hidden_layers": LAYERS}
    config = tiny_config(model, memory=MODES[mode], parallel=FSDP, train={"micro_batch_size": 1})
    runtime = processes.start(config)
    trainer = make_trainer(config, runtime)
    executor: Any = trainer.executor
    engine: Any = trainer.engine
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCABULARY, (3, 64, 64), generator=generator).amin(0)  # low ids are frequent
    mine = ids.chunk(runtime.topology.data)[runtime.topology.data_rank]
    with Traffic() as traffic, FlopCounterMode(display=False) as flops:
        plan = executor.channel.plan(mine, 1, ahead=False)
        executor.channel.begin(plan)
        executor.channel.finish()
    rows = traffic.calls["alltoall_base_"]
    with traffic:
        for copies in engine.copies:
            copies.reduce(1.0)
            copies.publish()
    counts = {
        "flops": flops.get_total_flops(),
        "sent": traffic.by_operation["alltoall_base_"],
        "row_exchanges": rows,
        "exchanges": traffic.calls["alltoall_base_"],
    }
    if isinstance(executor.source, OwnedTables):
        hidden, wide = config.model.hidden_size, config.model.intermediate_size
        asked = gather_ids(plan.tables.ids, runtime.groups.stage_cpu.main)
        weights = [(hidden, 1), (2 * wide, hidden), (hidden, wide)]
        owners = executor.source.placement.owners
        formula = owned_traffic(asked, runtime.topology.rank, owners, hidden, weights, RowBytes(4, 4))
        counts |= {"formula": formula.total, "rows": executor.source.evaluations(0, 0)}
    return runtime.gather(lambda: counts)


PLACES: list[tuple[str, dict[str, Any]]] = [
    ("table owned", FSDP),
    ("table shared", {}),
    ("table owned", FSDP | {"tensor": 2}),
    ("table", FSDP),
    ("table owned", FSDP | {"pipeline": 2}),
    ("unique", {"zero_stage": 3}),
    ("table of a layer owned", FSDP),
]


def move(folder: str) -> list[str]:
    """Train a step, then save and load it in each of PLACES; the tensors that change on the way."""
    changed: list[str] = []
    earlier: dict[str, Tensor] = {}
    last: Path | None = None
    for number, (mode, parallel) in enumerate(PLACES):
        # Five layers: of two ranks each has two and a half.
        model = {"kind": "memory", "num_hidden_layers": 5}
        config = tiny_config(model, memory=MODES[mode], parallel=parallel, train={"micro_batch_size": 1})
        runtime = processes.start(config)
        trainer = make_trainer(config, runtime)
        if last is None:
            for step in range(2):
                trainer.step(my_batches(runtime, step, config), 1e-2)
        else:
            load_training_state(last, open_checkpoint(last), trainer.engine, runtime)
        progress = {"step": number, "samples": 0, "tokens": 0}
        data = {"fingerprint": "", "order": ORDER, "eod_id": 0, "bos_id": None}
        last = write_checkpoint(
            Path(folder), take_snapshot(trainer.engine, runtime, config, progress, data), runtime
        )
        now = _tensors(last)
        assert {name.partition("/")[2] for name in now} == _names(config.model)
        changed += [f"{mode} {name}" for name in earlier if not torch.equal(earlier[name], now[name])]
        assert not earlier or earlier.keys() == now.keys()
        earlier = now
    return changed


def _tensors(checkpoint: Path) -> dict[str, Tensor]:
    """A checkpoint's weights and moments, whole."""
    index = read_index(checkpoint, open_checkpoint(checkpoint).files)
    return {name: read_tensor(index, name) for name in index.tensors if name != RNG}


def _names(model: ModelConfig) -> set[str]:
    with unfilled():
        return {piece.name for piece in pieces(Transformer(model))}
