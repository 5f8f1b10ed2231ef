"""The DeepSpeed engine: ZeRO with AdamW.

DeepSpeed sees one micro-batch per step: we accumulate and scale the loss ourselves (fp32 gradients, one
global label count); it reduces, clips and steps.
"""

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mlm_train.config import Config
from mlm_train.model.logical import Target
from mlm_train.parallel.engine.base import Engine, parameter_groups
from mlm_train.parallel.engine.flat import Flat, cut_anywhere, cut_evenly
from mlm_train.parallel.engine.optimizer_state import scatter_weights
from mlm_train.parallel.mesh.groups import deepspeed_mpu
from mlm_train.parallel.runtime import Runtime
from mlm_train.utils.library_noise import silenced

BUCKET = 50_000_000  # elements that are prefetched or reduced at once


def _load_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed with our device as its accelerator, without the op that it compiles for gloo."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("LOCAL_RANK", "0")  # required by DeepSpeed, also without torchrun
    with silenced():
        import deepspeed

    if device.type == "cpu":
        # Otherwise initialize compiles a shared-memory op, which takes minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def _zero_section(stage: int, model: nn.Module) -> dict[str, Any]:
    """DeepSpeed's config section for a ZeRO stage."""
    section = {"stage": stage, "contiguous_gradients": False, "overlap_comm": False}
    if stage >= 1:
        # Gradients wait in a bucket until they are reduced: the default size holds those of a small model.
        section["reduce_bucket_size"] = BUCKET
    if stage == 3:
        sizes = [(parameter.dim(), parameter.numel()) for parameter in model.parameters()]
        section |= {
            # Norms are not sharded: gathering them costs more than it saves.
            "stage3_param_persistence_threshold": max((n for dim, n in sizes if dim == 1), default=0),
            # Free a gathered weight after its use: the default keeps up to 1e9 parameters.
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": BUCKET,
            # It would replace torch.nn.functional.linear for the whole process.
            "memory_efficient_linear": False,
        }
    return section


class DeepSpeedEngine(Engine):
    """AdamW under DeepSpeed's ZeRO, stages 0 to 3 (config field parallel.zero_stage).

    With stage 3 the model's parameters hold this rank's shard only, flattened.
    """

    def __init__(
        self, model: nn.Module, config: Config, runtime: Runtime, roots: Sequence[nn.Module]
    ) -> None:
        super().__init__(model, config, runtime, roots)
        deepspeed = _load_deepspeed(runtime.device)
        self.stage = config.parallel.zero
        self.reduces_each_pass = config.reduces_each_pass
        self.mpu = deepspeed_mpu(runtime.groups, runtime.topology)
        self.single = runtime.topology.data == 1
        options = config.optimizer
        # Stage 3 shards the weights here: until then each rank holds its whole shard of the model.
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
        """The AdamW that DeepSpeed wraps."""
        adamw: torch.optim.Optimizer = self.zero.basic_optimizer
        return adamw

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Accumulate gradients of the passes inside; at the end, average their sum over data parallel.

        Stages 2 and 3 reduce gradients in each pass, so that no rank ever holds all of them; the others, and
        stage 2 with a pipeline or tables (Config.reduces_each_pass), reduce them at the end.
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
                self.zero.zero_grad()  # so that leaving reduces nothing: the other ranks may not take part
                raise
        # A single rank has nothing to reduce; DeepSpeed would copy all gradients into buckets and back.
        if self.stage == 1 or (self.stage == 0 and not self.single):
            self.zero.set_gradient_accumulation_boundary(True)
            self.zero.allreduce_gradients()

    def step(self, lr: float) -> float:
        """Clip, update; return the gradient norm before clipping.

        The norm is infinite, on every rank, where it was non-finite and nothing was updated.
        """
        for group in self.zero.optimizer.param_groups:
            group["lr"] = lr
        norm = None if self.stage else self._clip()
        if norm is not None and not math.isfinite(norm):  # the other stages check it themselves
            self.zero.zero_grad()
            return math.inf
        self.zero.set_gradient_accumulation_boundary(True)
        self.zero.step()
        if norm is None:
            # Stage 3 returns an older norm where it skips the update.
            norm = float(self.zero.get_global_grad_norm()) if self.zero.was_step_applied() else math.inf
        return norm

    def _clip(self) -> float:
        """Clip gradients in stage 0 by DeepSpeed's function; its engine does not return their norm."""
        from deepspeed.runtime.utils import clip_grad_norm_

        return float(clip_grad_norm_(self.model.parameters(), self.clip or math.inf, mpu=self.mpu))

    def fill(self, fill: Callable[[Iterable[Target]], None]) -> None:
        """Have `fill` write the weights of this rank: into tensors in host memory, then into ZeRO's."""
        with torch.no_grad():
            whole = {name: torch.zeros(shape) for name, shape in self.shapes.items()}
            fill(Target(piece, whole[piece.parameter]) for piece in self.pieces)
        scatter_weights(self, whole)

    def flats(self) -> Iterator[Flat]:
        """Yield ZeRO's partitions; in stage 0, which has none, one flat tensor per parameter."""
        if self.stage == 0:
            yield from super().flats()
            return
        zero, names = self.zero.optimizer, self.zero.param_names
        if self.stage < 3:
            for i, partition in enumerate(zero.single_partition_of_fp32_groups):
                parameters, starts = zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i]
                size, rank = partition.numel(), dist.get_rank(zero.real_dp_process_group[i])
                members = {
                    names[parameter]: cut_anywhere(start, parameter.numel(), size, rank)
                    for parameter, start in zip(parameters, starts, strict=True)
                }
                yield Flat(partition, partition, members)
            return
        rank = dist.get_rank(zero.dp_process_group)
        for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
            members = {}
            for parameter in zero.fp16_groups[i]:
                _, position, size = zero.grad_position[zero.get_param_id(parameter)]
                members[names[parameter]] = cut_evenly(position, parameter.ds_numel, size, rank)
            yield Flat(flat, flat, members)

    def refresh_model(self) -> None:
        """Update the model's weights from ZeRO's partitions, as at the end of a step."""
        zero = self.zero.optimizer
        if self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3:
            zero._partition_all_parameters()
            for i in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(i)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
