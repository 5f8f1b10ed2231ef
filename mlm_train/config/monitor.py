"""Config section `monitor`: what is seen of a run."""

from pydantic import Field

from mlm_train.config.choices import CallbackName, Writer
from mlm_train.config.section import Section


class MonitorConfig(Section):
    """What is seen."""

    writers: list[Writer] = Field(
        ["tensorboard"],
        description="where metrics go: tensorboard (below train.output/tensorboard), jsonl "
        "(train.output/metrics.jsonl), wandb (Weights & Biases; pip install 'mlm-train[wandb]'), or classes "
        "of yours: package.module:Name (docs/extending.md)",
    )
    callbacks: list[CallbackName] = Field(
        [], description="classes of yours that look on while a run trains: package.module:Name"
    )
    log_interval: int = Field(1, ge=1, description="steps between log lines and metrics")
    straggler_interval: int = Field(
        50, ge=1, description="steps over which ranks are compared, to say which are slow"
    )
    straggler_ratio: float = Field(
        1.5, gt=1, description="a rank is slow that takes so many times its stage's median"
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="arithmetic peak of one rank, 1e12 FLOP/s, that MFU is measured against beside a product "
        "measured at the start (default: the datasheet's, of accelerators that are known)",
    )
