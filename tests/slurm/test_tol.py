"""A ToL built on Ray across the nodes of a Slurm job."""

import json
import time
from pathlib import Path

from mlm_train.tol.format.index import STATE
from tests.commands import ROOT
from tests.slurm.conftest import Cluster
from tests.tol.conftest import export, random_model
from tests.tol.test_build import digests

SCRIPT = ROOT / "slurm/tol_build.sbatch"


def test_across_nodes_as_on_one_and_with_a_node_lost(cluster: Cluster, tmp_path: Path) -> None:
    from tests.tol.built import build_tol

    large = random_model(vocab_size=60000, num_hidden_layers=6, hidden_size=64, intermediate_size=256)
    model = export(tmp_path / "model", large)
    build_tol(model, tmp_path / "local", partitions=40, workers=2)
    options = ("--partitions", 40)
    whole = (SCRIPT, model, "--output", tmp_path / "whole", *options)
    job = cluster.submit(tmp_path / "whole.log", "--nodes=2", *whole, MLM_RAY_CPUS="1")
    assert job.end() == "COMPLETED", job.text()
    assert digests(tmp_path / "whole") == digests(tmp_path / "local")

    broken = tmp_path / "broken, --each-node too"
    again = (SCRIPT, model, "--output", broken, *options)
    job = cluster.submit(tmp_path / "broken.log", "--nodes=2", *again, MLM_RAY_CPUS="1")
    while not (broken / STATE).is_file() or not json.loads((broken / STATE).read_text())["done"]:
        assert job.field("JobState") in ("PENDING", "RUNNING"), job.text()
        time.sleep(0.05)
    nodes = cluster.do("scontrol", "show", "hostnames", job.field("NodeList")).split()
    node = next(name for name in nodes if name != job.field("BatchHost"))
    cluster.lose(node)
    assert job.end() == "COMPLETED", job.text()
    assert digests(broken) == digests(tmp_path / "local")
    cluster.restore(node)
