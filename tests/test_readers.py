"""Every reader of an untrusted file: one line and exit code 2, without blocking."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlm_train.checkpoint.load import open_checkpoint
from mlm_train.checkpoint.manifest import write_manifest
from mlm_train.parallel import runtime
from mlm_train.tol.allocate.sensitivity import Notes, Sums
from mlm_train.utils.records import SEAL, json_value
from mlm_train.utils.run_lock import Attempt, _path, _record, _recorded
from tests.commands import TINY, mlm_train, outcome, refused
from tests.test_security import sharded_export, tol

Fifo = Callable[[Path], Path]
HOSTILE = (
    b"", b"{", b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000, b"null", b"[]", b'"text"',
    b"\xff\xfe", b"1" * 5000,
    b'{"format": "\\ud800"}', b'{"vocab_size": 9223372036854775808}', b"NaN",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    run = tmp_path_factory.mktemp("runs") / "run"
    mlm_train("pretrain", "configs/micro.yaml", *words(data, run))
    runtime.stop()
    return run


def words(data: Path, run: Path) -> tuple[str, ...]:
    where = (f"data.path={data}", f"train.output={run}")
    return *TINY, *where, "train.steps=1", "schedule.warmup_steps=0"


@pytest.fixture(scope="module")
def export(run: Path) -> Path:
    folder = run.parent / "export"
    mlm_train("export", run, "--output", folder)
    return folder


def edits(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Each position in a JSON value, with wrong values for it."""
    if path:
        for other in (None, -1, 2**63, 10**30, 1.5, True, "text", [], {}, [[[]]], {"a": {}}):
            if type(other) is not type(tree) or other in (2**63, 10**30, -1):
                yield path, other
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(inner)[:40]:
        yield from edits(value, (*path, key))


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    tree = json.loads(json.dumps(tree))
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return tree


def test_a_sealed_manifest_of_the_wrong_shape_is_refused(run: Path, tmp_path: Path) -> None:
    (folder,) = (run / "checkpoints").glob("step-*")
    copy = tmp_path / "run" / "checkpoints" / folder.name
    shutil.copytree(folder, copy)
    tree = json.loads((copy / "manifest.json").read_text())
    del tree[SEAL]
    may_be_none = (("data", "order"), ("validation",), ("progress", "rewarm"))
    cases = [
        changed(tree, path, value)
        for path, value in edits(tree)
        if path[:1] != ("config",) and (value is not None or path not in may_be_none)
        if path != ("validation", "loss") or not isinstance(value, int | float)
    ]
    needed = tree.keys() - {"validation"}
    cases += [{name: value for name, value in tree.items() if name != left_out} for left_out in needed]
    for case in cases:
        write_manifest(copy, case)
        code, said = outcome("checkpoint", "verify", copy)
        assert code == 2 and str(copy) in said, (case, said)
    write_manifest(copy, tree)
    open_checkpoint(copy)


def test_sizes_in_config_json_that_no_model_has(export: Path, tmp_path: Path) -> None:
    copy = tmp_path / "export"
    shutil.copytree(export, copy)
    tree = json.loads((copy / "config.json").read_text())
    for path, value in edits(tree):
        (copy / "config.json").write_text(json.dumps(changed(tree, path, value)))
        if path[0] in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "head_dim",
            "rms_norm_eps",
        ):
            assert str(copy) in refused("generate", "--model", copy, "--prompt-ids", "1"), (path, value)
        else:  # one that has no say is not looked at
            code, said = outcome("generate", "--model", copy, "--prompt-ids", "1", "--max-new-tokens", 1)
            assert code in (0, 2) and "Traceback" not in said, (path, value, said)


def test_json_of_any_kind_is_one_line(run: Path, data: Path, export: Path, tmp_path: Path) -> None:
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    table, sharded = tol(tmp_path / "tol"), sharded_export(tmp_path / "sharded")
    allocation = tmp_path / "allocation.json"
    out = tmp_path / "out"
    commands: list[tuple[Path, str, tuple[object, ...]]] = [
        (checkpoint, "manifest.json", ("checkpoint", "verify")),
        (data, "manifest.json", ("data", "inspect")),
        (export, "config.json", ("generate", "--prompt-ids", "1", "--model")),
        (sharded, "model.safetensors.index.json", ("generate", "--prompt-ids", "1", "--model")),
        (table, "tol.index.json", ("tol", "verify")),
    ]
    for number, (folder, name, command) in enumerate(commands):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        for text in HOSTILE:
            (copy / name).write_bytes(text)
            line = refused(*command, copy)
            assert str(copy) in line and len(line) < 1000, (name, text[:40])
    for text in HOSTILE:
        allocation.write_bytes(text)
        line = refused("tol", "compress", table, "--output", out, "--allocation", allocation)
        assert "allocation.json" in line


def test_a_fifo_in_any_files_place_is_refused_at_once(
    run: Path, data: Path, export: Path, tmp_path: Path, fifo: Fifo
) -> None:
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    table, sharded = tol(tmp_path / "tol"), sharded_export(tmp_path / "sharded")
    tokens = tmp_path / "tokens.safetensors"
    generate = ("generate", "--prompt", "a", "--model")
    folders: list[tuple[Path, tuple[object, ...]]] = [
        (checkpoint, ("checkpoint", "verify")),
        (data, ("data", "inspect", "--verify", "full")),
        (data, ("data", "inspect")),
        (export, generate),
        (sharded, ("tol", "verify", table, "--model")),
        (table, ("tol", "verify")),
        (table, ("generate", "--model", sharded, "--prompt-ids", 1, "--tol")),
    ]
    for number, (folder, command) in enumerate(folders):
        for name in sorted(path.name for path in folder.iterdir()):
            copy = tmp_path / f"{number}-{name}"
            shutil.copytree(folder, copy)
            fifo(copy / name)
            code, said = outcome(*command, copy)
            assert code == 2 and (str(copy) in said or said.startswith(f"damaged: {name}")), (
                folder,
                name,
                said,
            )
    fifo(tokens)
    logits = (
        "evaluate",
        "--model",
        export,
        "--dump-logits",
        tmp_path / "out.safetensors",
        "--tokens",
        tokens,
    )
    assert str(tokens) in refused(*logits)
    for name in ("tokenizer.model", "tokenizer.json"):
        fifo(tmp_path / name)
        prepare = (
            "data",
            "prepare",
            "--input",
            "README.md",
            "--output",
            tmp_path / "prepared",
            "--tokenizer",
        )
        assert name in refused(*prepare, tmp_path / name)


def test_a_runs_own_small_files_may_be_anything(run: Path, data: Path, tmp_path: Path, fifo: Fifo) -> None:
    """These files are written again, or rejected by name where they cannot be."""
    for name in ("heartbeat.json", "checkpoints/latest", "config.yaml", "train.log", "tokenizer.model"):
        for how in ("fifo", "folder", "damaged"):
            copy = tmp_path / f"{Path(name).name}-{how}"
            shutil.copytree(run, copy)
            (copy / name).unlink()
            if how == "fifo":
                fifo(copy / name)
            elif how == "folder":
                (copy / name).mkdir()
            else:
                (copy / name).write_bytes(b"\xff\x00{")
            longer = ("train.steps=2", "schedule.rewarm_steps=0")
            command = ("pretrain", "configs/micro.yaml", *words(data, copy), *longer)
            if how == "damaged" or name in ("heartbeat.json", "checkpoints/latest"):
                mlm_train(*command)
            else:
                code, said = outcome(*command)
                assert code == 0 or (code == 2 and name in said), (name, how, said)
            runtime.stop()


def test_notes_that_are_damaged_are_as_none(tmp_path: Path, fifo: Fifo) -> None:
    folder, notes = tmp_path / "run", Notes(tmp_path / "result.json", ["about"])
    for text in (
        *HOSTILE,
        b'{"job": 1, "restart": 0}',
        b'{"job": "1", "restart": "x"}',
        b'{"about": [], "batches": {}}',
    ):
        _path(folder).write_bytes(text)
        notes.path.write_bytes(text)
        assert _recorded(folder) is None and notes.read() is None
    for path in (_path(folder), notes.path):
        fifo(path)
    assert _recorded(folder) is None and notes.read() is None
    _path(folder).unlink()
    _record(folder, Attempt(job="7", restart=2))
    assert _recorded(folder) == Attempt(job="7", restart=2)
    notes.path.unlink()
    sums = Sums(np.array([[0.5]]), np.array([[0.25]]), 3)
    notes.write(sums)
    assert notes.read() == sums


def test_a_terabyte_of_nothing_is_not_read(data: Path, export: Path, tmp_path: Path) -> None:
    """A sparse file instead of one that is read whole or memory-mapped."""
    notes = Notes(tmp_path / "result.json", ["about"])
    notes.path.touch()
    os.truncate(notes.path, 2**40)
    assert notes.read() is None
    inspect, generate = ("data", "inspect"), ("generate", "--prompt", "a", "--model")
    for folder, name, command in (
        (data, "manifest.json", inspect),
        (data, "tokenizer.model", inspect),
        (export, "config.json", generate),
        (export, "tokenizer.model", generate),
        (export, "model.safetensors", generate),
        (export, "tokenizer.model", ("import", "--output", tmp_path / "imported")),
    ):
        copy = tmp_path / f"{command[0]}-{name}"
        shutil.copytree(folder, copy)
        (copy / "export.manifest.json").unlink(missing_ok=True)  # as of a folder that others wrote
        os.truncate(copy / name, 2**40)
        started = time.monotonic()
        assert str(copy / name) in refused(*command, copy)
        assert time.monotonic() - started < 10


def test_a_newline_in_a_value_makes_no_second_line(data: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a\nb\x1b[31m\u2028c"
    for command in (
        ("checkpoint", "verify", odd),
        ("tol", "verify", odd),
        ("export", odd, "--output", tmp_path / "x"),
        ("data", "inspect", odd),
        ("pretrain", odd),
        ("generate", "--model", odd, "--prompt", "a"),
        ("tol", "verify", tmp_path, f"--{odd}"),
    ):
        line = refused(*command)  # one line
        assert line.isprintable() and repr(odd.name)[1:-1] in line
    output = f"train.output={json.dumps(str(odd))}"  # as YAML spells it
    mlm_train("pretrain", "configs/micro.yaml", *words(data, tmp_path / "run"), output)
    runtime.stop()
    lines = (odd / "train.log").read_text().removesuffix("\n").split("\n")
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S", line) and line.isprintable() for line in lines)
    assert any(repr(odd.name)[1:-1] in line for line in lines)
    assert len((odd / "heartbeat.json").read_text().splitlines()) == 1


def test_json_is_read_strictly() -> None:
    for text in HOSTILE[:4]:
        with pytest.raises(ValueError):
            json_value(text)
    assert json_value('{"a": [1, 2.5, "é", null, true]}') == {"a": [1, 2.5, "é", None, True]}
