"""`--add-bos`: documents that begin with a token, from `data prepare` to the last reader of the model."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceTrainer

from mlm_train.checkpoint.reading.logical_folder import find_model, load_model
from mlm_train.data.prepared import PreparedData
from mlm_train.data.tokenizer import Tokenizer, tokenizer_of
from mlm_train.errors import UserError
from mlm_train.evaluate.scorer import Scorer
from mlm_train.memory import make_source
from mlm_train.parallel import runtime
from tests.commands import TINY, mlm_train, refused

PROMPT = "def main(self):"


@pytest.fixture(autouse=True)
def no_groups_left() -> Iterator[None]:
    """A run in this process must not disturb the next."""
    yield
    runtime.stop()


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A SentencePiece model with <s>, id 1, and </s>, id 2."""
    prefix = tmp_path_factory.mktemp("begun") / "some"
    SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts[:20]).split("\n")), model_prefix=str(prefix), model_type="bpe",
        vocab_size=500, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


def prepared_by(corpus: Path, tokenizer: Path, output: Path, *words: object) -> PreparedData:
    mlm_train(
        "data",
        "prepare",
        "--input",
        corpus,
        "--output",
        output,
        "--tokenizer",
        tokenizer,
        "--workers",
        1,
        *words,
    )
    return PreparedData.open(output)


@pytest.fixture(scope="module")
def folders(corpus: Path, begun: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The corpus prepared with --add-bos, and without."""
    folder = tmp_path_factory.mktemp("folders")
    prepared_by(corpus, begun, folder / "with", "--add-bos")
    prepared_by(corpus, begun, folder / "without")
    return folder / "with", folder / "without"


@pytest.fixture(scope="module")
def runs(folders: tuple[Path, Path]) -> Iterator[tuple[Path, Path]]:
    """A run on each of the two."""
    for data in folders:
        output = data.with_name(f"run-{data.name}")
        mlm_train(
            "pretrain", "configs/micro.yaml", *TINY, f"data.path={data}", f"train.output={output}",
            "train.steps=1", "schedule.warmup_steps=0", "model.init_std=0.5",
        )  # fmt: skip
        runtime.stop()
    yield folders[0].with_name("run-with"), folders[0].with_name("run-without")


def generated(capsys: pytest.CaptureFixture[str], *words: object) -> list[int]:
    capsys.readouterr()
    mlm_train("generate", "--max-new-tokens", 20, "--temperature", 1, "--json", *words)
    ids: list[int] = json.loads(capsys.readouterr().out)["ids"]
    return ids


def test_every_document_begins_with_it(folders: tuple[Path, Path]) -> None:
    begun, plain = (PreparedData.open(folder) for folder in folders)
    assert (begun.bos_id, begun.eod_id, plain.bos_id) == (1, 2, None)
    assert begun.fingerprint != plain.fingerprint
    begun.verify()
    plain.verify()
    for split in ("train", "validation"):
        stream, other = begun.split(split), plain.split(split)
        offsets, theirs = stream.document_offsets, other.document_offsets
        assert np.array_equal(np.diff(offsets), np.diff(theirs) + 1)
        assert (
            np.all(stream.tokens[offsets[:-1]] == 1)
            and np.count_nonzero(stream.tokens == 1) == len(offsets) - 1
        )
        assert np.array_equal(np.delete(stream.tokens, offsets[:-1]), other.tokens)
    mlm_train("data", "inspect", folders[0], "--sequence-length", 64, "--verify")


def test_which_token_it_is(tokenizer_json: Path, model: Path, corpus: Path, tmp_path: Path) -> None:
    def says(name: str, tree: dict[str, Any]) -> int | None:
        (tmp_path / name).write_text(json.dumps(tree))
        return Tokenizer.load(tmp_path / "tokenizer.json").bos_id

    words = ("data", "prepare", "--input", corpus, "--output", tmp_path / "out", "--add-bos", "--tokenizer")
    shutil.copy(tokenizer_json, tmp_path / "tokenizer.json")
    assert says("special_tokens_map.json", {"bos_token": None}) is None
    assert str(model) in refused(*words, model)  # those trained here have none
    assert "--add-bos" in refused(*words, "train:500")
    assert str(tmp_path / "tokenizer.json") in refused(*words, tmp_path / "tokenizer.json")
    renamed = tokenizer_json.read_text().replace("<|other|>", "<|begin_of_text|>")
    assert says("tokenizer.json", json.loads(renamed)) == 1
    assert says("tokenizer_config.json", {"bos_token": {"content": "<|endoftext|>"}}) == 0
    assert "<|endoftext|>" in refused(*words, tmp_path / "tokenizer.json")  # it ends documents
    data = prepared_by(
        corpus, tmp_path / "tokenizer.json", tmp_path / "out", "--add-bos", "--eod", "<|begin_of_text|>"
    )
    assert (data.bos_id, data.eod_id) == (0, 1)


def test_damage_and_mixtures_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    blend = json.dumps([{"path": str(folder), "weight": 1} for folder in folders])
    line = refused(
        "pretrain", "configs/micro.yaml", *TINY, "data.path=null", f"data.blend={blend}",
        f"train.output={tmp_path / 'run'}",
    )  # fmt: skip
    assert str(folders[0]) in line and str(folders[1]) in line
    copy = shutil.copytree(folders[0], tmp_path / "copy")
    tree = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(tree | {"bos_id": 3}))
    with pytest.raises(UserError, match=r"manifest\.json"):
        PreparedData.open(copy)
    data = PreparedData.open(folders[1])
    wrong = PreparedData(data.path, data.manifest.model_copy(update={"bos_id": 1}))
    with pytest.raises(UserError, match=r"train\.bin"):
        wrong.verify()


def test_generate_begins_as_the_run_did(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tokenizer_of(runs[0]).encode(PROMPT)
    for run, begins in zip(runs, (True, False), strict=True):
        export, again = tmp_path / run.name, tmp_path / f"{run.name}-again"
        mlm_train("export", run, "--output", export)
        mlm_train("import", export, "--output", again)
        tree = json.loads((export / "config.json").read_text())
        assert tree["add_bos_token"] is begins and (tree["bos_token_id"] == 1 or not begins)
        for model in (run, export, again):
            given = ("--model", model, "--prompt-ids")
            with_it = generated(capsys, *given, ",".join(map(str, [1, *ids])))
            without = generated(capsys, *given, ",".join(map(str, ids)))
            assert with_it != without
            words = ("--model", model, "--prompt", PROMPT)
            assert generated(capsys, *words) == (with_it if begins else without)
            assert generated(capsys, *words, "--add-bos") == with_it
            assert generated(capsys, *words, "--no-add-bos") == without
            assert find_model(model).bos_id == (1 if begins else None)
    assert "--add-bos" in refused("generate", "--model", runs[0], "--prompt-ids", "3", "--add-bos")


def test_evaluate_begins_windows_where_the_data_do_not(
    runs: tuple[Path, Path], folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def loss(run: Path, data: Path, *words: object) -> float:
        capsys.readouterr()
        mlm_train("evaluate", "--model", run, "--data", data, "--samples", 6, "--json", *words)
        value: float = json.loads(capsys.readouterr().out)["loss"]
        return value

    for run, begins in zip(runs, (True, False), strict=True):
        model = load_model(run)
        source = make_source("unique", model.memory_blocks())
        windows = Scorer(run, folders[1], count=6, add_bos=False).windows
        plain = windows.tokens(range(6))
        first = torch.cat([torch.ones_like(plain[:, :1]), plain[:, :-1]], dim=1)
        with torch.no_grad():
            expected = [
                float(torch.nn.functional.cross_entropy(
                    model(tokens[:, :-1], source).flatten(0, 1), tokens[:, 1:].flatten()
                ))
                for tokens in (first, plain)
            ]  # fmt: skip
        assert abs(expected[0] - expected[1]) > 1e-4
        assert loss(run, folders[1]) == pytest.approx(expected[0 if begins else 1], rel=1e-5)
        assert loss(run, folders[1], "--add-bos") == pytest.approx(expected[0], rel=1e-5)
        assert loss(run, folders[1], "--no-add-bos") == pytest.approx(expected[1], rel=1e-5)
        assert loss(run, folders[0]) == loss(run, folders[0], "--no-add-bos")
        line = refused("evaluate", "--model", run, "--data", folders[0], "--add-bos")
        assert str(folders[0]) in line
    mlm_train("evaluate", "--model", runs[1], "--data", folders[1], "--baselines", runs[1], "--add-bos")


def test_a_llama_begins_texts_as_transformers_does(
    tokenizer_json: Path, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    """By tokenizer_config.json, else by what its tokenizer.json puts before a text."""
    from tokenizers import Tokenizer as Library
    from tokenizers import processors

    folder = tmp_path / "export"
    mlm_train("export", runs[1], "--output", folder)
    (folder / "tokenizer.model").unlink()
    tree = json.loads((folder / "config.json").read_text())
    del tree["add_bos_token"]

    def first(config: dict[str, Any] | None, template: bool) -> int | None:
        tokenizer = Library.from_file(str(tokenizer_json))
        if template:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<|other|> $A", special_tokens=[("<|other|>", 1)]
            )
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").unlink(missing_ok=True)
        if config is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "config.json").write_text(json.dumps(tree))
        return find_model(folder, "none").bos_id

    named = {"bos_token": "<|other|>"}
    assert first(None, False) is None and first(named, False) is None
    assert first(None, True) == first(named, True) == 1
    assert first(named | {"add_bos_token": True}, False) == 1
    assert first(named | {"add_bos_token": False}, True) is None
