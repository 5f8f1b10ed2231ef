"""The trace of a real `generate` from disk: rows arrive while layers are computed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlm_train
from mlm_train.checkpoint.hf.folder import write_folder
from mlm_train.errors import UserError
from mlm_train.model.logical import named_pieces
from mlm_train.tol.format.index_file import read_index
from mlm_train.tol.serve import parts
from mlm_train.tol.serve.store import StoreOptions
from mlm_train.utils.files import is_png
from tests.commands import mlm_train as command
from tests.commands import refused
from tests.inference.test_decode import random_model
from tests.partitions import write_table

LAYERS, HIDDEN, TOKENS = 8, 128, 500
ROW, LAYER = LAYERS * HIDDEN * 4, HIDDEN * 4  # bytes


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An export and its ToL in fp32."""
    folder = tmp_path_factory.mktemp("trace")
    model = random_model(
        kind="memory",
        vocab_size=700,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        max_position_embeddings=600,
    )
    write_folder(folder / "export", model.config, named_pieces(model))
    return folder / "export", write_table(folder / "tol", model, folder / "export", [300])


@pytest.fixture
def trace(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That of a prefill, whose rows of 4 KiB are read in two parts."""
    monkeypatch.setattr(parts, "PART_BYTES", 2048)
    monkeypatch.setattr(parts, "BLOCK", 512)
    ids = ",".join(map(str, range(100, 100 + TOKENS)))
    disk = ("--tol", folders[1], "--tol-tier", "disk", "--tol-direct")
    file = tmp_path / "trace.json"
    command(
        "generate", "--model", folders[0], *disk, "--prompt-ids", ids, "--max-new-tokens", 1, "--trace", file
    )
    return file


def spans(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Spans by name: beginning and end in microseconds, thread, and what is said of them."""
    events = json.loads(file.read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    found: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event["ph"] == "X":
            times = {"start": event["ts"], "end": event["ts"] + event["dur"], "thread": names[event["tid"]]}
            found.setdefault(event["name"], []).append(event["args"] | times)
    return found


def test_reads_are_behind_layers_and_a_layer_waits_for_its_own_bytes(
    trace: Path, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = spans(trace)
    reads, waits = found.pop("tol.read"), found.pop("tol.wait")
    assert found.keys() == {f"layer {layer}" for layer in range(LAYERS)}
    layers = [found[f"layer {layer}"][0] for layer in range(LAYERS)]
    assert {each["thread"] for each in (*waits, *layers)} == {"MainThread"}
    assert {read["thread"] for read in reads} == {"tol-read"}
    headers = [part.bytes - ROW * (part.rows[1] - part.rows[0]) for part in read_index(folders[1]).partitions]
    places = [(read["at"] - headers[read["file"]]) % ROW for read in reads]
    assert len(set(places)) == 2 and sum(read["bytes"] for read in reads) == TOKENS * ROW
    for layer, (wait, whole) in enumerate(zip(waits, layers, strict=True)):
        assert wait["layer"] == layer and whole["start"] <= wait["start"] <= wait["end"] <= whole["end"]
        own = [
            read["end"]
            for read, first in zip(reads, places, strict=True)
            if first < (layer + 1) * LAYER and layer * LAYER < first + read["bytes"]
        ]
        assert len(own) == TOKENS and wait["end"] >= max(own)
    # Independently of how the command computes it: what happens in each microsecond.
    begin = min(each["start"] for each in (*reads, *layers))
    happens = np.zeros((3, int(max(each["end"] for each in (*reads, *layers)) - begin) + 1), dtype=bool)
    for row, some in enumerate((reads, layers, waits)):
        for each in some:
            happens[row, round(each["start"] - begin) : round(each["end"] - begin)] = True
    hidden = (happens[0] & happens[1] & ~happens[2]).sum()
    assert hidden > 0
    capsys.readouterr()
    report, plot = tmp_path / "overlap.json", tmp_path / "overlap.png"
    command("bench", "overlap", trace, "--json", report, "--plot", plot)
    assert is_png(plot)
    ratio = json.loads(report.read_text())["ratios"]["hidden_over_reads"]
    assert ratio == pytest.approx(hidden / happens[0].sum(), abs=0.02)
    assert f"{ratio:.1%} is behind the computation of layers" in capsys.readouterr().out
    assert "has 1 forward passes: --pass 2" in refused("bench", "overlap", trace, "--pass", 2)


def test_in_python(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Of several passes, with computed FFN-M too; only one at a time; afterwards nothing is recorded."""
    file, prompt = tmp_path / "trace.json", [5, 6, 7]
    for tol, expected in ((None, set[str]()), (folders[1], {"tol.wait"})):
        model = mlm_train.load(folders[0], tol, store=StoreOptions("shared"))
        with model.trace(file):
            model.generate(prompt, max_new_tokens=3)
            with pytest.raises(UserError, match="end that one first"), model.trace(file):
                pass
        found = spans(file)
        assert found.keys() - {f"layer {layer}" for layer in range(LAYERS)} == expected
        assert {len(some) for name, some in found.items() if name != "tol.wait"} == {3}
        for layer in model.decoder.model.layers.values():
            assert not layer._forward_hooks and not layer._forward_pre_hooks
    assert "has no reads in --pass 3: " in refused("bench", "overlap", file, "--pass", 3)


def test_what_is_not_a_trace(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for number, text in enumerate(("", "[]", "{}", '{"traceEvents": [{"ph": "X"}]}', '{"traceEvents": 3}')):
        file = tmp_path / f"{number}.json"
        file.write_text(text)
        assert "generate --trace" in refused("bench", "overlap", file)
    words = ("generate", "--model", folders[0], "--prompt-ids", "1", "--trace")
    assert "exists and is not a trace" in refused(*words, file)
    assert "in a folder that exists" in refused(*words, tmp_path / "no" / "trace.json")
