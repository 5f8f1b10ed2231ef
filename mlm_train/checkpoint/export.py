"""Checkpoint -> Hugging Face folder (contract: hf_folder.py), on one process."""

from pathlib import Path

from mlm_train.checkpoint.folders import resolve
from mlm_train.checkpoint.hf_folder import write_folder
from mlm_train.checkpoint.load import config_of, load_weights, open_checkpoint
from mlm_train.data.tokenizer import tokenizer_file
from mlm_train.model.logical import named_pieces
from mlm_train.model.transformer import Transformer


def export_checkpoint(source: Path, output: Path, dtype: str) -> Path:
    """Write the export of a checkpoint (or of a run's newest); returns the checkpoint's folder.

    The tokenizer goes along when the run's folder holds it. Raises UserError for a damaged checkpoint
    or an existing output folder.
    """
    import torch

    folder = resolve(source)
    manifest = open_checkpoint(folder)
    config = config_of(manifest).model
    model = Transformer(config)
    load_weights(folder, model)
    tokenizer = tokenizer_file(folder.absolute().parent.parent)
    write_folder(
        output,
        config,
        named_pieces(model),
        [] if tokenizer is None else [tokenizer],
        getattr(torch, dtype),
        eos_token_id=manifest.data.eod_id,
    )
    return folder
