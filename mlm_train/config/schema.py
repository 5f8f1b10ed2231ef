"""The typed schema of a run: one YAML file of nine sections. Descriptions give the units."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mlm_train.config.memory import MemoryConfig, check_memory
from mlm_train.config.model import ModelConfig
from mlm_train.config.monitor import MonitorConfig
from mlm_train.config.parallel import ZERO_BUBBLE, ParallelConfig, check_parallel
from mlm_train.config.schedule import ScheduleConfig, check_schedule
from mlm_train.config.section import Section, reject
from mlm_train.errors import UserError
from mlm_train.utils.checks import Check
from mlm_train.utils.urls import is_url


class BlendSource(Section):
    """One source of a blend."""

    path: str = Field(description="folder written by `mlm-train data prepare`")
    weight: float = Field(gt=0, description="share of the tokens trained on, relative to the other weights")


class DataConfig(Section):
    """Training data."""

    path: str | None = Field(None, description="folder written by `mlm-train data prepare`")
    blend: Annotated[list[BlendSource], Field(min_length=1)] | None = Field(
        None, description="instead of path: several such folders with one tokenizer, weighted by tokens"
    )
    validation: dict[Annotated[str, Field(pattern="^[^/\\s]+$")], str] | None = Field(
        None,
        description="further folders by name, each with a validation loss of its own beside that of path or "
        "blend; none of them is trained on",
    )
    sequence_length: int = Field(2048, ge=1, le=2**31, description="tokens per sequence")
    separate_documents: bool = Field(
        False,
        description="tokens attend only within their own document, whose positions start at 0; a sequence "
        "may hold several documents",
    )
    verify: Check = Field(
        "sizes",
        description="what of the data is compared with its manifest before a run: full (every byte, by one "
        "rank, within parallel.timeout), sizes, or none",
    )

    @model_validator(mode="after")
    def _path_or_blend(self) -> Self:
        if self.path is None and self.blend is None:
            raise UserError(
                "config: data.path is missing; set it in the YAML or as data.path=..., or give data.blend"
            )
        if self.path is not None and self.blend is not None:
            fix = "give either this or data.blend; data.path=null on the command line removes it"
            reject("data.path", self.path, fix)
        return self


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW with clipping of the global gradient norm."""

    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="decay of the two moments")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay; not applied to norms")
    decay_embeddings: bool = Field(
        True, description="whether weight decay applies to the embedding and the output head too"
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="the global gradient norm is clipped to this; 0: no clipping"
    )


class BatchSizeWarmup(Section):
    """Global batch size that grows from `start` by `increment` over the first `samples` sequences."""

    start: int = Field(ge=1, description="first global batch size, sequences")
    increment: int = Field(ge=1, description="growth at a time, sequences")
    samples: int = Field(ge=1, description="sequences after which train.global_batch_size is reached")


class SpikeConfig(Section):
    """Detection of loss spikes: roll back to the newest checkpoint and skip the samples around the spike."""

    sigmas: float = Field(
        6.0, gt=0, description="standard deviations above the window's mean from which a loss is a spike"
    )
    window: int = Field(100, ge=2, description="steps in the window; no loss is a spike until it is full")
    skip_steps: int = Field(
        20, ge=0, description="steps' worth of samples skipped after the spike, beside those up to it"
    )
    max_rollbacks: int = Field(3, ge=1, description="rollbacks per run; the next spike ends it")


ActivationCheckpointing = Literal["none", "selective", "full"]


class TrainConfig(Section):
    """Length, batch size, precision and safeguards of a run."""

    output: str = Field(description="folder of the run: config, checkpoints, TensorBoard, log")
    steps: int = Field(ge=1, description="optimizer steps")
    global_batch_size: int = Field(ge=1, le=2**31, description="sequences per step, over all ranks")
    micro_batch_size: int = Field(ge=1, le=2**31, description="sequences per forward pass, per rank")
    batch_size_warmup: BatchSizeWarmup | None = Field(None, description="batch size warmup; default: none")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: autocast; weights and gradients stay fp32"
    )
    activation_checkpointing: ActivationCheckpointing | list[ActivationCheckpointing] = Field(
        "none",
        description="activations recomputed in the backward pass. selective: attention between its two "
        "matmuls; full: whole layers, and FFN-M on its own. A list has one entry per pipeline stage",
    )
    compile: bool = Field(
        False,
        description="torch.compile the layers, one graph for all of them; the first step waits for it",
    )
    seed: int = Field(1234, ge=0, lt=2**63, description="seed of the initial weights and the sample order")
    deterministic: bool = Field(False, description="deterministic kernels on CUDA too; slower (docs/run.md)")
    z_loss: float = Field(1e-6, ge=0, description="weight of the mean squared log-sum-exp")
    loss_chunk_size: int | None = Field(
        None,
        ge=1,
        description="tokens per chunk of logits in the loss; default: as many as take 256 MiB in fp32 on a "
        "CPU and 2 GiB on a GPU, half of it in bf16",
    )
    eval_interval: int = Field(0, ge=0, description="steps between evaluations; 0: only at the end")
    eval_samples: int = Field(64, ge=1, description="validation sequences per evaluation, spread evenly")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA if available")
    watchdog_timeout: float | None = Field(
        None,
        ge=0,
        description="seconds without progress after which a run is reported as hung and ended; "
        "default: half of parallel.timeout; 0: never",
    )
    gc_interval: int = Field(
        50,
        ge=0,
        description="steps between garbage collections of Python, on all ranks at once; 0: whenever it likes",
    )
    max_skipped_steps: int = Field(
        3,
        ge=1,
        description="consecutive steps with non-finite loss or gradient (skipped, weights unchanged) that "
        "end the run",
    )
    spike: SpikeConfig | None = Field(None, description="rollback at loss spikes; default: none")
    stop_after: int | None = Field(
        None, ge=1, description="end cleanly, with a checkpoint, after this many steps of this launch"
    )

    def activation_checkpointing_of(self, stage: int) -> ActivationCheckpointing:
        """`activation_checkpointing` of a pipeline stage."""
        chosen = self.activation_checkpointing
        return chosen if isinstance(chosen, str) else chosen[stage]


class CheckpointConfig(Section):
    """Saving and resuming."""

    interval: int = Field(500, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_latest_k: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_interval: int = Field(
        0, ge=0, description="also keep checkpoints of steps that are multiples of it; 0: none"
    )
    keep_best_k: int = Field(
        0,
        ge=0,
        description="also keep this many checkpoints of the lowest validation loss; RUN/best names one",
    )
    async_save: bool = Field(True, description="continue training while a checkpoint is written from a copy")
    url: str | None = Field(
        None,
        description="URL (s3://, gs://, ..., of a package that fsspec knows) to which every checkpoint is "
        "uploaded too, during training; a run resumes from there where its folder has no newer one",
    )
    resume: bool = Field(
        True, description="continue from the newest checkpoint of train.output or checkpoint.url"
    )
    fall_back: bool = Field(
        True,
        description="rename a damaged newest checkpoint, and continue from the newest intact one; false: "
        "refuse to start",
    )
    warm_start: str | None = Field(
        None,
        description="checkpoint or export from which a new run takes its initial weights, and nothing else",
    )
    verify: Check = Field(
        "full",
        description="what of a checkpoint, or of warm_start's export, is compared with its manifest before "
        "loading: full (every byte, shared among the ranks), sizes, or none",
    )
    accept_data: str | None = Field(
        None,
        pattern="^sha256:[0-9a-f]{12,64}$",
        description="fingerprint of other data, as printed by the error, with which a checkpoint may resume",
    )


class Config(Section):
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    memory: MemoryConfig | None = Field(None, description="not with model.kind=base")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        """Checks that involve several sections; parallel/mesh/topology.py checks the world size."""
        self._check_memory()
        check_schedule(self.schedule, self.optimizer.lr, self.train.steps)
        self._check_batch()
        self._check_keep()
        self._check_url()
        if self.data.sequence_length > self.model.max_position_embeddings:
            reject(
                "data.sequence_length",
                self.data.sequence_length,
                f"is longer than model.max_position_embeddings={self.model.max_position_embeddings}",
            )
        check_parallel(self.parallel, self.model, self.data.sequence_length)
        self._check_transport()
        self._check_activation_checkpointing()
        self._check_compile()
        if self.train.watchdog_timeout is not None and self.train.watchdog_timeout >= self.parallel.timeout:
            fix = f"must be below parallel.timeout={self.parallel.timeout}, the timeout of a collective"
            reject("train.watchdog_timeout", self.train.watchdog_timeout, fix)
        return self

    @property
    def schedule_steps(self) -> int:
        """Steps of the whole schedule, which may differ from train.steps."""
        return self.schedule.total_steps or self.train.steps

    @property
    def tables(self) -> bool:
        """Whether FFN-M's rows of a step are computed before its micro-batches (memory.mode=table)."""
        return self.memory is not None and self.memory.mode == "table"

    @property
    def transport(self) -> str:
        """How x0 reaches the pipeline's stages: parallel.x0_transport, default applied."""
        relays = self.parallel.order in ZERO_BUBBLE and not self.tables
        return self.parallel.x0_transport or ("relay" if relays else "broadcast")

    @property
    def reduces_each_pass(self) -> bool:
        """Whether ZeRO reduces gradients in every backward pass and keeps only its shard.

        With a pipeline or tables, some gradients come from outside the micro-batches' passes (x0, tied head,
        FFN-M), so all gradients are reduced at the end of the step.
        """
        return self.parallel.zero >= 2 and self.parallel.pipeline == 1 and not self.tables

    def _check_transport(self) -> None:
        transport, schedule = self.parallel.x0_transport, self.parallel.order
        if transport is None:
            return
        if self.tables:
            if transport != "broadcast":
                fix = "is incompatible with memory.mode=table, which needs the step's rows: use broadcast"
                reject("parallel.x0_transport", transport, fix)
        elif schedule in ZERO_BUBBLE and transport != "relay":
            reject(
                "parallel.x0_transport",
                transport,
                f"is incompatible with parallel.pipeline_schedule={schedule}, which computes weight "
                "gradients separately, from a stage's input alone: use relay, or memory.mode=table",
            )

    def _check_activation_checkpointing(self) -> None:
        chosen, parallel = self.train.activation_checkpointing, self.parallel
        if isinstance(chosen, list) and len(chosen) != parallel.stages:
            fix = f"needs one value for all stages, or a list of {parallel.stages}"
            reject("train.activation_checkpointing", chosen, fix)
        if parallel.order in ZERO_BUBBLE and "full" in (chosen, *chosen):
            reject(
                "train.activation_checkpointing",
                chosen,
                f"with parallel.pipeline_schedule={parallel.order} a layer's forward would be recomputed for "
                "each of its weights: use selective, or parallel.pipeline_schedule=1f1b",
            )

    def _check_compile(self) -> None:
        """Reject what does not run or does not pay with torch 2.13 and DeepSpeed 0.19."""
        if not self.train.compile:
            return
        if self.parallel.pipeline > 1 and self.parallel.order in ZERO_BUBBLE:
            fix = (
                f"is incompatible with parallel.pipeline_schedule={self.parallel.order}, which computes "
                "weight gradients separately; a compiled layer's backward is one graph: use 1f1b, gpipe or "
                "interleaved_1f1b"
            )
            reject("train.compile", True, fix)
        if self.parallel.zero == 3:
            fix = (
                "is incompatible with parallel.zero_stage=3: gathering weights at each matmul breaks a "
                "compiled layer's graph: set parallel.zero_stage=2, or leave train.compile out"
            )
            reject("train.compile", True, fix)

    def _check_memory(self) -> None:
        if self.model.has_memory and self.memory is None:
            self._fill("memory", MemoryConfig())
        if not self.model.has_memory and self.memory is not None:
            reject("memory.mode", self.memory.mode, "has no effect with model.kind=base; leave it out")
        if self.memory is not None:
            check_memory(self.memory, self.parallel, self.train.precision)

    def _check_url(self) -> None:
        url = self.checkpoint.url
        if url is not None and not is_url(url):
            reject("checkpoint.url", url, "is not a URL: give s3://..., gs://..., sftp://... or file:///...")

    def _check_keep(self) -> None:
        checkpoint, eval_interval = self.checkpoint, self.train.eval_interval
        interval, kept, best = checkpoint.interval, checkpoint.keep_interval, checkpoint.keep_best_k
        if kept and (interval == 0 or kept % interval):
            fix = f"must be a multiple of checkpoint.interval={interval}: other steps have no checkpoint"
            reject("checkpoint.keep_interval", kept, fix)
        if best and (interval == 0 or eval_interval == 0 or interval % eval_interval):
            fix = (
                f"needs a validation for each checkpoint: train.eval_interval={eval_interval} must divide "
                f"checkpoint.interval={interval}"
            )
            reject("checkpoint.keep_best_k", best, fix)

    def _check_batch(self) -> None:
        train, warmup = self.train, self.train.batch_size_warmup
        if train.global_batch_size % train.micro_batch_size:
            reject(
                "train.global_batch_size",
                train.global_batch_size,
                f"must be a multiple of train.micro_batch_size={train.micro_batch_size}",
            )
        if warmup is None:
            return
        if warmup.start >= train.global_batch_size:
            reject(
                "train.batch_size_warmup.start",
                warmup.start,
                f"must be below train.global_batch_size={train.global_batch_size}",
            )
        if (train.global_batch_size - warmup.start) % warmup.increment:
            reject(
                "train.batch_size_warmup.increment",
                warmup.increment,
                f"must divide global_batch_size - start = {train.global_batch_size - warmup.start}",
            )
