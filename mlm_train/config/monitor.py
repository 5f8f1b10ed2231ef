"""Config section `monitor`: logs, metrics and callbacks of a run."""

from pydantic import Field

from mlm_train.config.choices import CallbackName, Writer
from mlm_train.config.section import Section


class MonitorConfig(Section):
    """Logs, metrics and callbacks."""

    writers: list[Writer] = Field(
        ["tensorboard"],
        description="where metrics go: tensorboard (below train.output/tensorboard), jsonl "
        "(train.output/metrics.jsonl), wandb (Weights & Biases; pip install 'mlm-train[wandb]'), or classes "
        "of yours: package.module:Name (docs/extending.md)",
    )
    callbacks: list[CallbackName] = Field(
        [], description="callback classes of yours: package.module:Name (docs/extending.md)"
    )
    log_interval: int = Field(1, ge=1, description="steps between log lines and metrics")
    straggler_interval: int = Field(
        50, ge=1, description="steps over which ranks are compared, to find slow ones"
    )
    straggler_ratio: float = Field(
        1.5, gt=1, description="a rank counts as slow from this many times its stage's median time"
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="peak of one rank, 1e12 FLOP/s, for speed/mfu_datasheet (default: the datasheet's, for "
        "accelerators that are known); speed/mfu_measured uses a matmul timed at the start",
    )
