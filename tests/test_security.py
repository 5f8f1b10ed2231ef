"""The guarantees of docs/security.md: no pickle, no path out of a folder, loopback, no credentials, pins."""

import ast
import json
import os
import pickle
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from mlm_train.checkpoint.hf.folder import open_tensors, verify_folder, write_folder
from mlm_train.checkpoint.hf.manifest import MANIFEST
from mlm_train.checkpoint.load import config_of, load_weights, open_checkpoint
from mlm_train.checkpoint.reading.logical_folder import load_model
from mlm_train.data.prepared import PreparedData
from mlm_train.data.tokenizer import tokenizer_of
from mlm_train.errors import UserError
from mlm_train.model.logical import named_pieces, targets
from mlm_train.model.transformer import Transformer
from mlm_train.parallel import runtime
from mlm_train.parallel.health.thread_stacks import flight_record, write_evidence
from mlm_train.tol.format.index import Provenance, TolIndex
from mlm_train.tol.format.index_file import write_index
from mlm_train.tol.format.partition import RowShape
from mlm_train.tol.serve.source import TolSource
from mlm_train.tol.storage.local import LocalFolder
from mlm_train.utils.records import SEAL, seal_of
from tests.commands import ROOT, TINY, listening, mlm_train, refused, start
from tests.partitions import write_partition
from tests.tol.conftest import random_model

SECRET = "tok-5ecretc4nary"
PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Calls that execute or unpickle their argument, by the end of their dotted name.
UNSAFE = re.compile(
    r"(^|\.)(eval|exec|os\.system|os\.popen|yaml\.(load|unsafe_load|full_load)(_all)?|torch\.jit\.load"
    r"|torch\.hub\.\w+|load_pickle|read_pickle|runpy\.\w+)$"
)


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str | None, str], int]]:
    """Dotted name, keywords as text and line of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            yield ast.unparse(node.func), keywords, node.lineno


def objections(source: str) -> list[str]:
    """Calls of a module that could execute a file's contents."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"imports {name}" for name in names if name.split(".")[0] in PICKLERS]
    for name, keywords, line in calls(tree):
        weights = name.endswith("torch.load") and keywords.get("weights_only") != "True"
        model_eval = name.endswith(".eval") and not keywords  # module.eval()
        switches = ("allow_pickle", "trust_remote_code", "shell")
        switched = any(keywords.get(switch, "False") != "False" for switch in switches)
        if weights or switched or (UNSAFE.search(name) and not model_eval):
            found.append(f"line {line}: {name}({keywords})")
    return found


def test_nothing_in_the_code_loads_pickles_or_runs_text() -> None:
    unsafe = (
        "import pickle", "from cloudpickle import loads", "torch.load(f)", "np.load(f, allow_pickle=True)",
        "yaml.load(t)", "eval(t)", "subprocess.run(c, shell=True)", "f(x, trust_remote_code=True)",
    )  # fmt: skip
    assert all(objections(line) for line in unsafe)
    assert not objections("torch.load(f, weights_only=True); yaml.safe_load(t); model.eval()")
    files = [*(ROOT / "mlm_train").rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "setup.py"]
    assert len(files) > 100
    assert {str(file): found for file in files if (found := objections(file.read_text()))} == {}


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, trained with credentials in the environment."""
    run = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN", "PIP_INDEX_URL"):
            patch.setenv(name, f"https://user:{SECRET}@host/")
        words = (
            *TINY,
            f"data.path={data}",
            f"train.output={run}",
            "train.steps=1",
            "schedule.warmup_steps=0",
        )
        mlm_train("pretrain", "configs/micro.yaml", *words)
        write_evidence(run / "failures" / "rank-00000", 0, "a report", flight_record())
    runtime.stop()
    return run


def tol(folder: Path) -> Path:
    """A ToL of zeros that fits random_model()."""
    folder.mkdir()
    chunk = torch.zeros(601, 3, 32)
    partition = write_partition(
        folder / "rows.safetensors", (0, 601), RowShape.plain("float32", 3, 32), [chunk]
    )
    source = Provenance(checkpoint="0" * 64, created="2026-01-01", tool_version="0")
    shape = {"vocab_size": 601, "num_layers": 3, "hidden_size": 32, "dtype": "float32"}
    index = {**shape, "layers": [0, 1, 2], "partitions": [partition], "source": source}
    write_index(LocalFolder(folder), TolIndex.model_validate(index))
    return folder


def sharded_export(folder: Path) -> Path:
    """An export of random_model() in several files, which its index names."""
    model = random_model()
    write_folder(folder, model.config, named_pieces(model), shard_bytes=20_000)
    return folder


def test_no_reader_unpickles(run: Path, data: Path, tmp_path: Path) -> None:
    """Python's audit events report every object that a pickle requests."""
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    model = random_model()
    export, table = sharded_export(tmp_path / "export"), tol(tmp_path / "tol")
    unpickled: list[object] = []
    watching = True

    def watch(event: str, arguments: object) -> None:
        if watching and event == "pickle.find_class":
            unpickled.append(arguments)

    sys.addaudithook(watch)  # hooks stay; this one turns deaf
    pickle.loads(pickle.dumps(Path("seen")))
    assert unpickled
    unpickled.clear()
    manifest = open_checkpoint(checkpoint)
    load_weights(checkpoint, manifest, targets(Transformer(config_of(manifest).model)))
    load_model(export)
    TolSource.open_folder(table, model.config)
    assert len(PreparedData.open(data).split("train").tokens)
    tokenizer_of(data)
    watching = False
    assert unpickled == []


def test_a_pickle_under_the_name_of_weights_is_not_run(run: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    export = tmp_path / "export"
    mlm_train("export", run, "--output", export)
    (export / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="is damaged"):
        open_tensors(export)
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (folder,) = (copy / "checkpoints").glob("step-*")
    for name in (".metadata", "more.safetensors"):  # what torch reads in its own checkpoints; a stray file
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    assert "more.safetensors is not in manifest.json" in refused(
        "export", copy, "--output", tmp_path / "other"
    )
    (folder / "more.safetensors").unlink()
    mlm_train("export", copy, "--output", tmp_path / "other")
    assert not (tmp_path / "exploded").exists()


def renamed(index: Path, old: str, new: str) -> None:
    """Make an index name another file."""
    text = index.read_text()
    assert json.dumps(old) in text
    tree = json.loads(text.replace(json.dumps(old), json.dumps(new)))
    if tree.pop(SEAL, None) is None:
        index.write_text(json.dumps(tree))
    else:  # whoever writes it on purpose can do that too
        index.write_text(json.dumps(tree | {SEAL: seal_of(tree)}))


def test_no_index_leads_out_of_its_folder(run: Path, data: Path, tmp_path: Path) -> None:
    model = random_model()
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    shard = next(checkpoint.glob("*.safetensors")).name
    tables, export = tol(tmp_path / "tables"), sharded_export(tmp_path / "export")
    part = min(export.glob("*.safetensors")).name
    readers: list[tuple[Path, str, str, Callable[[Path], object]]] = [
        (checkpoint, "manifest.json", shard, open_checkpoint),
        (data, "manifest.json", "train.bin", PreparedData.open),
        (data, "manifest.json", "tokenizer.model", PreparedData.open),
        (tables, "tol.index.json", "rows.safetensors", lambda at: TolSource.open_folder(at, model.config)),
        (export, "model.safetensors.index.json", part, load_model),
        (export, MANIFEST, "config.json", lambda at: verify_folder(at, "sizes")),
    ]
    for number, (folder, index, name, read) in enumerate(readers):
        inner = tmp_path / str(number)
        copy, outside = inner / "folder", inner / name
        shutil.copytree(folder, copy)
        read(copy)
        (copy / name).rename(outside)
        for way_out in (f"../{name}", str(outside), "..", ""):
            shutil.copy(folder / index, copy / index)
            renamed(copy / index, name, way_out)
            with pytest.raises(UserError, match=r"not a file of that folder|plain file name"):
                read(copy)
        shutil.copy(folder / index, copy / index)
        (copy / name).symlink_to(outside)
        with pytest.raises(UserError, match="out of its folder: put the file itself there"):
            read(copy)
        (copy / name).unlink()
        outside.rename(copy / f"real-{name}.kept")
        (copy / name).symlink_to(f"real-{name}.kept")  # within the folder a link is fine
        read(copy)


def test_a_model_in_hugging_faces_cache_may_be_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "model" / "blobs", tmp_path / "model" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    sharded_export(blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    load_model(snapshot)


def test_credentials_of_the_environment_are_written_nowhere(run: Path, data: Path) -> None:
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"config.yaml", "train.log", "manifest.json", "rank-00000.txt"} <= {path.name for path in files}
    assert [str(path) for path in files if SECRET.encode() in path.read_bytes()] == []


def test_a_url_with_a_password_is_no_config_value(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ("configs/micro.yaml", *TINY)
    for name, url in (
        ("train.output", f"s3://me:{SECRET}@bucket/run"), ("data.path", f"https://{SECRET}@host/data"),
        ("checkpoint.warm_start", f"hf://u:{SECRET}@host"), ("data.pth", f"https://me:{SECRET}@host"),
    ):  # fmt: skip
        line = refused("pretrain", *tiny, f"{name}={url}")
        assert f"{name} holds a URL with a user name or password" in line and SECRET not in line
    monkeypatch.setenv("HF_TOKEN", SECRET)  # the job gets it, the command does not show it
    storage = (f"data.path={data}", f"train.output={tmp_path / 'run'}")
    mlm_train("launch", "--slurm", *tiny, *storage, "--nproc", 1, "--render")
    assert SECRET not in capsys.readouterr().out


def test_the_installer_shows_no_password_of_an_index(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools import install

    ran: list[tuple[list[str], str]] = []

    def run_pip(command: list[str], env: dict[str, str], **_: object) -> object:
        ran.append((command, env.get("PIP_INDEX_URL", "")))
        raise install.subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(install.subprocess, "run", run_pip)
    monkeypatch.setattr(install.venv, "create", lambda *_, **__: None)
    monkeypatch.setenv("TORCH_INDEX", f"https://me:{SECRET}@host/simple")
    with pytest.raises(install.subprocess.CalledProcessError) as error:
        install.main("requirements.txt")
    ((command, index),) = ran
    assert SECRET in index and SECRET not in str(command) + str(error.value)
    shown = capsys.readouterr().out
    assert "https://host/simple" in shown and SECRET not in shown


def test_tensorboard_listens_on_loopback(run: Path) -> None:
    monitor = start("monitor", run, "--port", 0)
    try:
        end = time.monotonic() + 60
        while not (found := listening(psutil.Process(monitor.pid))):
            assert monitor.poll() is None and time.monotonic() < end
            time.sleep(0.2)
        assert found == {"127.0.0.1"}
    finally:
        monitor.terminate()
        monitor.communicate(timeout=30)


def test_every_dependency_is_pinned() -> None:
    """What `make` installs; the ranges of setup.py are compared with it in tests/test_packaging.py."""
    for file in (
        "requirements.txt",
        "requirements-dev.txt",
        "requirements-wandb.txt",
        "requirements-vllm.txt",
    ):
        lines = [line.strip() for line in (ROOT / file).read_text().splitlines()]
        wanted = [line for line in lines if line and not line.startswith(("#", "-r "))]
        assert wanted and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in wanted), wanted
