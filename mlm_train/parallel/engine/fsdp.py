"""The FSDP engine: torch's fully_shard (FSDP2), and AdamW on each rank's own rows.

A block is one unit of sharding. What is left of a stage, final norm and head, is another: its root, whose
forward runs first. Not among them are weights that are read outside of any forward: those whose rows other
ranks own, FFN-M of which tables are made before the micro-batches, a tied embedding. Of the latter two each
rank holds copies and updates a part (copies.py). With one data-parallel rank this is a plain AdamW.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mlm_train.config import Config
from mlm_train.model.block import Block
from mlm_train.model.logical import Piece, Target
from mlm_train.parallel.engine.base import Engine, grouped
from mlm_train.parallel.engine.copies import Copies, Copy
from mlm_train.parallel.engine.flat import Flat, Run
from mlm_train.parallel.ffn_m.embedding import RowEmbedding, RowOrder
from mlm_train.parallel.ffn_m.owners import rows_of
from mlm_train.parallel.mesh.sharded import local, owned_parameters
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.parallel.pipeline.stages import my_spans, owners_of
from mlm_train.parallel.runtime import Runtime

EMBEDDING = "embed_tokens.weight"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def whole_parameters(model: nn.Module, config: Config, topology: Topology) -> set[str]:
    """Names of the parameters of which every data-parallel rank holds a whole copy."""
    layers = [layer for span in my_spans(config, topology) for layer in span.layers]
    tabled = layers[: config.memory.tabled(len(layers))] if config.memory is not None else []
    prefixes = ("embed_tokens.", *(f"layers.{layer}.memory_" for layer in tabled))
    names = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
    return names - owned_parameters(model).keys()


class FsdpEngine(Engine):
    """AdamW under FSDP2: weights, gradients and moments are sharded over data parallel, by rows."""

    def __init__(
        self, model: nn.Module, config: Config, runtime: Runtime, roots: Sequence[nn.Module]
    ) -> None:
        super().__init__(model, config, runtime, roots)
        self.topology, self.data_group = runtime.topology, runtime.groups.data
        self.reduces_each, self.reshards = config.parallel.reduce_each_micro_batch, config.parallel.reshards
        _, self.shard_size = config.parallel.sharding(self.topology.data)
        self.shard_rank = self.topology.data_rank % self.shard_size
        self.sharded_roots: list[FSDPModule] = []
        self.replicas = None
        if self.topology.data > 1:
            self._shard(config, runtime, roots)
        # FSDP puts other parameters in their place during a pass.
        self.parameters = dict(model.named_parameters())
        self.sharded = {name for name, p in self.parameters.items() if isinstance(p, DTensor)}
        self.copies = list(self._copies(config, runtime))
        self.rows = {name: rows for copies in self.copies for name, rows in copies.rows.items()}
        self.pieces = [held for piece in self.pieces if (held := self._held(piece)) is not None]
        shards = {
            name: self.rows[name] if name in self.rows else nn.Parameter(local(parameter.detach()))
            for name, parameter in self.parameters.items()
        }
        self.shards = {name: shard for name, shard in shards.items() if shard.numel()}
        self.shapes = {name: shard.shape for name, shard in self.shards.items()}
        embedding = getattr(model, "embed_tokens", None)
        self.order = (
            RowOrder(embedding, runtime.groups.stage) if isinstance(embedding, RowEmbedding) else None
        )
        self.filled: Tensor | None = None  # the embedding's rows as they are stored, before refresh_model
        self.norms: dict[str, Tensor] = {}  # of each gradient of the latest step
        self.loss: Tensor | None = None
        options = config.optimizer
        self.optimizer = torch.optim.AdamW(
            grouped(self.shards.items(), options),
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            fused=True,  # one pass over weights, gradients and moments
        )

    def _shard(self, config: Config, runtime: Runtime, roots: Sequence[nn.Module]) -> None:
        """Wrap blocks and roots; then give the parameters storage, zeros, of this rank's rows alone."""
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if config.train.precision == "bf16":
            reduce_dtype = DTYPES[config.parallel.reduce_dtype or "fp32"]
            policy = replace(policy, param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
        mesh = runtime.groups.data_mesh(runtime.device, self.topology, self.topology.data // self.shard_size)
        self.replicas = mesh.get_group("replicate") if mesh.ndim > 1 else None  # of a shard
        others = whole_parameters(self.model, config, self.topology) | owned_parameters(self.model).keys()
        mine = {parameter for name, parameter in self.model.named_parameters() if name not in others}
        for root in roots:
            ignored = {parameter for parameter in root.parameters() if parameter not in mine}
            for module in (*(m for m in root.modules() if isinstance(m, Block)), root):
                fully_shard(
                    module,
                    mesh=mesh,
                    reshard_after_forward=config.parallel.reshards,
                    mp_policy=policy,
                    ignored_params=ignored,
                )
            root.to_empty(device=runtime.device)
            assert isinstance(root, FSDPModule)
            self.sharded_roots.append(root)
        with torch.no_grad():
            for parameter in self.model.parameters():
                local(parameter).zero_()

    def _copies(self, config: Config, runtime: Runtime) -> Iterator[Copies]:
        """Yield the weights that data-parallel ranks hold whole, and the FFN-M owned here."""
        topology, ranks = self.topology, self.topology.data
        if ranks > 1 and (whole := whole_parameters(self.model, config, topology)):
            copies = {
                name: Copy(p, {r: (r * len(p) // ranks, (r + 1) * len(p) // ranks) for r in range(ranks)})
                for name, p in self.parameters.items()
                if name in whole
            }
            yield Copies(copies, topology.data_rank, ranks, self.data_group, True, torch.float32)
        if (owners := owners_of(config, topology)) is not None:
            copies = {}
            for name, parameter in owned_parameters(self.model).items():
                if name.startswith("layers."):
                    shares = owners.shares(int(name.split(".")[1]))
                    rows = {share.rank: rows_of(share, owners.ranks, len(parameter)) for share in shares}
                    copies[name] = Copy(parameter, rows)
            group, dtype = runtime.groups.stage, DTYPES[config.train.precision]
            yield Copies(copies, topology.stage_rank, owners.ranks, group, owners.divided > 0, dtype)

    def _held(self, piece: Piece) -> Piece | None:
        """What of a piece is in this rank's shard; FSDP shards rows as torch.chunk does."""
        for copies in self.copies:
            if piece.parameter in copies.copies:
                return piece.within(*copies.copies[piece.parameter].rows[copies.rank])
        if piece.parameter not in self.sharded:
            return piece
        rows = self.shapes[piece.parameter][0]
        size = -(-rows // self.shard_size)
        return piece.within(size * self.shard_rank, size * (self.shard_rank + 1))

    def targets(self) -> Iterator[Target]:
        return (Target(piece, self.shards[piece.parameter].detach()) for piece in self.pieces)

    def fill(self, fill: Callable[[Iterable[Target]], None]) -> None:
        """Have `fill` write the weights of this rank; the embedding's rows get in order in refresh_model."""
        if self.order is not None:
            self.filled = torch.zeros_like(self.shards[EMBEDDING]).detach()
        fill(
            Target(piece, self.filled)
            if self.filled is not None and piece.parameter == EMBEDDING
            else Target(piece, self.shards[piece.parameter].detach())
            for piece in self.pieces
        )

    def before_pass(self, last: bool) -> None:
        """Reduce gradients in the backward pass of a step's last micro-batch, or of each."""
        for root in self.sharded_roots:
            root.set_requires_gradient_sync(last or self.reduces_each)
            root.set_is_last_backward(last)
            root.set_reshard_after_backward(last or self.reshards)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Accumulate gradients of the passes inside; at the end, average their sum over data parallel.

        Those of sharded parameters are averaged in the step's last backward pass already.
        """
        yield
        for copies in self.copies:
            copies.reduce(1 / self.topology.data)
        if self.order is not None and (gradient := self.parameters[EMBEDDING].grad) is not None:
            gradient /= self.topology.data

    def step(self, lr: float) -> Tensor:
        """Clip, update, drop the gradients; return the whole model's gradient norm before clipping.

        The norm is infinite, on every rank, where it was non-finite and nothing was updated. Nothing waits
        for the device here: AdamW's kernel reads there by how much to clip and whether to update.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        gradients = {}
        for name, shard in self.shards.items():
            gradient = shard.grad if name in self.rows else self.parameters[name].grad
            gradients[name] = torch.zeros_like(shard) if gradient is None else local(gradient)
            shard.grad = gradients[name]
        norm = self._norm(gradients)
        finite = norm.isfinite()
        # Attributes of torch's gradient scaler, which fused optimizers know.
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.grad_scale = self._divisor(norm, finite)  # type: ignore[attr-defined]
        self.optimizer.step()
        self._publish()
        for parameter in (*self.parameters.values(), *self.shards.values()):
            parameter.grad = None
        return norm.where(finite, math.inf)

    def _divisor(self, norm: Tensor, finite: Tensor) -> Tensor:
        """What gradients are divided by to be clipped, fp32 scalar."""
        if not self.clip:
            return torch.ones_like(norm, dtype=torch.float32)
        return (norm / self.clip).clamp(min=1.0).where(finite, 1.0).float()

    def _norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """The norm of the whole gradient: squares of each number once, summed over all ranks; fp64 scalar."""
        rank = self.topology.data_rank  # a shard is counted by the first of its copies
        self.norms = dict(zip(gradients, torch._foreach_norm(list(gradients.values())), strict=True))
        mine = [
            norm
            for name, norm in self.norms.items()
            if name in self.counted and (name not in self.sharded or rank < self.shard_size)
        ]
        total = torch.zeros((), dtype=torch.float64, device=next(iter(gradients.values())).device)
        if mine:
            total += torch.stack(mine).double().square().sum()
        if self.loss is not None:  # a non-finite loss spoils the step on all ranks
            total += torch.zeros_like(total).where(self.loss.isfinite(), math.nan)
        dist.all_reduce(total)
        return total.sqrt()

    def inspect(self, loss: Tensor) -> None:
        """Note a step's loss, which is looked at with the norm."""
        self.loss = loss

    def nonfinite(self) -> Callable[[], list[str]]:
        """A function that returns which gradients were non-finite; none where others have added to them."""
        norms = {} if self.sharded else self.norms
        return lambda: [name for name, norm in norms.items() if not norm.isfinite()]

    def flats(self) -> Iterator[Flat]:
        """Yield one flat tensor per shard of a parameter."""
        for name, shard in self.shards.items():
            members = {name: Run(0, shard.numel(), 0)}
            order = self.order if name == EMBEDDING else None
            replicas = self.replicas if name in self.sharded else None
            yield Flat(shard.detach().view(-1), shard, members, order, replicas)

    def refresh_model(self) -> None:
        """Drop weights that were gathered before the shards were written to, and update copies."""
        if self.filled is not None and self.order is not None:
            self.shards[EMBEDDING].detach().copy_(self.order.from_checkpoint(self.filled))
            self.filled = None
        self._publish()
        for root in self.sharded_roots:
            for module in root.modules():  # type: ignore[attr-defined]
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _publish(self) -> None:
        """Bring the updated rows of copies to all that hold them."""
        for copies in self.copies:
            copies.publish()
