"""An export with random weights, one Ray for all tests of this folder, a cluster."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from mlm_train.checkpoint.hf.folder import write_folder
from mlm_train.config import ModelConfig
from mlm_train.model.logical import named_pieces
from mlm_train.model.transformer import Transformer
from mlm_train.tol.build.ray_cluster import ray_cluster
from mlm_train.tol.storage import lease
from tests.objects import Objects
from tests.tol.built import build_tol
from tests.tol.processes import kill_leftovers
from tests.tol.stores import build

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "object_store_memory": 128 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args=node)
second = cluster.add_node(**node)
print(cluster.address, flush=True)
for _ in sys.stdin:
    cluster.remove_node(second)
    print("removed", flush=True)
cluster.shutdown()
"""


@pytest.fixture(scope="package")  # an idle Ray takes 4% of a core
def ray(s3_socket: socket.socket) -> Iterator[None]:
    with ray_cluster(workers=2):
        yield


@pytest.fixture(params=["s3", "file"])
def url(request: pytest.FixtureRequest, objects: Objects, tmp_path: Path) -> str:
    """A new folder at a URL."""
    return f"s3://bucket/{tmp_path.name}" if request.param == "s3" else f"file://{tmp_path}/store/tol"


@pytest.fixture
def short_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the wait for a lease in this process, where no two builders start at once."""
    monkeypatch.setattr(lease, "SETTLE", 0.05)


@pytest.fixture(scope="session")
def url_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("url") / "model", random_model(vocab_size=2003))


@pytest.fixture(scope="package")
def url_reference(url_model: Path, ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table that every low-rank build of `url_model` must equal: in a folder, by groups of layers."""
    folder = tmp_path_factory.mktemp("reference") / "tol"
    build(url_model, folder, group_bytes=1).run()
    return folder


def random_model(**fields: object) -> Transformer:
    """A flex model with all weights random, including norms."""
    torch.manual_seed(3)
    shapes = {"vocab_size": 601, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    given = {"kind": "memory", "intermediate_size": 44, "num_key_value_heads": 2, **shapes, **fields}
    model = Transformer(ModelConfig.model_validate(given)).requires_grad_(False).eval()
    for name, weight in named_pieces(model):
        weight.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2)
    return model


def export(folder: Path, model: Transformer) -> Path:
    write_folder(folder, model.config, named_pieces(model))
    return folder


@pytest.fixture(scope="session")
def model() -> Transformer:
    return random_model()


@pytest.fixture(scope="session")
def exported(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("exports") / "model", model)


@pytest.fixture(scope="package")
def tables(exported: Path, ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A ToL of each plain type; 7 partitions divide neither 601 rows nor their 13 chunks."""
    root = tmp_path_factory.mktemp("tables")
    for dtype in ("bfloat16", "float16", "float32"):
        build_tol(exported, root / dtype, dtype, partitions=7, chunk_rows=50)
    return {dtype: root / dtype for dtype in ("bfloat16", "float16", "float32")}


@pytest.fixture
def cluster() -> Iterator["subprocess.Popen[str]"]:
    """A Ray cluster of two nodes on this machine, one CPU each; it removes the second when it reads a line.

    In its own process, since this one may use another Ray. Its first line is its address.
    """
    scratch = tempfile.mkdtemp(prefix="mlm-ray-", dir="/tmp")  # Ray's sockets need short paths
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=os.environ | {"RAY_TMPDIR": scratch, "RAY_USAGE_STATS_ENABLED": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        left = psutil.Process(process.pid).children(recursive=True)
        process.communicate(timeout=60)
        kill_leftovers(left)
        shutil.rmtree(scratch, ignore_errors=True)
