"""Causal attention by blocks against torch's own, in eager mode and compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlm_train.kernels import cpu_attention as causal
from mlm_train.kernels.cpu_attention import causal_attention, causal_attention_applies


def inputs(length: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """query, key, value with large scores, the last two strided as views of one fused matmul are."""
    torch.manual_seed(length)
    query = 3 * torch.randn(2, 3, length, head_dim)
    both = 3 * torch.randn(2, length, 6, head_dim).transpose(1, 2)
    return [part.to(dtype).detach().requires_grad_() for part in (query, *both.split(3, 1))]


def gradients(function: object, parts: list[Tensor]) -> list[Tensor]:
    """The output, and the inputs' gradients for a random gradient of it."""
    out = function(*parts)  # type: ignore[operator]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, parts, weight)]


def torch_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's own causal attention."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def error(found: Tensor, exact: Tensor) -> float:
    """Relative error, in norm."""
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1.0))


@pytest.mark.parametrize(("length", "head_dim"), [(1, 8), (5, 8), (16, 6), (37, 24), (48, 32), (80, 8)])
def test_equals_torch_in_float64(length: int, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "MIN_BLOCK", 16)
    parts = inputs(length, head_dim, torch.float64)
    pairs = zip(gradients(causal_attention, parts), gradients(torch_attention, parts), strict=True)
    assert all(error(found, exact) < 1e-12 for found, exact in pairs)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("length", [70, 300])
def test_bf16_is_about_as_far_from_float64_as_torch(length: int, compiles: bool) -> None:
    function = torch.compile(causal_attention, dynamic=False) if compiles else causal_attention
    parts = inputs(length, 48, torch.bfloat16)
    exact = gradients(torch_attention, [part.detach().double().requires_grad_() for part in parts])
    found, theirs = gradients(function, parts), gradients(torch_attention, parts)
    for mine, other, right in zip(found, theirs, exact, strict=True):
        assert error(mine, right) < max(1.5 * error(other, right), 2e-3)


def test_where_it_is_used() -> None:
    taken = []

    def function(query: Tensor, key: Tensor) -> Tensor:
        taken.append(causal_attention_applies(query, key))
        return query + 1

    query, key, _ = inputs(8, 8, torch.bfloat16)
    assert not causal_attention_applies(query, key), "only in a compiled layer"
    for arguments, expected in (
        ((query, key), True),
        ((query.float(), key), False),
        ((query, key[:, :1]), False),
    ):
        torch.compile(function, backend="eager", dynamic=False)(*arguments)
        assert taken.pop() is expected
