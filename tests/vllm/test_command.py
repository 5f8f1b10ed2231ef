"""`mlm-train serve` before vLLM starts: what it refuses, and the command that it runs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mlm_train.cli import build_parser
from mlm_train.errors import UserError
from mlm_train.tol.format.index_file import read_index
from mlm_train.tol.serve.store import StoreOptions
from mlm_train.vllm.command import vllm_command
from mlm_train.vllm.options import TolOptions
from tests.commands import refused
from tests.hf.conftest import export
from tests.inference.test_decode import random_model
from tests.partitions import write_table


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An export and its ToL."""
    folder = tmp_path_factory.mktemp("folders")
    model = random_model(kind="memory")
    exported = export(folder / "mine", model)
    return exported, write_table(folder / "tol", model, exported, [50])


def command_of(*words: object) -> list[str]:
    """The command of `mlm-train serve` with these words, and what it would pass on."""
    return vllm_command(build_parser("serve").parse_args(["serve", *map(str, words)]))


def test_the_command_of_vllm(folders: tuple[Path, Path]) -> None:
    exported, tol = folders
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(exported)]
    address = ["--host", "127.0.0.1", "--port", "8000"]
    assert command_of(exported) == [*server, "--served-model-name", "mine", *address]
    on_disk = ("--tol-tier", "disk", "--tol-cache", "1MB", "--tol-direct")
    found = command_of(exported, "--tol", tol, *on_disk, "--name", "other", "--port", 81)
    assert found[:-3] == [*server, "--served-model-name", "other", *address[:-1], "81"]
    assert found[-3:-1] == ["--enforce-eager", "--additional-config"]
    tree = {"folder": str(tol), "tier": "disk", "cache_bytes": 10**6, "direct": True}
    assert json.loads(found[-1]) == {"tol": tree}
    options = TolOptions.of(json.loads(found[-1]))
    assert options is not None
    assert options.store_options() == StoreOptions("disk", cache_bytes=10**6, direct=True)


def test_bad_folders_are_refused_before_anything_starts(folders: tuple[Path, Path], tmp_path: Path) -> None:
    exported, tol = folders
    other = random_model(kind="memory")
    other.embed_tokens.weight[3, 0] += 1.0
    table = write_table(tmp_path / "other", other, export(tmp_path / "edited", other), [50])
    assert "built from another model" in refused("serve", exported, "--tol", table)
    assert "does not exist" in refused("serve", exported, "--tol", tmp_path / "nothing")
    assert "a base model has no FFN-M" in refused(
        "serve", export(tmp_path / "base", random_model(kind="base")), "--tol", tol
    )
    assert "are for tier disk" in refused("serve", exported, "--tol", tol, "--tol-direct")
    assert "give --tol TOLDIR too" in refused("serve", exported, "--tol-lock")
    assert "is not a folder" in refused("serve", tmp_path / "nothing")
    passed_on = ("--", "--additional-config={}")
    assert "leave one of them out" in refused("serve", exported, "--tol", tol, *passed_on)
    last = table / read_index(table).partitions[1].file
    with last.open("r+b") as file:
        file.write(b"\xff" * 12)
    assert f"{last} (rows [50, 97)) is damaged" in refused("serve", tmp_path / "edited", "--tol", table)
    last.unlink()
    assert "the file is missing" in refused("serve", tmp_path / "edited", "--tol", table)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is there")
def test_without_vllm_it_says_how_to_install_it(folders: tuple[Path, Path]) -> None:
    line = refused("serve", folders[0], "--tol", folders[1], "--", "--dtype", "float32")
    assert "vLLM is not installed here" in line and "docs/vllm.md" in line
    assert "vLLM is not installed here" in refused("bench", "vllm", "--preset", "tiny")


def test_options_of_a_table_by_hand() -> None:
    assert TolOptions.of({}) is None and TolOptions.of(None) is None and TolOptions.of({"else": 1}) is None
    for value, message in (
        ("tol/mine", "must be an object"),
        ({"folder": "t", "teir": "disk"}, "teir"),
        ({"folder": "t", "tier": "ram"}, "tier='ram'"),
        ({"folder": "t", "depth": 0}, "depth=0"),
        ({}, "folder"),
    ):
        with pytest.raises(UserError, match=message) as error:
            TolOptions.of({"tol": value})
        assert str(error.value).startswith("--additional-config") and "\n" not in str(error.value)
