"""Which layers a pipeline rank holds; arithmetic only."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlm_train.config import Config, ModelConfig
from mlm_train.config.parallel import V_SHAPED
from mlm_train.model.counts import count_parameters
from mlm_train.parallel.ffn_m.owners import Owners
from mlm_train.parallel.mesh.topology import Topology


@dataclass(frozen=True)
class StageSpan:
    """One stage of the pipeline: consecutive layers [start, stop)."""

    number: int
    start: int
    stop: int
    first: bool
    last: bool

    @property
    def layers(self) -> range:
        """The layers' numbers in the whole model."""
        return range(self.start, self.stop)


def balanced(config: ModelConfig, stages: int) -> list[int]:
    """Layers per stage that minimise the cost of the most expensive stage; the head counts on the last.

    Cost is multiplications per token; the embedding, a lookup, costs nothing. Every stage gets at least one
    layer. Of equally good splits the first is taken.
    """
    counts = count_parameters(config)
    layer = (counts.total - config.hidden_size) / config.num_hidden_layers
    head = config.vocab_size * config.hidden_size
    layers = config.num_hidden_layers

    def cost(last_layers: int) -> float:
        others = -(-(layers - last_layers) // (stages - 1)) if stages > 1 else 0
        return max(others * layer, last_layers * layer + head)

    last = min(range(1, layers - stages + 2), key=cost) if stages > 1 else layers
    rest, others = layers - last, stages - 1
    return [rest // others + (number < rest % others) for number in range(others)] + [last]


def all_spans(config: Config) -> list[StageSpan]:
    """Every stage of the pipeline, in order."""
    parallel = config.parallel
    count = parallel.stages
    sizes: Sequence[int] = parallel.layers_per_stage or balanced(config.model, count)
    spans, start = [], 0
    for number, size in enumerate(sizes):
        spans.append(StageSpan(number, start, start + size, number == 0, number == count - 1))
        start += size
    return spans


def most_layers(config: Config, topology: Topology) -> int:
    """Layers of the pipeline rank that has most."""
    ranks = topology.along_pipeline()
    return max(sum(len(span.layers) for span in my_spans(config, rank)) for rank in ranks)


def my_spans(config: Config, topology: Topology) -> list[StageSpan]:
    """The stages of this rank: every pipeline-size-th one (arXiv 2104.04473, interleaved).

    In a V-shaped schedule (arXiv 2401.10241, section 6) the stages go down the ranks and up again, so the
    first rank holds the first and the last stage.
    """
    spans, rank = all_spans(config), topology.pipeline_rank
    if config.parallel.order in V_SHAPED:
        return [spans[rank], spans[-1 - rank]]
    return spans[rank :: topology.pipeline]


def owners_of(config: Config, topology: Topology) -> Owners | None:
    """The owners of FFN-M on this rank's stage (memory.placement=owned); None where a stage has one rank."""
    if config.memory is None or not config.memory.owned or topology.stage_ranks == 1:
        return None
    layers = [layer for span in my_spans(config, topology) for layer in span.layers]
    return Owners(layers[: config.memory.tabled(len(layers))], topology.stage_ranks)


def owns_embedding(config: Config, topology: Topology) -> bool:
    """Whether the first stage's ranks own the embedding by rows.

    A tied head needs the whole weight, and so does each stage with parallel.x0_transport=replicate, or a
    transport of the user's.
    """
    by_rows = config.transport in ("broadcast", "relay") and not config.model.tie_word_embeddings
    return config.parallel.engine == "fsdp" and topology.data > 1 and by_rows
