"""A table's counters in TensorBoard, read back with TensorBoard's own reader."""

import json
from pathlib import Path

import pytest

from mlm_train.checkpoint.hf.folder import write_folder
from mlm_train.data.prepared import PreparedData
from mlm_train.model.logical import named_pieces
from mlm_train.tol.format.index_file import read_index
from tests.commands import mlm_train, refused, scalars
from tests.inference.test_decode import random_model
from tests.inference.test_language_model import export_with_words
from tests.partitions import write_table


def test_each_batch_of_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = export_with_words(tmp_path / "words")
    table = write_table(tmp_path / "tol", random_model(kind="memory"), export, [50])
    prompts = [[1, 2, 3, 2], [3, 4], [2, 3, 9]]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    events = ("--tensorboard", tmp_path / "tensorboard")
    words = ("generate", "--model", export, "--max-new-tokens", 1, *events)
    disk = ("--tol", table, "--tol-tier", "disk", "--tol-cache", "1MB")
    mlm_train(*words, *disk, "--prompts", file, "--batch-size", 1)
    # A batch's rows are asked for at the end of the one before it, and count there.
    size = read_index(table).row_bytes
    expected = {
        "rows": [4, 2, 3], "distinct": [3 + 2, 3, 0], "hits": [1, 2, 0], "misses": [4, 1, 0],
        "bytes": [4 * size, size, 0], "hit_rate": [1 / 5, 2 / 3, 0],
    }  # fmt: skip
    for name, values in expected.items():
        assert list(scalars(tmp_path, f"tol/{name}").values()) == pytest.approx(values), name
    waits = scalars(tmp_path, "tol/wait_seconds")
    assert list(waits) == [1, 2, 3] and all(0 < wait < 60 for wait in waits.values())
    mlm_train(*words, *disk, "--prompt-ids", "1,2,3,2", "--json")
    assert scalars(tmp_path, "tol/rows") == {1: 4}  # the latest command's
    capsys.readouterr()
    assert "without a table" in refused(*words, "--prompt-ids", "1")
    assert str(file) in refused(*words, *disk, "--tensorboard", file / "no", "--prompt-ids", "1")


def test_each_micro_batch_of_evaluate(data: Path, tmp_path: Path) -> None:
    model = random_model(kind="memory", vocab_size=PreparedData.open(data).vocab_size)
    write_folder(tmp_path / "export", model.config, named_pieces(model))
    table = write_table(tmp_path / "tol", model, tmp_path / "export", [50])
    words = (
        "evaluate",
        "--model",
        tmp_path / "export",
        "--data",
        data,
        "--tol",
        table,
        "--sequence-length",
        8,
    )
    mlm_train(*words, "--samples", 5, "--micro-batch-size", 2, "--tensorboard", tmp_path / "tensorboard")
    assert scalars(tmp_path, "tol/rows") == {1: 16, 2: 16, 3: 8}
    text = PreparedData.open(data).split("validation").tokens[:40].tolist()
    distinct = [len(set(text[start : start + 16])) for start in (0, 16, 32)]
    assert list(scalars(tmp_path, "tol/distinct").values()) == distinct
