"""Weights & Biases. Needs pip install 'mlm-train[wandb]'; WANDB_MODE=offline needs no account."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlm_train.config import Config
from mlm_train.errors import UserError

PROJECT = "mlm_train"  # default of WANDB_PROJECT


class WandbWriter:
    """Writes one W&B run per launch and per rollback, in a group named after the run's folder.

    W&B rejects repeated steps. Each W&B run is named after its first step, from which on it replaces the
    older ones of its group. Files lie in train.output/wandb.
    """

    def __init__(self, config: Config, first_step: int) -> None:
        check_wandb()
        import wandb

        self.wandb: Any = wandb
        self.config = config
        self.run = self._start(first_step)

    def _start(self, first_step: int) -> Any:
        output = Path(self.config.train.output).absolute()
        try:
            return self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                group=os.environ.get("WANDB_RUN_GROUP", output.name),
                name=f"{output.name} from step {first_step}",
                dir=output,
                config=self.config.model_dump(mode="json"),
                reinit="create_new",
                # The trainer logs and uses the terminal itself.
                settings=self.wandb.Settings(console="off", silent=True, disable_git=True),
            )
        except self.wandb.Error as error:
            line = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(
                f"monitor.writers: wandb: {line}; run `wandb login`, or set WANDB_MODE=offline"
            ) from None

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log values by tag; several calls for one step are merged."""
        self.run.log(dict(values), step=step)

    def purge(self, step: int) -> None:
        """Continue in a new W&B run."""
        self.run.finish()
        self.run = self._start(step)

    def close(self) -> None:
        """Finish the W&B run, and wait for its upload when online."""
        self.run.finish()


def check_wandb() -> None:
    """Raise UserError if the package is missing."""
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # W&B creates a folder of that name, which is not the package
        raise UserError("monitor.writers: wandb needs the wandb package: pip install 'mlm-train[wandb]'")
