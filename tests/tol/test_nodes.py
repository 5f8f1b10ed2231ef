"""`tol build --each-node` on two nodes with node-local folders: built on one, complete on both."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mlm_train.errors import UserError
from mlm_train.tol.build.builder import Build
from mlm_train.tol.format.layout import TableSpec
from mlm_train.tol.storage.node_folders import NodeFolder
from mlm_train.tol.tools.copy_to_nodes import copy_to_nodes
from tests.commands import ROOT, refused
from tests.tol.processes import kill_leftovers
from tests.tol.test_faults import flip, same

SPEC = TableSpec(dtype="int8", group_size=8, rank=16)
OPTIONS = (
    "--dtype",
    "int8",
    "--group-size",
    "8",
    "--rank",
    "16",
    "--partitions",
    "6",
    "--compute",
    "float32",
)
CLUSTER = """
import os, sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "object_store_memory": 128 * 2**20}
cluster = Cluster()
for folder in sys.argv[1:]:
    cluster.add_node(**node, node_name=os.path.basename(folder), env_vars={"SCRATCH": folder})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def nodes(ray: None, tmp_path: Path) -> Iterator[tuple[str, Path, Path]]:
    """A cluster's address, and the SCRATCH of each of its two nodes; the first is the builder's.

    Started after the Ray of this process, whose token it uses.
    """
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    scratch = tempfile.mkdtemp(prefix="mlm-ray-", dir="/tmp")  # Ray's sockets need short paths
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, *map(str, folders)],
        env=os.environ | {"RAY_TMPDIR": scratch, "RAY_USAGE_STATS_ENABLED": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), folders[0], folders[1]
    finally:
        left = psutil.Process(process.pid).children(recursive=True)
        process.communicate(timeout=60)
        kill_leftovers(left)
        shutil.rmtree(scratch, ignore_errors=True)


def build(
    model: Path, output: str, address: str, scratch: Path, *more: str
) -> "subprocess.CompletedProcess[str]":
    """Run `tol build` on the first node."""
    command = ["tol", "build", str(model), "--output", output, "--each-node", "--ray-address", address]
    command += more or OPTIONS  # --repair takes no options about how the table is stored
    return subprocess.run(
        [sys.executable, "-m", "mlm_train", *command],
        cwd=ROOT, env=os.environ | {"SCRATCH": str(scratch)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_two_nodes(exported: Path, tmp_path: Path, nodes: tuple[str, Path, Path]) -> None:
    address, first, second = nodes
    built = build(exported, "$SCRATCH/tol", address, first)
    assert built.returncode == 0, built.stderr
    assert built.stdout.startswith(f"{first}/tol: 601 rows") and "copied to 1 other node" in built.stdout
    Build(exported, tmp_path / "one", SPEC, partitions=6, compute="float32").run(1)
    assert same(first / "tol", tmp_path / "one")
    assert same(second / "tol", first / "tol")

    # The same command again copies what is missing or damaged, and rebuilds nothing.
    before = {path.name: path.stat().st_mtime_ns for path in (first / "tol").iterdir()}
    kept, damaged, lost = sorted((second / "tol").glob("rows-*"))[:3]
    inode = kept.stat().st_ino
    flip(damaged)
    lost.unlink()
    again = build(exported, "$SCRATCH/tol", address, first)
    assert again.returncode == 0, again.stderr
    assert same(second / "tol", first / "tol") and kept.stat().st_ino == inode
    assert before == {path.name: path.stat().st_mtime_ns for path in (first / "tol").iterdir()}

    # The builder's own copy is damaged: it is repaired, and the other node's is unchanged.
    flip(first / "tol" / kept.name)
    repaired = build(exported, "$SCRATCH/tol", address, first, "--repair")
    assert repaired.returncode == 0, repaired.stderr
    assert "1 partition was damaged; the table is intact now" in repaired.stdout
    assert same(second / "tol", first / "tol") and same(first / "tol", tmp_path / "one")
    assert kept.stat().st_ino == inode

    # Another node's folder has other contents: that node is named, and nothing is overwritten.
    shutil.rmtree(second / "tol")
    (second / "tol").mkdir()
    (second / "tol" / "mine").touch()
    failed = build(exported, "$SCRATCH/tol", address, first)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1, repr(failed.stderr)
    line = rf"mlm-train: node second: {second}/tol exists already and nothing is overwritten; .*kept\n"
    assert re.fullmatch(line, failed.stderr), failed.stderr
    assert [path.name for path in (second / "tol").iterdir()] == ["mine"]


def test_bad_input(exported: Path, tmp_path: Path) -> None:
    arguments = ("tol", "build", exported, "--each-node", "--ray-address", "auto", "--output")
    assert "is not set on this node" in refused(*arguments, "$MLM_NOT_SET/tol")
    assert "is a URL" in refused(*arguments, "s3://bucket/tol")
    Build(exported, tmp_path / "tol", SPEC, partitions=6).run(1)
    assert "holds another table" in refused(*arguments, tmp_path / "tol")


def test_one_node(exported: Path, tmp_path: Path, ray: None) -> None:
    """Without other nodes there is nothing to copy; a worker's writes reach the builder's folder."""
    storage = NodeFolder(tmp_path / "tol")
    Build(exported, storage, SPEC, partitions=6).run(1)
    Build(exported, tmp_path / "seen", SPEC, partitions=6).run(1)
    assert copy_to_nodes(storage, None) == 0 and same(tmp_path / "tol", tmp_path / "seen")
    with pytest.raises(UserError, match="exists already"):
        Build(exported, NodeFolder(tmp_path / "tol"), SPEC, partitions=6).run(1)
