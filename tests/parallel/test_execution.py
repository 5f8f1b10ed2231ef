"""Micro-batches on one process: weights are cast once per step, with unchanged gradients."""

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mlm_train.config.schema import ActivationCheckpointing
from mlm_train.model.initial import initialise
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.build import build_executor, build_model
from mlm_train.parallel.pipeline.single_stage import SingleStageExecutor
from tests.parallel.layouts import MODELS
from tests.parallel.reference import sharpen, tiny_config


@pytest.mark.parametrize(
    ("name", "mode", "recompute"),
    [
        ("base gqa tied", None, "none"),
        ("base", None, "full"),
        ("memory tied alpha", "table", "none"),
        ("memory", "table", "full"),
        ("flex", "unique", "selective"),
        ("flex linear post tied", "per_token", "full"),
    ],
)
def test_weights_are_cast_once_per_step(
    name: str, mode: str | None, recompute: ActivationCheckpointing
) -> None:
    """Two steps with changed weights: gradients equal those of casts per micro-batch to the bit."""
    memory = {"memory": {"mode": mode}} if mode else {}
    train = {"precision": "bf16", "activation_checkpointing": recompute, "z_loss": 0.0}
    config = tiny_config(dict(MODELS[name]), train=train, **memory)
    ids = torch.randint(0, 96, (8, 24))
    batches = list(zip(ids.split(2), ids.roll(-1, 1).split(2), strict=True))
    found, casts = {}, {}
    for kept in (True, False):
        runtime = processes.start(config)
        model = build_model(config, runtime)
        initialise(model, config.model, 3)
        sharpen(model)
        executor = build_executor(model, config, runtime)
        without = patch.object(SingleStageExecutor, "_casts_kept", lambda self: nullcontext())
        with nullcontext() if kept else without, profile(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(2):
                executor.backward(batches, 1 / ids.numel())
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(1.5)
        casts[kept] = sum(event.count for event in seen.key_averages() if event.key == "aten::_to_copy")
        processes.stop()
        found[kept] = {key: parameter.grad for key, parameter in model.named_parameters()}
    for key, gradient in found[False].items():
        torch.testing.assert_close(found[True][key], gradient, rtol=0, atol=0)
    # Two steps, three of four micro-batches, at least attention's two weights in each of three layers.
    assert casts[False] - casts[True] >= 2 * 3 * 2 * 3, casts
