"""Weights & Biases. Needs the extra: pip install 'mlm-train[wandb]'; with WANDB_MODE=offline no account."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlm_train.config import Config
from mlm_train.errors import UserError

PROJECT = "mlm_train"  # unless WANDB_PROJECT says otherwise


class WandbWriter:
    """A W&B run for each launch, and for each rollback, in one group: the run's folder.

    W&B takes no step twice. A W&B run is named after its first step: from that step on it replaces the older
    ones of its group. Its files lie below train.output/wandb.
    """

    def __init__(self, config: Config, first_step: int) -> None:
        check_wandb()
        import wandb

        self.wandb: Any = wandb
        self.config = config
        self.run = self._begun(first_step)

    def _begun(self, first_step: int) -> Any:
        output = Path(self.config.train.output).absolute()
        try:
            return self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                group=os.environ.get("WANDB_RUN_GROUP", output.name),
                name=f"{output.name} from step {first_step}",
                dir=output,
                config=self.config.model_dump(mode="json"),
                reinit="create_new",
                # The log is ours, and so is the terminal.
                settings=self.wandb.Settings(console="off", silent=True, disable_git=True),
            )
        except self.wandb.Error as error:
            line = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(
                f"monitor.writers: wandb: {line}; run `wandb login`, or set WANDB_MODE=offline"
            ) from None

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Values by tag; those of one step add up."""
        self.run.log(dict(values), step=step)

    def purge(self, step: int) -> None:
        """Go on in a W&B run of its own."""
        self.run.finish()
        self.run = self._begun(step)

    def close(self) -> None:
        """Wait until all of it is sent, or offline on disk."""
        self.run.finish()


def check_wandb() -> None:
    """UserError where the package is missing."""
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # a folder of that name, which W&B itself makes, is no package
        raise UserError(
            "monitor.writers: wandb needs the package of that name: pip install 'mlm-train[wandb]'"
        )
