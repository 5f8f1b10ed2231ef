"""What the ranks of the peer check run: `base` in our layers, in megatron-core's, in transformers'."""

import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor, nn

from mlm_train.checkpoint.hf.folder import write_folder
from mlm_train.config import Config, ModelConfig
from mlm_train.model.initial import initialise
from mlm_train.model.logical import named_pieces, pieces
from mlm_train.model.loss import IGNORED, LossSums, count_labels
from mlm_train.model.rope import rotary_angles, rotate
from mlm_train.model.transformer import Transformer
from mlm_train.parallel import runtime as processes
from mlm_train.parallel.build import build_loss, build_model, tensor_group
from mlm_train.parallel.tensor.collectives import TensorGroup
from tests.parallel.parity_cases import assembled
from tests.parallel.reference import global_batch, logical_gradients, relative_error, sharpen, tiny_config


class Result(NamedTuple):
    """Means over the valid labels, and the gradients of CE + z_loss * z by logical name."""

    cross_entropy: float
    z: float
    gradients: dict[str, Tensor]


def run_cases(cases: list[dict]) -> list[dict[str, float]]:
    """For each model, the relative distances of peers' losses and gradients from ours, the largest rank's."""
    return [_run_case(model) for model in cases]


def _run_case(model: dict) -> dict[str, float]:
    config = tiny_config(model, parallel={"tensor": processes.world_size()})
    runtime = processes.start(config)
    whole = Transformer(config.model)
    initialise(whole, config.model, config.train.seed)
    sharpen(whole)
    weights = dict(named_pieces(whole))

    network = build_model(config, runtime)
    group = tensor_group(config, runtime)
    with torch.no_grad():
        parameters = dict(network.named_parameters())
        for piece in pieces(network):
            piece.of(parameters[piece.parameter]).copy_(piece.cut(weights[piece.name]))
    ids, labels = _batch()
    ours = _ours(config, network, ids, labels, group)
    error = _distances("megatron", _megatron(config, weights), ours)
    held = {name: parameter.grad for name, parameter in network.named_parameters()}
    ours = ours._replace(gradients=assembled(list(pieces(network)), held))
    if runtime.is_rank_0:
        error |= _distances("transformers", _transformers(config, weights), ours)
    assert all(map(math.isfinite, error.values())), error  # max() would lose a NaN
    errors: list[Any] = [None] * runtime.topology.world
    dist.all_gather_object(errors, error)
    return {name: max(error[name] for error in errors if name in error) for name in errors[0]}


def _batch() -> tuple[Tensor, Tensor]:
    """ids and labels; the last position has no label, as in transformers."""
    ids, labels = global_batch(0)
    labels[:, -1] = IGNORED
    return ids, labels


def _result(sums: LossSums, labels: Tensor, config: Config, gradients: Any) -> Result:
    count = count_labels(labels)
    ((sums.cross_entropy + config.train.z_loss * sums.z) / count).backward()
    return Result(float(sums.cross_entropy) / count, float(sums.z) / count, gradients())


def _ours(config: Config, network: Transformer, ids: Tensor, labels: Tensor, group: TensorGroup) -> Result:
    count, loss, z_loss = count_labels(labels), build_loss(config, group), config.train.z_loss
    objective, summed = network(ids, loss=lambda hidden, weight: loss(hidden, weight, labels, 1 / count))
    objective.backward()
    cross_entropy = float(summed) / count
    return Result(cross_entropy, (objective.item() - cross_entropy) / z_loss, logical_gradients(network))


def _distances(peer: str, theirs: Result, ours: Result) -> dict[str, float]:
    for name, gradient in (*ours.gradients.items(), *theirs.gradients.items()):
        assert gradient.isfinite().all(), (peer, name)  # relative_error's max() would lose a NaN
    return {
        f"{peer} loss": abs(theirs.cross_entropy / ours.cross_entropy - 1),
        f"{peer} z": abs(theirs.z / ours.z - 1),
        f"{peer} gradients": relative_error(theirs.gradients, ours.gradients),
    }


# --- megatron-core: its own layers, with modules named so that parameters have their export names.


def _column(config: ModelParallelConfig, inputs: int, outputs: int, **options: Any) -> ColumnParallelLinear:
    return ColumnParallelLinear(
        inputs, outputs, config=config, init_method=nn.init.zeros_, bias=False, gather_output=False, **options
    )


def _row(config: ModelParallelConfig, inputs: int, outputs: int) -> RowParallelLinear:
    return RowParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=nn.init.zeros_,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
    )


class MegatronAttention(nn.Module):
    """Three column-parallel matmuls, attention of this rank's heads, a row-parallel matmul."""

    def __init__(self, model: ModelConfig, layout: ModelParallelConfig) -> None:
        super().__init__()
        self.head_dim = model.attention_head_dim
        width, kv_width = model.num_attention_heads * self.head_dim, model.kv_heads * self.head_dim
        self.q_proj = _column(layout, model.hidden_size, width)
        self.k_proj = _column(layout, model.hidden_size, kv_width)
        self.v_proj = _column(layout, model.hidden_size, kv_width)
        self.o_proj = _row(layout, width, model.hidden_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x [batch, sequence, hidden] -> the same shape."""
        query, key, value = (
            projection(x)[0].unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(
            rotate(query, *rope), rotate(key, *rope), value, is_causal=True, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))[0]


class MegatronFFN(nn.Module):
    """SwiGLU of two column-parallel matmuls and a row-parallel one."""

    def __init__(self, model: ModelConfig, layout: ModelParallelConfig) -> None:
        super().__init__()
        self.gate_proj = _column(layout, model.hidden_size, model.intermediate_size)
        self.up_proj = _column(layout, model.hidden_size, model.intermediate_size)
        self.down_proj = _row(layout, model.intermediate_size, model.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> [..., hidden]."""
        return self.down_proj(F.silu(self.gate_proj(x)[0]) * self.up_proj(x)[0])[0]


class MegatronBlock(nn.Module):
    """Llama's layer."""

    def __init__(self, model: ModelConfig, layout: ModelParallelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(model.hidden_size, eps=model.rms_norm_eps)
        self.self_attn = MegatronAttention(model, layout)
        self.post_attention_layernorm = nn.RMSNorm(model.hidden_size, eps=model.rms_norm_eps)
        self.mlp = MegatronFFN(model, layout)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x [batch, sequence, hidden] -> the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), rope)
        return x + self.mlp(self.post_attention_layernorm(x))


class MegatronBase(nn.Module):
    """The model; a tied head is a column-parallel matmul with the embedding's weight, as Megatron's GPT."""

    def __init__(self, model: ModelConfig, layout: ModelParallelConfig) -> None:
        super().__init__()
        self.config = model
        self.model = nn.Module()
        self.model.embed_tokens = VocabParallelEmbedding(
            model.vocab_size, model.hidden_size, init_method=nn.init.zeros_, config=layout
        )
        layers = [MegatronBlock(model, layout) for _ in range(model.num_hidden_layers)]
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = nn.RMSNorm(model.hidden_size, eps=model.rms_norm_eps)
        tied = model.tie_word_embeddings
        self.lm_head = _column(layout, model.hidden_size, model.vocab_size, skip_weight_param_allocation=tied)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [batch, sequence] -> logits of this rank's vocabulary shard."""
        config, embedding = self.config, self.model.embed_tokens
        rope = rotary_angles(config.attention_head_dim, config.rope_theta, torch.arange(ids.shape[1]))
        x = embedding(ids)
        for layer in self.model.layers:
            x = layer(x, rope)
        return self.lm_head(
            self.model.norm(x), weight=embedding.weight if config.tie_word_embeddings else None
        )[0]


def _megatron(config: Config, weights: dict[str, Tensor]) -> Result:
    """Run megatron-core's layers on shards of the same weights, cut along the dimension it gives."""
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(dist.get_world_size(), create_gloo_process_groups=False)
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    layout = ModelParallelConfig(
        tensor_model_parallel_size=size,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    network = MegatronBase(config.model, layout)
    parameters = dict(network.named_parameters())
    assert parameters.keys() == weights.keys()
    sharded = 0
    with torch.no_grad():
        for name, parameter in parameters.items():
            weight = weights[name]
            if getattr(parameter, "tensor_model_parallel", False):
                weight = weight.chunk(size, parameter.partition_dim)[rank]
                sharded += 1
            assert weight.shape == parameter.shape, name
            parameter.copy_(weight)
    matrices = sum(weight.dim() > 1 for weight in weights.values())
    assert sharded == matrices, "every matrix is sharded, every norm is whole"

    ids, labels = _batch()
    valid = labels != IGNORED
    logits = network(ids)
    # z first: the cross-entropy overwrites fp32 logits.
    top = logits.detach().amax(-1)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=parallel_state.get_tensor_model_parallel_group())
    exponentials = (logits - top.unsqueeze(-1)).exp().sum(-1)
    lse = reduce_from_tensor_model_parallel_region(exponentials).log() + top
    cross_entropy = vocab_parallel_cross_entropy(logits, labels)
    sums = LossSums((cross_entropy * valid).sum(), (lse.square() * valid).sum())
    return _result(
        sums, labels, config, lambda: {name: parameter.grad for name, parameter in parameters.items()}
    )


def _transformers(config: Config, weights: dict[str, Tensor]) -> Result:
    """Run the export of the same weights in transformers, with its own loss and attention."""
    from transformers import LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder) / "export", config.model, weights)
        network, loading = LlamaForCausalLM.from_pretrained(
            Path(folder) / "export", attn_implementation="eager", output_loading_info=True
        )
    assert not any(loading.values()), loading
    ids, labels = _batch()
    ahead = torch.cat(
        (torch.full_like(labels[:, :1], IGNORED), labels[:, :-1]), dim=1
    )  # transformers shifts labels itself
    out = network(input_ids=ids, labels=ahead)
    assert out.loss is not None
    count = count_labels(labels)
    z = (out.logits.logsumexp(-1).square() * (labels != IGNORED)).sum()
    sums = LossSums(out.loss * count, z)
    return _result(
        sums,
        labels,
        config,
        lambda: {name: parameter.grad for name, parameter in network.named_parameters()},
    )
