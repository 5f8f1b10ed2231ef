"""What the ranks of test_shares.py run: saves and loads in any layout, with bytes and opens counted."""

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mlm_train.bench.file_traffic import FileTraffic
from mlm_train.checkpoint import digests, shards
from mlm_train.checkpoint.hf.folder import write_folder
from mlm_train.checkpoint.hf.index import export_index
from mlm_train.checkpoint.index import read_index
from mlm_train.checkpoint.load import index_of, load_engine_weights, load_training_state, open_checkpoint
from mlm_train.checkpoint.reading.slices import read_tensor
from mlm_train.checkpoint.save import take_snapshot, write_checkpoint
from mlm_train.checkpoint.saver import Saver
from mlm_train.checkpoint.shards import RNG
from mlm_train.checkpoint.together import first_hash_fault
from mlm_train.config import Config
from mlm_train.data.order import ORDER
from mlm_train.errors import UserError
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.engine.optimizer_state import optimizer_steps
from mlm_train.parallel.health.watchdog import watched
from mlm_train.parallel.runtime import Runtime
from mlm_train.train.preflight import newest_of
from mlm_train.train.resume import intact_checkpoint
from mlm_train.train.step import Trainer
from mlm_train.utils.direct import PAGE
from tests.parallel.layouts import MODES
from tests.parallel.parity_cases import make_trainer, my_batches
from tests.parallel.reference import tiny_config

Layout = dict[str, Any]  # {"mode": of MODES, "parallel": config section}


def _config(model: dict, layout: Layout, **sections: dict) -> Config:
    memory = {} if layout.get("mode") is None else {"memory": MODES[layout["mode"]]}
    train = {"micro_batch_size": 1, "global_batch_size": 12} | sections.pop("train", {})
    checkpoint = {"keep_latest_k": 1000} | sections.pop("checkpoint", {})
    parallel = layout.get("parallel", {}) | sections.pop("parallel", {})
    return tiny_config(model, parallel=parallel, train=train, checkpoint=checkpoint, **memory, **sections)


def _save(folder: str, step: int, trainer: Trainer, config: Config, runtime: Runtime) -> Path:
    progress = {"step": step, "samples": 0, "tokens": 0}
    data = {"fingerprint": "", "order": ORDER, "eod_id": 0, "bos_id": None}
    snapshot = take_snapshot(trainer.engine, runtime, config, progress, data)
    with patch.object(shards, "BLOCK", 4 * PAGE):  # so that files have several blocks
        return write_checkpoint(Path(folder), snapshot, runtime)


def _tensors(checkpoint: Path) -> dict[str, Tensor]:
    manifest = open_checkpoint(checkpoint)
    index = read_index(checkpoint, manifest.files, manifest.index)
    return {name: read_tensor(index, name) for name in index.tensors if name != RNG}


def save(folder: str, model: dict, layout: Layout, step: int = 1) -> list[int]:
    """Train two steps, save. Returns the bytes of each file."""
    config = _config(model, layout)
    runtime = processes.start(config)
    trainer = make_trainer(config, runtime)
    for number in (step - 1, step):
        trainer.step(my_batches(runtime, number, config), 1e-2)
    return [entry.bytes for entry in open_checkpoint(_save(folder, step, trainer, config, runtime)).files]


def move(folder: str, model: dict, layouts: dict[str, Layout]) -> dict[str, Any]:
    """Load step 1 in each layout, save again: which tensors differ, bytes read over bytes, opens by rank."""
    found: dict[str, Any] = {}
    source = Path(folder) / "step-00000001"
    expected = _tensors(source)
    for number, (name, layout) in enumerate(layouts.items(), 100):
        config = _config(model, layout)
        runtime = processes.start(config)
        trainer = make_trainer(config, runtime)
        manifest = open_checkpoint(source)
        with FileTraffic(source) as count:
            load_training_state(source, manifest, trainer.engine, runtime)
        counts = runtime.gather(lambda count=count: (count.bytes_read, count.opens))
        read, size = sum(read for read, _ in counts), sum(entry.bytes for entry in manifest.every_file)
        written = _save(folder, number, trainer, config, runtime)
        again = _tensors(written)
        assert again.keys() == expected.keys()
        found[name] = {
            "differ": [key for key in expected if not torch.equal(again[key], expected[key])],
            "read": read / size,
            "opens": [opens for _, opens in counts],
            "files": len(manifest.files),
            "sizes": [entry.bytes for entry in open_checkpoint(written).files],
            "weights": _weights_differ(source, expected, trainer, config, runtime, folder, number + 100),
        }
        trainer.step(my_batches(runtime, 2, config), 1e-2)  # the model has them too
    return found


def warm(folder: str, model: dict, layouts: dict[str, Layout]) -> dict[str, Any]:
    """Start in each layout from a bfloat16 export of step 1: which weights differ, bytes read over bytes."""
    source, export, found = Path(folder) / "step-00000001", Path(folder) / "export", {}
    weights = {
        name.removeprefix("weight/"): tensor.bfloat16()
        for name, tensor in _tensors(source).items()
        if name.startswith("weight/")
    }
    for number, (name, layout) in enumerate(layouts.items(), 300):
        config = _config(model, layout)
        runtime = processes.start(config)
        trainer = make_trainer(config, runtime)
        if not found:
            runtime.broadcast(
                lambda config=config: write_folder(
                    export, config.model, iter(weights.items()), {}, torch.bfloat16, shard_bytes=2**16
                )
            )
        with FileTraffic(export) as count:
            load_engine_weights(lambda c=config: export_index(export, c.model), trainer.engine, runtime)
        counts = runtime.gather(lambda count=count: (count.bytes_read, count.opens))
        again = _tensors(_save(folder, number, trainer, config, runtime))
        sizes = [file.stat().st_size for file in export.glob("*.safetensors")]
        found[name] = {
            "differ": [
                key for key in weights if not torch.equal(again[f"weight/{key}"], weights[key].float())
            ],
            "read": sum(read for read, _ in counts) / sum(sizes),
            "opens": [opens for _, opens in counts],
            "files": len(sizes),
        }
    return found


def _weights_differ(
    source: Path,
    expected: dict[str, Tensor],
    trainer: Trainer,
    config: Config,
    runtime: Runtime,
    folder: str,
    step: int,
) -> list[str]:
    """The same for a start from weights alone, after the moments were changed by a step."""
    trainer.step(my_batches(runtime, 3, config), 1e-2)
    load_engine_weights(lambda: index_of(source, open_checkpoint(source)), trainer.engine, runtime)
    again = _tensors(_save(folder, step, trainer, config, runtime))
    equal = {key for key in expected if torch.equal(again[key], expected[key])}
    assert not any(key.startswith("exp_avg_sq/model.layers") for key in equal)
    load_training_state(source, open_checkpoint(source), trainer.engine, runtime)
    return [key for key in expected if key.startswith("weight/") and key not in equal]


def refuse(folder: str, checks: list[str], model: dict, layout: Layout) -> list[str | None]:
    """The line with which each rank refuses the run's checkpoint, for each of checkpoint.verify."""
    lines: list[str | None] = []
    for verify in checks:
        checkpoint = {"fall_back": False, "verify": verify}
        config = _config(model, layout, train={"output": folder}, checkpoint=checkpoint)
        runtime = processes.start(config)
        trainer = make_trainer(config, runtime)

        def resume(
            config: Config = config, runtime: Runtime = runtime, trainer: Trainer = trainer
        ) -> str | None:
            try:
                found = intact_checkpoint(config, runtime, partial(newest_of, config))
                assert found is not None
                load_training_state(found.folder, found.manifest, trainer.engine, runtime)
            except UserError as error:
                return str(error)
            return None

        line = resume()
        everyone = runtime.gather(lambda line=line: line)
        assert len(set(everyone)) == 1, everyone
        lines.append(line)
    return lines


def fall_back(folder: str, model: dict, layout: Layout) -> list[str]:
    """The checkpoint that every rank resumes from, and why newer ones are damaged."""
    config = _config(model, layout, train={"output": folder})
    runtime = processes.start(config)
    trainer = make_trainer(config, runtime)
    found = intact_checkpoint(config, runtime, partial(newest_of, config))
    assert found is not None
    load_training_state(found.folder, found.manifest, trainer.engine, runtime)
    assert optimizer_steps(trainer.engine) == 2
    names = [found.folder.name, *(fault for _, fault in found.damaged)]
    everyone = runtime.gather(lambda: names)
    assert all(each == names for each in everyone)
    return names


def slow_disk(folder: str, model: dict, limit: float) -> dict[str, float]:
    """Save, in the background and not, and hash under a watchdog, while the last rank's disk is slow.

    limit: seconds of a collective, and more than the watchdog waits. Returns the seconds of each.
    """
    config = _config(model, {}, train={"output": folder, "watchdog_timeout": 0.85 * limit})
    runtime = processes.start(config)
    trainer = make_trainer(config, runtime)
    # Of the saves alone: when ranks start, a busy machine may delay one of them.
    parallel = config.parallel.model_copy(update={"timeout": limit})
    runtime.barrier()
    data = {"fingerprint": "", "order": ORDER, "eod_id": 0, "bos_id": None}
    seconds: dict[str, float] = {}
    with watched(config, runtime.topology, runtime.marker), ExitStack() as stack:
        stack.enter_context(patch.object(shards, "BLOCK", 5 * PAGE))
        for module in (shards, digests):
            stack.enter_context(patch.object(module, "THREADS", 1))
        if runtime.topology.rank == runtime.topology.world - 1:
            for owner, name in ((digests, "read_at"), (shards.DirectFile, "write")):
                stack.enter_context(patch.object(owner, name, _slow(getattr(owner, name), limit / 8)))
        for step, in_background in enumerate((True, False), 1):
            section = config.checkpoint.model_copy(update={"async_save": in_background})
            own = config.model_copy(update={"checkpoint": section, "parallel": parallel})
            saver = Saver(trainer.engine, runtime, own, data, lambda saved: None, print)
            started = time.monotonic()
            runtime.marker.enter("checkpoint", patient=True)
            saver.save({"step": step, "samples": 0, "tokens": 0})
            saver.finish()
            seconds["background" if in_background else "foreground"] = time.monotonic() - started
        checkpoint = Path(folder) / "checkpoints" / "step-00000002"
        runtime.marker.enter("resume")
        started = time.monotonic()
        manifest = open_checkpoint(checkpoint, "sizes")
        assert first_hash_fault(checkpoint, manifest.every_file, runtime) is None
        seconds["verify"] = time.monotonic() - started
    return seconds


def _slow(work: Any, seconds: float) -> Any:
    """The same, after some seconds."""

    def late(*arguments: Any) -> Any:
        time.sleep(seconds)
        return work(*arguments)

    return late
