"""Weights that several ranks hold whole, while each updates only its own rows of them.

A rank's rows are an fp32 weight with gradient and moments: its part of the optimizer. After the backward pass
the gradients' rows go to the ranks that update them, and after the update the rows go to all holders, each
time in one all-to-all for all such weights of a group.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mlm_train.parallel.mesh.exchange import exchange


@dataclass(frozen=True)
class Copy:
    """A rank's whole copy of a weight, and the rows [start, stop) that each holder updates, by rank."""

    weight: nn.Parameter
    rows: Mapping[int, tuple[int, int]]

    def of(self, rank: int, tensor: Tensor) -> Tensor:
        """The rows of `tensor`, of the weight's shape, that a holder updates."""
        start, stop = self.rows[rank]
        return tensor[start:stop]


class Copies:
    """The copies that this rank holds, by name; `rows`: those rows of them that it updates, fp32.

    joins: whether some rank of the group shares a copy with another; dtype: the copies', on every rank.
    """

    def __init__(
        self, copies: Mapping[str, Copy], rank: int, ranks: int, group: Any, joins: bool, dtype: torch.dtype
    ) -> None:
        self.copies, self.rank, self.ranks, self.group, self.joins = copies, rank, ranks, group, joins
        self.dtype = dtype
        self.rows = {name: nn.Parameter(self._rows_of(copy)) for name, copy in copies.items()}

    def _rows_of(self, copy: Copy) -> Tensor:
        """This rank's rows; the weight itself where no other rank holds it and it is fp32."""
        own = copy.of(self.rank, copy.weight.detach())
        return own.clone() if len(copy.rows) > 1 and own.dtype == torch.float32 else own.float()

    def reduce(self, scale: float) -> None:
        """Sum the copies' gradients into those of the rows, times `scale`; the copies keep none."""
        gradients = {name: _take_gradient(copy.weight) for name, copy in self.copies.items()}
        sums = {name: copy.of(self.rank, gradients[name]) for name, copy in self.copies.items()}

        def theirs(rank: int, name: str) -> Tensor:
            return self.copies[name].of(rank, gradients[name])

        for mine, part in self._swap(theirs, lambda rank, name: sums[name], torch.float32):
            mine += part
        for name, total in sums.items():
            # Rows of several holders: a copy, so that the whole gradient is not kept for them.
            kept = total.clone() if len(self.copies[name].rows) > 1 else total
            self.rows[name].grad = kept.mul_(scale)

    @torch.no_grad()
    def publish(self) -> None:
        """Write the updated rows into all holders' copies."""

        def mine(rank: int, name: str) -> Tensor:
            return self.rows[name].to(self.dtype)

        def theirs(rank: int, name: str) -> Tensor:
            return self.copies[name].of(rank, self.copies[name].weight.detach())

        for name in self.copies:
            theirs(self.rank, name).copy_(self.rows[name])
        for rows, part in self._swap(mine, theirs, self.dtype):
            rows.copy_(part)

    def _shared_with(self, rank: int) -> list[str]:
        """The copies that this rank and another hold, in one order on both."""
        return [name for name, copy in self.copies.items() if rank != self.rank and rank in copy.rows]

    def _swap(
        self, give: Callable[[int, str], Tensor], take: Callable[[int, str], Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Give each other holder a tensor per shared copy; yield `take`'s tensors with what comes for them.

        give, take: of a rank and a name.
        """
        if not self.joins:
            return
        shared = [self._shared_with(rank) for rank in range(self.ranks)]
        given = [[give(rank, name).flatten() for name in names] for rank, names in enumerate(shared)]
        taken = [[take(rank, name) for name in names] for rank, names in enumerate(shared)]
        sent, received = ([sum(t.numel() for t in of_rank) for of_rank in side] for side in (given, taken))
        device = next(iter(self.copies.values())).weight.device
        flat = torch.cat([torch.empty(0, dtype=dtype, device=device), *chain.from_iterable(given)])
        del given
        arrived, _ = exchange(flat, sent, received, self.group)
        targets = list(chain.from_iterable(taken))
        for target, part in zip(targets, arrived.split([t.numel() for t in targets]), strict=True):
            yield target, part.view_as(target)


def _take_gradient(weight: nn.Parameter) -> Tensor:
    """A weight's fp32 gradient, zeros if it has none; the weight keeps none."""
    gradient: Tensor | None = getattr(weight, "main_grad", None)
    if gradient is not None:
        del weight.main_grad  # type: ignore[attr-defined]
        return gradient
    gradient, weight.grad = weight.grad, None
    return torch.zeros_like(weight, dtype=torch.float32) if gradient is None else gradient.float()
