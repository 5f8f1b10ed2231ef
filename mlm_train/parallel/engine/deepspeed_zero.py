"""The optimizer over data parallel: DeepSpeed ZeRO around AdamW, gradients scaled by us.

DeepSpeed sees one micro-batch a step: we accumulate and scale the loss ourselves (fp32 gradients,
one global label count), and it reduces, clips and steps.
"""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mlm_train.config import Config
from mlm_train.parallel.engine.base import Engine, parameter_groups
from mlm_train.parallel.engine.flat import Flat, cut_anywhere, cut_evenly
from mlm_train.parallel.mesh.groups import deepspeed_mpu
from mlm_train.parallel.runtime import Runtime
from mlm_train.utils.library_noise import silenced

BUCKET = 50_000_000  # elements gathered ahead, or reduced together


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


def _zero_section(stage: int, model: nn.Module) -> dict[str, Any]:
    """DeepSpeed's settings of a ZeRO stage."""
    section = {"stage": stage, "contiguous_gradients": False, "overlap_comm": False}
    if stage >= 1:
        # Whole gradients wait in a bucket until they are reduced: its default would hold a small model's.
        section["reduce_bucket_size"] = BUCKET
    if stage == 3:
        sizes = [(parameter.dim(), parameter.numel()) for parameter in model.parameters()]
        section |= {
            # Norms stay whole: gathering them costs more than it saves.
            "stage3_param_persistence_threshold": max((n for dim, n in sizes if dim == 1), default=0),
            # A gathered weight goes after its use: the default keeps those of a model up to 1e9 parameters.
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": BUCKET,
            # It would replace torch.nn.functional.linear for the whole process.
            "memory_efficient_linear": False,
        }
    return section


class DeepSpeedEngine(Engine):
    """AdamW under DeepSpeed's ZeRO, stages 0 to 3 (config field parallel.zero_stage).

    Stage 3 leaves nothing but this rank's part in the model's parameters, and their own shape is gone.
    """

    def __init__(self, model: nn.Module, config: Config, runtime: Runtime) -> None:
        super().__init__(model, config, runtime)
        deepspeed = _load_deepspeed(runtime.device)
        self.stage = config.parallel.zero_stage
        self.reduces_each_pass = config.reduces_each_pass
        self.mpu = deepspeed_mpu(runtime.groups, runtime.topology)
        self.alone = runtime.topology.data == 1
        options = config.optimizer
        # Stage 3 cuts the weights here, so each rank holds its whole share of the model once, at the start.
        self.zero, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(
                parameter_groups(model, options),
                lr=options.lr,
                betas=options.betas,
                eps=options.eps,
                fused=True,  # one pass over weights, gradients and moments
            ),
            mpu=self.mpu,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": self.clip if self.stage else 0.0,
                "zero_optimization": _zero_section(self.stage, model),
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
        )
        if self.reduces_each_pass:
            self.entry = self.zero

    @property
    def optimizer(self) -> torch.optim.Optimizer:  # type: ignore[override]
        """The AdamW inside."""
        found: torch.optim.Optimizer = self.zero.basic_optimizer
        return found

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Backward passes inside add up; at the end their sum has been averaged over data parallel.

        Stages 2 and 3 reduce each pass as it comes, so that no rank ever holds all gradients; the others,
        and stage 2 with a pipeline or tables (Config.reduces_each_pass), send nothing until the end.
        """
        if self.reduces_each_pass:
            self.zero.set_gradient_accumulation_boundary(False)
            yield
            self.zero.optimizer.finalize_gradient_accumulation_boundary()
            return
        with self.zero.coalesce_grad_reduction() if self.stage >= 2 else self.zero.no_sync():
            try:
                yield
            except BaseException:
                self.zero.zero_grad()  # nothing to reduce on the way out: the other ranks may never come
                raise
        # Alone, plain gradients are their own sum; DeepSpeed would copy them all into buckets and back.
        if self.stage == 1 or (self.stage == 0 and not self.alone):
            self.zero.set_gradient_accumulation_boundary(True)
            self.zero.allreduce_gradients()

    def step(self, lr: float) -> float:
        """Clip globally, update; the gradient norm before clipping.

        Infinite where nothing was updated, since it was not finite; so it is on every rank then.
        """
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr
        norm = None if self.stage else self._clip()
        if norm is not None and not math.isfinite(norm):  # the other stages look by themselves
            self.zero.zero_grad()
            return math.inf
        self.zero.set_gradient_accumulation_boundary(True)
        self.zero.step()
        if norm is None:
            # Stage 3 keeps an older norm where it refuses the update.
            norm = float(self.zero.get_global_grad_norm()) if self.zero.was_step_applied() else math.inf
        return norm

    def _clip(self) -> float:
        """Stage 0: DeepSpeed's own clipping of plain gradients, whose norm its engine would not tell."""
        from deepspeed.runtime.utils import clip_grad_norm_

        return float(clip_grad_norm_(self.model.parameters(), self.clip or math.inf, mpu=self.mpu))

    def flats(self) -> Iterator[Flat]:
        """ZeRO's partitions of the optimizer; stage 0 has none."""
        if self.stage == 0:
            yield from super().flats()
            return
        zero, names = self.zero.optimizer, self.zero.param_names
        if self.stage < 3:
            for i, slice_ in enumerate(zero.single_partition_of_fp32_groups):
                places = zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True)
                members = {names[p]: cut_anywhere(offset, p.numel(), slice_.numel()) for p, offset in places}
                yield Flat(slice_, slice_, zero.real_dp_process_group[i], members)
            return
        for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
            members = {}
            for parameter in zero.fp16_groups[i]:
                _, place, part = zero.grad_position[zero.get_param_id(parameter)]
                members[names[parameter]] = cut_evenly(place, parameter.ds_numel, part)
            yield Flat(flat, flat, zero.dp_process_group, members)

    def refresh_model(self) -> None:
        """As the end of a step does."""
        zero = self.zero.optimizer
        if self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3:
            zero._partition_all_parameters()
            for i in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(i)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
