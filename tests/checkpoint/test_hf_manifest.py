"""The manifest of an export: `export verify` and all readers report a changed byte."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from mlm_train.checkpoint.hf.manifest import MANIFEST
from mlm_train.checkpoint.reading.logical_folder import load_model
from mlm_train.parallel import runtime
from mlm_train.utils.files import sha256_of
from tests.checkpoint.test_hf_folder import random_model, write
from tests.checkpoint.test_hf_import import llama
from tests.commands import mlm_train, refused
from tests.partitions import write_table

IDS = ("--prompt-ids", "1,2,3", "--max-new-tokens", "2")


def flip(file: Path, at: int = -1) -> None:
    """Change one byte of a file, keeping its size."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.fixture
def export(data: Path, tmp_path: Path) -> Path:
    """A flex model in shards, with a tokenizer, of the vocabulary of `data`."""
    model = random_model(kind="flex", flex_beta=1, vocab_size=512)
    return write(tmp_path / "export", model, shard_bytes=60000, beside=[data / "tokenizer.model"])


def test_every_file_is_listed_and_the_folder_verifies(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(tmp_path / "llama")
    mlm_train("import", tmp_path / "llama", "--output", tmp_path / "import")
    for folder in (export, tmp_path / "import"):
        listed = {one["file"]: one for one in json.loads((folder / MANIFEST).read_text())["files"]}
        there = {file.name for file in folder.iterdir()} - {MANIFEST, "config.yaml"}
        assert listed.keys() == there and {"config.json"} < there
        for name, one in listed.items():
            assert one["bytes"] == (folder / name).stat().st_size
            assert one["sha256"] == sha256_of(folder / name)
        capsys.readouterr()
        mlm_train("export", "verify", folder)
        assert f"{folder}: whole, {len(there)} files" in capsys.readouterr().out
    with torch.no_grad():  # transformers ignores it
        LlamaForCausalLM.from_pretrained(tmp_path / "import")(torch.tensor([[1]]))


def test_a_flipped_byte_of_any_file_is_named(export: Path, data: Path, tmp_path: Path) -> None:
    for file in sorted(export.iterdir()):
        bad = Path(shutil.copytree(export, tmp_path / "bad", dirs_exist_ok=True))
        flip(bad / file.name, -2)
        for words in (
            ("export", "verify", bad),
            ("generate", "--model", bad, *IDS),
            ("evaluate", "--model", bad, "--data", data, "--samples", 1),
            ("import", bad, "--output", tmp_path / "import"),
            ("tol", "build", bad, "--output", tmp_path / "tol"),
        ):
            assert str(bad / file.name) in refused(*words), words
        assert not (tmp_path / "import").exists() and not (tmp_path / "tol").exists()


def test_how_much_is_compared(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = max(export.glob("*.safetensors"))
    flip(shard)
    for check in ("sizes", "none"):
        mlm_train("generate", "--model", export, *IDS, "--verify", check)
    extra = export / "tokenizer.model"
    extra.write_bytes(extra.read_bytes() + b"more")
    assert str(extra) in refused("generate", "--model", export, *IDS, "--verify", "sizes")
    mlm_train("generate", "--model", export, *IDS, "--verify", "none")
    extra.unlink()
    assert str(extra) in refused("generate", "--model", export, *IDS, "--verify", "sizes")
    assert "--verify" in refused("generate", "--model", export, *IDS, "--verify", "some")


def test_a_flipped_byte_of_a_table(export: Path, data: Path, tmp_path: Path) -> None:
    mix = tmp_path / "mix.json"
    tol = write_table(tmp_path / "tol", load_model(export), export, [100, 300])
    commands = (
        ("generate", "--model", export, *IDS, "--tol", tol),
        ("evaluate", "--model", export, "--data", data, "--samples", 1, "--tol", tol),
        ("tol", "inspect", tol, "--model", export),
        ("tol", "allocate", tol, "--model", export, "--data", data, "--output", mix, "--budget", "1MB"),
    )
    for words in commands[:3]:
        mlm_train(*words, "--verify", "full")
    flip(tol / "100.safetensors")
    for words in commands:
        assert str(tol / "100.safetensors") in refused(*words, "--verify", "full"), words
    for words in commands[:3]:
        mlm_train(*words)  # a table may be larger than memory: not all of its bytes are read by default
        mlm_train(*words, "--verify", "none")
    (tol / "100.safetensors").write_bytes((tol / "100.safetensors").read_bytes()[:-4])
    for words in commands:
        assert str(tol / "100.safetensors") in refused(*words), words


def test_weights_that_came_later_are_refused(export: Path) -> None:
    shutil.copy(min(export.glob("model-*.safetensors")), export / "model.safetensors")
    for words in (("export", "verify", export), ("generate", "--model", export, *IDS)):
        assert str(export / "model.safetensors") in refused(*words)


def test_the_manifest_itself(export: Path) -> None:
    file = export / MANIFEST
    tree = json.loads(file.read_text())
    tree["files"][0]["sha256"] = tree["files"][1]["sha256"]
    for text in (json.dumps(tree), json.dumps(tree | {"files": []}), "[]", "{", "[" * 100_000, "{}"):
        file.write_text(text)
        for words in (("export", "verify", export), ("generate", "--model", export, *IDS)):
            assert str(file) in refused(*words)
    file.unlink()
    mlm_train("generate", "--model", export, *IDS)
    assert MANIFEST in refused("export", "verify", export)
    assert "nowhere" in refused("export", "verify", export / "nowhere")


def test_a_run_may_be_called_verify(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "verify" in refused("export", "verify", "--output", "out")
    assert "--output" in refused("export", "verify")
    assert "--output" in refused("export", "verify", "export", "--output", "out")
    assert "three" in refused("export", "one", "three", "--output", "out")


def test_a_warm_start_reads_no_flipped_byte(export: Path, data: Path, tmp_path: Path) -> None:
    imported = tmp_path / "import"
    mlm_train("import", export, "--output", imported)
    words = ("pretrain", imported / "config.yaml", f"data.path={data}", f"train.output={tmp_path / 'run'}")
    flip(imported / "model.safetensors")
    assert str(imported / "model.safetensors") in refused(*words, "train.steps=1", "schedule.warmup_steps=0")
    runtime.stop()
