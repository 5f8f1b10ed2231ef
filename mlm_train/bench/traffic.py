"""Count the bytes a rank hands to torch.distributed, at the dispatcher, below every Python wrapper.

Convention, payload bytes summed over the n ranks of a group: a send counts its tensor's bytes (the receive
counts nothing); a broadcast or a reduce counts tensor x (n - 1); an all-reduce, which is a reduce and a
broadcast, counts 2 x tensor x (n - 1); an all-to-all counts what each rank sends to the others, an all-gather
each rank's tensor x (n - 1), a reduce-scatter what of each rank's tensor is for the others. This is the
minimum that crosses, whatever tree or ring the backend chooses; headers are not counted.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# Multiples of the tensor's bytes per rank other than the first.
COLLECTIVES = {"broadcast_": 1, "reduce_": 1, "allreduce_": 2}
GATHERS = {"_allgather_base_", "_reduce_scatter_base_"}
FREE = {"recv_", "barrier"}


class Traffic(TorchDispatchMode):
    """Counts this rank's traffic within `with Traffic() as traffic:`; the total is `bytes` summed over ranks.

    What differs by rank (a send, an all-to-all, an all-gather, a reduce-scatter) counts on the sender; other
    collectives on the first rank of their group. An operation without a convention raises
    NotImplementedError, so that nothing crosses uncounted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operation: Counter[str] = Counter()  # payload bytes
        self.calls: Counter[str] = Counter()  # of this rank

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
        """Count an operation. args: of the c10d operation: tensors, process group, ..."""
        if operation in FREE:
            return
        self.calls[operation] += 1
        if operation == "alltoall_base_":
            self.by_operation[operation] += _for_others(*args[1:5])
            return
        if operation in GATHERS:  # (output, input, group, ...)
            others = dist.ProcessGroup.unbox(args[2]).size() - 1
            whole = args[0] if operation == "_allgather_base_" else args[1]
            self.by_operation[operation] += _bytes_of(whole) // (others + 1) * others
            return
        if operation != "send" and operation not in COLLECTIVES:
            raise NotImplementedError(
                f"{operation} sends data between ranks, but traffic.py does not count it"
            )
        payload = sum(_bytes_of(tensor) for tensor in args[0])
        if operation == "send":
            self.by_operation[operation] += payload
            return
        group = dist.ProcessGroup.unbox(args[1])
        if group.rank() == 0:
            self.by_operation[operation] += COLLECTIVES[operation] * payload * (group.size() - 1)


def _for_others(tensor: torch.Tensor, group: Any, _: Sequence[int], rows: Sequence[int]) -> int:
    """Bytes of an all-to-all's input [rows, ...] for other ranks; empty `rows`: equal parts."""
    group = dist.ProcessGroup.unbox(group)
    own = rows[group.rank()] if rows else len(tensor) // group.size()
    return _bytes_of(tensor) - _bytes_of(tensor[:own])


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
