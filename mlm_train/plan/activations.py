"""Estimate of the activation memory that autograd keeps on a rank between forward and backward passes."""

import torch

from mlm_train.config import Config
from mlm_train.config.parallel import INTERLEAVED
from mlm_train.config.schema import ActivationCheckpointing
from mlm_train.model.loss import default_chunk
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.parallel.pipeline.stages import StageSpan, my_spans

FP32 = 4


def activation_bytes(config: Config, topology: Topology) -> int:
    """Bytes on the pipeline rank with the most activations."""
    per_rank = []
    for rank in topology.along_pipeline():
        spans, count = my_spans(config, rank), in_flight(config, rank)
        kept = count * sum(_stage_bytes(config, span) for span in spans)
        head = _head_bytes(config, count) if spans[-1].last else 0.0
        per_rank.append(kept + head + _recomputed_bytes(config, spans) + _received_bytes(config, rank, spans))
    return int(max(per_rank))


def in_flight(config: Config, topology: Topology) -> float:
    """Maximum number of micro-batches between their forward and backward on this pipeline rank.

    With several stages per rank each counts as a fraction. Warm-up lengths: arXiv 2104.04473, section 2.
    """
    parallel, position = config.parallel, topology.pipeline_rank
    count = topology.micro_batches(config.train)
    if parallel.pipeline == 1:
        return 1
    if parallel.order == "gpipe":
        return count
    if parallel.order == "1f1b":
        return min(count, parallel.pipeline - position)
    if parallel.order in INTERLEAVED:
        stages = parallel.stages_per_rank
        warmup = 2 * (parallel.pipeline - position - 1) + (stages - 1) * parallel.pipeline + 1
        return min(count, warmup / stages)
    return min(count, parallel.pipeline + 0.5 * (parallel.order == "dualpipe_v"))


def compute_bytes(config: Config) -> int:
    """Bytes per element of matrix multiplications and of the activations that autograd keeps of them."""
    return 2 if config.train.precision == "bf16" else FP32


def _tokens(config: Config) -> int:
    return config.train.micro_batch_size * config.data.sequence_length


def _layer_elements(config: Config, extent: ActivationCheckpointing) -> tuple[float, float]:
    """Elements kept per token and layer: in the compute dtype, and in fp32.

    Attention keeps its qkv (3 hidden), the rotated queries and keys (2) and its output (1); a SwiGLU keeps
    gate, up, the activation and their product (4 keys); tensor parallelism divides these. Two normed inputs
    of matrix multiplications are whole on each rank, also gathered ones; the residual and the norms' inputs
    are divided by sequence parallelism. Selective activation checkpointing drops the rotated queries and
    keys, full keeps only a layer's input. FFN-M keeps nothing with tables; "unique" is counted as if all
    tokens differed.
    """
    model, tensor = config.model, config.parallel.tensor
    outside = tensor if config.parallel.sequence else 1
    if extent == "full":
        return 0.0, model.hidden_size / outside
    ffn, inputs = (0, 1) if config.tables else (4 * model.intermediate_size, 2)
    if model.kind == "flex":
        ffn += (4 if model.compute_form == "swiglu" else 1) * (model.compute_intermediate_size or 0)
        inputs += 1
    attention = model.hidden_size * (6 if extent == "none" else 4)
    return inputs * model.hidden_size + (attention + ffn) / tensor, inputs * model.hidden_size / outside


def _layer_bytes(config: Config, extent: ActivationCheckpointing) -> float:
    cast, plain = _layer_elements(config, extent)
    return _tokens(config) * (compute_bytes(config) * cast + FP32 * plain)


def _stage_bytes(config: Config, span: StageSpan) -> float:
    """Bytes of one micro-batch in one stage."""
    return len(span.layers) * _layer_bytes(config, config.train.activation_checkpointing_of(span.number))


def _recomputed_bytes(config: Config, spans: list[StageSpan]) -> float:
    """Bytes of the layer being recomputed with full activation checkpointing."""
    full = any(config.train.activation_checkpointing_of(span.number) == "full" for span in spans)
    return _layer_bytes(config, "none") if full else 0.0


def _head_bytes(config: Config, count: float) -> float:
    """Bytes of a chunk's logits, a bf16 copy of the head's weight, and the gradients of weight and input.

    model/loss.py computes these gradients in the forward; they wait for `count` backward passes.
    """
    model, tokens = config.model, _tokens(config)
    words = -(-model.vocab_size // config.parallel.tensor)
    chunk = min(config.train.loss_chunk_size or default_chunk(words, _device(config)), tokens)
    element = compute_bytes(config)
    copied = model.hidden_size if element < FP32 else 0
    return words * element * (chunk + copied) + count * FP32 * (words + tokens) * model.hidden_size


def _received_bytes(config: Config, topology: Topology, spans: list[StageSpan]) -> float:
    """Bytes of torch's pipeline receive buffers, for every micro-batch of a step, and of x0's rows.

    A stage receives activations unless it is the first, and gradients unless it is the last; with relay also
    x0 and its gradient. Broadcast's rows and their gradient are counted as if all tokens differed.
    """
    if topology.pipeline == 1:
        return 0.0
    parallel, model = config.parallel, config.model
    count = topology.micro_batches(config.train)
    outside = parallel.tensor if parallel.sequence else 1
    relays = model.has_memory and config.transport == "relay"
    sides = sum((not span.first) + (not span.last) for span in spans) * (2 if relays else 1)
    buffers = count * sides * _tokens(config) * model.hidden_size / outside
    rows = 0
    if model.has_memory and config.transport == "broadcast":
        rows = 2 * min(model.vocab_size, count * _tokens(config)) * model.hidden_size
    return FP32 * (buffers + rows)


def _device(config: Config) -> torch.device:
    """The kind of device that a run here would use."""
    on_cpu = config.train.device == "cpu" or not torch.cuda.is_available()
    return torch.device("cpu" if on_cpu else "cuda")
