"""The Ray build: correct rows, equal bytes, and nothing lost when a process is killed."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from mlm_train.errors import UserError, first_line
from mlm_train.model.logical import named_pieces
from mlm_train.model.transformer import Transformer
from mlm_train.tol.build.builder import Build
from mlm_train.tol.build.ray_cluster import _check_reachable, _remove_abandoned, _scratch
from mlm_train.tol.build.state import BuildState
from mlm_train.tol.format.codec import TORCH_DTYPE
from mlm_train.tol.format.index import INDEX, STATE
from mlm_train.tol.format.index_file import read_index
from mlm_train.tol.format.layout import TableSpec
from mlm_train.tol.storage.local import LocalFolder
from mlm_train.utils.files import locked
from tests.commands import ROOT, listening, mlm_train, refused
from tests.tol.built import build_tol
from tests.tol.conftest import export, random_model


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_are_ffn_m(tables: dict[str, Path], model: Transformer, dtype: str) -> None:
    folder = tables[dtype]
    index = read_index(folder)
    assert not (folder / STATE).exists() and not list(folder.glob(".*"))
    tree = json.loads((folder / INDEX).read_text())
    assert (tree["format"], tree["version"], tree["dtype"], tree["layers"]) == (
        "mlm-tol",
        1,
        dtype,
        [0, 1, 2],
    )
    assert tree["rank"] is None and tree["group_size"] is None
    parts = []
    for partition in index.partitions:
        file = folder / partition.file
        data = file.read_bytes()
        assert (8 + int.from_bytes(data[:8], "little")) % 4096 == 0
        assert len(data) == partition.bytes and hashlib.sha256(data).hexdigest() == partition.sha256
        parts.append(load_file(file)["rows"])
    table = torch.cat(parts)
    x0 = model.embed_tokens.weight
    true = torch.stack([block.ffn_m(x0) for block in model.memory_blocks().values()], dim=1)
    assert true.abs().mean() > 0.1
    assert table.dtype == TORCH_DTYPE[dtype] and table.shape == (601, 3, 32)
    info = torch.finfo(TORCH_DTYPE[dtype])
    error = (table.float() - true).abs()
    assert (error <= info.eps / 2 * true.abs() + 2e-6 * true.abs().amax() + 1e-7).all()


def test_a_local_ray_listens_on_loopback_only(ray: None) -> None:
    assert listening(psutil.Process()) == {"127.0.0.1"}


def test_killed_builder_resumes_to_the_same_bytes(
    tables: dict[str, Path], exported: Path, tmp_path: Path
) -> None:
    arguments = (exported, tmp_path / "unbroken", "float32", 6, 2, None, 1)
    build_tol(*arguments)
    broken = tmp_path / "broken"
    code = (
        "from tests.tol.built import build_tol\n"
        f"build_tol({str(exported)!r}, {str(broken)!r}, 'float32', 6, 2, None, 1)"
    )
    builder = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    done: dict[str, object] = {}
    while builder.poll() is None and not done:
        if (broken / STATE).exists():
            done = json.loads((broken / STATE).read_text())["done"]
        time.sleep(0.005)
    children = psutil.Process(builder.pid).children(recursive=True)
    scratch = set(re.findall(r"/tmp/mlm-ray-\w+", str([child.cmdline() for child in children])))
    builder.kill()
    assert builder.wait() == -signal.SIGKILL, "the build ended before it could be killed"
    assert not (broken / INDEX).exists() and 1 <= len(done) < 6
    committed = digests(broken)
    build_tol(*arguments[:1], broken, *arguments[2:])
    assert committed.items() <= digests(broken).items()
    assert digests(broken) == digests(tmp_path / "unbroken")
    assert not list(broken.glob(".*"))
    for child in children:  # Ray's agents take half a minute to notice that the builder is gone
        with contextlib.suppress(psutil.Error):
            child.kill()
    for folder in scratch:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.long
def test_a_ray_that_cannot_start() -> None:
    """Here since it may open too few files; a busy machine gives the same line."""
    code = (
        "import resource\nimport ray\nfrom mlm_train.tol.build.ray_cluster import ray_cluster\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))\n"
        "with ray_cluster(1):\n    pass"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "UserError: Ray did not start on this machine: " in last, done.stderr
    assert last.endswith("run the same command again, or name a running Ray by --ray-address")


def test_unfinished_builds(tables: dict[str, Path], exported: Path, tmp_path: Path) -> None:
    """A damaged committed partition is rebuilt; another plan, or another model, is rejected."""
    output = tmp_path / "tol"
    index = build_tol(exported, output, "bfloat16", 3)
    before = digests(output)
    (output / INDEX).unlink()
    state = BuildState(plan=Build(exported, output, TableSpec(), partitions=3).plan)
    state.done = dict(enumerate(index.partitions))
    state.sums = {number: [(0.0, 0.0)] * 3 for number in state.done}
    state.save(LocalFolder(output))
    for options, message in (
        ({"partitions": 4}, "partitions=3"),
        ({"partitions": 3, "dtype": "float16"}, "dtype=bf"),
    ):
        with pytest.raises(UserError, match=message):
            build_tol(exported, output, **options)
    other = export(tmp_path / "other", random_model(intermediate_size=30))
    with pytest.raises(UserError, match="another model"):
        build_tol(other, output, partitions=3)
    damaged = output / index.partitions[1].file
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    build_tol(exported, output, partitions=3)
    assert digests(output) == before
    with pytest.raises(UserError, match="nothing is overwritten; name a new folder"):
        build_tol(exported, output, partitions=3)


@pytest.mark.parametrize(
    ("address", "environment", "message"),
    [
        ("127.0.0.1:1", "", r"--ray-address 127\.0\.0\.1:1: no Ray there"),
        ("auto", "127.0.0.1:1", r"--ray-address auto \(RAY_ADDRESS=127\.0\.0\.1:1\): no Ray there"),
        ("", "", "--ray-address '': give HOST:PORT"),
        ("http://127.0.0.1:1", "", r"--ray-address http://127\.0\.0\.1:1: give HOST:PORT"),
    ],
)
def test_unreachable_cluster(
    address: str, environment: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", environment)
    with pytest.raises(UserError, match=message):
        _check_reachable(address)


def test_messages_of_ray() -> None:
    """One line without colours, complete even if Ray lists remedies on further lines."""
    assert first_line("\x1b[36mray::BuildWorker\x1b[39m died.\nTraceback") == "ray::BuildWorker died"
    assert first_line("It looks like an HTTP address. To fix this, either:\n1. ...") == (
        "It looks like an HTTP address"
    )


def test_no_node_has_what_a_worker_needs(exported: Path, ray: None, tmp_path: Path) -> None:
    """Ray would wait silently. No partition has been started."""
    for options, message in (
        ({"device": "cuda"}, r"needs 1 CPU and 1 GPU, .* \(at most 2 CPUs and 0 GPUs\); .* --device"),
        ({"threads": 3}, r"needs 3 CPUs, .* \(at most 2 CPUs\); give fewer --threads"),
    ):
        with pytest.raises(UserError, match=message):
            Build(exported, tmp_path / "tol", TableSpec(), **options).run(1)
        assert {path.name for path in (tmp_path / "tol").iterdir()} == {STATE}


def test_scratch_of_killed_builds_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not of a live process, without an owner file, or of another user."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom mlm_train.tol.build.ray_cluster import _scratch\n"
        "with _scratch() as folder:\n    Path(folder).mkdir()\n    print(folder, flush=True)\n    input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    held = Path(process.stdout.readline().strip())
    new = Path(tempfile.mkdtemp(prefix="mlm-ray-", dir=held.parents[1]))
    try:
        with _scratch():
            assert held.exists() and new.exists()
        process.kill()
        process.wait()
        with monkeypatch.context() as other:
            other.setattr(os, "getuid", lambda: os.geteuid() + 1)
            _remove_abandoned(held.parent)
            assert held.parent.exists()
        with _scratch():
            assert not held.parent.exists() and new.exists()
    finally:
        new.rmdir()


def test_bad_input(
    tables: dict[str, Path], exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = export(tmp_path / "base", random_model(kind="base"))
    for name in ("model.layers.1.memory_mlp.up_proj.weight", "model.embed_tokens.weight"):
        model = random_model()
        dict(named_pieces(model))[name][5, 2] = float("nan")
        export(tmp_path / name, model)
    large = random_model()
    large.memory_blocks()[2].memory_mlp.down_proj.weight.mul_(1e6)
    export(tmp_path / "large", large)
    cases = (
        (tmp_path / "none", {}, "is not a folder; give an export"),
        (base, {}, "base model"),
        (exported, {"partitions": 602}, "--partitions 602: give 1 to 601"),
        (exported, {"partitions": 0}, "--partitions 0"),
        (exported, {"workers": 0}, "--workers 0"),
        (
            tmp_path / "model.layers.1.memory_mlp.up_proj.weight",
            {},
            r"layers\.1\.memory_mlp\.up_proj\.weight has NaN",
        ),
        (tmp_path / "model.embed_tokens.weight", {}, r"token 5 in layer \d is not finite"),
        (
            tmp_path / "large",
            {"dtype": "float16"},
            "layer 2 is not finite in float16; build with --dtype bfloat16",
        ),
    )
    for number, (model_dir, options, message) in enumerate(cases):
        with pytest.raises(UserError, match=message) as caught:
            build_tol(model_dir, tmp_path / f"out{number}", **options)
        assert "\n" not in str(caught.value)
    # Nothing was committed, so another type may use the folder of the last case.
    index = build_tol(tmp_path / "large", tmp_path / "out7", partitions=3)
    assert {file.name for file in (tmp_path / "out7").iterdir()} == {
        INDEX,
        *(p.file for p in index.partitions),
    }
    with (
        locked(tmp_path / "busy", "being built"),
        pytest.raises(UserError, match="another process"),
    ):
        build_tol(exported, tmp_path / "busy")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").touch()
    with pytest.raises(UserError, match="nothing is overwritten"):
        build_tol(exported, tmp_path / "used")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100))
    with pytest.raises(UserError, match=r"148\.16 kB and has 100 bytes free"):
        build_tol(exported, tmp_path / "full")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threads", 0), "--threads 0: give at least 1"),
        (("--threads", -1), "--threads -1: give at least 1"),
        (("--workers", 0), "--workers 0: give at least 1"),
        (("--device", "foo"), "--device foo: give cpu or cuda"),
        (("--device", "cuda:7"), "--device cuda:7: give cpu or cuda"),
        (("--device", ""), "--device '': give cpu or cuda"),
        (("--budget", "1B"), "a budget of 1 byte is too small for any layer; give at least "),
        (("--output", ""), "the folder's name is empty; name a folder or a URL"),
        (("--output", "/dev/null"), "/dev/null cannot be written: File exists; it is not a folder"),
        (("--output", "FILE/x"), "cannot be written: Not a directory; a part of that path is a file"),
        (("--output", "LINK"), "cannot be written: File exists; it is not a folder"),
        (("--output", "file:///x/y", "--evaluate", "z"), "file:///x/y is a URL; name a folder: --evaluate"),
        (
            ("--output", "file:///x/y", "--each-node", "--ray-address", "x:1"),
            "file:///x/y is a URL; name a folder: --each-node",
        ),
    ],
)
def test_options_that_cannot_work(
    arguments: tuple[object, ...],
    message: str,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rejected before Ray starts, and nothing is written."""
    monkeypatch.setattr("mlm_train.tol.build.builder.ray_cluster", None)
    (tmp_path / "FILE").touch()
    (tmp_path / "LINK").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    assert message in refused("tol", "build", exported, "--output", "tol", *arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"FILE", "LINK"}


def test_the_same_command_again(
    tables: dict[str, Path], exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished build is reported, and the folder of a different build is rejected."""
    output = tmp_path / "tol"
    stored = ("--dtype", "int8", "--group-size", 8, "--partitions", 3)
    for options in (("--budget", "60kB"), ("--rank", 8, "--drop", 1)):
        arguments = ("tol", "build", exported, "--output", output, *stored, *options)
        mlm_train(*arguments)
        before = digests(output)
        capsys.readouterr()
        mlm_train(*arguments)
        assert capsys.readouterr().out.startswith(f"{output} is finished already: 601 rows of ")
        for other in (("--group-size", 16), ("--drop", 0), ("--partitions", 4), ("--budget", "50kB")):
            if "--rank" in options and "--budget" in other:
                continue
            line = refused(*arguments, *other)
            assert line == f"mlm-train: {output} holds another table; name a new folder, or remove it"
        assert digests(output) == before
        lost = output / read_index(output).partitions[1].file
        lost.unlink()
        assert f"{lost}, of a finished table, is missing or damaged: repair" in refused(*arguments)
        mlm_train(*arguments[:5], "--repair")
        assert digests(output) == before
        shutil.rmtree(output)


def test_an_unfinished_build_is_not_resumed_as_a_compression(
    tables: dict[str, Path], exported: Path, tmp_path: Path
) -> None:
    index, plan = (
        read_index(tables["float32"]),
        Build(exported, tmp_path / "x", TableSpec(), partitions=7).plan,
    )
    (output := tmp_path / "tol").mkdir()
    state = BuildState(plan=plan.model_copy(update={"checkpoint": index.source.checkpoint}))
    state.done, state.sums = dict(enumerate(index.partitions)), {n: [(0.0, 0.0)] * 3 for n in range(7)}
    state.save(LocalFolder(output))
    with pytest.raises(UserError, match="is an unfinished build from a model; give a new folder"):
        Build(None, output, TableSpec(), table=tables["float32"], partitions=7).run()
