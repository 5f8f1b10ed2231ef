"""Pruning of a base model's layers, one after the other."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlm_train.analyze.prune.matrix import METHODS, InputMoments, output_error
from mlm_train.config import ModelConfig
from mlm_train.model.block import Block
from mlm_train.model.counts import layer_matrices
from mlm_train.model.geometry import Geometry, single_document
from mlm_train.model.linear import FusedLinear, Linear
from mlm_train.model.transformer import Transformer


class PrunedMatrix(NamedTuple):
    """A pruned matrix of a layer, such as mlp.down_proj. error: see output_error."""

    layer: int
    name: str
    elements: int
    zeros: int
    error: float


def sparsity_like(config: ModelConfig, beta: float) -> float:
    """The share of a base model's matrices to zero, so that as many elements stay as are active in MemoryLLM
    (beta 0), or in Flex-MemoryLLM with beta * hidden^2 elements of FFN-C per layer, at the same total.
    """
    matrices = layer_matrices(config)
    return 1 - (matrices.attention + beta * config.hidden_size**2) / (matrices.attention + matrices.ffn)


@torch.inference_mode()
def prune(
    model: Transformer,
    batches: Sequence[Tensor],
    method: str,
    sparsity: float,
    after_layer: Callable[[], object] = lambda: None,
) -> list[PrunedMatrix]:
    """Zero this share of every matrix in the layers of a base model, in place; not of embedding and head.

    batches: calibration text, int64 [windows, sequence], all of one sequence length. As published, each
    layer is pruned by the inputs that it has after those before it were pruned. Held in memory: the residual
    stream of all windows, and the moments of one layer's inputs.
    """
    geometry = single_document(model.config, batches[0].shape[1], batches[0].device)
    streams = [model.embed(ids) for ids in batches]
    pruned = []
    for layer, block in enumerate(map(model.block, range(model.config.num_hidden_layers))):
        moments = _moments(block, geometry, streams)
        for name, rows, linear in _matrices(block):
            weight = linear.weight[rows]
            new = METHODS[method](weight, moments[linear], sparsity)
            error = output_error(weight, new, moments[linear])
            zeros = int((new == 0).sum())
            pruned.append(PrunedMatrix(layer, name, new.numel(), zeros, error))
            linear.weight[rows] = new
        for number, x in enumerate(streams):
            streams[number] = block(x, geometry)
        after_layer()
    return pruned


def _moments(block: Block, geometry: Geometry, streams: Sequence[Tensor]) -> dict[Linear, InputMoments]:
    """Moments of the inputs of each linear layer of a block."""
    moments, hooks = dict[Linear, InputMoments](), []
    for linear in block.modules():
        if isinstance(linear, Linear):
            moments[linear] = InputMoments(linear.in_features, linear.weight.device)
            hooks.append(linear.register_forward_pre_hook(_counting(moments[linear])))
    for x in streams:
        block(x, geometry)
    for hook in hooks:
        hook.remove()
    return moments


def _counting(moments: InputMoments) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _, inputs: moments.add(inputs[0])


def _matrices(block: Block) -> Iterator[tuple[str, slice, Linear]]:
    """Each matrix by its logical name: fused ones are pruned apart, as if they were not."""
    for path, linear in block.named_modules():
        if isinstance(linear, FusedLinear):
            start = 0
            for name, rows in linear.parts.items():
                yield f"{path.rpartition('.')[0]}.{name}", slice(start, start + rows), linear
                start += rows
        elif isinstance(linear, Linear):
            yield path, slice(None), linear
