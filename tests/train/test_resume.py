"""A run that is stopped, moved to another number of processes, or killed, resumes as if unbroken."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.commands import TINY, finished, mlm_train, ranks_under, same_losses, scalars, start
from tests.ranks import train_on_ranks
from tests.zero_bubble import runs_here, skip_the_rest

CONFIG = "configs/micro.yaml"
LEG = 5
STEPS = 8 * LEG


def words(data: Path, output: Path, *more: str) -> list[str]:
    return [
        CONFIG, *TINY, f"data.path={data}", f"train.output={output}", f"train.steps={STEPS}",
        "train.eval_interval=4", "checkpoint.interval=2", "model.num_hidden_layers=4",
        "train.batch_size_warmup={start: 4, increment: 4, samples: 12}", "memory.mode=unique", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All steps in one run on two processes."""
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    output = finished("launch", "--nproc", 2, *words(data, run))
    assert f"step {STEPS}/{STEPS} | loss" in output and "left 0:00:00" in output
    return run


TABLE = "memory.mode=table"
ALONE = (1, (TABLE,))
DP2 = (2, ())
SHARED = (2, (TABLE, "memory.placement=shared"))
TP2 = (2, ("parallel.tensor=2",))
PP2 = (2, ("parallel.pipeline=2", "train.micro_batch_size=1"))
PP2_REPLICATED = (2, (*PP2[1], "parallel.x0_transport=replicate", "parallel.pipeline_schedule=gpipe"))
TP2_PP2 = (4, ("parallel.tensor=2", *PP2[1]))
PP2_INTERLEAVED = (2, (*PP2[1], "parallel.pipeline_schedule=interleaved_1f1b", "parallel.virtual_stages=2"))


TP2_DP2 = (4, ("parallel.tensor=2",))
PP2_DP2 = (4, PP2[1])


def zero(stage: int, layout: tuple[int, tuple[str, ...]]) -> tuple[int, tuple[str, ...]]:
    """A layout with the given ZeRO stage."""
    return layout[0], (*layout[1], f"parallel.zero_stage={stage}")


ONE_0 = zero(0, ALONE)
EVERY_AXIS = (8, TP2_PP2[1])
ZERO_3 = zero(3, DP2)
PP2_V = (2, (*PP2[1], TABLE, "parallel.pipeline_schedule=zbv", "train.activation_checkpointing=selective"))
TP2_SEQUENCE = (
    2,
    ("parallel.tensor=2", TABLE, "parallel.sequence=true", "train.activation_checkpointing=full"),
)
# A run goes through these, LEG steps in each, and returns to the first one: every value of every axis (TP,
# PP, virtual stages, DP, ZeRO, sequence parallelism, x0 transport, head) is entered and left.
ROUNDS = {
    "untied": {
        "DP2": DP2,
        "TP2 PP2": TP2_PP2,
        "one, ZeRO-0": ONE_0,
        "PP2 interleaved": PP2_INTERLEAVED,
        "DP2, ZeRO-3": ZERO_3,
        "TP2, sequences cut": TP2_SEQUENCE,
        "DP2, ZeRO-2, shared tables": zero(2, SHARED),
        "DP2 again": DP2,
    },
    "tied": {
        "one, ZeRO-0": ONE_0,
        "TP2 DP2, ZeRO-2": zero(2, TP2_DP2),
        "PP2 in a V": PP2_V,
        "DP2, ZeRO-3": ZERO_3,
        "TP2, ZeRO-0": zero(0, TP2),
        "PP2 DP2": PP2_DP2,
        "PP2 replicated": PP2_REPLICATED,
        "one, ZeRO-0 again": ONE_0,
    },
}


@pytest.fixture(scope="module")
def unbroken_tied(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tied head, on one process."""
    run = tmp_path_factory.mktemp("runs") / "tied"
    train_on_ranks(1, *words(data, run, "model.tie_word_embeddings=true"))
    return run


@pytest.mark.parametrize("head", ROUNDS)
def test_resumes_in_any_layout(
    unbroken: Path, unbroken_tied: Path, data: Path, tmp_path: Path, head: str
) -> None:
    """Weights and optimizer state: losses after each move equal the unbroken run's."""
    run = tmp_path / "moved"
    tied = f"model.tie_word_embeddings={str(head == 'tied').lower()}"
    other = unbroken_tied if head == "tied" else unbroken
    expected = scalars(other, "train/loss")
    legs = {name: leg for name, leg in ROUNDS[head].items() if all(map(runs_here, leg[1]))}
    for leg, (name, (world, layout)) in enumerate(legs.items()):
        more = (*layout, f"train.stop_after={LEG}")
        train_on_ranks(world, *words(data, run, tied, *more))
        starts = re.findall(r"resumed from \S+ at step (\d+)", (run / "train.log").read_text())
        assert [int(step) for step in starts] == [LEG * before for before in range(1, leg + 1)]
        losses = scalars(run, "train/loss")
        assert len(losses) == (leg + 1) * LEG
        for step in range(leg * LEG + 1, len(losses) + 1):
            assert losses[step] == pytest.approx(expected[step], rel=1e-5), (name, step)
    skip_the_rest(*ROUNDS[head].keys() - legs.keys())
    same_losses(run, other, norms=1e-3)


def test_every_layout_starts_from_the_same_weights(data: Path, tmp_path: Path) -> None:
    """Initialisation and export do not depend on the layout: the files are bitwise equal."""
    odd = ("model.intermediate_size=45", "optimizer.lr=1e-30", "schedule.min_lr=0", "train.steps=1")
    exports = []
    for number, (world, layout) in enumerate((ALONE, EVERY_AXIS, ZERO_3)):
        run, export = tmp_path / f"run-{number}", tmp_path / f"export-{number}"
        still = words(data, run, *odd, "schedule.warmup_steps=0", *layout)
        train_on_ranks(world, *still)
        mlm_train("export", run, "--output", export)
        exports.append((export / "model.safetensors").read_bytes())
    assert exports[0] == exports[1] == exports[2]
    # A warm start fills every layout's padding with zeros: the same first loss, the same weights after.
    losses = []
    for world, layout in (ALONE, TP2_PP2, ZERO_3):
        run, export = tmp_path / f"warm-{world}", tmp_path / f"warm-export-{world}"
        warm = (f"checkpoint.warm_start={tmp_path / 'export-0'}", "train.seed=5", "train.z_loss=0")
        still = words(data, run, *odd, "schedule.warmup_steps=0", *warm, *layout)
        train_on_ranks(world, *still)
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
    ranks = ranks_under(launch.pid)
    assert len(ranks) == 2
    os.kill(ranks[1].pid, signal.SIGKILL)
    output, _ = launch.communicate(timeout=120)
    assert launch.returncode == 1 and "rank 1 failed first: killed by SIGKILL" in output
    assert len(scalars(run, "train/loss")) < STEPS, "it was killed too late to test anything"
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
        "speed/mfu_measured", "speed/step_seconds", "memory/peak_gib", "data/distinct_ratio_step",
        "data/distinct_ratio_micro_batch",
    ):  # fmt: skip
        values = scalars(unbroken, tag)
        assert len(values) == STEPS and all(value > 0 for value in values.values()), tag
    assert scalars(unbroken, "validation/loss").keys() == set(range(4, STEPS + 1, 4))
    losses = list(scalars(unbroken, "train/loss").values())
    assert losses[-1] < losses[0]
    batches = list(scalars(unbroken, "train/global_batch").values())
    assert batches == [4, 4, 4] + [8] * (STEPS - 3)
    assert scalars(unbroken, "train/tokens")[STEPS] == 32 * sum(batches)
    log = (unbroken / "train.log").read_text()
    assert log.count("| loss") == STEPS + STEPS // 4 and "committed" in log
    kept = sorted(path.name for path in (unbroken / "checkpoints").iterdir())
    assert kept == ["latest", f"step-{STEPS - 2:08d}", f"step-{STEPS:08d}"]
