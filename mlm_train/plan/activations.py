"""An estimate of what autograd keeps on a rank between forward and backward passes."""

from dataclasses import replace

from mlm_train.config import Config
from mlm_train.config.parallel import INTERLEAVED
from mlm_train.config.schema import Recompute
from mlm_train.model.loss import default_chunk
from mlm_train.parallel.stages import StageSpan, my_spans
from mlm_train.parallel.topology import Topology

FP32 = 4


def activation_bytes(config: Config, topology: Topology) -> int:
    """Bytes on the pipeline rank that keeps most."""
    found = []
    for place in range(topology.pipeline):
        rank = replace(topology, rank=place * topology.tensor * topology.data)
        spans = my_spans(config, rank)
        kept = sum(_stage_bytes(config, span) for span in spans) * in_flight(config, rank)
        head = _head_bytes(config) if spans[-1].last else 0
        found.append(int(kept) + head + _once_more(config, spans))
    return max(found)


def in_flight(config: Config, topology: Topology) -> float:
    """Micro-batches whose forward is done and whose backward is not, at most, on this pipeline rank.

    A stage that is one of several on a rank counts as its share. Warm-ups of arXiv 2104.04473, section 2.
    """
    parallel, place = config.parallel, topology.pipeline_rank
    count = config.train.global_batch // (config.train.micro_batch * topology.data)
    if parallel.pipeline == 1:
        return 1
    if parallel.order == "gpipe":
        return count
    if parallel.order == "1f1b":
        return min(count, parallel.pipeline - place)
    if parallel.order in INTERLEAVED:
        each = parallel.stages_per_rank
        warm = 2 * (parallel.pipeline - place - 1) + (each - 1) * parallel.pipeline + 1
        return min(count, warm / each)
    return min(count, parallel.pipeline + 0.5 * (parallel.order == "dualpipe_v"))


def _tokens(config: Config) -> int:
    return config.train.micro_batch * config.data.sequence_length


def _layer_elements(config: Config, extent: Recompute) -> tuple[float, float]:
    """Elements a token and layer keeps: in the compute dtype, and in fp32.

    Residual and norms have about 4 hidden, attention another 4; a SwiGLU keeps its two products, the
    activation and their product, 4 keys each. Tensor parallelism divides all but residual and norms, which
    sequence parallelism divides. Selective recomputation drops the turned queries and keys and the values,
    full keeps a layer's input.
    """
    model, tensor = config.model, config.parallel.tensor
    outside = tensor if config.parallel.sequence else 1
    if extent == "full":
        return 0.0, model.hidden_size / outside
    ffn = 4 * model.intermediate_size
    if model.kind == "flex":
        ffn += (4 if model.compute_form == "swiglu" else 1) * (model.compute_intermediate_size or 0)
    attention = model.hidden_size * (4 if extent == "none" else 1)
    inside = (attention + ffn) / tensor
    return 4 * model.hidden_size / outside + inside, 2 * model.hidden_size / outside


def _layer_bytes(config: Config, extent: Recompute) -> float:
    compute = 2 if config.train.precision == "bf16" else FP32
    cast, plain = _layer_elements(config, extent)
    return _tokens(config) * (compute * cast + FP32 * plain)


def _stage_bytes(config: Config, span: StageSpan) -> float:
    """One micro-batch in one stage."""
    return len(span.layers) * _layer_bytes(config, config.train.recompute_of(span.number))


def _once_more(config: Config, spans: list[StageSpan]) -> int:
    """Full recomputation brings back one layer at a time."""
    full = any(config.train.recompute_of(span.number) == "full" for span in spans)
    return int(_layer_bytes(config, "none")) if full else 0


def _head_bytes(config: Config) -> int:
    """A chunk's logits, the gradients of the head's weight and input, and a bf16 copy of the weight."""
    model, tokens = config.model, _tokens(config)
    words = -(-model.vocab_size // config.parallel.tensor)
    chunk = min(config.train.loss_chunk or default_chunk(words), tokens)
    copied = 2 if config.train.precision == "bf16" else 0
    return words * (chunk + model.hidden_size) * (FP32 + copied) + tokens * FP32 * model.hidden_size
