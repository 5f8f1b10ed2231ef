"""An export with random weights, one Ray for all tests of this folder, a cluster, and a store of objects."""

import contextlib
import os
import re
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
from tests.tol.built import build_tol

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


@pytest.fixture(scope="session")
def s3_socket() -> Iterator[socket.socket]:
    """Where the S3 of test_url.py will listen; known before Ray starts, whose workers are told so too."""
    with socket.socket() as waiting, pytest.MonkeyPatch.context() as environment:
        waiting.bind(("127.0.0.1", 0))
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{waiting.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("NO_PROXY", "127.0.0.1")
        yield waiting


@pytest.fixture(scope="package")  # an idle Ray takes 4% of a core
def ray(s3_socket: socket.socket) -> Iterator[None]:
    with ray_cluster(workers=2):
        yield


def random_model(**fields: object) -> Transformer:
    """A flex model whose weights are all random, norms included."""
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
    """A ToL of each type; 7 partitions divide neither 601 rows nor their 13 chunks."""
    root = tmp_path_factory.mktemp("tables")
    for dtype in ("bfloat16", "float16", "float32"):
        build_tol(exported, root / dtype, dtype, partitions=7, chunk_rows=50)
    return {dtype: root / dtype for dtype in ("bfloat16", "float16", "float32")}


def end(processes: list[psutil.Process]) -> None:
    """Of a builder that is gone, which Ray's own take half a minute to notice, and their folders."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for scratch in re.findall(r"/tmp/mlm-ray-\w+", str(process.cmdline())):
                shutil.rmtree(scratch, ignore_errors=True)
            process.kill()


@pytest.fixture
def cluster() -> Iterator["subprocess.Popen[str]"]:
    """A Ray cluster of two nodes on this machine, a CPU each; its second node goes when it reads a line.

    In a process of its own, since this one may use another Ray. Its first line is its address.
    """
    scratch = tempfile.mkdtemp(prefix="mlm-ray-", dir="/tmp")  # Ray's sockets want short paths
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
        end(left)
        shutil.rmtree(scratch, ignore_errors=True)
