import subprocess
import sys

import pytest

from mlm_train.cli import main
from mlm_train.data.inspection import distinct_ids
from mlm_train.data.prepared import PreparedData
from mlm_train.data.samples import Samples


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["data", *map(str, arguments)])
    return stop.value.code


def test_collect_prepare_inspect(tmp_path, capsys):
    corpus, data = tmp_path / "corpus", tmp_path / "data"
    assert run("collect", "--output", corpus, "--max-bytes", "400kB", "--validation-fraction", "0.2") == 0
    assert "validation:" in capsys.readouterr().out
    assert (
        run("prepare", "--input", corpus, "--output", data, "--tokenizer", "train:500", "--workers", 1) == 0
    )
    shown = capsys.readouterr()
    assert PreparedData.open(data).fingerprint[:16] in shown.out
    assert "tokenizing" in shown.err
    assert run("inspect", data, "--sequence-length", 64, "--samples", 2, "--verify") == 0
    out = capsys.readouterr().out
    assert "train sample 1" in out and "distinct ids" in out and "matches the manifest's hash" in out


def test_errors_are_one_line_and_exit_2(tmp_path, capsys):
    assert run("inspect", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("mlm-train: ") and error.count("\n") == 1
    assert run("inspect", tmp_path, "--debug") == 2
    assert "Traceback" in capsys.readouterr().err
    assert run("--debug", "inspect", tmp_path) == 2
    assert "Traceback" in capsys.readouterr().err
    assert run("collect", "--output", tmp_path / "x", "--max-bytes", "lots") == 2
    assert "not a size such as 40MB" in capsys.readouterr().err
    assert run("inspect", tmp_path, "--sequence-length", "0") == 2
    assert "not a whole number above zero" in capsys.readouterr().err


def test_samples_longer_than_the_split(prepared, capsys):
    assert run("inspect", prepared.path, "--sequence-length", 10**9) == 2
    assert "fewer than one sample" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["collect", "prepare", "inspect"])
def test_help_has_an_example(command, capsys):
    assert run(command, "--help") == 0
    assert f"  mlm-train data {command} " in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from mlm_train.cli import build_parser; build_parser('data'); "
        "print([m for m in ('torch', 'numpy', 'datasets', 'pydantic', 'rich') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_distinct_ids(prepared):
    ratios = distinct_ids(Samples(prepared.split("train"), 64, seed=0))
    assert list(ratios) == [2048, 16384, 65536]
    assert 1 > ratios[2048] > ratios[16384] > ratios[65536] > 0
