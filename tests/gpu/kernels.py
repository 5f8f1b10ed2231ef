"""Parts of a step on the device, forward and backward, against float64 on a CPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from mlm_train.config import ModelConfig
from mlm_train.memory.rows import Lookup
from mlm_train.model.attention import Attention
from mlm_train.model.geometry import Geometry, separate_documents, single_document
from mlm_train.model.linear import compute_dtype
from mlm_train.model.loss import IGNORED, VocabRange, head_loss
from tests.gpu.checks import BF16_FACTOR, Figures, within
from tests.parallel.reference import EOD, relative_error

FP32 = 1e-5  # relative error
# A part of a step: results and gradients by name, on a device, with weights in a dtype.
Part = Callable[[torch.device, torch.dtype], dict[str, Tensor]]
CPU = torch.device("cpu")


def errors(name: str, part: Part, device: str) -> Figures:
    """Relative errors of a part on the device in fp32 and under bf16 autocast; the latter on a CPU too."""
    exact = run(part, CPU, torch.float64)
    on_device = torch.device(device)
    return {
        f"{name} fp32": relative_error(run(part, on_device), exact),
        f"{name} bf16": relative_error(run(part, on_device, bf16=True), exact),
        f"{name} bf16-alone": relative_error(run(part, CPU, bf16=True), exact),
    }


def run(
    part: Part, device: torch.device, dtype: torch.dtype = torch.float32, bf16: bool = False
) -> dict[str, Tensor]:
    """What a part returns, brought to the CPU."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        results = part(device, dtype)
    return {name: result.detach().cpu() for name, result in results.items()}


def judged(figures: Figures) -> Figures:
    """The figures of `errors`; AssertionError beyond their limits."""
    alone = {name.removesuffix("-alone"): value for name, value in figures.items() if name.endswith("-alone")}
    return within(
        figures, {"fp32": FP32} | {name: BF16_FACTOR * float(value) for name, value in alone.items()}
    )


def attention(device: str) -> Figures:
    """Attention with grouped heads or not, of one document or several."""
    length = 96 if device == "cpu" else 1024
    figures: Figures = {}
    for heads in (4, 1):
        for separate in (False, True):
            name = f"{'documents' if separate else 'causal'}{'' if heads == 4 else ' grouped'}"
            part = _attention(heads, separate, length)
            figures |= errors(name, part, device)
    return judged(figures)


def _attention(key_value_heads: int, separate: bool, length: int) -> Part:
    config = ModelConfig(
        vocab_size=96,
        hidden_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        intermediate_size=96,
    )
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 30, (2, length), generator=generator)
    drawn = torch.randn(2, 2, length, config.hidden_size, generator=generator, dtype=torch.float64)

    def geometry(device: torch.device, dtype: torch.dtype) -> Geometry:
        """Angles of the CPU: they are fp32 by definition, and the last bit of a frequency is, at position
        1,000, more than the limit."""
        if not separate:
            found = single_document(config, length, CPU)
            return found._replace(cos=found.cos.to(device), sin=found.sin.to(device))
        found = separate_documents(config, ids, EOD, dtype)
        mask = separate_documents(config, ids.to(device), EOD, dtype).mask
        return Geometry(found.cos.to(device), found.sin.to(device), mask)

    def part(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(2)
        module = Attention(config).to(device, dtype)
        x, gradient = drawn.to(device, dtype)
        x.requires_grad_()
        out = module(x, geometry(device, compute_dtype(x)))
        out.backward(gradient.to(out.dtype))
        assert x.grad is not None
        return {"out": out, "x": x.grad} | {name: p.grad for name, p in module.named_parameters()}

    return part


def head(device: str) -> Figures:
    """Head and cross-entropy with z-loss over a tokenizer's vocabulary, in chunks of uneven size."""
    tokens, hidden_size, vocabulary = (48, 32, 1003) if device == "cpu" else (160, 128, 128_256)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(tokens, hidden_size, generator=generator, dtype=torch.float64)
    weights = (
        torch.randn(vocabulary, hidden_size, generator=generator, dtype=torch.float64) / hidden_size**0.5
    )
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[::3] = IGNORED
    z_loss = 1e-2

    def part(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        hidden, weight = (part.to(device, dtype, copy=True).requires_grad_() for part in (drawn, weights))
        targets = labels.to(device)
        if dtype == torch.float64:
            kept = targets != IGNORED
            logits = hidden[kept] @ weight.t()
            lse = logits.logsumexp(-1)
            cross_entropy = (lse - logits.gather(-1, targets[kept, None])[:, 0]).sum()
            objective = (cross_entropy + z_loss * lse.square().sum()) / tokens
        else:
            objective, cross_entropy = head_loss(
                hidden,
                weight,
                targets,
                scale=1 / tokens,
                z_loss=z_loss,
                vocabulary=VocabRange(0, vocabulary),
                chunk=37,
            )
        objective.backward()
        assert hidden.grad is not None and weight.grad is not None
        return {"loss": cross_entropy, "hidden": hidden.grad, "weight": weight.grad}

    return judged(errors("head", part, device))


def rows(device: str) -> Figures:
    """Lookups in a table, and the sums of gradients into it: by atomic adds, and in a fixed order."""
    positions, table_rows, hidden_size = (512, 60, 32) if device == "cpu" else (16_384, 3_000, 1_024)
    generator = torch.Generator().manual_seed(4)
    index = torch.randint(0, table_rows, (2, positions), generator=generator).amin(0)
    table = torch.randn(table_rows, hidden_size, generator=generator, dtype=torch.float64)
    incoming = torch.randn(positions, hidden_size, generator=generator, dtype=torch.float64)

    def part(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        if dtype == torch.float64:
            return {"rows": table[index], "sums": torch.zeros_like(table).index_add(0, index, incoming)}
        total = torch.zeros_like(table, device=device, dtype=dtype)
        anchor = torch.zeros(1, device=device, requires_grad=True)
        found = Lookup.apply(index.to(device), table.to(device, dtype), total, anchor)
        found.backward(incoming.to(device, dtype))
        return {"rows": found, "sums": total}

    figures: Figures = {}
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        exact, found = run(part, CPU, torch.float64), run(part, torch.device(device))
        name = f"{'fixed-order' if deterministic else 'any-order'} fp32"
        figures[name] = relative_error(found, exact)
    again = run(part, torch.device(device))
    assert all(found[name].equal(again[name]) for name in found), "two runs in a fixed order differ"
    return within(figures, {"fp32": FP32})
