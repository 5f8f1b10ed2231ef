"""Validation losses of each source of a blend, and the reported peak memory and its rank."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mlm_train.checkpoint.reading.logical_folder import load_model
from mlm_train.data.prepared import PreparedData
from mlm_train.memory import make_source
from mlm_train.parallel import runtime
from tests.commands import ROOT, TINY, mlm_train, scalars
from tests.ranks import run_on_ranks, train_on_ranks

LENGTH, COUNTS = 32, {"data": 9, "prose": 3}  # of twelve validation samples, three to one
STILL = ("optimizer.lr=1e-30", "schedule.min_lr=0")


@pytest.fixture(scope="module")
def blend(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The corpus and two pages of this project's docs, with one tokenizer."""
    root = tmp_path_factory.mktemp("blend")
    prepare = ("data", "prepare", "--input", ROOT / "docs" / "run.md")
    options = ("--tokenizer", data / "tokenizer.model", "--validation", ROOT / "docs" / "data.md")
    mlm_train(*prepare, "--output", root / "prose", *options)
    return {"data": data, "prose": root / "prose"}


def pretrain(blend: dict[str, Path], run: Path, *more: str) -> list[str]:
    sources = ", ".join(
        f"{{path: {path}, weight: {3 if name == 'data' else 1}}}" for name, path in blend.items()
    )
    return [
        "configs/micro.yaml", *TINY, "data.path=null", f"data.blend=[{sources}]", f"train.output={run}",
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
        windows, count = (len(tokens) - 1) // LENGTH, COUNTS[name]
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
        assert f"{name} {loss:.4f} of {COUNTS[name]}" in log


def test_ranks_together_find_the_same_losses(run: Path, blend: dict[str, Path], tmp_path: Path) -> None:
    """Two stages of two data-parallel ranks, with incomplete and padded micro-batches."""
    other = tmp_path / "other"
    layout = ("parallel.pipeline=2", "train.steps=1", "schedule.warmup_steps=0", *STILL)
    warm = f"checkpoint.warm_start={run}"
    train_on_ranks(4, *pretrain(blend, other, warm, *layout))
    for tag in ("loss", *(f"loss/{name}" for name in COUNTS)):
        mine, theirs = scalars(other, f"validation/{tag}")[1], scalars(run, f"validation/{tag}")[2]
        assert mine == pytest.approx(theirs, rel=1e-5), tag
    assert scalars(other, "memory/peak_gib_rank")[1] in range(4)


def test_the_most_memory_is_that_of_the_rank_that_has_it() -> None:
    """Rank 1 of two has allocated more; both ranks and TensorBoard show it."""
    for most, rank, peaks, own in run_on_ranks("tests.train.memory_cases:run", 2, guilty=1):
        assert rank == 1 and peaks.index(max(peaks)) == 1
        assert most == pytest.approx(max(peaks) / 2**30)
        assert peaks == pytest.approx(own, rel=0.05) and peaks[1] - peaks[0] > 2**28
