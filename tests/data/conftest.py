"""A small real corpus, a tokenizer trained on it, and the folder prepared from both."""

import json
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before `datasets` is imported: tests never reach for the network

from mlm_train.data.collect import collect, standard_library
from mlm_train.data.prepare import prepare
from mlm_train.data.prepared import PreparedData
from mlm_train.data.train_tokenizer import train_sentencepiece


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 0.8 MB of the standard library's json, email, asyncio packages, as collect writes it."""
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    sources = [standard_library() / name for name in ("json", "email", "asyncio")]
    collect(folder, sources, max_bytes=800_000, validation_fraction=0.2)
    return folder


@pytest.fixture(scope="session")
def texts(corpus: Path) -> list[str]:
    """The texts of the corpus's train split."""
    return [json.loads(line)["text"] for line in (corpus / "train.jsonl").open(encoding="utf-8")]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A trained SentencePiece model with 700 pieces."""
    path = tmp_path_factory.mktemp("tokenizer") / "some.model"
    path.write_bytes(train_sentencepiece(texts, 700, None))
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, corpus: Path, model: Path) -> PreparedData:
    """The corpus prepared with the model. Tests must not change it."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare([str(corpus)], folder, str(model))
    return PreparedData.open(folder)


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A byte-level BPE of the `tokenizers` library with the special token <|endoftext|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|other|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path
