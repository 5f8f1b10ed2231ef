"""`mlm-train generate`, with and without a ToL."""

import json
from pathlib import Path

import pytest

from mlm_train.checkpoint.hf import folder as hf_folder
from mlm_train.checkpoint.hf.folder import write_folder
from mlm_train.cli import main
from mlm_train.model.logical import named_pieces
from tests.inference.test_decode import random_model
from tests.inference.test_language_model import export_with_words
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
    folders: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
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
    read.clear()
    embedded = write_table(
        tmp_path / "embedded", random_model(kind="flex", flex_beta=2), Path(export), [50], True
    )
    assert call(*words, "--tol", str(embedded)) == 0
    assert [int(token) for token in capsys.readouterr().out.split(",")] == computed["ids"]
    assert read and not any("memory_" in name or "embed" in name for name in read)
    on_disk = ("--tol-tier", "disk", "--tol-cache", "1MB", "--tol-direct", "--stats")
    assert call(*words, "--tol", tol, *on_disk) == 0
    streamed = capsys.readouterr()
    assert [int(token) for token in streamed.out.split(",")] == computed["ids"]
    assert "ToL: 22 rows, " in streamed.err


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(export_with_words(tmp_path / "words")), "--max-new-tokens", "6", "--ignore-eos"]
    assert call(*words, "--prompt", "w7 w8", "--json", "--logprobs", "2") == 0
    whole = json.loads(capsys.readouterr().out)
    assert len(whole["text"].split()) == len(whole["ids"]) == 6 and whole["finish_reason"] == "length"
    assert [len(entry["top"]) for entry in whole["logprobs"]] == [2] * 6
    assert [entry["id"] for entry in whole["logprobs"]] == whole["ids"]
    assert call(*words, "--prompt", "w7 w8") == 0
    assert capsys.readouterr().out == whole["text"] + "\n"
    second = whole["text"].split()[1]
    for prompt in (["--prompt", "w7 w8"], ["--prompt-ids", "7,8", "--json"]):
        assert call(*words, *prompt, "--stop", "nothing", "--stop", second) == 0
        out = capsys.readouterr().out
        text = json.loads(out)["text"] if "--json" in prompt else out.removesuffix("\n")
        assert text == whole["text"][: whole["text"].index(second)]
    assert call(*words, "--prompt", "") == 2
    assert "no tokens" in capsys.readouterr().err


def test_prompts_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(export_with_words(tmp_path / "words")), "--max-new-tokens", "5"]
    words += ["--temperature", "1.5", "--top-k", "50", "--repetition-penalty", "1.2", "--seed", "3"]
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("w1\nw2 w3 w4 w5\n\nw6 w7\n")
    objects.write_text('{"prompt": "w1"}\n{"prompt": [2, 3, 4, 5]}\n{"prompt": "w6 w7"}\n')
    found = []
    for file, more in ((lines, []), (objects, ["--batch-size", "2", "--json"])):
        assert call(*words, "--prompts", str(file), *more) == 0
        found.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert [entry["prompt"] for entry in found[1]] == ["w1", [2, 3, 4, 5], "w6 w7"]
    for ours, theirs in zip(*found, strict=True):
        assert set(ours) == {"prompt", "text", "ids", "finish_reason"}
        assert ours["ids"] == theirs["ids"] and ours["text"] == theirs["text"]
    assert call(*words, "--prompt", "w6 w7", "--json") == 0
    assert json.loads(capsys.readouterr().out)["ids"] == found[0][2]["ids"]
    objects.write_text('{"prompt": "w1"}\n{"prompt": [97]}\n')
    assert call(*words, "--prompts", str(objects)) == 2
    out, err = capsys.readouterr()
    assert not out and "prompts.jsonl, line 2: prompt id 97" in err


def test_scales(folders: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    def ids(*words: str) -> list[int]:
        assert call("--model", folders[0], "--prompt-ids", "5,6", "--json", *words) == 0
        result: list[int] = json.loads(capsys.readouterr().out)["ids"]
        return result

    assert ids() == ids("--memory-scale", "1") == ids("--memory-scale", "1,1,1.0")
    assert ids("--drop-layers", "0,2") == ids("--memory-scale", "0,1,0") != ids()
    assert ids("--memory-scale", "0.5", "--tol", folders[1]) == ids("--memory-scale", "0.5") != ids()


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
        (["--prompt-ids", "1", "--tol-tier", "disk"], "--tol-tier has no effect without a table"),
        (["--prompt-ids", "1", "--tol-patch", "p"], "--tol-patch has no effect without a table"),
        (["--prompt-ids", "1", "--top-k", "-1"], "top_k -1: give 0"),
        (["--prompt-ids", "1", "--repetition-penalty", "0"], "repetition_penalty 0.0: give more"),
        (["--prompt-ids", "1", "--stop", ""], "stop ('',): give texts"),
        (["--prompt-ids", "1", "--stop", "a"], "holds no tokenizer"),
        (["--prompt-ids", "1", "--logprobs", "1"], "add --json"),
        (["--prompt-ids", "1", "--batch-size", "1"], "without --prompts"),
        (["--prompts", "/nothing.txt", "--batch-size", "0"], "--batch-size 0: give at least 1"),
        (["--prompt-ids", "1", "--max-new-tokens", "0"], "--max-new-tokens 0: give at least 1"),
        (["--prompt-ids", "1", "--add-bos"], "write the id there"),
        (["--prompt-ids", "1", "--memory-scale", "a"], "--memory-scale 'a': give numbers"),
        (["--prompt-ids", "1", "--memory-scale", "1,1"], "or 3, one per layer"),
        (["--prompt-ids", "1", "--drop-layers", "1.5"], "--drop-layers 1.5: give layers such as 3,5-7"),
        (["--prompt-ids", "1", "--drop-layers", "3"], "layers are 0 to 2"),
        (["--prompt", "a"], "holds no tokenizer"),
        (["--prompts", "/nothing.txt"], "No such file"),
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
