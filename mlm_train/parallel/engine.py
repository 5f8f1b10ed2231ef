"""The optimizer over data parallel: DeepSpeed ZeRO-1 around AdamW, gradients set by us.

DeepSpeed sees one micro-batch a step: we accumulate and scale the loss ourselves (fp32 gradients,
one global label count), then ask it to reduce, clip and step.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mlm_train.config import OptimizerConfig
from mlm_train.parallel.runtime import Runtime
from mlm_train.quiet import silenced


def _load_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told not to guess: accelerator by our device, no op compiled for gloo on CPU."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("LOCAL_RANK", "0")  # it insists, without torchrun too
    with silenced():
        import deepspeed

    if device.type == "cpu":
        # Otherwise the first initialize compiles a shared-memory op for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def _groups_for_deepspeed(runtime: Runtime) -> SimpleNamespace:
    """The `mpu` object DeepSpeed asks for process groups.

    Its model-parallel group must span tensor and pipeline, or the clipped norm is a stage's own.
    """
    from megatron.core import parallel_state as state

    t = runtime.topology
    axes = {
        "data_parallel": (state.get_data_parallel_group, t.data, t.data_rank),
        "model_parallel": (
            state.get_model_parallel_group,
            t.tensor * t.pipeline,
            t.pipeline_rank * t.tensor + t.tensor_rank,
        ),
        "tensor_model_parallel": (state.get_tensor_model_parallel_group, t.tensor, t.tensor_rank),
        "pipeline_model_parallel": (state.get_pipeline_model_parallel_group, t.pipeline, t.pipeline_rank),
    }
    mpu = SimpleNamespace()
    for axis, (group, size, rank) in axes.items():
        setattr(mpu, f"get_{axis}_group", lambda *_, group=group, **__: group())
        setattr(mpu, f"get_{axis}_world_size", lambda *_, size=size, **__: size)
        setattr(mpu, f"get_{axis}_rank", lambda *_, rank=rank, **__: rank)
    return mpu


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """AdamW groups: no decay on norms, on embedding and head as the config says."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_embedding = name.startswith(("embed_tokens", "lm_head"))
        decays = parameter.dim() > 1 and (config.decay_embeddings or not is_embedding)
        (decay if decays else plain).append(parameter)
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Engine:
    """Gradients in, updated weights out, on every rank alike."""

    def __init__(self, model: nn.Module, config: OptimizerConfig, runtime: Runtime) -> None:
        deepspeed = _load_deepspeed(runtime.device)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps
        )
        self.zero, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            mpu=_groups_for_deepspeed(runtime),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": config.clip,
                "zero_optimization": {"stage": 1, "contiguous_gradients": False, "overlap_comm": False},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
        )
        self.model = model

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Backward passes inside add to the gradients of this rank; nothing is sent."""
        with self.zero.no_sync():
            yield

    def step(self, lr: float) -> float:
        """Average gradients over data parallel, clip globally, update; the norm before clipping."""
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr
        self.zero.set_gradient_accumulation_boundary(True)
        self.zero.allreduce_gradients()
        self.zero.step()
        return float(self.zero.get_global_grad_norm())
