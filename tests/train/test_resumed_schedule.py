"""The learning rate of a run resumed under another schedule never changes silently."""

import json
import math
import shutil
from pathlib import Path

import pytest

from mlm_train.parallel import runtime
from tests.commands import TINY, finished, mlm_train, refused, scalars
from tests.train.short_runs import CONFIG, snapshot

PEAK, LEAST, WARMUP, STEPS = 4e-3, 5e-4, 2, 6
pytestmark = pytest.mark.usefixtures("no_groups_left")


def pretrain(data: Path, run: Path, *more: str) -> list[str]:
    """Six steps of a cosine schedule, with a checkpoint at each."""
    return [
        "pretrain", CONFIG, *TINY, f"data.path={data}", f"train.output={run}", f"train.steps={STEPS}",
        f"optimizer.lr={PEAK}", f"schedule.min_lr={LEAST}", "checkpoint.interval=1", "memory.mode=unique",
        "monitor.peak_tflops=1", "train.eval_samples=2", *more,
    ]  # fmt: skip


def cosine(step: int, total: int, peak: float = PEAK, warmup: int = WARMUP) -> float:
    """The rate of step 0, 1, ... by definition."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min(1.0, (step - warmup) / (total - warmup))
    return LEAST + (peak - LEAST) * (1 + math.cos(math.pi * share)) / 2


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has done its six steps."""
    run = tmp_path_factory.mktemp("scheduled") / "done"
    mlm_train(*pretrain(data, run))
    runtime.stop()
    return run


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    """A copy of it, to resume."""
    return Path(shutil.copytree(done, tmp_path / "run"))


def rates(run: Path) -> list[float]:
    """Learning rates of all steps."""
    by_step = scalars(run, "train/lr")
    assert list(by_step) == list(range(1, len(by_step) + 1))
    return list(by_step.values())


def logged(rate: float) -> str:
    """A rate as in log lines and errors."""
    return f"{rate:.3g}"


def test_a_rate_that_would_jump_is_refused_with_both_rates_and_the_ways_out(run: Path, data: Path) -> None:
    before = snapshot(run)
    line = refused(*pretrain(data, run, "train.steps=12"))
    assert logged(LEAST) in line and logged(cosine(6, 12)) in line and "train.steps" in line
    assert "schedule.total_steps=6" in line and "schedule.rewarm_steps=" in line
    # In the middle of a run, and whatever of the schedule makes it jump.
    for folder in (run / "checkpoints").glob("step-*6"):
        shutil.rmtree(folder)
    before = snapshot(run)
    assert sorted(path.name for path in run.glob("checkpoints/step-*"))[-1] == "step-00000005"
    for change, new in (
        ("train.steps=12", cosine(5, 12)),
        ("schedule.total_steps=12", cosine(5, 12)),
        ("schedule.warmup_steps=4", cosine(5, 6, warmup=4)),
    ):
        line = refused(*pretrain(data, run, change))
        assert logged(cosine(5, 6)) in line and logged(new) in line, line
        assert change.partition("=")[0] in line
    assert "schedule.min_lr" in refused(*pretrain(data, run, "schedule.min_lr=0"))
    line = refused(*pretrain(data, run, "schedule.kind=wsd", "schedule.decay_steps=1"))
    assert logged(PEAK) in line and "schedule.kind" in line
    launch = refused("launch", "--nproc", 1, *pretrain(data, run, "train.steps=12")[1:])
    assert logged(cosine(5, 12)) in launch
    assert snapshot(run) == before


def test_total_steps_holds_the_schedule(run: Path, data: Path) -> None:
    mlm_train(*pretrain(data, run, "train.steps=8", "schedule.total_steps=6"))
    assert rates(run) == pytest.approx([cosine(step, 6) for step in range(8)])
    log = (run / "train.log").read_text()
    assert "changed since that checkpoint: train.steps 6 -> 8" in log


def test_total_steps_is_the_schedules_length_whatever_is_run_of_it(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for steps in (3, 5, 9):
        mlm_train(*pretrain(data, run, f"train.steps={steps}", "schedule.total_steps=7"))
        runtime.stop()
    assert rates(run) == pytest.approx([cosine(step, 7) for step in range(9)])
    line = refused(*pretrain(data, tmp_path / "new", "schedule.total_steps=1"))
    assert "schedule.total_steps=1" in line and not (tmp_path / "new").exists()


def test_a_rewarm_goes_straight_to_the_new_schedule_and_is_resumed(run: Path, data: Path) -> None:
    """Four steps from the old rate at step 6 to the new schedule's at step 10, over three launches."""
    longer = ("train.steps=12",)
    mlm_train(*pretrain(data, run, *longer, "schedule.rewarm_steps=4", "train.stop_after=2"))
    runtime.stop()
    mlm_train(*pretrain(data, run, *longer, "train.stop_after=1"))  # rewarm_steps is not given any more
    runtime.stop()
    mlm_train(*pretrain(data, run, *longer, "schedule.rewarm_steps=4"))  # it does not start again
    goal = cosine(10, 12)
    line = [LEAST + (goal - LEAST) * step / 4 for step in range(4)]
    expected = [cosine(step, 6) for step in range(6)] + line + [goal, cosine(11, 12)]
    assert rates(run) == pytest.approx(expected)
    kept = json.loads((run / "checkpoints" / "step-00000012" / "manifest.json").read_text())
    assert kept["progress"]["rewarm"] == {"step": 6, "lr": pytest.approx(LEAST), "steps": 4}
    assert f"{LEAST:.3g} to {goal:.3g}" in (run / "train.log").read_text()


def test_a_rewarm_is_left_for_another(run: Path, data: Path) -> None:
    """A change during the rewarm is a jump again, from the rewarm's rate."""
    first = ("train.steps=12", "schedule.rewarm_steps=4", "train.stop_after=2")
    mlm_train(*pretrain(data, run, *first))
    runtime.stop()
    here = LEAST + (cosine(10, 12) - LEAST) * 2 / 4
    assert logged(here) in refused(*pretrain(data, run, "train.steps=20"))
    runtime.stop()
    mlm_train(*pretrain(data, run, "train.steps=20", "schedule.rewarm_steps=2", "train.stop_after=3"))
    goal = cosine(10, 20)
    assert rates(run)[8:] == pytest.approx([here, (here + goal) / 2, goal])


def test_no_steps_of_rewarm_jump_at_once(run: Path, data: Path) -> None:
    mlm_train(*pretrain(data, run, "train.steps=12", "schedule.rewarm_steps=0", "train.stop_after=1"))
    runtime.stop()
    mlm_train(*pretrain(data, run, "train.steps=12", "train.stop_after=1"))
    assert rates(run)[6:] == pytest.approx([cosine(6, 12), cosine(7, 12)])
    log = (run / "train.log").read_text()
    assert f"{LEAST:.3g} to {cosine(6, 12):.3g}" in log


def test_another_peak_is_the_users_word(done: Path, run: Path, data: Path, tmp_path: Path) -> None:
    """A changed optimizer.lr is intended: the log has both rates. It does not excuse another length."""
    for folder in run.glob("checkpoints/step-*6"):
        shutil.rmtree(folder)
    rewarmed = Path(shutil.copytree(run, tmp_path / "rewarmed"))
    half = f"optimizer.lr={PEAK / 2}"
    assert "train.steps" in refused(*pretrain(data, run, half, "train.steps=12"))
    mlm_train(*pretrain(data, run, half))
    runtime.stop()
    assert rates(run)[5] == pytest.approx(cosine(5, 6, PEAK / 2))
    log = (run / "train.log").read_text()
    assert f"changed since that checkpoint: optimizer.lr {PEAK} -> {PEAK / 2}" in log
    assert f"{cosine(5, 6):.3g} to {cosine(5, 6, PEAK / 2):.3g}" in log
    mlm_train(*pretrain(data, rewarmed, half, "schedule.rewarm_steps=9"))
    assert rates(rewarmed)[5] == pytest.approx(cosine(5, 6))


def test_a_change_that_does_not_show_yet_goes_on(data: Path, tmp_path: Path) -> None:
    """Warmup and the stable part of wsd do not depend on the schedule's length."""
    wsd = ("schedule.kind=wsd", "schedule.decay_steps=2", "train.steps=6")
    run = tmp_path / "run"
    mlm_train(*pretrain(data, run, *wsd, "train.stop_after=3"))
    runtime.stop()
    mlm_train(*pretrain(data, run, *wsd, "train.steps=9", "train.stop_after=5"))
    runtime.stop()
    assert rates(run)[3:] == pytest.approx([PEAK] * 5)
    line = refused(*pretrain(data, run, *wsd, "train.steps=12"))  # at step 8 of 9 it decays
    assert logged((PEAK + LEAST) / 2) in line and logged(PEAK) in line
    assert "schedule.total_steps=9" in line


def test_a_finished_run_has_nothing_to_do(done: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = snapshot(done)
    times = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}
    capfd.readouterr()
    for more in ((), ("optimizer.lr=1e-2", "schedule.kind=wsd", "schedule.decay_steps=2")):
        mlm_train(*pretrain(data, done, *more))
        output = capfd.readouterr()
        lines = (output.out + output.err).splitlines()
        assert len(lines) == 1 and "nothing to do" in lines[0] and str(done) in lines[0], lines
    assert snapshot(done) == before
    assert times == {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file()}


def test_ranks_of_a_finished_run_say_it_once(done: Path, data: Path) -> None:
    before = snapshot(done)
    output = finished("launch", "--nproc", 2, *pretrain(data, done)[1:])
    assert output.count("nothing to do") == 1 and "Traceback" not in output
    assert snapshot(done) == before
