"""`tol build --each-node` on two nodes that have folders of their own: built on one, whole on both."""

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
from tests.tol.conftest import end
from tests.tol.test_faults import flip, same

STORAGE = TableSpec(dtype="int8", group_size=8, rank=16)
WORDS = ("--dtype", "int8", "--group-size", "8", "--rank", "16", "--partitions", "6", "--compute", "float32")
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

    After the Ray of this process, whose token it takes.
    """
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    scratch = tempfile.mkdtemp(prefix="mlm-ray-", dir="/tmp")  # Ray's sockets want short paths
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
        end(left)
        shutil.rmtree(scratch, ignore_errors=True)


def build(
    model: Path, output: str, address: str, scratch: Path, *more: str
) -> "subprocess.CompletedProcess[str]":
    """The command, on the first node."""
    words = ["tol", "build", str(model), "--output", output, "--each-node", "--ray-address", address]
    words += more or WORDS  # what repairs is told nothing of how the table is stored
    return subprocess.run(
        [sys.executable, "-m", "mlm_train", *words],
        cwd=ROOT, env=os.environ | {"SCRATCH": str(scratch)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_two_nodes(exported: Path, tmp_path: Path, nodes: tuple[str, Path, Path]) -> None:
    address, first, second = nodes
    built = build(exported, "$SCRATCH/tol", address, first)
    assert built.returncode == 0, built.stderr
    assert built.stdout.startswith(f"{first}/tol: 601 rows") and "copied to 1 other node" in built.stdout
    Build(exported, tmp_path / "one", STORAGE, partitions=6, compute="float32").run(1)
    assert same(first / "tol", tmp_path / "one")
    assert same(second / "tol", first / "tol")

    # The same command again copies what is missing or damaged, and makes nothing anew.
    before = {path.name: path.stat().st_mtime_ns for path in (first / "tol").iterdir()}
    kept, damaged, lost = sorted((second / "tol").glob("rows-*"))[:3]
    inode = kept.stat().st_ino
    flip(damaged)
    lost.unlink()
    again = build(exported, "$SCRATCH/tol", address, first)
    assert again.returncode == 0, again.stderr
    assert same(second / "tol", first / "tol") and kept.stat().st_ino == inode
    assert before == {path.name: path.stat().st_mtime_ns for path in (first / "tol").iterdir()}

    # The builder's own copy is damaged: mended, and the other node's is as it was.
    flip(first / "tol" / kept.name)
    mended = build(exported, "$SCRATCH/tol", address, first, "--repair")
    assert mended.returncode == 0 and "1 partition was damaged; it is whole" in mended.stdout, mended.stderr
    assert same(second / "tol", first / "tol") and same(first / "tol", tmp_path / "one")
    assert kept.stat().st_ino == inode

    # Another node's folder has something else: that node is named, and nothing is overwritten.
    shutil.rmtree(second / "tol")
    (second / "tol").mkdir()
    (second / "tol" / "mine").touch()
    failed = build(exported, "$SCRATCH/tol", address, first)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1, repr(failed.stderr)
    line = rf"mlm-train: node second: {second}/tol exists already and nothing is overwritten; .*kept\n"
    assert re.fullmatch(line, failed.stderr), failed.stderr
    assert [path.name for path in (second / "tol").iterdir()] == ["mine"]


def test_bad_input(exported: Path, tmp_path: Path) -> None:
    words = ("tol", "build", exported, "--each-node", "--ray-address", "auto", "--output")
    assert "is not set on this node" in refused(*words, "$MLM_NOT_SET/tol")
    assert "is a URL" in refused(*words, "s3://bucket/tol")
    Build(exported, tmp_path / "tol", STORAGE, partitions=6).run(1)
    assert "holds another table" in refused(*words, tmp_path / "tol")


def test_one_node(exported: Path, tmp_path: Path, ray: None) -> None:
    """Without others there is nothing to copy; what a worker says of its draft reaches the builder."""
    storage = NodeFolder(tmp_path / "tol")
    Build(exported, storage, STORAGE, partitions=6).run(1)
    Build(exported, tmp_path / "seen", STORAGE, partitions=6).run(1)
    assert copy_to_nodes(storage, None) == 0 and same(tmp_path / "tol", tmp_path / "seen")
    with pytest.raises(UserError, match="exists already"):
        Build(exported, NodeFolder(tmp_path / "tol"), STORAGE, partitions=6).run(1)
