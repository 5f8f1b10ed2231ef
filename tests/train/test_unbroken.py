"""Every sample of a run is trained on once, wherever it is killed and on however many ranks it resumes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

from mlm_train.config import DataConfig
from mlm_train.data.blend import Blend
from tests.commands import ROOT, TINY, mlm_train, ranks_under, scalars
from tests.ranks import forkserver
from tests.train import lives
from tests.train.recording import digests

KILLS = 20
RESUMED_ON = ((1, 1), (2, 1), (3, 2), (4, 3), (6, 2), (12, 1), (1, 12), (2, 3))  # ranks, micro-batch


@pytest.fixture(scope="module")
def blend(data: Path, corpus: Path) -> list[dict]:
    """Two sources with one tokenizer; the small one is repeated for several epochs."""
    small = corpus.parent / "small"
    model = data / "tokenizer.model"
    text = corpus / "validation.jsonl"
    both = ("--input", text, "--validation", text, "--workers", 1)
    mlm_train("data", "prepare", *both, "--output", small, "--tokenizer", model)
    return [{"path": str(data), "weight": 0.2}, {"path": str(small), "weight": 0.8}]


def expected(blend: list[dict], length: int, seed: int, count: int) -> list[str]:
    """Digests of the first `count` samples, read at once."""
    samples = Blend.open(DataConfig(blend=blend)).samples("train", length, seed)
    return digests(*samples.batch(0, count))


def notes_of(path: Path) -> list:
    """Lines of notes, without a last one truncated by a kill."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_killed_twenty_times_at_random_and_resumed_at_other_sizes(blend: list[dict], tmp_path: Path) -> None:
    """SIGKILL at any moment; each launch has another data-parallel size and micro-batch."""
    processes = forkserver()
    checkpoint = tmp_path / "progress.json"
    chance = random.Random(2)
    starts, seen = [], []
    for life in range(KILLS + 1):
        starts.append(json.loads(checkpoint.read_text())["samples"] if life and checkpoint.is_file() else 0)
        notes = tmp_path / f"life-{life}"
        notes.touch()
        arguments = (blend, *RESUMED_ON[life % len(RESUMED_ON)], notes, checkpoint)
        steps = chance.randint(1, 2 * lives.STEPS // KILLS)
        most = steps + 2 if life < KILLS else None  # so that the last life has some to do
        process = processes.Process(target=lives.live, args=(*arguments, most))
        process.start()
        if life < KILLS:
            while len(notes_of(notes)) < steps and process.is_alive():
                time.sleep(0.001)
            time.sleep(chance.random() * 0.004)
            process.kill()
        process.join(120)
        assert process.exitcode == (-signal.SIGKILL if life < KILLS else 0), life
        seen.append(notes_of(notes))
    whole = expected(blend, lives.LENGTH, lives.SEED, lives.STEPS * lives.GLOBAL_BATCH)
    assert len(set(starts)) > KILLS // 2, "most launches must have started somewhere else"
    for start, life_notes in zip(starts, seen, strict=True):
        for number, (first, found) in enumerate(life_notes):
            assert first == start + number * lives.GLOBAL_BATCH  # unbroken from the checkpoint on
            assert sorted(found) == sorted(whole[first : first + lives.GLOBAL_BATCH])
    covered = {first for life_notes in seen for first, _ in life_notes}
    assert covered == set(range(0, len(whole), lives.GLOBAL_BATCH))
    repeats = Counter(whole)
    assert max(repeats.values()) > 2, "the small source must have come round several times"


def launch(world: int, notes: Path, words: list[str]) -> "subprocess.Popen[str]":
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return subprocess.Popen(
        [sys.executable, *torchrun, "-m", "tests.train.recording", str(notes), "pretrain", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_a_rank(run: "subprocess.Popen[str]", notes: Path, step: int) -> None:
    """SIGKILL a rank once rank 0 has started this many steps."""
    own = Path(f"{notes}.0")
    while not own.is_file() or len(notes_of(own)) < step:
        assert run.poll() is None, run.communicate()[0][-4000:]
        time.sleep(0.02)
    ranks = ranks_under(run.pid)
    os.kill(ranks[-1].pid, signal.SIGKILL)
    run.communicate(timeout=120)
    assert run.returncode != 0


def test_the_trainer_takes_the_same_samples_in_every_life(blend: list[dict], tmp_path: Path) -> None:
    """Two ranks, killed; one, killed; two with another micro-batch to the end."""
    steps, size = 16, 8
    words = [
        "configs/micro.yaml", *TINY, "data.path=null", f"data.blend={json.dumps(blend)}",
        f"train.output={tmp_path / 'run'}", f"train.steps={steps}", f"train.global_batch_size={size}",
        "checkpoint.interval=2", "monitor.peak_tflops=1",
    ]  # fmt: skip
    whole = expected(blend, 32, 1234, steps * size)
    done: set[str] = set()
    for life, (world, micro_batch, kill_at) in enumerate(((2, 2, 4), (1, 4, 4), (2, 1, None))):
        notes = tmp_path / f"life-{life}"
        run = launch(world, notes, [*words, f"train.micro_batch_size={micro_batch}"])
        if kill_at is not None:
            kill_a_rank(run, notes, kill_at)
        else:
            output, _ = run.communicate(timeout=300)
            assert run.returncode == 0, output[-4000:]
            assert "resumed from" in output and "| epochs data 0." in output
        found: dict[str, list[list[str]]] = {}
        for rank in range(world):
            for task, samples in notes_of(Path(f"{notes}.{rank}")):
                found.setdefault(task, []).append(samples)
        for task, shares in found.items():
            first = (int(task.removeprefix("step ")) - 1) * size
            together, right = Counter(chain.from_iterable(shares)), Counter(whole[first : first + size])
            if len(shares) == world:
                assert together == right, (life, task)
                done.add(task)
            assert together <= right, (
                life,
                task,
            )  # of the step in which it was killed, only some ranks' samples
    assert done == {f"step {step + 1}" for step in range(steps)}
    consumed = [scalars(tmp_path / "run", f"data/samples/{name}") for name in ("data", "small")]
    assert [sum(pair) for pair in zip(*(by_step.values() for by_step in consumed), strict=True)] == [
        size * (step + 1) for step in range(steps)
    ]
