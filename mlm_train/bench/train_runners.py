"""The step runners that `bench train` compares: our trainer, and transformers' Llama.

Each runs a step in the same parts: begin, micro-batches, finish, optimizer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mlm_train.bench.train_presets import Variant
from mlm_train.checkpoint.hf.config import config_json
from mlm_train.config import Config, ModelConfig
from mlm_train.errors import UserError
from mlm_train.model.block import Block, MemoryBlock
from mlm_train.model.initial import draw, initialise
from mlm_train.model.loss import count_labels
from mlm_train.model.transformer import Transformer
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.build import autocast_of, build_engine, build_executor, build_model
from mlm_train.parallel.engine.base import parameter_groups
from mlm_train.parallel.pipeline.single_stage import SingleStageExecutor
from mlm_train.train.batches import MicroBatch
from mlm_train.train.step import Trainer
from mlm_train.utils.host_memory import keep_freed


class StepRunner(Protocol):
    """Runs a training step part by part; gradients accumulate until `update`."""

    @property
    def model(self) -> nn.Module:
        """The model in training."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, whose state is counted."""
        ...

    def begin(self, batches: Sequence[MicroBatch]) -> None:
        """Do the work before the micro-batches of a step, which are `batches`."""
        ...

    def run(self, number: int) -> float:
        """Run forward and backward of micro-batch `number`. Returns its mean cross-entropy."""
        ...

    def finish(self) -> None:
        """Do the work after the micro-batches."""
        ...

    def whole(self, batches: Sequence[MicroBatch]) -> float:
        """Run a whole step except the optimizer, as in training. Returns the mean cross-entropy."""
        ...

    def update(self) -> None:
        """Clip gradients, run AdamW, drop the gradients."""
        ...

    def step_tensors(self) -> list[Tensor]:
        """Tensors held between begin and finish, other than gradients."""
        ...


class AttentionBlock(MemoryBlock):
    """x' = x + Attn(N(x)): memory's block without FFN-M and lookup, for a model without FFN."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        scale = [1.0] * config.num_hidden_layers
        config = config.model_copy(update={"kind": "memory", "memory_scale": scale})
        super().__init__(config, layer, with_memory=False)

    def forward(self, x: Tensor, rope: Any, read: Any = None, cache: Any = None) -> Tensor:
        """x [batch, sequence, hidden] -> the same shape."""
        return self._run(MemoryBlock._context, x, rope, cache)


def remove_ffn(model: Transformer) -> None:
    """Replace each block by an AttentionBlock."""
    for name, block in model.layers.items():
        assert isinstance(block, Block)
        model.layers[name] = AttentionBlock(model.config, block.layer)


class TrainerRunner:
    """Runs the model, engine and executor of `pretrain` in one process."""

    def __init__(self, variant: Variant, config: Config) -> None:
        runtime = processes.start(config)
        self.model = build_model(config, runtime)
        if variant.family == "noffn":
            remove_ffn(self.model)
        initialise(self.model, config.model, config.train.seed)
        self.lr = config.optimizer.lr
        executor = build_executor(self.model, config, runtime)
        self.engine = build_engine(self.model, executor, config, runtime)
        assert isinstance(executor, SingleStageExecutor)
        self.executor = executor
        self.trainer = Trainer(self.engine, executor, runtime)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The engine's optimizer."""
        return self.engine.optimizer

    def begin(self, batches: Sequence[MicroBatch]) -> None:
        """Enter the engine's accumulation and the executor's step, as Trainer.backward does."""
        self.scale = 1.0 / sum(count_labels(batch.labels) for batch in batches)
        self.regions = ExitStack()
        self.regions.enter_context(self.engine.accumulating())
        self.prepared = self.regions.enter_context(self.executor.step(batches))

    def run(self, number: int) -> float:
        """Run a prepared micro-batch."""
        micro_batch = self.prepared[number]
        return self.executor.run(micro_batch, self.scale).item() / count_labels(micro_batch.labels)

    def finish(self) -> None:
        """Run the tables' backward and end the engine's accumulation."""
        self.regions.close()

    def whole(self, batches: Sequence[MicroBatch]) -> float:
        """Call Trainer.backward."""
        total, labels = self.trainer.backward(batches)
        return total.item() / labels

    def update(self) -> None:
        """Call Engine.step."""
        self.engine.step(self.lr)

    def step_tensors(self) -> list[Tensor]:
        """The memory source's tensors: tables, their gradients, the step's rows."""
        return list(_tensors_of(self.executor.source))


class LlamaRunner:
    """Runs transformers' LlamaForCausalLM with its own loss, torch's AdamW and gradient clipping."""

    def __init__(self, variant: Variant, config: Config) -> None:
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError:
            raise UserError("transformers is not installed (requirements-dev.txt has it)") from None
        keep_freed()  # as runtime.start does for ours
        tree = config_json(config.model) | {"use_cache": False}
        self.device = processes.pick_device(config.train.device)
        self.model = LlamaForCausalLM(LlamaConfig.from_dict(tree)).train().to(self.device)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(draw(config.model, config.train.seed, name, weight.shape))
        options = config.optimizer
        self.max_grad_norm = options.max_grad_norm
        groups: Any = parameter_groups(self.model, options)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, lr=options.lr, betas=options.betas, eps=options.eps
        )
        self.entry: Callable[..., Any] = torch.compile(self.model) if variant.compiled else self.model
        self.precision = autocast_of(config, self.device)

    def begin(self, batches: Sequence[MicroBatch]) -> None:
        """Count the labels of the step, by which transformers' own trainer divides a micro-batch's loss."""
        self.batches = [MicroBatch(*(part.to(self.device) for part in batch)) for batch in batches]
        # A tensor: torch.compile would recompile for each new number.
        self.labels = torch.tensor(sum(count_labels(batch.labels) for batch in batches), device=self.device)

    def run(self, number: int) -> float:
        """Run a micro-batch."""
        batch = self.batches[number]
        with self.precision:
            loss = self.entry(
                input_ids=batch.ids,
                labels=batch.labels,
                shift_labels=batch.labels,  # ours are the next tokens already
                num_items_in_batch=self.labels,
            ).loss
        loss.backward()
        return (loss.detach() * self.labels).item() / count_labels(batch.labels)

    def finish(self) -> None:
        """Do nothing."""

    def whole(self, batches: Sequence[MicroBatch]) -> float:
        """Run the plain loop."""
        self.begin(batches)
        return sum(map(self.run, range(len(batches)))) / len(batches)

    def update(self) -> None:
        """Clip, step and drop the gradients."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step_tensors(self) -> list[Tensor]:
        """Return no tensors."""
        return []


def build_runner(variant: Variant, config: Config) -> StepRunner:
    """Build a variant with the initial weights of config field train.seed."""
    return LlamaRunner(variant, config) if variant.family == "hf" else TrainerRunner(variant, config)


def _tensors_of(thing: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Tensors that an object of ours or its collections hold, each storage once, without modules' weights."""
    seen = set() if seen is None else seen
    if isinstance(thing, nn.Module | nn.Parameter) or id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        if thing.untyped_storage().data_ptr() not in seen:
            seen.add(thing.untyped_storage().data_ptr())
            yield thing
    elif isinstance(thing, Mapping):
        for value in thing.values():
            yield from _tensors_of(value, seen)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from _tensors_of(value, seen)
    elif type(thing).__module__.startswith("mlm_train."):
        yield from _tensors_of(vars(thing), seen)
