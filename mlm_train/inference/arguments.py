"""Options of the commands that run a model from end to end: its scales, and loading it."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlm_train.errors import UserError
from mlm_train.tol.serve.arguments import store_options
from mlm_train.utils.arguments import layers_in

if TYPE_CHECKING:
    from mlm_train.inference.language_model import LanguageModel

MOST_LAYERS = 10_000


def add_scale_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--memory-scale` and `--drop-layers`, for `scales`."""
    parser.add_argument(
        "--memory-scale",
        "--alpha",
        metavar="ALPHA",
        help="factor on FFN-M's output, instead of the model's: one number, or one per layer such as 1,1,0.5",
    )
    parser.add_argument(
        "--drop-layers", metavar="LAYERS", help="layers whose FFN-M adds nothing, such as 3,5-7"
    )


def scales(args: argparse.Namespace) -> tuple[float | Sequence[float] | None, set[int]]:
    """memory_scale and dropped_layers of Decoder. UserError for what is no number or no layer."""
    return memory_scale(args.memory_scale), dropped_layers(args.drop_layers)


def memory_scale(text: str | None, option: str = "--memory-scale") -> float | Sequence[float] | None:
    """One number, or one per layer."""
    found = None if text is None else numbers(float, text, option)
    return found[0] if found is not None and len(found) == 1 else found


def dropped_layers(text: str | None, option: str = "--drop-layers") -> set[int]:
    """Numbers of layers; the model says which ones it has."""
    return set() if text is None else layers_in(option, text, range(MOST_LAYERS))


def numbers(kind: type, text: str, option: str) -> list[Any]:
    """The numbers of an option such as 1,2,3."""
    try:
        return [kind(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option} {text!r}: give {what} such as 1,2,3") from None


def language_model(args: argparse.Namespace, skip_tokenizer: bool = False, *also: str) -> "LanguageModel":
    """The model that `--model` names, served as the other options say. UserError, as `load` raises it.

    also: options without effect where there is no table (store_options).
    """
    from mlm_train.inference.language_model import load

    store = store_options(args, *also)
    factors, dropped = scales(args)
    return load(
        args.model,
        args.tol,
        store=store,
        patches=args.tol_patch,
        edits=args.edit,
        verify=args.verify,
        memory_scale=factors,
        dropped_layers=dropped,
        add_bos=args.add_bos,
        skip_tokenizer=skip_tokenizer,
    )
