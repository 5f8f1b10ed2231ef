"""The model: parameter counts, initialisation, logical names, memory sources."""

import pytest
import torch

from mlm_train.config import ModelConfig
from mlm_train.memory import make_source
from mlm_train.model.counts import count_parameters, train_flops_per_token
from mlm_train.model.initial import draw, initialise
from mlm_train.model.logical import named_pieces
from mlm_train.model.loss import loss_sums
from mlm_train.model.transformer import Transformer

KINDS = {
    "base": {"kind": "base"},
    "memory": {"kind": "memory", "tie_word_embeddings": True},
    "flex": {"kind": "flex", "flex_beta": 3, "num_key_value_heads": 2},
    "linear": {"kind": "flex", "flex_beta": 2, "compute_form": "linear", "compute_input": "post_attention"},
}


def config(name: str) -> ModelConfig:
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return ModelConfig(**shape, intermediate_size=40, **KINDS[name])


@pytest.mark.parametrize("name", KINDS)
def test_counts_are_those_of_the_model(name: str) -> None:
    model = Transformer(config(name))
    counts = count_parameters(config(name))
    assert counts.stored == sum(p.numel() for p in model.parameters())
    served = Transformer(config(name), with_memory=False)
    outside = counts.embedding + counts.head
    assert counts.active + outside == sum(p.numel() for p in served.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_initial_weights_depend_on_seed_and_name_alone(name: str) -> None:
    first, second = Transformer(config(name)), Transformer(config(name))
    torch.manual_seed(1)
    initialise(first, config(name), 7)
    torch.manual_seed(2)
    initialise(second, config(name), 7)
    for (tensor, a), (_, b) in zip(named_pieces(first), named_pieces(second), strict=True):
        assert torch.equal(a, b), tensor
        assert torch.equal(a, draw(config(name), 7, tensor, a.shape)), tensor
    shape = torch.Size((400, 400))
    plain = draw(config(name), 7, "model.layers.0.self_attn.q_proj.weight", shape)
    residual = draw(config(name), 7, "model.layers.0.self_attn.o_proj.weight", shape)
    assert plain.std() == pytest.approx(0.02, rel=0.02)
    assert residual.std() == pytest.approx(0.02 / 6**0.5, rel=0.02)


@pytest.mark.parametrize("name", ["memory", "flex", "linear"])
def test_unique_equals_per_token_in_float64(name: str) -> None:
    model = Transformer(config(name)).double()
    initialise(model, config(name), 3)
    ids = torch.randint(0, 12, (3, 20))
    results = []
    for mode in ("per_token", "unique"):
        model.zero_grad()
        logits = model(ids, make_source(mode, model.memory_blocks()))
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-12


def test_loss_is_torchs_cross_entropy_plus_z() -> None:
    logits, labels = torch.randn(2, 5, 11, dtype=torch.float32) * 3, torch.randint(0, 11, (2, 5))
    labels[0, 2:] = -100
    sums = loss_sums(logits, labels)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert torch.allclose(sums.cross_entropy, expected)
    assert torch.allclose(sums.z, logits.logsumexp(-1)[labels != -100].square().sum())


def test_attention_is_causal() -> None:
    model = Transformer(config("flex")).double()
    initialise(model, config("flex"), 3)
    source = make_source("unique", model.memory_blocks())
    ids = torch.randint(0, 61, (1, 16))
    changed = ids.clone()
    changed[0, 9] = (ids[0, 9] + 1) % 61
    before, after = model(ids, source), model(changed, source)
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-14)
    assert not torch.allclose(before[:, 9], after[:, 9], atol=1e-6)


def test_flops_count_ffn_m_by_distinct_tokens() -> None:
    c = config("memory")
    all_positions, none = (train_flops_per_token(c, 128, ratio) for ratio in (1.0, 0.0))
    ffn_m = 3 * c.num_hidden_layers * c.hidden_size * c.intermediate_size  # norms are not counted
    assert all_positions - none == 6 * ffn_m
