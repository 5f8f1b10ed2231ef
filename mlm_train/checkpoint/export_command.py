"""`mlm-train export`: a Hugging Face folder from a checkpoint."""

import argparse
from pathlib import Path

HELP = """Write a Hugging Face folder (config.json, safetensors, tokenizer) from a checkpoint.
A base model loads in transformers.LlamaForCausalLM as it is.

example:
  mlm-train export runs/micro --output runs/micro-export"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("source", help="a run's folder (its newest checkpoint), RUN/best, or a step-* folder")
    parser.add_argument("--output", required=True, help="new folder to write")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights"
    )


def run(args: argparse.Namespace) -> int:
    """Export and say what was written."""
    from mlm_train.checkpoint.export import export_checkpoint

    folder = export_checkpoint(Path(args.source), Path(args.output), args.dtype)
    print(f"exported {folder} to {args.output} ({args.dtype})")
    return 0
