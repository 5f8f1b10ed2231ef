"""What a torch cannot do is refused before ranks meet, and all else runs on it."""

import pytest
import torch

from mlm_train.config import load_config
from mlm_train.errors import UserError
from mlm_train.parallel import runtime
from tests.commands import ROOT

PIPELINE = ["parallel.pipeline=2", "train.micro_batch_size=1", "model.num_hidden_layers=4"]


@pytest.mark.parametrize("schedule", ["zbv", "dualpipe_v", "interleaved_zero_bubble"])
def test_zero_bubble_schedules_need_a_newer_torch(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*PIPELINE, f"parallel.pipeline_schedule={schedule}"]
    words += ["parallel.virtual_stages=2"] if schedule == "interleaved_zero_bubble" else []
    config = load_config(str(ROOT / "configs" / "micro.yaml"), words)
    monkeypatch.setattr(runtime, "ZERO_BUBBLE_TORCH", (99, 1))
    with pytest.raises(UserError) as refusal:
        runtime.check_torch(config.parallel)
    assert str(refusal.value) == (
        f"parallel.pipeline_schedule={schedule}: needs torch 99.1 or newer, and this is torch "
        f"{torch.__version__}: set parallel.pipeline_schedule=1f1b, or install a newer torch"
    )
    runtime.check_torch(load_config(str(ROOT / "configs" / "micro.yaml"), PIPELINE).parallel)
