"""Counts what a rank hands to torch.distributed, at the dispatcher, below every Python wrapper.

Convention, payload bytes of all ranks of a group of n together: a send is its tensor's bytes (its
receive is the same bytes and counts nothing); a broadcast or a reduce is tensor x (n - 1); an
all-reduce, a reduce and a broadcast, is 2 x tensor x (n - 1); an all-to-all is what each rank has for
the others. That is what crosses at the least, whatever tree or ring the backend chooses; headers are
left out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# Tensors' worth of traffic of a collective, for each rank beside the first.
COLLECTIVES = {"broadcast_": 1, "reduce_": 1, "allreduce_": 2}
FREE = {"recv_", "barrier"}


class Traffic(TorchDispatchMode):
    """Within `with Traffic() as traffic:` counts this rank's share; `bytes` summed over ranks is all.

    A send counts on its sender, as does an all-to-all's part; a collective on the first rank of its group.
    An operation that the convention does not name raises NotImplementedError: nothing crosses uncounted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operation: Counter[str] = Counter()  # payload bytes

    @property
    def bytes(self) -> int:
        """Payload bytes counted on this rank."""
        return self.by_operation.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func.overloadpacket.__name__, args)
        call: Callable[..., Any] = func
        return call(*args, **(kwargs or {}))

    def _count(self, operation: str, args: Sequence[Any]) -> None:
        """args of the c10d operations: tensors, process group, ..."""
        if operation in FREE:
            return
        if operation == "alltoall_base_":
            self.by_operation[operation] += _for_others(*args[1:5])
            return
        if operation != "send" and operation not in COLLECTIVES:
            raise NotImplementedError(f"{operation} crosses between ranks; traffic.py does not count it")
        payload = sum(_bytes_of(tensor) for tensor in args[0])
        if operation == "send":
            self.by_operation[operation] += payload
            return
        group = dist.ProcessGroup.unbox(args[1])
        if group.rank() == 0:
            self.by_operation[operation] += COLLECTIVES[operation] * payload * (group.size() - 1)


def _for_others(tensor: torch.Tensor, group: Any, _: Sequence[int], rows: Sequence[int]) -> int:
    """Bytes of an all-to-all's input [rows, ...] that other ranks get; no `rows`: the same for each."""
    group = dist.ProcessGroup.unbox(group)
    mine = rows[group.rank()] if rows else len(tensor) // group.size()
    return _bytes_of(tensor) - _bytes_of(tensor[:mine])


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
