"""The Ray build: right rows, equal bytes, and nothing lost when a process is killed."""

import contextlib
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from mlm_train.errors import UserError
from mlm_train.files import locked
from mlm_train.model.logical import named_pieces
from mlm_train.model.transformer import Transformer
from mlm_train.tol.build import Build, build_tol
from mlm_train.tol.cluster import _check_reachable
from mlm_train.tol.codec import TORCH_DTYPE
from mlm_train.tol.format import INDEX, STATE, read_index
from mlm_train.tol.place import Folder
from mlm_train.tol.state import State, Storage
from tests.commands import listening
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


def test_a_ray_of_our_own_listens_on_loopback_alone(ray: None) -> None:
    assert listening(psutil.Process()) == {"127.0.0.1"}


def test_killed_builder_resumes_to_the_same_bytes(
    tables: dict[str, Path], exported: Path, tmp_path: Path
) -> None:
    arguments = (exported, tmp_path / "unbroken", "float32", 6, 2, None, 1)
    build_tol(*arguments)
    broken = tmp_path / "broken"
    code = (
        "from mlm_train.tol.build import build_tol\n"
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


def test_unfinished_builds(tables: dict[str, Path], exported: Path, tmp_path: Path) -> None:
    """A damaged committed partition is built again; another plan, or another model, is refused."""
    output = tmp_path / "tol"
    index = build_tol(exported, output, "bfloat16", 3)
    before = digests(output)
    (output / INDEX).unlink()
    state = State(plan=Build(exported, output, Storage(), partitions=3).plan)
    state.done = dict(enumerate(index.partitions))
    state.sums = {number: [(0.0, 0.0)] * 3 for number in state.done}
    state.save(Folder(output))
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
    with pytest.raises(UserError, match="nothing is overwritten"):
        build_tol(exported, output, partitions=3)


def test_unreachable_cluster() -> None:
    with pytest.raises(UserError, match=r"--ray-address 127\.0\.0\.1:1: no Ray there"):
        _check_reachable("127.0.0.1:1")


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
        (tmp_path / "none", {}, "is no folder; give an export"),
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
    # Nothing was committed, so another type may take the folder of the last case.
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
