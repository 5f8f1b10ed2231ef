"""Real text and a real tokenizer for every test that trains: the Python library's own sources."""

from pathlib import Path

import pytest

from tests.commands import mlm_train


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Collected text, train.jsonl and validation.jsonl."""
    folder = tmp_path_factory.mktemp("corpus") / "text"
    mlm_train("data", "collect", "--output", folder, "--max-bytes", "1MB", "--validation-fraction", "0.1")
    return folder


@pytest.fixture(scope="session")
def data(corpus: Path) -> Path:
    """Prepared data with a vocabulary of 512."""
    folder = corpus.parent / "data"
    mlm_train("data", "prepare", "--input", corpus, "--output", folder, "--tokenizer", "train:512")
    return folder
