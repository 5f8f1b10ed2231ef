"""`mlm-train import`: train on with the weights of a Hugging Face Llama."""

import argparse
from pathlib import Path

from mlm_train.errors import escaped
from mlm_train.utils.checks import add_verify

HELP = """Take the weights of a Hugging Face Llama (as kind base), or of an export, to train on with them.
Writes a folder of config.json, safetensors and tokenizer, which `evaluate`, `generate` and
checkpoint.warm_start read, and a config.yaml that starts a run from it at any layout. The weights
keep their bits and their type; chat template, generation_config.json and all end tokens go along, also
into the run and its export. What the model cannot express is refused, what is not carried is listed.

examples:
  mlm-train import models/llama --output imports/llama
  mlm-train data prepare --input texts/ --output data/llama --tokenizer imports/llama
  mlm-train pretrain imports/llama/config.yaml data.path=data/llama parallel.tensor=2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("source", metavar="HF_FOLDER", help="a folder with config.json and safetensors")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder to write")
    add_verify(parser, "an export")


def run(args: argparse.Namespace) -> int:
    """Import, say what was written and what to do next."""
    from mlm_train.checkpoint.hf.importing import CONFIG, import_folder
    from mlm_train.data.tokenizer import tokenizer_file
    from mlm_train.model.counts import count_parameters

    output = Path(args.output)
    found = import_folder(Path(args.source), output, args.verify or "full")
    size, stored = count_parameters(found.config).total, str(found.dtype).removeprefix("torch.")
    what = f"{found.config.kind}, {size:,} parameters, {stored}"
    print(f"imported {escaped(args.source)} to {escaped(str(output))} ({what})")
    if found.carried:
        print(f"with {', '.join(found.carried)}")
    if tokenizer_file(output) is None:
        print("it holds no tokenizer: the data you train on must be prepared with the model's own")
    if found.left:
        print(f"not carried: {escaped(', '.join(found.left))}")
    print(f"next: mlm-train pretrain {output / CONFIG} data.path=... train.output=...")
    return 0
