"""A run goes on in another engine and with FFN-M placed otherwise as if nothing had changed."""

from pathlib import Path

from tests.commands import mlm_train, same_losses, scalars
from tests.ranks import train_on_ranks
from tests.train.test_resume import LEG, words

FSDP = "parallel.engine=fsdp"
TABLE = "memory.mode=table"
OWNED = (FSDP, TABLE, "memory.placement=owned")
LEGS = (
    ("FSDP, DP2, owned", 2, OWNED),
    ("one, plain", 1, (FSDP, TABLE)),
    ("ZeRO-1, DP2", 2, (TABLE, "memory.placement=shared")),
    ("FSDP, PP2 DP2, owned", 4, (*OWNED, "parallel.pipeline=2", "train.micro_batch_size=1")),
    ("FSDP, HSDP", 4, (FSDP, "parallel.replicate=2", "train.micro_batch_size=1", TABLE)),
    ("ZeRO-3, DP2", 2, ("parallel.zero_stage=3",)),
    (
        "FSDP, TP2, owned, recomputed",
        2,
        (*OWNED, "parallel.tensor=2", "train.activation_checkpointing=full"),
    ),
    ("FSDP, DP2, compiled", 2, (FSDP, "train.compile=true", "train.activation_checkpointing=selective")),
)
# Of two ranks each owns two and a half of five layers.
LAYERS = "model.num_hidden_layers=5"


def test_resumes_in_another_engine_and_placement(data: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "moved", tmp_path / "unbroken"
    mlm_train("pretrain", *words(data, other, LAYERS, "parallel.zero_stage=0"))
    expected = scalars(other, "train/loss")
    for leg, (name, world, layout) in enumerate(LEGS):
        train_on_ranks(world, *words(data, run, LAYERS, *layout, f"train.stop_after={LEG}"))
        losses = scalars(run, "train/loss")
        assert len(losses) == (leg + 1) * LEG, name
    same_losses(run, other, norms=1e-3)
    assert len(expected) == len(losses)
