"""`mlm-train import`: train on with the weights of a Hugging Face Llama."""

import argparse
from pathlib import Path

HELP = """Take the weights of a Hugging Face Llama (as kind base), or of an export, to train on with them.
Writes a folder of config.json, safetensors and tokenizer, which `evaluate`, `generate` and
checkpoint.warm_start read, and a config.yaml that starts a run from it at any layout. The weights
keep their bits and their type. What the model cannot express is refused.

examples:
  mlm-train import models/llama --output imports/llama
  mlm-train data prepare --input texts/ --output data/llama --tokenizer imports/llama
  mlm-train pretrain imports/llama/config.yaml data.path=data/llama parallel.tensor=2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("source", metavar="HF_FOLDER", help="a folder with config.json and safetensors")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder to write")


def run(args: argparse.Namespace) -> int:
    """Import, say what was written and what to do next."""
    from mlm_train.checkpoint.hf_import import CONFIG, TOKENIZER_FILES, import_folder
    from mlm_train.model.counts import count_parameters

    output = Path(args.output)
    config, dtype = import_folder(Path(args.source), output)
    size, stored = count_parameters(config).total, str(dtype).removeprefix("torch.")
    print(f"imported {args.source} to {output} ({config.kind}, {size:,} parameters, {stored})")
    if not any((output / name).is_file() for name in TOKENIZER_FILES):
        print("it holds no tokenizer: the data you train on must be prepared with the model's own")
    print(f"next: mlm-train pretrain {output / CONFIG} data.path=... train.output=...")
    return 0
