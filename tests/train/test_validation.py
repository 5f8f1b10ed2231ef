"""Validation losses of each source and of further sets, and the reported peak memory and its rank."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mlm_train.checkpoint.reading.logical_folder import load_model
from mlm_train.data.prepared import PreparedData
from mlm_train.memory import make_source
from mlm_train.parallel import runtime
from tests.commands import ROOT, TINY, mlm_train, refused, scalars
from tests.ranks import run_on_ranks, train_on_ranks

LENGTH, COUNTS = 32, {"data": 9, "prose": 3}  # of twelve validation samples, three to one
FURTHER = {"memos": 12}  # of a set that is not trained on
STILL = ("optimizer.lr=1e-30", "schedule.min_lr=0")


@pytest.fixture(scope="module")
def blend(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The corpus and pages of this project's docs, with one tokenizer; `memos` is for validation alone."""
    root = tmp_path_factory.mktemp("blend")
    prepare = (
        "data",
        "prepare",
        "--input",
        ROOT / "docs" / "run.md",
        "--tokenizer",
        data / "tokenizer.model",
    )
    mlm_train(*prepare, "--output", root / "prose", "--validation", ROOT / "docs" / "data.md")
    mlm_train(*prepare, "--output", root / "notes", "--validation", ROOT / "docs" / "tol-format.md")
    return {"data": data, "prose": root / "prose", "memos": root / "notes"}


def pretrain(blend: dict[str, Path], run: Path, *more: str) -> list[str]:
    sources = ", ".join(f"{{path: {blend[name]}, weight: {3 if name == 'data' else 1}}}" for name in COUNTS)
    return [
        "configs/micro.yaml", *TINY, "data.path=null", f"data.blend=[{sources}]", f"train.output={run}",
        f"data.validation={{memos: {blend['memos']}}}",
        "train.steps=2", "train.eval_samples=12", "memory.mode=unique", "monitor.peak_tflops=1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(blend: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two steps on one process."""
    output = tmp_path_factory.mktemp("validated") / "run"
    mlm_train("pretrain", *pretrain(blend, output))
    yield output
    runtime.stop()


def expected(run: Path, blend: dict[str, Path]) -> dict[str, float]:
    """Each source's loss computed on its own: whole logits of windows spread evenly over its split."""
    model = load_model(run)
    found = {}
    for name, path in blend.items():
        tokens = torch.from_numpy(PreparedData.open(path).split("validation").tokens[:].astype("int64"))
        windows, count = (len(tokens) - 1) // LENGTH, (COUNTS | FURTHER)[name]
        losses = []
        for number in range(count):
            start = number * windows // count * LENGTH
            window = tokens[start : start + LENGTH + 1]
            with torch.inference_mode():
                logits = model(window[None, :-1], make_source("unique", model.memory_blocks()))[0]
            losses.append(F.cross_entropy(logits, window[1:]).item())
        found[name] = sum(losses) / count
    return found


def test_each_source_has_its_own_loss(run: Path, blend: dict[str, Path]) -> None:
    sources = expected(run, blend)
    assert abs(sources["data"] - sources["prose"]) > 1e-3
    total = sum(sources[name] * COUNTS[name] for name in COUNTS) / sum(COUNTS.values())
    assert scalars(run, "validation/loss")[2] == pytest.approx(total, rel=1e-5)
    log = (run / "train.log").read_text()
    for name, loss in sources.items():
        assert scalars(run, f"validation/loss/{name}")[2] == pytest.approx(loss, rel=1e-5)
        assert scalars(run, f"validation/perplexity/{name}")[2] == pytest.approx(2.718281828**loss, rel=1e-4)
        if name in COUNTS:
            assert f"{name} {loss:.4f} of {COUNTS[name]}" in log
    assert f"validation on memos at step 2 | loss {sources['memos']:.4f} | ppl " in log


def test_evaluate_gives_each_of_them(
    run: Path, blend: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (COUNTS | FURTHER).items():
        capsys.readouterr()
        words = ("evaluate", "--model", run, "--data", blend[name], "--sequence-length", LENGTH, "--json")
        mlm_train(*words, "--samples", count, "--spread")
        loss = json.loads(capsys.readouterr().out)["loss"]
        assert scalars(run, f"validation/loss/{name}")[2] == pytest.approx(loss, rel=1e-5), name


def test_bad_sets(blend: dict[str, Path], tmp_path: Path) -> None:
    def said(*more: str) -> str:
        return refused("pretrain", *pretrain(blend, tmp_path / "run", *more))

    assert "data.validation.prose: a source of data.blend has that name: choose another" in said(
        f"data.validation={{prose: {blend['memos']}}}"
    )
    assert "no holds no prepared data" in said(f"data.validation={{memos: {tmp_path / 'no'}}}")
    assert "data.validation" in said("data.validation={a/b: x}")
    other = tmp_path / "other"
    mlm_train(
        "data", "prepare", "--input", ROOT / "docs" / "run.md", "--output", other,
        "--tokenizer", "train:600", "--validation", ROOT / "docs" / "data.md",
    )  # fmt: skip
    line = said(f"data.validation={{memos: {other}}}")
    assert f"data.validation: {other} was prepared with a different tokenizer" in line


def test_ranks_together_find_the_same_losses(run: Path, blend: dict[str, Path], tmp_path: Path) -> None:
    """Two stages of two data-parallel ranks, with incomplete and padded micro-batches."""
    other = tmp_path / "other"
    layout = ("parallel.pipeline=2", "train.steps=1", "schedule.warmup_steps=0", *STILL)
    warm = f"checkpoint.warm_start={run}"
    train_on_ranks(4, *pretrain(blend, other, warm, *layout))
    for tag in ("loss", *(f"loss/{name}" for name in COUNTS | FURTHER)):
        mine, theirs = scalars(other, f"validation/{tag}")[1], scalars(run, f"validation/{tag}")[2]
        assert mine == pytest.approx(theirs, rel=1e-5), tag
    assert scalars(other, "memory/peak_gib_rank")[1] in range(4)


def test_the_most_memory_is_that_of_the_rank_that_has_it() -> None:
    """Rank 1 of two has allocated more; both ranks and TensorBoard show it."""
    for most, rank, peaks, own in run_on_ranks("tests.train.memory_cases:run", 2, guilty=1):
        assert rank == 1 and peaks.index(max(peaks)) == 1
        assert most == pytest.approx(max(peaks) / 2**30)
        assert peaks == pytest.approx(own, rel=0.05) and peaks[1] - peaks[0] > 2**28
