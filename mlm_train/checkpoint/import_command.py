"""`mlm-train import`: start training from the weights of a Hugging Face Llama."""

import argparse
from pathlib import Path

from mlm_train.errors import escaped
from mlm_train.utils.checks import add_verify

HELP = """Import the weights of a Hugging Face Llama (as kind base), or of an export, to continue training.
Writes a folder of config.json, safetensors and tokenizer, which `evaluate`, `generate` and
checkpoint.warm_start read, and a config.yaml that starts a run from it with any parallel layout. The weights
keep their bits and their dtype; chat template, generation_config.json and all end tokens are carried over,
also into the run and its export. A model that cannot be expressed is rejected; what is not carried over is
listed.

examples:
  mlm-train import models/llama --output imports/llama
  mlm-train data prepare --input texts/ --output data/llama --tokenizer imports/llama
  mlm-train pretrain imports/llama/config.yaml data.path=data/llama parallel.tensor=2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("source", metavar="HF_FOLDER", help="a folder with config.json and safetensors")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder to write")
    add_verify(parser, "an export")


def run(args: argparse.Namespace) -> int:
    """Import, and print what was written and the next command."""
    from mlm_train.checkpoint.hf.importing import CONFIG, import_folder
    from mlm_train.data.tokenizer import tokenizer_file
    from mlm_train.model.counts import count_parameters

    output = Path(args.output)
    imported = import_folder(Path(args.source), output, args.verify or "full")
    size, stored = count_parameters(imported.config).total, str(imported.dtype).removeprefix("torch.")
    what = f"{imported.config.kind}, {size:,} parameters, {stored}"
    print(f"imported {escaped(args.source)} to {escaped(str(output))} ({what})")
    if imported.carried:
        print(f"carried over: {', '.join(imported.carried)}")
    if tokenizer_file(output) is None:
        print("it has no tokenizer: prepare the training data with the model's own")
    if imported.left:
        print(f"not carried over: {escaped(', '.join(imported.left))}")
    print(f"next: mlm-train pretrain {output / CONFIG} data.path=... train.output=...")
    return 0
