"""A model's share on this rank, in memory."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mlm_train.config import ModelConfig
from mlm_train.model.loss import LossSums, loss_sums
from mlm_train.model.transformer import Transformer
from mlm_train.parallel.runtime import Runtime
from mlm_train.parallel.tensor import TensorGroup, mark_for_clipping, parallel_loss_sums, shard

Loss = Callable[[Tensor, Tensor], LossSums]


def tensor_group(runtime: Runtime) -> TensorGroup:
    """The ranks that share this rank's layers."""
    from megatron.core import parallel_state

    topology = runtime.topology
    handle = parallel_state.get_tensor_model_parallel_group()
    return TensorGroup(topology.tensor, topology.tensor_rank, handle)


def build_model(config: ModelConfig, runtime: Runtime) -> Transformer:
    """This rank's share of the model on its device; the weights are not filled yet."""
    with torch.device("meta"):
        model = Transformer(config)
        group = tensor_group(runtime)
        if group.size > 1:
            shard(model, group)
    model.to_empty(device=runtime.device)
    mark_for_clipping(model, group)
    return model


def loss_of(config: ModelConfig, runtime: Runtime) -> Loss:
    """(logits, labels) -> sums, for the logits that this rank's model gives."""
    group = tensor_group(runtime)
    if group.size == 1:
        return loss_sums
    return partial(parallel_loss_sums, vocab_size=config.vocab_size, group=group)
