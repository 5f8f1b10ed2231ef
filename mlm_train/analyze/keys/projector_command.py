"""`mlm-train analyze projector`: its options."""

import argparse
from typing import TYPE_CHECKING

from mlm_train.utils.arguments import add_action

if TYPE_CHECKING:
    from mlm_train.utils.arguments import Actions

_HELP = """Write a layer's tokens for TensorBoard's embedding projector:
`tensorboard --logdir DIR`, tab Projector.

example:
  mlm-train analyze projector keys/run1 --layer 3 --output projector/run1"""


def add_projector(actions: "Actions") -> None:
    """Add the action."""
    parser = add_action(actions, "projector", "write tokens for TensorBoard's projector", _HELP)
    parser.add_argument("folder", metavar="FOLDER", help="written by `mlm-train analyze keys`")
    parser.add_argument("--layer", metavar="LAYER", type=int, required=True)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to write; must not exist")


def run_projector(args: argparse.Namespace) -> int:
    """Write the folder. Returns exit code 0."""
    from mlm_train.analyze.keys.folder import KeysFolder
    from mlm_train.analyze.keys.projector import write_projector

    tokens = write_projector(KeysFolder(args.folder), args.layer, args.output)
    print(f"{args.output}: {tokens:,} tokens of layer {args.layer}; tensorboard --logdir {args.output}")
    return 0
