"""Separate documents in a packed row: exactly the results of each alone."""

import pytest
import torch

from mlm_train.config.schema import ActivationCheckpointing
from mlm_train.memory import make_source
from mlm_train.model.geometry import separate_documents
from mlm_train.model.initial import initialise
from mlm_train.model.transformer import Transformer
from tests.parallel.layouts import MODELS
from tests.parallel.reference import EOD, relative_error, sharpen, tiny_config


def rows() -> torch.Tensor:
    """Rows: two documents and the start of a third; one that ends with the row; a single one."""
    ids = torch.randint(EOD + 1, 96, (3, 24), generator=torch.Generator().manual_seed(5))
    ids[0, 6] = ids[0, 15] = ids[1, 0] = ids[1, 23] = EOD
    return ids


def test_positions_and_mask_are_of_each_document() -> None:
    config = tiny_config(dict(MODELS["base"])).model
    packed = separate_documents(config, rows(), EOD, torch.float32)
    assert packed.mask is not None
    earlier = (packed.mask[:, 0] == 0).sum(-1) - 1  # positions that each position attends to
    first = [*range(7), *range(9), *range(8)]
    assert earlier.tolist() == [first, [0, *range(23)], [*range(24)]]
    plain = separate_documents(config, rows()[2:], EOD, torch.float32)
    torch.testing.assert_close(packed.cos[0, 0], plain.cos[0, 0][first], rtol=0, atol=0)
    torch.testing.assert_close(packed.sin[0, 0], plain.sin[0, 0][first], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "recompute"), [("base gqa tied", "none"), ("memory", "full"), ("flex", "selective")]
)
def test_packed_documents_have_the_losses_and_gradients_of_each_alone(
    name: str, recompute: ActivationCheckpointing
) -> None:
    config = tiny_config(dict(MODELS[name])).model
    model = Transformer(config).double()
    initialise(model, config, 3)
    sharpen(model)
    for layer in range(config.num_hidden_layers):
        model.block(layer).set_activation_checkpointing(recompute)
    source = make_source("unique", model.memory_blocks()) if config.has_memory else None
    ids = rows()
    labels = ids.roll(-1, 1)  # a document's last token predicts the next one's first, as in training
    results = []
    for separator, texts in ((EOD, [slice(0, 24)]), (None, [slice(0, 7), slice(7, 16), slice(16, 24)])):
        model.separator = separator
        model.zero_grad(set_to_none=True)
        parts = [
            torch.nn.functional.cross_entropy(
                model(ids[:1, text], source).flatten(0, 1), labels[0, text], reduction="none"
            )
            for text in texts
        ]
        losses = torch.cat(parts)
        losses.sum().backward()
        results.append({"losses": losses.detach()} | {key: p.grad for key, p in model.named_parameters()})
    assert relative_error(*results) < 1e-12
    model.separator = None
    alone = model(ids[:1], source)[0, 7:]
    model.separator = EOD
    assert (alone - model(ids[:1], source)[0, 7:]).abs().max() > 0.01, "without a mask they must differ"
