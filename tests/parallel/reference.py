"""The reference: one process without engine or micro-batches, in float64 by default."""

import torch
from torch import Tensor

from mlm_train.config import Config
from mlm_train.config.load import parse_config
from mlm_train.memory import make_source
from mlm_train.model.initial import initialise
from mlm_train.model.logical import pieces
from mlm_train.model.loss import IGNORED
from mlm_train.model.source import MemorySource
from mlm_train.model.transformer import Transformer
from mlm_train.parallel.engine.base import parameter_groups
from mlm_train.train.schedule import learning_rate

VOCABULARY, LENGTH, GLOBAL_BATCH = 96, 24, 8
# Of relative errors in fp32 (parity_cases.py).
LIMITS = {"loss": 1e-5, "norm": 1e-5, "gradients": 1e-5, "weights": 1e-4}
EOD = 2  # ends a document in cases that separate documents; about half of the rows contain one


def tiny_config(model: dict, **sections: dict) -> Config:
    """A config small enough for any machine; `model` and sections override."""
    tree = {
        "model": {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
        }
        | model,
        "data": {"path": "none", "sequence_length": LENGTH},
        # AdamW divides by the gradient's magnitude: with a smaller eps rounding errors are whole steps.
        "optimizer": {"lr": 1e-2, "max_grad_norm": 0.5, "eps": 1e-5},
        "schedule": {"warmup_steps": 2},
        "train": {
            "output": "none",
            "steps": 10,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": 2,
            "z_loss": 1e-2,
        },
    }
    if model.get("kind", "base") != "base":
        tree["memory"] = {"mode": "unique"}
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return parse_config(tree)


def global_batch(step: int, size: int = GLOBAL_BATCH) -> tuple[Tensor, Tensor]:
    """ids and labels of a step: repeated ids, and such masks that half of the rows are nearly empty."""
    generator = torch.Generator().manual_seed(step)
    drawn = torch.randint(0, VOCABULARY, (2, size, LENGTH), generator=generator)
    ids = drawn.amin(0)  # low ids are frequent, as common words are
    labels = torch.randint(0, VOCABULARY, (size, LENGTH), generator=generator)
    valid_fraction = torch.linspace(0.02, 1.0, size).unsqueeze(1)
    labels[torch.rand(size, LENGTH, generator=generator) > valid_fraction] = IGNORED
    return ids, labels


def sharpen(model: Transformer) -> None:
    """Scale a new model's weights up, so that every part of it affects the loss."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0 if "embed" not in name else 20.0)
            else:
                generator = torch.Generator().manual_seed(len(name))
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def logical_gradients(model: Transformer) -> dict[str, Tensor]:
    """Logical name -> gradient."""
    parameters = dict(model.named_parameters())
    return {piece.name: piece.of(parameters[piece.parameter].grad).clone() for piece in pieces(model)}


def train_reference(config: Config, steps: int, dtype: torch.dtype = torch.float64) -> dict:
    """Losses, gradient norms, the first step's gradients and the final weights, computed in `dtype`."""
    model = Transformer(config.model).to(dtype)
    initialise(model, config.model, config.train.seed)
    sharpen(model)
    source = make_source("per_token", model.memory_blocks()) if config.model.has_memory else None
    options = config.optimizer
    groups = parameter_groups(model, options)
    optimizer = torch.optim.AdamW(groups, betas=options.betas, eps=options.eps)
    losses, norms, first = [], [], {}
    for step in range(steps):
        ids, labels = global_batch(step, config.train.global_batch_size)
        forward = logits_by_document if config.data.separate_documents else Transformer.forward
        logits = forward(model, ids, source)
        valid = labels != IGNORED
        lse = logits.logsumexp(-1)[valid]
        chosen = logits[valid].gather(-1, labels[valid].unsqueeze(-1)).squeeze(-1)
        loss = (lse - chosen).mean()
        optimizer.zero_grad()
        (loss + config.train.z_loss * lse.square().mean()).backward()
        if step == 0:
            first = logical_gradients(model)
        norms.append(
            float(
                torch.nn.utils.clip_grad_norm_(
                    model.parameters(), config.optimizer.max_grad_norm or torch.inf
                )
            )
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        losses.append(float(loss.detach()))
    parameters = dict(model.named_parameters())
    weights = {piece.name: piece.of(parameters[piece.parameter].detach()) for piece in pieces(model)}
    return {"losses": losses, "norms": norms, "gradients": first, "weights": weights}


def logits_by_document(model: Transformer, ids: Tensor, source: MemorySource | None) -> Tensor:
    """Logits [batch, sequence, vocabulary] of rows whose documents are run one at a time."""
    rows = []
    for row in ids:
        ends = (row[:-1] == EOD).nonzero().flatten() + 1
        documents = row.tensor_split(ends)
        rows.append(torch.cat([model(document[None], source) for document in documents], 1))
    return torch.cat(rows)


def relative_error(values: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest ||v - r|| / ||r|| of a tensor; ||r|| is at least 1e-6 of the norm of all tensors."""
    assert values.keys() == reference.keys()
    floor = 1e-6 * float(torch.stack([r.double().norm() for r in reference.values()]).norm())
    errors = torch.stack(
        [
            (values[name].double() - r.double()).norm() / r.double().norm().clamp_min(floor)
            for name, r in reference.items()
        ]
    )
    assert errors.isfinite().all(), "a shard is missing or non-finite"
    return float(errors.max())
