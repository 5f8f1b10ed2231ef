"""Build a rank's shard of the model, and the executor that runs micro-batches through it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlm_train.config import Config
from mlm_train.memory import SourceOptions, TableSource, TrainingSource, UniqueSource, make_source
from mlm_train.model.loss import VocabRange, head_loss
from mlm_train.model.transformer import Transformer
from mlm_train.model.unfilled import unfilled
from mlm_train.parallel.engine import Engine, make_engine
from mlm_train.parallel.engine.fsdp import DTYPES
from mlm_train.parallel.ffn_m.embedding import OwnedRows, RowEmbedding
from mlm_train.parallel.ffn_m.owned import OwnedTables, Placement, keep_owned
from mlm_train.parallel.ffn_m.shares import DataParallelSharing
from mlm_train.parallel.mesh.topology import Topology
from mlm_train.parallel.pipeline.single_stage import Executor, Loss, SingleStageExecutor
from mlm_train.parallel.pipeline.stages import most_layers, my_spans, owners_of, owns_embedding
from mlm_train.parallel.pipeline.x0 import TRANSPORTS, LocalEmbedding, LocalRows, X0Channel
from mlm_train.parallel.runtime import Runtime
from mlm_train.parallel.tensor.collectives import TensorGroup
from mlm_train.parallel.tensor.layers import (
    ParallelVocabRange,
    mark_for_clipping,
    shard,
    sum_replicated,
    sum_replicated_each_pass,
)
from mlm_train.utils.extensions import find


def tensor_group(config: Config, runtime: Runtime) -> TensorGroup:
    """This rank's tensor-parallel group."""
    topology = runtime.topology
    return TensorGroup(topology.tensor, topology.tensor_rank, runtime.groups.tensor, config.parallel.sequence)


def shapes_of(config: Config, topology: Topology, group: TensorGroup) -> Transformer:
    """This rank's shard of the model, without storage: its layers, sharded over `group`."""
    spans = my_spans(config, topology)
    replicated = config.transport == "replicate"
    owners = owners_of(config, topology)
    with unfilled():
        model = Transformer(
            config.model,
            layers=[layer for span in spans for layer in span.layers],
            embeds=spans[0].first or replicated,
            heads=spans[-1].last,
        )
        owned = keep_owned(model, owners, topology.stage_rank, config.train.precision == "bf16")
        if group.size > 1:
            shard(model, group, owned)
        if spans[0].first and owns_embedding(config, topology):
            size, hidden = config.model.vocab_size, config.model.hidden_size
            rows = RowEmbedding(size, hidden, topology.stage_rank, topology.stage_ranks)
            model.embed_tokens = rows  # type: ignore[assignment]
    return model


def build_model(config: Config, runtime: Runtime, eod_id: int | None = None) -> Transformer:
    """This rank's shard of the model on its device, all zeros, as padding must be; without storage for FSDP.

    eod_id: the id that ends a document; required by data.separate_documents.
    """
    group = tensor_group(config, runtime)
    model = shapes_of(config, runtime.topology, group)
    if config.data.separate_documents:
        assert eod_id is not None
        model.separator = eod_id
    if config.parallel.engine != "fsdp" or runtime.topology.data == 1:  # FSDP gives each rank its rows
        model.to_empty(device=runtime.device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    mark_for_clipping(model, group)
    if model.embed_tokens is not None and runtime.topology.pipeline_rank > 0:
        # A copy (tied head, or `replicate`): only the first stage's counts in the gradient norm.
        weight: Any = model.embed_tokens.weight
        weight.ds_pipe_replicated = True
        weight.model_parallel = weight.tensor_model_parallel = False  # read by ZeRO stage 0
    return model


def build_loss(config: Config, group: TensorGroup) -> Loss:
    """The loss of a normed hidden state, the head's matmul included, over this rank's vocabulary shard."""
    train, vocab_size = config.train, config.model.vocab_size
    sharded = group.size > 1
    vocabulary = ParallelVocabRange.of(vocab_size, group) if sharded else VocabRange(0, vocab_size)

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if sharded:  # each vocabulary shard gives a partial gradient of hidden
            hidden = group.enter(hidden)
        return head_loss(
            hidden,
            weight,
            labels,
            scale=scale,
            z_loss=train.z_loss,
            vocabulary=vocabulary,
            chunk=train.loss_chunk_size,
            compiles=train.compile,
        )

    return loss


def autocast_of(config: Config, device: torch.device) -> torch.autocast:
    """The autocast of config field train.precision: bf16 matmuls, or disabled."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.train.precision == "bf16")


def build_executor(model: Transformer, config: Config, runtime: Runtime) -> Executor:
    """The executor of this layout."""
    group = tensor_group(config, runtime)
    for span in my_spans(config, runtime.topology):
        for layer in span.layers:
            model.block(layer).set_activation_checkpointing(
                config.train.activation_checkpointing_of(span.number)
            )
            model.block(layer).compiles = config.train.compile
    loss = build_loss(config, group)
    precision = autocast_of(config, runtime.device)
    source = _source(model, config, runtime, group, precision)
    if runtime.topology.pipeline > 1:
        from mlm_train.parallel.pipeline.executor import PipelineExecutor  # imports torch's compiler

        channel = _channel(model, config, runtime, group, source)
        return PipelineExecutor(model, config, runtime, group, source, channel, loss, precision)
    sum_norms: Callable[[], None] = partial(sum_replicated, model, group)
    if config.reduces_each_pass:
        # A pass's gradients are reduced before the next one: the norms' are summed in each pass.
        sum_replicated_each_pass(model, group)
        sum_norms = _nothing
    # Rows of x0 are embedded once per step, unless gradients are reduced in each pass.
    rows = None if config.reduces_each_pass else _channel(model, config, runtime, group, source)
    return SingleStageExecutor(config, runtime, model, source, rows, loss, precision, sum_norms)


def build_engine(model: Transformer, executor: Executor, config: Config, runtime: Runtime) -> Engine:
    """The engine that updates the model's weights, attached to the executor; fill them next."""
    engine = make_engine(model, config, runtime, executor.roots)
    executor.attach(engine.entry, engine.before_pass)
    return engine


def _source(
    model: Transformer, config: Config, runtime: Runtime, group: TensorGroup, precision: torch.autocast
) -> TrainingSource | None:
    """The memory source of this rank; None where the model has no FFN-M."""
    memory = config.memory
    if memory is None:
        return None
    share = (
        DataParallelSharing(runtime.groups.data, runtime.groups.data_cpu, runtime.device)
        if memory.shared
        else None
    )
    blocks = model.memory_blocks()
    kept, device = memory.kept_layers or 0, runtime.device
    if (placement := _placement(config, runtime)) is not None:
        tabled = {layer: blocks.pop(layer) for layer in placement.owners.layers}
        others = UniqueSource(blocks, group) if blocks else None
        row_bytes = config.model.hidden_size * DTYPES[config.train.precision].itemsize
        return OwnedTables(tabled, group, precision, placement, others, kept, device, row_bytes)
    options = SourceOptions(group, precision, share, memory.table_layers, kept, device)
    return make_source(memory.mode, blocks, options)


def _placement(config: Config, runtime: Runtime) -> Placement | None:
    """Where the owned FFN-M of this rank's stage is; None without."""
    topology, groups, memory = runtime.topology, runtime.groups, config.memory
    owners = owners_of(config, topology)
    if owners is None or memory is None:
        return None
    stages = [owners_of(config, rank) for rank in topology.along_pipeline()]
    return Placement(
        owners,
        [owners for owners in stages if owners is not None],
        topology.stage_rank,
        groups.stage,
        groups.stage_cpu,
        every_row=not owns_embedding(config, topology),
        gradient_dtype=DTYPES[memory.gradient_rows or "fp32"],
    )


def _rows_of(
    model: Transformer, config: Config, runtime: Runtime, group: TensorGroup
) -> LocalRows | OwnedRows | None:
    """Where the first stage gets the rows of a step's ids; None on others."""
    if runtime.topology.pipeline_rank > 0:
        return None
    if isinstance(model.embed_tokens, RowEmbedding):
        groups, memory = runtime.groups, config.memory
        gradient_rows = (memory.gradient_rows if memory is not None else None) or "fp32"
        dtypes = DTYPES[config.train.precision], DTYPES[gradient_rows]
        return OwnedRows(model.embed_tokens, groups.stage, groups.stage_cpu, group, *dtypes)
    return LocalRows(model, group, runtime.device) if model.embed_tokens is not None else None


def _channel(
    model: Transformer, config: Config, runtime: Runtime, group: TensorGroup, source: TrainingSource | None
) -> X0Channel:
    """The transport of x0 to this rank."""
    most = most_layers(config, runtime.topology)
    no_memory = source is None and runtime.topology.pipeline > 1
    transport = LocalEmbedding if no_memory else find("parallel.x0_transport", config.transport, TRANSPORTS)
    channel: X0Channel = transport(
        model,
        runtime.groups.pipeline,
        group,
        runtime.device,
        config.parallel.crossings,
        source if isinstance(source, TableSource) else None,
        config.memory is not None and config.memory.tabled(most) == most,
        _rows_of(model, config, runtime, group),
        owns_embedding(config, runtime.topology)
        and (isinstance(source, OwnedTables) or not isinstance(source, TableSource)),
    )
    return channel


def _nothing() -> None:
    """Do nothing after a step's backward passes, where each pass has summed the norms' gradients."""
