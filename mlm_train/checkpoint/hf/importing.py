"""Import a Hugging Face Llama, or an export: write an export to start from, and a run's config."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mlm_train.checkpoint.hf.files import CARRIED, carried, special_tokens
from mlm_train.checkpoint.hf.folder import (
    INDEX,
    FolderTensors,
    open_tensors,
    read_config,
    verify_folder,
    write_folder,
)
from mlm_train.checkpoint.hf.llama import CORRECT, read_llama
from mlm_train.checkpoint.hf.manifest import MANIFEST
from mlm_train.config import ModelConfig
from mlm_train.config.load import parse_config
from mlm_train.config.yaml_text import yaml_text
from mlm_train.errors import UserError
from mlm_train.utils.checks import Check
from mlm_train.utils.files import new_folder, refuse_used, write_text
from mlm_train.utils.records import read_json

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DERIVED = ".rotary_emb.inv_freq"  # in each layer of older Llama folders; it follows from rope_theta
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
CONFIG = "config.yaml"
_HEADER = """# Continues training from the weights of {source}.
# Adjust: data.path (`mlm-train data prepare --tokenizer {output}` writes it), batch size, lr, layout.
"""


@dataclass(frozen=True)
class Imported:
    """What was written. `left`: descriptions of what was not carried over from the source."""

    config: ModelConfig
    dtype: torch.dtype
    carried: list[str]
    left: list[str]


def import_folder(source: Path, output: Path, verify: Check = "full") -> Imported:
    """Write an export with the unchanged weights of `source`, the files beside them, and config.yaml.

    Every tensor is checked; one tensor and one shard of the output are held in memory at a time. verify: how
    much of an export is compared with its manifest first. Raises UserError for a model that cannot be
    expressed, a damaged folder, and a non-empty `output`.
    """
    refuse_used(output)
    config = read_config(source)
    verify_folder(source, verify)
    beside = carried(source)
    with open_tensors(source) as tensors:
        _leave_out_copies(tensors, config)
        tensors.check(config)
        dtype = functools.reduce(torch.promote_types, (_dtype(tensors, name) for name in tensors.names()))
        with new_folder(output) as draft:
            write_folder(draft, config, _each(tensors), beside, dtype, tokens=special_tokens(source))
            write_text(draft / CONFIG, _run_config(source, output, config))
    return Imported(
        config, dtype, [file.name for file in beside], [*_fields_left(source, dtype), *_files_left(source)]
    )


def _leave_out_copies(tensors: FolderTensors, config: ModelConfig) -> None:
    """Ignore redundant tensors of a Llama's folder: rotary frequencies, and the head where it is tied."""
    for name in tensors.names():
        if name.endswith(DERIVED):
            tensors.leave_out(name)
    if config.tie_word_embeddings and HEAD in tensors.names() and EMBEDDING in tensors.names():
        if not torch.equal(tensors.tensor(HEAD), tensors.tensor(EMBEDDING)):
            raise UserError(
                f"{tensors.path}: {HEAD} is not {EMBEDDING}, but config.json has tie_word_embeddings=true: "
                "set it to false there, or remove the tensor"
            )
        tensors.leave_out(HEAD)


def _dtype(tensors: FolderTensors, name: str) -> torch.dtype:
    """dtype of a stored tensor. UserError for quantized weights."""
    stored = tensors.dtype(name)
    if stored not in DTYPES:
        raise UserError(
            f"{tensors.path}: tensor {name} has dtype {stored}, which is not supported: give weights in "
            "float32, bfloat16 or float16, not quantized ones"
        )
    return DTYPES[stored]


def _each(tensors: FolderTensors) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors one by one, with a progress bar."""
    from rich.console import Console
    from rich.progress import track

    for name in track(tensors.names(), "importing", console=Console(stderr=True), transient=True):
        yield name, tensors.tensor(name)


def _fields_left(source: Path, stored: torch.dtype) -> list[str]:
    """Fields of config.json that have an effect in transformers and none here."""
    file = source / "config.json"
    llama = read_llama(read_json(file, CORRECT), file)
    left = []
    if llama.attention_dropout:
        left.append(f"attention_dropout={llama.attention_dropout} (training has no dropout)")
    name = str(stored).removeprefix("torch.")
    if llama.dtype not in (None, name):
        left.append(f"dtype={llama.dtype} (the weights are stored in {name}, and stay so)")
    return left


def _files_left(source: Path) -> list[str]:
    """Files of the folder that are not carried over; those written anew do not count."""
    used = {"config.json", INDEX, MANIFEST, CONFIG, *CARRIED}
    return sorted(
        path.name for path in source.iterdir() if path.name not in used and path.suffix != ".safetensors"
    )


def _run_config(source: Path, output: Path, model: ModelConfig) -> str:
    """A config that continues training from the imported weights, for any number of processes."""
    name = output.absolute().name
    tree = {
        "model": model.model_dump(mode="json", exclude_none=True),
        "data": {"path": f"data/{name}", "sequence_length": min(2048, model.max_position_embeddings)},
        "optimizer": {"lr": 3e-5},
        "schedule": {"kind": "cosine", "warmup_steps": 100, "min_lr": 3e-6},
        "train": {
            "output": f"runs/{name}",
            "steps": 1000,
            "global_batch_size": 128,
            "micro_batch_size": 1,
            "precision": "bf16",
        },
        "checkpoint": {"warm_start": str(output.absolute())},
    }
    parse_config(tree)
    header = _HEADER.format(source=source, output=output)
    return header + yaml_text(tree)
