"""Modules without storage, in a separate process, since imported modules stay imported."""

import subprocess
import sys

SCRIPT = """
import sys
from mlm_train.config import ModelConfig
from mlm_train.model.transformer import Transformer
from mlm_train.model.unfilled import unfilled

config = ModelConfig(kind="flex", vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                     num_attention_heads=2, flex_beta=1)
with unfilled():
    model = Transformer(config)
assert {weight.device.type for weight in model.parameters()} == {"meta"}
whole = Transformer(config)
assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
assert all(weight.device.type == "cpu" for weight in whole.parameters())
assert "torch._dynamo" not in sys.modules, "it takes over a second"
"""


def test_shapes_alone_need_no_compiler() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
