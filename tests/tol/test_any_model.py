"""Commands on a table accept its model as an export, a run's folder, or a checkpoint."""

import json
import shutil
from pathlib import Path

import pytest

from mlm_train.parallel import runtime
from mlm_train.utils.arguments import MODEL_KINDS
from tests.commands import TINY, mlm_train, refused
from tests.tol.test_faults import flip


def train(data: Path, run: Path, *arguments: str) -> None:
    try:
        paths = (f"data.path={data}", f"train.output={run}")
        mlm_train("pretrain", "configs/micro.yaml", *TINY, *paths, "train.steps=2", *arguments)
    finally:
        runtime.stop()


@pytest.fixture(scope="module")
def folders(data: Path, ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run, its checkpoint, its export, and its table."""
    root = tmp_path_factory.mktemp("any")
    train(data, root / "run")
    mlm_train("export", root / "run", "--output", root / "export")
    mlm_train("tol", "build", root / "export", "--output", root / "tol", "--dtype", "float32")
    found = {name: root / name for name in ("run", "export", "tol")}
    return found | {"checkpoint": root / "run" / "checkpoints" / "step-00000002"}


MODELS = ("export", "run", "checkpoint")


def test_perplexity(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`evaluate` (computed and looked up), `tol build` and `tol compress` report identical digits."""
    outputs = []
    for name in MODELS:
        model, out = ("--model", folders[name]), tmp_path / name
        short = ("--data", data, "--samples", 5, "--json")
        mlm_train("evaluate", *model, *short)
        mlm_train("evaluate", *model, *short, "--tol", folders["tol"])
        mlm_train("tol", "build", folders[name], "--output", out / "tol", "--evaluate", data)
        arguments = ("--output", out / "int8", "--dtype", "int8", "--evaluate", data)
        mlm_train("tol", "compress", folders["tol"], *arguments, *model)
        outputs.append(capsys.readouterr().out.replace(str(out), "OUT"))
    assert outputs[0] == outputs[1] == outputs[2]
    computed, looked_up = (json.loads(line) for line in outputs[0].splitlines()[:2])
    assert computed["windows"] == 5 and looked_up["perplexity"] == pytest.approx(computed["perplexity"])
    assert outputs[0].count("perplexity ") == 2


def test_allocate_inspect_and_generate(
    folders: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, mixes = [], []
    for name in MODELS:
        model, out = ("--model", folders[name]), tmp_path / f"{name}.json"
        mlm_train("tol", "inspect", folders["tol"], *model, "--json", "--neighbours", " self")
        mlm_train("generate", *model, "--prompt", "def", "--max-new-tokens", 4, "--json")
        inspected, generated = map(json.loads, capsys.readouterr().out.splitlines())
        results.append((inspected, generated["ids"]))
        arguments = ("--samples", 2, "--budget", "50kB", "--output", out)
        mlm_train("tol", "allocate", folders["tol"], *model, "--data", data, *arguments)
        capsys.readouterr()
        mixes.append(json.loads(out.read_text()))
    assert results[0] == results[1] == results[2] and mixes[0] == mixes[1] == mixes[2]
    assert results[0][0]["sizes"]["ffn_m"] and results[0][0]["neighbours"][0]["text"] == " self"


def test_bad_input(folders: dict[str, Path], data: Path, corpus: Path, tmp_path: Path) -> None:
    """One line, and nothing is written."""
    table, out = folders["tol"], ("--output", tmp_path / "out")
    train(data, tmp_path / "base", "model.kind=base")
    damaged = Path(shutil.copytree(folders["run"], tmp_path / "damaged"))
    flip(next(damaged.glob("checkpoints/step-*/*.safetensors")))
    (tmp_path / "empty").mkdir()
    for name, line in (
        ("base", "base model"),
        ("damaged", "is damaged: its checksum differs"),
        ("empty", f"empty holds no model; give {MODEL_KINDS}"),
        ("none", f"none is not a folder; give {MODEL_KINDS}"),
    ):
        model = tmp_path / name
        text = ("--model", model, "--data", data)
        assert line in refused("tol", "build", model, *out, "--evaluate", data)
        compress = ("tol", "compress", table, *out, "--dtype", "int8")
        assert line in refused(*compress, "--model", model, "--evaluate", data)
        assert line in refused("tol", "allocate", table, *text, *out, "--budget", "1MB")
        assert line in refused("evaluate", *text, "--tol", table)
        if name != "damaged":  # weights are not read
            assert line in refused("tol", "inspect", table, "--model", model)
    other = tmp_path / "other"
    mlm_train("data", "prepare", "--input", corpus, "--output", other, "--tokenizer", "train:400")
    for model in (folders["run"], folders["checkpoint"]):
        line = refused("tol", "build", model, *out, "--evaluate", other)
        assert f"{folders['run'] / 'tokenizer.model'} is not the tokenizer of {other}" in line
    allocate = ("tol", "allocate", table, "--model", folders["run"], "--data", data, *out, "--budget", "1MB")
    assert "--samples 0: give at least 1" in refused(*allocate, "--samples", 0)
    assert "--micro-batch-size 0: give at least 1" in refused(*allocate, "--micro-batch-size", 0)
    assert "--sequence-length 65 is longer" in refused(*allocate, "--sequence-length", 65)
    assert not (tmp_path / "out").exists()
