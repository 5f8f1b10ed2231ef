"""Config section `parallel`, and its checks against the model."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mlm_train.config.choices import Engine, X0Transport
from mlm_train.config.model import ModelConfig
from mlm_train.config.section import Section, reject

Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "zbv", "interleaved_zero_bubble", "dualpipe_v"]
INTERLEAVED = ("interleaved_1f1b", "interleaved_zero_bubble")
V_SHAPED = ("zbv", "dualpipe_v")  # rank r holds stage r and the r-th stage from the end
ZERO_BUBBLE = ("zbv", "interleaved_zero_bubble", "dualpipe_v")  # weight gradients are computed separately


class ParallelConfig(Section):
    """How the ranks share the work. The data-parallel size is world / (tensor * pipeline)."""

    tensor: int = Field(1, ge=1, description="tensor-parallel size: ranks that share each layer")
    sequence: bool = Field(
        False,
        description="sequence parallelism: norms, residual and x0 are sharded along the sequence",
    )
    pipeline: int = Field(1, ge=1, description="pipeline-parallel size: ranks that hold consecutive layers")
    virtual_stages: int | None = Field(
        None, ge=2, description="stages per pipeline rank; zbv and dualpipe_v have 2"
    )
    pipeline_schedule: Schedule | None = Field(
        None,
        description="order of micro-batches in the pipeline; default 1f1b. Experimental: "
        "interleaved_zero_bubble, dualpipe_v",
    )
    layers_per_stage: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, description="layers per stage; default: balanced by cost, including the output head"
    )
    x0_transport: X0Transport | None = Field(
        None,
        description="how x0 reaches the pipeline's stages. broadcast (default): the step's distinct rows, "
        "once. relay: passed on beside the hidden state (default with zero-bubble schedules, except with "
        "memory.mode=table). replicate: an embedding on every stage. Or a class of yours: "
        "package.module:Name (docs/extending.md)",
    )
    engine: Engine = Field(
        "fsdp",
        description="what reduces gradients and steps the optimizer: fsdp (AdamW, torch's FSDP2: weights, "
        "gradients and moments sharded over data parallel), deepspeed (AdamW, ZeRO; default where "
        "parallel.zero_stage is given), or a class of yours: package.module:Name (docs/extending.md)",
    )
    zero_stage: Literal[0, 1, 2, 3] | None = Field(
        None,
        description="with engine=deepspeed: ZeRO, what the data-parallel ranks shard instead of replicating: "
        "0 nothing, 1 optimizer states, 2 gradients too, 3 weights too (without a pipeline); default 1",
    )
    shard: int | None = Field(
        None,
        ge=1,
        description="with engine=fsdp: data-parallel ranks that share one copy of the sharded state; "
        "default: all, or what parallel.replicate leaves",
    )
    replicate: int | None = Field(
        None,
        ge=1,
        description="with engine=fsdp: copies of the sharded state (HSDP); default: 1, or what "
        "parallel.shard leaves",
    )
    reduce_dtype: Literal["fp32", "bf16"] | None = Field(
        None,
        description="with engine=fsdp and train.precision=bf16: how gradients are summed over data parallel; "
        "default fp32",
    )
    reduce_each_micro_batch: bool = Field(
        False,
        description="with engine=fsdp, without a pipeline: reduce gradients after each micro-batch, so that "
        "no rank holds them whole; default: once per step",
    )
    reshard_after_forward: bool = Field(
        True,
        description="with engine=fsdp, without a pipeline: whether a block's gathered weights are freed "
        "after each forward and backward pass. false: they are gathered once per step, and each rank holds "
        "all of them until the step's end",
    )
    context: int = Field(1, exclude=True, description="must be 1: there is no context parallelism")
    timeout: float = Field(600.0, gt=0, le=86400, description="timeout of a collective, seconds")

    @model_validator(mode="before")
    @classmethod
    def _zero_is_deepspeed(cls, values: Any) -> Any:
        """ZeRO's stage alone chooses its engine."""
        if isinstance(values, dict) and values.get("zero_stage") is not None:
            return {"engine": "deepspeed"} | values
        return values

    @property
    def reshards(self) -> bool:
        """Whether FSDP frees gathered weights between forward and backward; torch's pipelines keep them."""
        return self.reshard_after_forward and self.pipeline == 1

    @property
    def order(self) -> Schedule:
        """The pipeline schedule, default applied."""
        return self.pipeline_schedule or "1f1b"

    @property
    def zero(self) -> int:
        """The stage of ZeRO, default applied; 0 with another engine than DeepSpeed."""
        if self.engine != "deepspeed":
            return 0
        return 1 if self.zero_stage is None else self.zero_stage

    @property
    def engine_name(self) -> str:
        """The engine, for a reader: with the stage of ZeRO."""
        return f"ZeRO-{self.zero}" if self.engine == "deepspeed" else self.engine

    def sharding(self, data: int) -> tuple[int, int]:
        """(replicate, shard) of `data` data-parallel ranks. Raises UserError where they do not fit."""
        shard = self.shard or (data if self.replicate is None else data // self.replicate)
        replicate = self.replicate or data // max(shard, 1)
        if replicate * shard != data:
            name = "shard" if self.shard is not None else "replicate"
            fitting = ", ".join(str(size) for size in range(1, data + 1) if data % size == 0)
            other = f" with parallel.replicate={replicate}" if name == "shard" and self.replicate else ""
            fix = f"does not fit {data} data-parallel processes{other}: {fitting} divide them"
            reject(f"parallel.{name}", getattr(self, name), fix)
        return replicate, shard

    @property
    def stages_per_rank(self) -> int:
        """Stages per pipeline rank."""
        return 2 if self.order in V_SHAPED else self.virtual_stages or 1

    @property
    def stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.pipeline * self.stages_per_rank

    @property
    def crossings(self) -> int:
        """Stage boundaries that lie between two ranks; the turn of a V does not."""
        return self.stages - 1 - (self.order in V_SHAPED)


def check_parallel(parallel: ParallelConfig, model: ModelConfig, sequence_length: int) -> None:
    """Raise UserError for a layout that does not fit the model; mesh/topology.py checks the world size."""
    if parallel.context != 1:
        reject(
            "parallel.context",
            parallel.context,
            "context parallelism is not part of mlm_train; "
            "use parallel.tensor with parallel.sequence for long sequences",
        )
    _check_engine(parallel)
    _check_tensor(parallel, model, sequence_length)
    if parallel.pipeline == 1:
        for name in ("virtual_stages", "pipeline_schedule", "layers_per_stage", "x0_transport"):
            if getattr(parallel, name) is not None:
                value = getattr(parallel, name)
                reject(f"parallel.{name}", value, "has an effect only with parallel.pipeline above 1")
        return
    if parallel.zero == 3:
        reject(
            "parallel.zero_stage",
            parallel.zero_stage,
            f"is incompatible with parallel.pipeline={parallel.pipeline} (every micro-batch would gather all "
            "weights twice, gradients would stay whole, and a tied head would find no weight): set "
            "parallel.zero_stage=2, or parallel.pipeline=1",
        )
    _check_schedule(parallel, model)
    _check_stages(parallel, model)


OF_FSDP = ("shard", "replicate", "reduce_dtype", "reduce_each_micro_batch", "reshard_after_forward")


def _check_engine(parallel: ParallelConfig) -> None:
    fields = {"zero_stage": "deepspeed"} | dict.fromkeys(OF_FSDP, "fsdp")
    for name, engine in fields.items():
        value, default = getattr(parallel, name), ParallelConfig.model_fields[name].default
        if value != default and parallel.engine != engine:
            fix = f"has an effect only with parallel.engine={engine}, not {parallel.engine}: leave it out"
            reject(f"parallel.{name}", value, fix)
    if parallel.reduce_each_micro_batch and parallel.pipeline > 1:
        fix = f"has no effect with parallel.pipeline={parallel.pipeline}: gradients are reduced once per step"
        reject("parallel.reduce_each_micro_batch", True, fix)
    if not parallel.reshard_after_forward and parallel.pipeline > 1:
        fix = f"has no effect with parallel.pipeline={parallel.pipeline}: torch keeps a stage's weights"
        reject("parallel.reshard_after_forward", False, fix)


def _check_tensor(parallel: ParallelConfig, model: ModelConfig, sequence_length: int) -> None:
    tensor, heads, kv_heads = parallel.tensor, model.num_attention_heads, model.kv_heads
    if heads % tensor or kv_heads % tensor:
        fitting = [str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0 and heads % n == 0]
        reject(
            "parallel.tensor",
            tensor,
            f"must divide {heads} attention and {kv_heads} key-value heads: {', '.join(fitting)} do",
        )
    if not parallel.sequence:
        return
    if tensor == 1:
        reject("parallel.sequence", True, "has an effect only with parallel.tensor above 1")
    if sequence_length % tensor:
        nearest = max(tensor, round(sequence_length / tensor) * tensor)
        reject(
            "data.sequence_length",
            sequence_length,
            f"must be a multiple of parallel.tensor={tensor} with parallel.sequence=true; "
            f"the nearest is {nearest}",
        )


def _check_schedule(parallel: ParallelConfig, model: ModelConfig) -> None:
    schedule, transport = parallel.order, parallel.x0_transport
    if transport is not None and not model.has_memory:
        reject("parallel.x0_transport", transport, "has no effect with model.kind=base")
    if schedule in V_SHAPED:
        if parallel.virtual_stages not in (None, 2):
            reject(
                "parallel.virtual_stages",
                parallel.virtual_stages,
                f"parallel.pipeline_schedule={schedule} has 2",
            )
    elif schedule in INTERLEAVED and parallel.virtual_stages is None:
        reject("parallel.pipeline_schedule", schedule, "needs parallel.virtual_stages, 2 or more")
    elif schedule not in INTERLEAVED and parallel.virtual_stages is not None:
        reject(
            "parallel.virtual_stages",
            parallel.virtual_stages,
            f"has an effect only with parallel.pipeline_schedule={' or '.join(INTERLEAVED)}",
        )


def _check_stages(parallel: ParallelConfig, model: ModelConfig) -> None:
    stages, layers = parallel.stages, model.num_hidden_layers
    if stages > layers:
        each = parallel.stages_per_rank
        fix = f"at most {layers // each} fits"
        if layers // each < 2:
            fix = "take a schedule with fewer stages per rank, or more layers"
        reject("parallel.pipeline", parallel.pipeline, f"makes {stages} stages of {layers} layers; {fix}")
    split = parallel.layers_per_stage
    if split is not None and (len(split) != stages or sum(split) != layers):
        reject(
            "parallel.layers_per_stage",
            split,
            f"needs {stages} numbers that add up to model.num_hidden_layers={layers}",
        )
