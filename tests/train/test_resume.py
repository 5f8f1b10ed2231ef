"""A run that is stopped, moved to another number of processes, or killed, goes on as if unbroken."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.commands import TINY, finished, mlm_train, scalars, start

CONFIG = "configs/micro.yaml"
STEPS = 8


def words(data: Path, output: Path, *more: str) -> list[str]:
    return [
        CONFIG, *TINY, f"data.path={data}", f"train.output={output}", f"train.steps={STEPS}",
        "train.evaluate_every=4", "checkpoint.every=2", "model.num_hidden_layers=4",
        "train.ramp={start: 4, increment: 4, samples: 12}", "memory.mode=unique", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps on two processes."""
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    output = finished("launch", "--nproc", 2, *words(data, run))
    assert f"step {STEPS}/{STEPS} | loss" in output and "left 0:00:00" in output
    return run


def same_losses(run: Path, other: Path, tolerance: float = 2e-5) -> None:
    """Every step once, with the other run's values, on training and validation."""
    for tag in ("train/loss", "train/grad_norm", "validation/loss"):
        values, expected = scalars(run, tag), scalars(other, tag)
        assert values.keys() == expected.keys(), (tag, values)
        for step, value in expected.items():
            assert values[step] == pytest.approx(value, rel=tolerance), (tag, step)


TABLE = "memory.mode=table"
ALONE = (1, (TABLE,))
DP2 = (2, ())
SHARED = (2, (TABLE, "memory.shared=true"))
TP2 = (2, ("parallel.tensor=2",))
PP2 = (2, ("parallel.pipeline=2", "train.micro_batch=1"))
PP2_REPLICATED = (2, (*PP2[1], "parallel.x0_transport=replicate", "parallel.schedule=gpipe"))
TP2_PP2 = (4, ("parallel.tensor=2", *PP2[1]))
PP2_INTERLEAVED = (2, (*PP2[1], "parallel.schedule=interleaved_1f1b", "parallel.virtual_stages=2"))


def zero(stage: int, layout: tuple[int, tuple[str, ...]]) -> tuple[int, tuple[str, ...]]:
    """A layout with another ZeRO stage."""
    return layout[0], (*layout[1], f"parallel.zero={stage}")


ZERO_3 = zero(3, DP2)
PP2_V = (2, (*PP2[1], TABLE, "parallel.schedule=zbv", "train.recompute=selective"))
TP2_SEQUENCE = (2, ("parallel.tensor=2", TABLE, "parallel.sequence=true", "train.recompute=full"))
# Where a run starts, and where it goes on; tied and untied heads.
MOVES = {
    "DP2 to one": (DP2, ALONE, False),
    "one to TP2 PP2": (ALONE, TP2_PP2, False),
    "TP2 PP2 to PP2 replicated": (TP2_PP2, PP2_REPLICATED, True),
    "PP2 interleaved to TP2": (PP2_INTERLEAVED, TP2, True),
    "PP2 in a V to TP2 with sequences cut": (PP2_V, TP2_SEQUENCE, True),
    "ZeRO-2 PP2 to ZeRO-3": (zero(2, PP2), ZERO_3, False),
    "ZeRO-3 to ZeRO-0 one": (ZERO_3, zero(0, ALONE), True),
    "ZeRO-1 to ZeRO-2 with shared tables": (DP2, zero(2, SHARED), False),
    "ZeRO-0 TP2 to ZeRO-3": (zero(0, TP2), ZERO_3, True),
}


@pytest.fixture(scope="module")
def unbroken_tied(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tied head, on one process."""
    run = tmp_path_factory.mktemp("runs") / "tied"
    finished("launch", "--nproc", 1, *words(data, run, "model.tie_word_embeddings=true"))
    return run


@pytest.mark.parametrize("move", MOVES)
def test_resumes_in_another_layout(
    unbroken: Path, unbroken_tied: Path, data: Path, tmp_path: Path, move: str
) -> None:
    before, after, tied = MOVES[move]
    run = tmp_path / "moved"
    for (world, layout), more in ((before, ["train.stop_after=5"]), (after, [])):
        head = f"model.tie_word_embeddings={str(tied).lower()}"
        output = finished("launch", "--nproc", world, *words(data, run, head, *layout, *more))
    assert "resumed from" in output and "at step 5" in output
    same_losses(run, unbroken_tied if tied else unbroken)


def test_every_layout_starts_from_the_same_weights(data: Path, tmp_path: Path) -> None:
    """Initialisation and export know no layout: the files are equal to the bit."""
    odd = ("model.intermediate_size=45", "optimizer.lr=1e-30", "schedule.min_lr=0", "train.steps=1")
    exports = []
    for number, (world, layout) in enumerate((ALONE, TP2_PP2, ZERO_3)):
        run, export = tmp_path / f"run-{number}", tmp_path / f"export-{number}"
        still = words(data, run, *odd, "schedule.warmup_steps=0", *layout)
        finished("launch", "--nproc", world, *still)
        mlm_train("export", run, "--output", export)
        exports.append((export / "model.safetensors").read_bytes())
    assert exports[0] == exports[1] == exports[2]
    # A warm start fills every layout's padding with zeros: the same first loss, the same weights after.
    losses = []
    for world, layout in (ALONE, TP2_PP2, ZERO_3):
        run, export = tmp_path / f"warm-{world}", tmp_path / f"warm-export-{world}"
        warm = (f"checkpoint.warm_start={tmp_path / 'export-0'}", "train.seed=5", "train.z_loss=0")
        still = words(data, run, *odd, "schedule.warmup_steps=0", *warm, *layout)
        finished("launch", "--nproc", world, *still)
        mlm_train("export", run, "--output", export)
        assert (export / "model.safetensors").read_bytes() == exports[0]
        losses.append(scalars(run, "train/loss")[1])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_a_killed_rank_costs_only_the_work_since_the_last_checkpoint(
    unbroken: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    launch = start("launch", "--nproc", 2, *words(data, run))
    pointer = run / "checkpoints" / "latest"
    while not pointer.is_file():
        assert launch.poll() is None, launch.communicate()[0]
        time.sleep(0.02)
    children = psutil.Process(launch.pid).children(recursive=True)
    ranks = [child for child in children if "pretrain" in child.cmdline()]
    assert len(ranks) == 2
    os.kill(ranks[1].pid, signal.SIGKILL)
    output, _ = launch.communicate(timeout=120)
    assert launch.returncode == 1 and "rank 1 failed first: killed by SIGKILL" in output
    assert len(scalars(run, "train/loss")) < STEPS, "it was killed too late to show anything"
    output = finished("launch", "--nproc", 2, *words(data, run))
    assert "resumed from" in output
    same_losses(run, unbroken, tolerance=0.0)


def test_a_finished_run_has_nothing_to_do(unbroken: Path, data: Path) -> None:
    before = sorted(path.name for path in (unbroken / "checkpoints").iterdir())
    mlm_train("pretrain", *words(data, unbroken))
    assert before == sorted(path.name for path in (unbroken / "checkpoints").iterdir())
    assert len(scalars(unbroken, "train/loss")) == STEPS


def test_tensorboard_and_log_hold_what_a_user_looks_for(unbroken: Path) -> None:
    for tag in (
        "train/loss", "train/perplexity", "train/lr", "train/grad_norm", "speed/tokens_per_second",
        "speed/mfu", "speed/step_seconds", "memory/peak_gib", "data/distinct_ratio_step",
        "data/distinct_ratio_micro_batch",
    ):  # fmt: skip
        values = scalars(unbroken, tag)
        assert len(values) == STEPS and all(value > 0 for value in values.values()), tag
    assert scalars(unbroken, "validation/loss").keys() == {4, 8}
    losses = list(scalars(unbroken, "train/loss").values())
    assert losses[-1] < losses[0]
    batches = list(scalars(unbroken, "train/global_batch").values())
    assert batches == [4, 4, 4, 8, 8, 8, 8, 8]
    assert scalars(unbroken, "train/tokens")[STEPS] == 32 * sum(batches)
    log = (unbroken / "train.log").read_text()
    assert log.count("| loss") == STEPS + 2 and "committed" in log
    kept = sorted(path.name for path in (unbroken / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000006", "step-00000008"]
