"""A trainer's data loading without a model, to be killed: prefetches, records samples, saves its progress."""

import json
import time
from pathlib import Path

from mlm_train.config import DataConfig, ParallelConfig
from mlm_train.data.blend import Blend
from mlm_train.monitor.report import Progress
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.train.batches import Prefetcher, step_batches
from mlm_train.utils.files import write_json
from tests.train.recording import digests

LENGTH, SEED, GLOBAL_BATCH, STEPS, COMMIT_EVERY = 32, 11, 12, 240, 5


def live(
    blend: list[dict], world: int, micro_batch: int, notes: Path, checkpoint: Path, most: int | None = None
) -> None:
    """Resume from the checkpoint with `world` data-parallel ranks, all in this process, up to the last step.

    Appends a line per step to `notes`: the first sample's index, and digests in the order of ranks. After
    `most` steps it waits to be killed, since the kill may come late on a busy machine.
    """
    samples = Blend.open(DataConfig(blend=blend)).samples("train", LENGTH, SEED)
    progress = Progress()
    if checkpoint.is_file():
        progress = Progress.from_dict(json.loads(checkpoint.read_text()))
    ranks = [Topology.of(ParallelConfig(), world, rank) for rank in range(world)]
    loaders = [
        Prefetcher(lambda key, rank=rank: step_batches(samples, *key, micro_batch, rank))  # type: ignore[misc]
        for rank in ranks
    ]
    with notes.open("a", encoding="utf-8") as file:
        while progress.step < STEPS:
            key = (progress.samples, GLOBAL_BATCH)
            then = (progress.samples + GLOBAL_BATCH, GLOBAL_BATCH)
            taken = [loader.take(key, then) for loader in loaders]
            found = [digest for share in taken for batch in share for digest in digests(*batch)]
            file.write(json.dumps([progress.samples, found]) + "\n")
            file.flush()
            time.sleep(0.002)  # a step
            progress = progress.after(GLOBAL_BATCH, LENGTH)
            if progress.step % COMMIT_EVERY == 0:
                write_json(checkpoint, progress.as_dict())
            if most is not None and (most := most - 1) == 0:
                time.sleep(60)
