"""Files beside a Llama's weights are carried over: import, a run from it, its export; all end tokens work."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from mlm_train.checkpoint.hf.files import SpecialTokens, special_tokens
from mlm_train.checkpoint.hf.manifest import MANIFEST
from mlm_train.data.tokenizer import tokenizer_of
from mlm_train.parallel import runtime
from tests.checkpoint.test_hf_import import llama
from tests.commands import mlm_train, refused

TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
BESIDE = {
    "tokenizer_config.json": json.dumps({"chat_template": TEMPLATE, "add_bos_token": True}),
    "special_tokens_map.json": json.dumps({"eos_token": "</s>"}),
    "added_tokens.json": json.dumps({"<extra>": 511}),
    "chat_template.jinja": TEMPLATE,
    "generation_config.json": json.dumps({"eos_token_id": [7, 9], "temperature": 0.6, "do_sample": True}),
}


@pytest.fixture(autouse=True)
def no_groups_left() -> Iterator[None]:
    """A run in this process must not disturb the next."""
    yield
    runtime.stop()


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Path:
    """A chat Llama as on the hub, with more files than a Llama needs."""
    folder = tmp_path / "llama"
    llama(folder, bos_token_id=5, eos_token_id=[2, 7], pad_token_id=4)
    shutil.copy(data / "tokenizer.model", folder)
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    (folder / "LICENSE").write_text("free")
    return folder


def tree(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_an_import_has_it_all_and_says_what_it_has_not(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "import"
    config = tree(folder / "config.json") | {"attention_dropout": 0.25, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    mlm_train("import", folder, "--output", output)
    said = capsys.readouterr().out
    for name, text in BESIDE.items():
        assert (output / name).read_text() == text
    config = tree(output / "config.json")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (5, [2, 7, 9], 4)
    assert tokenizer_of(output).eod_id == 2
    (left,) = (line for line in said.splitlines() if line.startswith("not carried"))
    assert all(word in left for word in ("LICENSE", "attention_dropout=0.25", "dtype=bfloat16"))
    assert "safetensors" not in left and "config.json" not in left
    # And from our own folder.
    mlm_train("import", output, "--output", tmp_path / "again")
    for file in output.iterdir():
        if file.name != "config.yaml":
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    assert "LICENSE" not in capsys.readouterr().out


def test_the_road_through_a_run(folder: Path, data: Path, tmp_path: Path) -> None:
    imported, run, export = (tmp_path / name for name in ("import", "run", "export"))
    mlm_train("import", folder, "--output", imported)
    words = (
        "train.precision=fp32", "train.global_batch_size=2", "train.eval_samples=2",
        "schedule.warmup_steps=0", "train.steps=1",
    )  # fmt: skip
    mlm_train("pretrain", imported / "config.yaml", f"data.path={data}", f"train.output={run}", *words)
    runtime.stop()
    mlm_train("export", run, "--output", export)
    for name, text in BESIDE.items():
        if name not in ("generation_config.json", "tokenizer_config.json"):
            assert (export / name).read_text() == text
    # The run's documents did not begin with bos: transformers must not add it either.
    said = json.loads(BESIDE["tokenizer_config.json"])
    assert said["add_bos_token"] and tree(export / "tokenizer_config.json") == said | {"add_bos_token": False}
    # A further run, from that run's checkpoint.
    mlm_train(
        "pretrain", imported / "config.yaml", f"data.path={data}", f"train.output={tmp_path / 'next'}",
        f"checkpoint.warm_start={run}", *words,
    )  # fmt: skip
    mlm_train("export", tmp_path / "next", "--output", tmp_path / "last")
    end = tokenizer_of(data).eod_id
    for folder_ in (export, tmp_path / "last"):
        config, generation = tree(folder_ / "config.json"), tree(folder_ / "generation_config.json")
        for found in (config, generation):
            assert (found["bos_token_id"], found["pad_token_id"]) == (5, 4)
            assert found["eos_token_id"] == [end, *sorted({2, 7, 9} - {end})]
        assert generation["temperature"] == 0.6
        assert "tokenizer.model" in {one["file"] for one in tree(folder_ / MANIFEST)["files"]}
        theirs = LlamaForCausalLM.from_pretrained(folder_).generation_config
        assert (theirs.bos_token_id, theirs.eos_token_id) == (5, config["eos_token_id"])


def test_another_tokenizer_takes_nothing_along(
    folder: Path, data: Path, tmp_path: Path, corpus: Path
) -> None:
    (folder / "tokenizer.model").write_bytes(b"another")
    mlm_train("import", folder, "--output", tmp_path / "import")
    run = tmp_path / "run"
    mlm_train(
        "pretrain", tmp_path / "import" / "config.yaml", f"data.path={data}", f"train.output={run}",
        "train.steps=1", "train.precision=fp32", "train.global_batch_size=2", "train.eval_samples=2",
        "schedule.warmup_steps=0",
    )  # fmt: skip
    log = (run / "train.log").read_text()
    assert "not copied" in log and all(name in log for name in BESIDE)
    mlm_train("export", run, "--output", tmp_path / "export")
    written = {"generation_config.json", "tokenizer_config.json"}  # by the export
    assert {*BESIDE} & {file.name for file in (tmp_path / "export").iterdir()} == written
    config = tree(tmp_path / "export" / "config.json")
    assert tree(tmp_path / "export" / "generation_config.json") == {"eos_token_id": config["eos_token_id"]}
    assert "chat_template" not in tree(tmp_path / "export" / "tokenizer_config.json")
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, tokenizer_of(data).eod_id)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, None, SpecialTokens(1, (2,), None)),
        ({"bos_token_id": None, "eos_token_id": None}, None, SpecialTokens()),
        ({"eos_token_id": 3}, {"eos_token_id": [4, 3]}, SpecialTokens(1, (3, 4), None)),
        ({}, {"eos_token_id": 4, "bos_token_id": 6, "pad_token_id": 0}, SpecialTokens(6, (4,), 0)),
        ({"eos_token_id": [8, 8, 9], "pad_token_id": 1}, {}, SpecialTokens(1, (8, 9), 1)),
    ],
)
def test_where_the_ids_stand(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, expected: SpecialTokens
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert special_tokens(tmp_path) == expected


def test_every_end_token_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whichever file names the end token; transformers stops there too."""
    folder = tmp_path / "llama"
    llama(folder, eos_token_id=None)
    words = ("generate", "--prompt-ids", "1,2,3", "--max-new-tokens", 30, "--json")

    def made() -> list[int]:
        capsys.readouterr()
        mlm_train(*words, "--model", folder)
        ids: list[int] = json.loads(capsys.readouterr().out)["ids"]
        return ids

    (folder / "generation_config.json").unlink()
    whole = made()
    assert len(whole) == 30
    at = max(at for at in range(30) if whole[at] not in whole[:at])
    assert at > 0
    unmade = [token for token in range(512) if token not in whole][:2]
    ends = [*unmade, whole[at]]
    config = tree(folder / "config.json")
    for name, fields in (
        ("config.json", config | {"eos_token_id": ends}),
        ("generation_config.json", {"eos_token_id": ends}),
        ("generation_config.json", {"eos_token_id": whole[at]}),
    ):
        (folder / "config.json").write_text(json.dumps(config))
        (folder / name).write_text(json.dumps(fields))
        assert made() == whole[:at]
        theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found = theirs.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=30, do_sample=False)[0, 3:].tolist()
        assert found == whole[: at + 1]
        (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": "many"}')
    assert str(folder / "generation_config.json") in refused(*words, "--model", folder)
