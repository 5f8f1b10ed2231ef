"""Functions run by the ranks of the traffic test: operations of known size, counted."""

import torch
import torch.distributed as dist

from mlm_train.bench.traffic import Traffic


def count_operations() -> dict[str, int]:
    """Bytes of each operation over both ranks, on every one of them."""
    dist.init_process_group("gloo")
    rank, tensor = dist.get_rank(), torch.ones(10, dtype=torch.float32)
    with Traffic() as traffic:
        dist.broadcast(tensor, 0)
        dist.reduce(tensor, 1)
        dist.all_reduce(tensor.double())
        dist.barrier()
        (dist.send if rank else dist.recv)(tensor, 1 - rank)
        exchange = [dist.P2POp(op, torch.ones(5), 1 - rank) for op in (dist.isend, dist.irecv)]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        refused = 0
        try:
            dist.all_gather([tensor.clone(), tensor.clone()], tensor)
        except NotImplementedError:
            refused = 1
    shares: list = [None] * dist.get_world_size()
    dist.all_gather_object(shares, dict(traffic.by_operation) | {"refused": refused})
    dist.destroy_process_group()
    return {name: sum(share.get(name, 0) for share in shares) for name in set().union(*shares)}
