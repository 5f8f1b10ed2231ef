"""`mlm-train export`: write a Hugging Face folder from a checkpoint, or verify one."""

import argparse
from pathlib import Path

from mlm_train.errors import UserError
from mlm_train.utils.checks import Check, add_verify

HELP = """Write a Hugging Face folder (config.json, safetensors, tokenizer) from a checkpoint.
transformers loads it: a base model as a Llama, others after `import mlm_train.hf`. The folder has a manifest
with the SHA-256 of each of its files; `export verify` compares them all. A changed file or a missing manifest
gives exit code 2 and one line naming it.

examples:
  mlm-train export runs/micro --output runs/micro-export
  mlm-train export verify runs/micro-export"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
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
        "--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the weights (default float32)"
    )
    add_verify(parser, "the checkpoint")


def run(args: argparse.Namespace) -> int:
    """Export a checkpoint, or verify an export."""
    first, *more = args.source
    if first == "verify" and len(more) == 1:
        if given := [name for name in ("output", "dtype", "verify") if getattr(args, name) is not None]:
            raise UserError(
                f"--{given[0]} has no effect on `export verify`, which reads a whole folder: leave it out"
            )
        return _verify(Path(more[0]))
    if more:
        raise UserError(f"export takes one run: leave out {more[0]!r}")
    if args.output is None:
        raise UserError("--output is missing: name the new folder to write")
    dtype = args.dtype or "float32"
    folder = export_checkpoint(Path(first), Path(args.output), dtype, args.verify or "full")
    print(f"exported {folder} to {args.output} ({dtype})")
    names = {path.name for path in Path(args.output).iterdir()}
    if "tokenizer.model" in names and not names & {"tokenizer.json", "tokenizer_config.json"}:
        print("no tokenizer.json: transformers cannot encode as this tokenizer.model does")
    return 0


def export_checkpoint(source: Path, output: Path, dtype: str, verify: Check = "full") -> Path:
    """Export a checkpoint, or a run's newest one. Returns the checkpoint's folder.

    The run's tokenizer is copied, and for a run that started from an import the files carried over from it;
    what transformers needs beyond these is written.
    Raises UserError for a damaged checkpoint or an existing output folder.
    """
    import torch

    from mlm_train.checkpoint.export_folder import write_export
    from mlm_train.checkpoint.folders import resolve
    from mlm_train.checkpoint.load import config_of, load_weights, open_checkpoint
    from mlm_train.checkpoint.reading.logical_folder import ModelFolder
    from mlm_train.model.logical import targets
    from mlm_train.model.transformer import Transformer

    folder = resolve(source)
    manifest = open_checkpoint(folder, verify)
    config = config_of(manifest).model
    model = Transformer(config)
    load_weights(folder, manifest, targets(model))
    write_export(output, ModelFolder(folder, config, manifest), model, getattr(torch, dtype))
    return folder


def _verify(folder: Path) -> int:
    from mlm_train.checkpoint.hf.folder import read_config, verify_folder
    from mlm_train.checkpoint.hf.manifest import MANIFEST

    read_config(folder)
    digests = verify_folder(folder, "full")
    if not digests:
        raise UserError(
            f"{folder} has no {MANIFEST} to compare with: it was not written by `mlm-train export`"
        )
    size = sum((folder / name).stat().st_size for name in digests)
    print(f"{folder}: whole, {len(digests)} files, {size / 2**30:.2f} GiB")
    return 0
