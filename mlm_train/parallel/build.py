"""A model's share on this rank, and what runs micro-batches through it."""

from functools import partial

import torch

from mlm_train.config import Config
from mlm_train.memory import make_source
from mlm_train.model.loss import loss_sums
from mlm_train.model.transformer import Transformer
from mlm_train.parallel.execution import Executor, Loss, Sequential
from mlm_train.parallel.pipeline import Pipeline
from mlm_train.parallel.runtime import Runtime
from mlm_train.parallel.stages import my_spans
from mlm_train.parallel.tensor import TensorGroup, mark_for_clipping, parallel_loss_sums, shard
from mlm_train.parallel.topology import Topology


def tensor_group(runtime: Runtime) -> TensorGroup:
    """The ranks that share this rank's layers."""
    from megatron.core import parallel_state

    topology = runtime.topology
    handle = parallel_state.get_tensor_model_parallel_group()
    return TensorGroup(topology.tensor, topology.tensor_rank, handle)


def shapes_of(config: Config, topology: Topology, group: TensorGroup) -> Transformer:
    """This rank's share of the model, without storage: its layers, its part of each of them."""
    spans = my_spans(config, topology)
    replicated = config.parallel.x0_transport == "replicate"
    with torch.device("meta"):
        model = Transformer(
            config.model,
            layers=[layer for span in spans for layer in span.layers],
            embeds=spans[0].first or replicated,
            heads=spans[-1].last,
        )
        if group.size > 1:
            shard(model, group)
    return model


def build_model(config: Config, runtime: Runtime) -> Transformer:
    """This rank's share of the model on its device: zeros, which the padding stays, to be filled next."""
    group = tensor_group(runtime)
    model = shapes_of(config, runtime.topology, group)
    model.to_empty(device=runtime.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    mark_for_clipping(model, group)
    if model.embed_tokens is not None and runtime.topology.pipeline_rank > 0:
        # A copy (tied head, or replicate): the first stage's counts in the gradient norm.
        model.embed_tokens.weight.ds_pipe_replicated = True  # type: ignore[attr-defined]
    return model


def build_executor(model: Transformer, config: Config, runtime: Runtime) -> Executor:
    """What trains and evaluates this layout."""
    source = make_source(config.memory.mode, model.memory_blocks()) if config.memory else None
    group = tensor_group(runtime)
    loss: Loss = loss_sums
    if group.size > 1:
        loss = partial(parallel_loss_sums, vocab_size=config.model.vocab_size, group=group)
    bf16 = config.train.precision == "bf16"
    precision = torch.autocast(runtime.device.type, dtype=torch.bfloat16, enabled=bf16)
    if runtime.topology.pipeline > 1:
        return Pipeline(model, config, runtime, source, loss, precision)
    return Sequential(model, source, loss, precision, config.train.z_loss, runtime.device, runtime.place)
