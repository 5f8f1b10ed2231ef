import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from mlm_train.data.prepare import prepare
from mlm_train.data.prepared import PreparedData
from mlm_train.data.tokenizer import tokenizer_of
from mlm_train.errors import UserError


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.open(encoding="utf-8")]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_megatron_reads_every_document_back(prepared: PreparedData, corpus):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokenizer = tokenizer_of(prepared.path)
    for split in ("train", "validation"):
        texts = texts_of(corpus / f"{split}.jsonl")
        dataset = IndexedDataset(str(prepared.path / split))
        record = prepared.manifest.splits[split]
        assert len(dataset) == len(dataset.document_indices) - 1 == record.documents == len(texts)
        for ids, text in zip(dataset[:], texts, strict=True):
            assert ids.dtype == np.uint16
            assert ids[-1] == prepared.eod_id and prepared.eod_id not in ids[:-1]
            assert tokenizer.decode(ids[:-1]) == text
        assert record.tokens == sum(dataset.sequence_lengths)
        assert record.characters == sum(map(len, texts))
        assert record.text_bytes == sum(len(text.encode()) for text in texts)


def test_output_does_not_depend_on_workers(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("mlm_train.data.prepare.BATCH_CHARACTERS", 1 << 14)  # many batches
    for workers in (1, 2):
        prepare([str(corpus)], tmp_path / str(workers), "train:500", workers=workers)
    one, two = bytes_of(tmp_path / "1"), bytes_of(tmp_path / "2")
    assert one.keys() == two.keys() and len(one) == 6
    assert one == two
    assert PreparedData.open(tmp_path / "1").vocab_size == 500


def test_long_documents_are_encoded_in_pieces(prepared, corpus, model, tmp_path, monkeypatch):
    monkeypatch.setattr("mlm_train.data.tokenizer.CHUNK_CHARACTERS", 1000)
    prepare([str(corpus)], tmp_path / "out", str(model))
    assert PreparedData.open(tmp_path / "out").fingerprint == prepared.fingerprint


def test_tokenizer_json_with_workers_and_chosen_end(corpus, tokenizer_json, tmp_path):
    prepare([str(corpus)], tmp_path / "a", str(tokenizer_json), workers=2, eod="<|other|>")
    data = PreparedData.open(tmp_path / "a")
    assert (data.manifest.tokenizer.file, data.eod_id) == ("tokenizer.json", 1)
    tokens = data.split("train").tokens
    assert np.count_nonzero(tokens == 1) == data.manifest.splits["train"].documents
    assert tokenizer_of(tmp_path / "a").eod_id == 1
    # A folder's tokenizer comes with its end token.
    prepare([str(corpus)], tmp_path / "b", str(tmp_path / "a"))
    assert PreparedData.open(tmp_path / "b").fingerprint == data.fingerprint


def test_large_vocabularies_need_int32(corpus, tokenizer_json, tmp_path):
    tree = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    token = dict(tree["added_tokens"][0], id=100_000, content="<far>")
    tree["added_tokens"].append(token)
    tree["model"]["vocab"]["<far>"] = 100_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    manifest = prepare([str(corpus)], tmp_path / "out", str(tmp_path / "tokenizer.json"), eod="<far>")
    assert (manifest.dtype, manifest.vocab_size, manifest.eod_id) == ("int32", 100_001, 100_000)
    stream = PreparedData.open(tmp_path / "out").split("validation")
    assert stream.tokens[-1] == 100_000


def test_fraction_divides_documents_by_their_text(corpus, model, tmp_path):
    lines = (corpus / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    lines.append('{"text": " \\n"}\n')  # blank: left out
    (tmp_path / "some.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "reversed.jsonl").write_text("".join(lines[::-1]), encoding="utf-8")
    held_out = []
    for name in ("some", "reversed"):
        manifest = prepare(
            [str(tmp_path / f"{name}.jsonl")], tmp_path / name, str(model), validation_fraction=0.3
        )
        assert sum(split.documents for split in manifest.splits.values()) == len(lines) - 1
        stream = PreparedData.open(tmp_path / name).split("validation")
        offsets = stream.document_offsets
        held_out.append({stream.tokens[a:b].tobytes() for a, b in itertools.pairwise(offsets)})
    assert held_out[0] == held_out[1]


def test_progress_counts_the_input(corpus, model, tmp_path):
    seen: dict[str, float] = {}

    def progress(stage, done, total):
        seen[stage] = seen.get(stage, 0.0) + done
        assert total == sum((corpus / f"{split}.jsonl").stat().st_size for split in ("train", "validation"))

    prepare([str(corpus)], tmp_path / "out", "train:500", progress=progress)
    assert len(seen) == 2
    assert len(set(seen.values())) == 1


def test_bad_input_leaves_nothing(corpus, model, tmp_path):
    out = tmp_path / "out"
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": ""}\n')
    one = tmp_path / "one.txt"
    one.write_text("only one document")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\nbad\n')
    cases = [
        (["/no/such/file"], {}, "does not exist"),
        ([blank], {}, "none of the 0 documents falls into the train split"),
        ([one], {}, "none of the 1 documents falls into the validation split"),
        ([bad], {"workers": 2}, "bad.jsonl:2 is not JSON"),
        ([corpus], {"validation_fraction": 0.1}, "has its own split"),
        ([one], {"validation_fraction": 1.5}, "must lie between 0 and 1"),
        ([one], {"validation_fraction": 0.1, "validation": str(one)}, "cannot be combined"),
        ([corpus], {"tokenizer": "train:many"}, "such as train:8192"),
        ([corpus], {"tokenizer": "gpt2"}, "unknown kind"),
        ([corpus], {"eod": "<none>"}, "no token '<none>'"),
    ]
    before = sorted(tmp_path.iterdir())
    for inputs, options, message in cases:
        choice = options.pop("tokenizer", str(model))
        with pytest.raises(UserError, match=message) as error:
            prepare([str(path) for path in inputs], out, choice, **options)
        assert "\n" not in str(error.value)
        assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_overwritten(corpus, model, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="exists already"):
        prepare([str(corpus)], tmp_path / "file", str(model))
    with pytest.raises(UserError, match="cannot be written"):
        prepare([str(corpus)], tmp_path / "file" / "below", str(model))
    assert (tmp_path / "file").read_text() == "kept"


def test_killed_in_the_middle(corpus, model, tmp_path):
    big = tmp_path / "big.jsonl"
    big.write_bytes((corpus / "train.jsonl").read_bytes() * 60)
    command = [sys.executable, "-m", "mlm_train", "data", "prepare", "--input", str(big)]
    command += ["--output", str(tmp_path / "out"), "--tokenizer", str(model), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in tmp_path.glob("out.partial-*/train.bin")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        workers = psutil.Process(process.pid).children(recursive=True)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert workers and not psutil.wait_procs(workers, timeout=10)[1]  # none waits for ever
    assert not (tmp_path / "out").exists()
    (partial,) = tmp_path.glob("out.partial-*")
    with pytest.raises(UserError, match=r"manifest.json is missing"):
        PreparedData.open(partial)
    prepare([str(corpus)], tmp_path / "out", str(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.jsonl", "out"]
