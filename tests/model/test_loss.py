"""The chunked head and loss against the plain one, to the precision of the dtype."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mlm_train.config.load import parse_config
from mlm_train.model import loss as loss_module
from mlm_train.model.initial import initialise
from mlm_train.model.loss import IGNORED, VocabRange, default_chunk, head_loss, loss_sums
from mlm_train.model.transformer import Transformer

HIDDEN, VOCABULARY, SHAPE = 16, 53, (3, 7)
Z_LOSS, SCALE = 1e-2, 0.37


class Result(NamedTuple):
    """Scalars and gradients of one method to compute the loss."""

    objective: Tensor
    cross_entropy: Tensor
    hidden: Tensor
    weight: Tensor


def inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight (logits of several units), labels with a third ignored and the first chunk of 4 all."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*SHAPE, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, SHAPE, generator=generator)
    labels[torch.rand(SHAPE, generator=generator) < 1 / 3] = IGNORED
    labels[0, :4] = IGNORED
    labels[2, 0], labels[2, 1] = 0, VOCABULARY - 1
    return hidden.to(dtype), weight.to(dtype), labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Result:
    """logsumexp and gather of all logits, in their dtype, gradients by autograd."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    lse, valid = logits.logsumexp(-1), labels != IGNORED
    target = logits.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    cross_entropy = ((lse - target) * valid).sum()
    objective = SCALE * (cross_entropy + Z_LOSS * (lse.square() * valid).sum())
    objective.backward()
    return Result(objective.detach(), cross_entropy.detach(), hidden.grad, weight.grad)


def call(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None, **other: Any) -> tuple:
    """head_loss over the whole vocabulary."""
    vocabulary = VocabRange(0, VOCABULARY)
    options = {"scale": SCALE, "z_loss": Z_LOSS, "vocabulary": vocabulary, "chunk": chunk} | other
    return head_loss(hidden, weight, labels, **options)


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None, **other: Any) -> Result:
    """The method under test."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    objective, cross_entropy = call(hidden, weight, labels, chunk, **other)
    assert not cross_entropy.requires_grad
    objective.backward()
    return Result(objective.detach(), cross_entropy, hidden.grad, weight.grad)


def distances(found: Result, reference: Result) -> dict[str, float]:
    """Relative, of each scalar and gradient."""
    return {
        name: float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
        for name, a, b in zip(Result._fields, found, reference, strict=True)
    }


@pytest.mark.parametrize("rows", [5, 2**11], ids=["blocks", "one block"])
@pytest.mark.parametrize("chunk", [1, 4, 5, 21, 100, None])
def test_equals_plain_in_float64(chunk: int | None, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CPU_GRADIENT_ROWS", rows)
    for seed in range(3):
        found = chunked(*inputs(seed), chunk)
        assert found.objective.dtype == found.cross_entropy.dtype == torch.float64
        assert max(distances(found, plain(*inputs(seed))).values()) < 1e-12


@pytest.mark.parametrize("chunk", [5, None])
def test_compiled_equals_plain_in_float64(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CPU_GRADIENT_ROWS", 20)
    for seed in range(2):
        found = chunked(*inputs(seed), chunk, compiles=True)
        assert max(distances(found, plain(*inputs(seed))).values()) < 1e-12


@pytest.mark.parametrize("rows", [1, 2, 50])
def test_blocks_of_the_softmax_do_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = chunked(*inputs(), 5)
    monkeypatch.setattr(loss_module, "BLOCK_BYTES", 4 * VOCABULARY * rows)
    assert all(map(torch.equal, chunked(*inputs(), 5), expected))


def test_equals_loss_sums_in_fp32() -> None:
    hidden, weight, labels = inputs(dtype=torch.float32)
    found = chunked(hidden, weight, labels, 4)
    assert all(tensor.dtype == torch.float32 for tensor in found)
    assert max(distances(found, plain(*inputs())).values()) < 1e-6
    sums = loss_sums(F.linear(hidden, weight), labels)
    assert torch.allclose(found.cross_entropy, sums.cross_entropy)
    assert torch.allclose(found.objective, SCALE * (sums.cross_entropy + Z_LOSS * sums.z))


@pytest.mark.parametrize(("chunk", "compiles"), [(4, False), (None, False), (4, True)])
def test_bf16_autocast_is_no_further_from_float64_than_plain(
    chunk: int | None, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CPU_GRADIENT_ROWS", 10)
    mine, theirs = [], []
    for seed in range(20):
        reference, (hidden, weight, labels) = plain(*inputs(seed)), inputs(seed, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mine.append(distances(chunked(hidden, weight, labels, chunk, compiles=compiles), reference))
            theirs.append(distances(plain(hidden, weight, labels), reference))
    for name in Result._fields:
        median = [float(torch.tensor([d[name] for d in found]).median()) for found in (mine, theirs)]
        assert min(median) > 1e-5, "both must really compute in bf16"
        assert median[0] <= 1.25 * median[1], (name, median)


def test_gradients_have_the_dtypes_of_their_tensors() -> None:
    hidden, weight, labels = inputs(dtype=torch.float32)
    for one, other in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = chunked(hidden.to(one), weight.to(other), labels, 4)
        assert (found.hidden.dtype, found.weight.dtype) == (one, other)
        assert found.objective.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):  # autocast leaves float64 alone
        assert max(distances(chunked(*inputs(), 4), plain(*inputs())).values()) < 1e-12


def test_all_ignored_is_zero_with_zero_gradients() -> None:
    hidden, weight, labels = inputs()
    for tensor in chunked(hidden, weight, torch.full_like(labels, IGNORED), 4):
        assert tensor.count_nonzero() == 0


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = inputs()
    reference = plain(hidden * 1e3, weight, labels)
    assert max(distances(chunked(hidden * 1e3, weight, labels, 4), reference).values()) < 1e-12


def test_padded_rows_are_masked_and_get_no_gradient() -> None:
    hidden, weight, labels = inputs()
    padded = torch.cat((weight, torch.zeros(4, HIDDEN, dtype=weight.dtype)))
    found = chunked(hidden, padded, labels, 4)
    assert found.weight[VOCABULARY:].count_nonzero() == 0
    found = found._replace(weight=found.weight[:VOCABULARY])
    assert max(distances(found, plain(hidden, weight, labels)).values()) < 1e-12


def test_backward_may_run_twice() -> None:
    """As zero-bubble schedules do: the hidden state's gradient first, the weight's later."""
    hidden, weight, labels = inputs()
    reference = plain(hidden, weight, labels)
    hidden.requires_grad_()
    weight.requires_grad_()
    objective, _ = call(hidden, weight, labels, 4)
    (first,) = torch.autograd.grad(objective, hidden, retain_graph=True)
    (later,) = torch.autograd.grad(objective, weight, retain_graph=True)
    objective.backward(retain_graph=True)
    objective.backward()
    for found, expected in ((first, reference.hidden), (later, reference.weight)):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert torch.allclose(hidden.grad, 2 * first) and torch.allclose(weight.grad, 2 * later)


def test_computes_only_the_gradients_that_are_wanted() -> None:
    hidden, weight, labels = inputs()
    reference = plain(hidden, weight, labels)
    objective, _ = call(hidden.clone().requires_grad_(), weight, labels, 4)
    assert torch.allclose(objective, reference.objective)
    objective, _ = call(hidden, weight.requires_grad_(), labels, 4)
    objective.backward()
    assert hidden.grad is None and torch.allclose(weight.grad, reference.weight)
    with Largest() as largest, torch.no_grad():
        objective, cross_entropy = call(hidden, weight, labels, 4)
    assert not objective.requires_grad and torch.allclose(cross_entropy, reference.cross_entropy)
    assert largest.elements <= 4 * VOCABULARY, "no gradient of the weight without autograd"


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation inside allocates."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage().data_ptr()
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(tensor, Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("bf16", [False, True])
def test_no_tensor_holds_the_logits_of_all_tokens(bf16: bool) -> None:
    tokens, vocabulary, hidden_size, chunk = 512, 2048, 8, 32
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    with Largest() as largest, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        options = {"scale": 1.0, "z_loss": 0.0, "vocabulary": VocabRange(0, vocabulary), "chunk": chunk}
        head_loss(hidden, weight, labels, **options)[0].backward()
    assert largest.elements == chunk * vocabulary
    with Largest() as largest:
        F.linear(hidden, weight)
    assert largest.elements == tokens * vocabulary, "the measure sees what the plain method holds"


def test_the_default_chunk_fits_its_bytes() -> None:
    for rows in (1, 1000, 32000, 128256, 10**9):
        chunk = default_chunk(rows, torch.device("cpu"))
        assert chunk == 1 or chunk * rows * 4 <= loss_module.CPU_CHUNK_BYTES < (chunk + 1) * rows * 4


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_gives_its_head_to_the_loss(tied: bool) -> None:
    """One process, the whole model: gradients of every weight, also of a tied one."""
    tree: dict[str, Any] = {
        "model": {
            "kind": "base",
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "tie_word_embeddings": tied,
        },
        "data": {"path": "none", "sequence_length": SHAPE[1]},
        "train": {"output": "none", "steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
    }
    config = parse_config(tree).model
    model = Transformer(config).double()
    initialise(model, config, 3)
    ids, (_, _, labels) = torch.randint(0, VOCABULARY, SHAPE), inputs()
    model(ids, loss=lambda hidden, weight: call(hidden, weight, labels, 4))[0].backward()
    mine = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    logits, valid = model(ids), labels != IGNORED
    lse = logits.logsumexp(-1)[valid]
    summed = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (SCALE * (summed + Z_LOSS * lse.square().sum())).backward()
    for found, parameter in zip(mine, model.parameters(), strict=True):
        assert float((found - parameter.grad).norm() / parameter.grad.norm()) < 1e-12
