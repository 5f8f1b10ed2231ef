"""Damaged or hostile tokenizer files: one line and exit code 2, in bounded time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer as HuggingFace
from tokenizers import models, pre_tokenizers, trainers

from mlm_train.data import tokenizer_trial
from mlm_train.data.tokenizer import Tokenizer
from mlm_train.errors import UserError
from tests.commands import refused

TEXT = "def main(self): return 0\n" * 5


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    """A tokenizer.json."""
    tokenizer: Any = HuggingFace(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


def no_words(tree: dict[str, Any]) -> None:
    tree["model"] |= {"type": "WordLevel", "vocab": {"</s>": 0}, "unk_token": "gone"}
    tree["model"].pop("merges")


def far_ids(tree: dict[str, Any]) -> None:
    tree["model"]["vocab"]["d"] = 2**32 - 1


def never_matches(tree: dict[str, Any]) -> None:
    """The library's Rust panics over a text, which is not a Python Exception."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tree["pre_tokenizer"]]}


def not_a_charsmap(tree: dict[str, Any]) -> None:
    """The library's Rust panics over the file."""
    tree["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAAAAAA"}


@pytest.mark.parametrize("damage", [no_words, far_ids, never_matches, not_a_charsmap])
def test_a_damaged_tokenizer_json_is_one_line(
    damage: Callable[[dict[str, Any]], None], tree: dict[str, Any], tmp_path: Path
) -> None:
    file, copy = tmp_path / "tokenizer.json", json.loads(json.dumps(tree))
    file.write_text(json.dumps(copy))
    tokenizer_trial.try_tokenizer(file)
    damage(copy)
    file.write_text(json.dumps(copy))
    words = ("data", "prepare", "--input", "README.md", "--output", tmp_path / "data", "--tokenizer", file)
    assert str(file) in refused(*words)
    assert not (tmp_path / "data").exists()


def test_what_does_not_end_is_ended(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hostile file takes more time than the trial allows."""
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(tree))
    monkeypatch.setattr(tokenizer_trial, "SECONDS", 0.01)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        tokenizer_trial.try_tokenizer(file)


def test_a_sentencepiece_that_knows_fewer_ids_than_the_model(data: Path, tmp_path: Path) -> None:
    model = sentencepiece_model_pb2.ModelProto.FromString((data / "tokenizer.model").read_bytes())
    del model.pieces[400:]
    file = tmp_path / "tokenizer.model"
    file.write_bytes(model.SerializeToString())
    tokenizer_trial.try_tokenizer(file)
    assert Tokenizer.load(file).decode([300, 450, 511])
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        Tokenizer.load(file)
