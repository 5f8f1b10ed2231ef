"""`mlm-train generate`, with and without a ToL."""

import json
import sys
import types
from pathlib import Path

import pytest

from mlm_train.checkpoint.hf import folder as hf_folder
from mlm_train.checkpoint.hf.folder import write_folder
from mlm_train.cli import main
from mlm_train.model.logical import named_pieces
from tests.inference.test_decode import random_model
from tests.partitions import write_table


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """An export and its ToL in fp32."""
    model = random_model(kind="flex", flex_beta=2)
    export, tol = tmp_path / "export", tmp_path / "tol"
    write_folder(export, model.config, named_pieces(model))
    write_table(tol, model, export, [50])
    return str(export), str(tol)


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["generate", *words])
    return int(exit_.value.code or 0)


def test_lookup_generates_the_same(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    export, tol = folders
    words = ["--model", export, "--prompt-ids", "5, 80,2", "--max-new-tokens", "20"]
    assert call(*words, "--json") == 0
    computed = json.loads(capsys.readouterr().out)
    assert len(computed["ids"]) == 20 and computed["text"] is None
    assert computed["prefill_ms"] > 0 and computed["decode_ms_per_token"] > 0
    read: list[str] = []
    whole = hf_folder.FolderTensors.tensor
    monkeypatch.setattr(
        hf_folder.FolderTensors, "tensor", lambda self, name: (read.append(name), whole(self, name))[1]
    )
    assert call(*words, "--tol", tol) == 0
    streamed = capsys.readouterr()
    assert [int(token) for token in streamed.out.split(",")] == computed["ids"]
    assert "ms per token" in streamed.err
    assert read and not any("memory_" in name for name in read)
    on_disk = ("--tol-tier", "disk", "--tol-cache", "1MB", "--tol-direct", "--stats")
    assert call(*words, "--tol", tol, *on_disk) == 0
    streamed = capsys.readouterr()
    assert [int(token) for token in streamed.out.split(",")] == computed["ids"]
    assert "ToL: 22 rows, " in streamed.err


class Letters:
    """A tokenizer with two ids per character."""

    eod_id = 96

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 32 for letter in text]

    def decode(self, ids: list[int]) -> str:
        text = "".join(f"<{token}>" for token in ids[: len(ids) // 2 * 2])
        return text + ("\N{REPLACEMENT CHARACTER}" if len(ids) % 2 else "")


def test_text(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    export, _ = folders
    module = types.ModuleType("tokenizer")
    module.tokenizer_of = lambda folder, eod: Letters()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlm_train.data.tokenizer", module)
    words = ["--model", export, "--prompt", "ab", "--max-new-tokens", "6"]
    assert call(*words, "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["text"] == "".join(f"<{token}>" for token in whole["ids"])
    assert call(*words) == 0
    assert capsys.readouterr().out == whole["text"] + "\n"
    assert call("--model", export, "--prompt", "") == 2
    assert "no tokens" in capsys.readouterr().err


def test_a_full_context_is_said(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", folders[0], "--prompt-ids", "1,2,3", "--seed", "9223372036854775807"]
    for asked, more in ((37, False), (38, True), (10**30, True)):
        for form in ([], ["--json"]):
            assert call(*words, "--max-new-tokens", str(asked), *form) == 0
            out, err = capsys.readouterr()
            ids = json.loads(out)["ids"] if form else out.split(",")
            assert len(ids) == 37 and (f"37 of {asked}" in err) == more


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt-ids", ""], "no tokens"),
        (["--prompt-ids", "1,x"], "whole numbers"),
        (["--prompt-ids", ",".join(["1"] * 40)], "max_position_embeddings"),
        (["--prompt-ids", "1", "--seed", "18446744073709551616"], "--seed"),
        (["--prompt-ids", "1", "--seed", "9223372036854775808"], "--seed"),
        (["--prompt-ids", "1", "--seed", "-1"], "--seed"),
        (["--prompt-ids", "1", "--seed", "9" * 5000], "--seed"),
        (["--prompt-ids", "1", "--seed", "\u0663"], "--seed"),
        (["--prompt", "caf\udce9"], "UTF-8"),
        (["--prompt-ids", "1", "--tol", "/nothing"], "does not exist"),
        (["--prompt-ids", "1", "--stats"], "give --tol"),
    ],
)
def test_bad_input(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert call("--model", folders[0], *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_table_of_another_model(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tol = folders
    model = random_model(kind="flex", flex_beta=2)
    model.embed_tokens.weight[3, 0] += 1.0
    write_folder(tmp_path / "edited", model.config, named_pieces(model))
    words = ["--model", str(tmp_path / "edited"), "--prompt-ids", "5", "--max-new-tokens", "2", "--tol", tol]
    assert call(*words) == 2
    assert f"{tol} was built from another model" in capsys.readouterr().err
    assert call(*words, "--verify", "sizes") == 0
