"""What commands with actions (`mlm-train data collect`) share."""

import argparse
from typing import TYPE_CHECKING

MODEL_KINDS = "an export, a run's folder (its newest checkpoint), RUN/best, or one checkpoint (step-*)"

if TYPE_CHECKING:
    Actions = argparse._SubParsersAction[argparse.ArgumentParser]


def add_action(actions: "Actions", name: str, summary: str, text: str) -> argparse.ArgumentParser:
    """The parser of one action; `text` is its description, examples included."""
    parser = actions.add_parser(
        name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # Without a default of its own, so that `tol --debug build` counts too.
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show a traceback for errors"
    )
    return parser
