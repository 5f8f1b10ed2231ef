"""`mlm-train export`: a Hugging Face folder from a checkpoint, and whether one is still what was written."""

import argparse
from pathlib import Path

from mlm_train.checks import add_verify
from mlm_train.errors import UserError

HELP = """Write a Hugging Face folder (config.json, safetensors, tokenizer) from a checkpoint.
A base model loads in transformers.LlamaForCausalLM as it is. The folder has a manifest with the SHA-256 of
each of its files; `export verify` reads all of them again. Exit code 2 and one line naming the file that is
not what was written, also where there is no manifest.

examples:
  mlm-train export runs/micro --output runs/micro-export
  mlm-train export verify runs/micro-export"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.usage = (
        "mlm-train export RUN --output FOLDER [--dtype T] [--verify V]\n       mlm-train export verify FOLDER"
    )
    parser.add_argument(
        "source",
        nargs="+",
        metavar="RUN",
        help="a run's folder (its newest checkpoint), RUN/best, or a step-* folder; or `verify` and an "
        "export's folder",
    )
    parser.add_argument("--output", metavar="FOLDER", help="new folder to write")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default float32)"
    )
    add_verify(parser, "the checkpoint")


def run(args: argparse.Namespace) -> int:
    """Export and say what was written, or verify and say whether it is whole."""
    first, *more = args.source
    if first == "verify" and len(more) == 1:
        if given := [name for name in ("output", "dtype", "verify") if getattr(args, name) is not None]:
            raise UserError(
                f"--{given[0]} is not of `export verify`, which reads a whole folder: leave it out"
            )
        return _verify(Path(more[0]))
    if more:
        raise UserError(f"export takes one run, not also {more[0]!r}: leave it out")
    if args.output is None:
        raise UserError("--output is missing: name the new folder to write")
    from mlm_train.checkpoint.export import export_checkpoint

    dtype = args.dtype or "float32"
    folder = export_checkpoint(Path(first), Path(args.output), dtype, args.verify or "full")
    print(f"exported {folder} to {args.output} ({dtype})")
    return 0


def _verify(folder: Path) -> int:
    from mlm_train.checkpoint.hf_folder import read_config, verify_folder
    from mlm_train.checkpoint.hf_manifest import MANIFEST

    read_config(folder)
    found = verify_folder(folder, "full")
    if not found:
        raise UserError(
            f"{folder} has no {MANIFEST} to be compared with: not written by this program's export"
        )
    size = sum((folder / name).stat().st_size for name in found)
    print(f"{folder}: whole, {len(found)} files, {size / 2**30:.2f} GiB")
    return 0
