"""The most memory that the paper's 1B shape takes, one layer of it: 128,256 tokens and 5,464 keys."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlm_train.checkpoint.hf.folder import expected_shapes, write_folder
from mlm_train.config import ModelConfig
from tests.commands import ROOT

MEASURED = """
import json, sys
import pyarrow.parquet, sklearn.cluster, sklearn.decomposition, sklearn.manifold, sklearn.metrics
from mlm_train.analyze.keys.analysis import analyse_keys
from mlm_train.analyze.keys.folder import Settings
from mlm_train.bench.memory_in_use import HostMemory
memory = HostMemory()
before = memory.now()
memory.reset_peak()
settings = Settings(top_k=32, clusters=64, map_tokens=int(sys.argv[3]), seed=0)
(found,) = analyse_keys(sys.argv[1], sys.argv[2], settings)
print(json.dumps({"imports": before, "beyond": memory.peak() - before, "seconds": found.seconds}))
"""


@pytest.mark.long
def test_a_layer_of_the_1b_shape_stays_below_2_gb(tmp_path: Path) -> None:
    """In fp32, the largest that an export is, with the largest map: about ten minutes on two cores."""
    config = ModelConfig.model_validate(
        {"kind": "memory", "vocab_size": 128_256, "hidden_size": 2048, "num_hidden_layers": 1,
         "num_attention_heads": 32, "intermediate_size": 5464}
    )  # fmt: skip
    weights = (
        (name, torch.randn(shape) * 0.02 if len(shape) > 1 else torch.ones(shape))
        for name, shape in expected_shapes(config).items()
    )
    write_folder(tmp_path / "model", config, weights, shard_bytes=2**29)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path / "model", tmp_path / "keys", "20000"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["beyond"] < 2e9, found
