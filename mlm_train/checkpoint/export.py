"""Checkpoint -> Hugging Face folder (contract: hf_folder.py), on one process."""

from pathlib import Path

from mlm_train.checkpoint.folders import resolve
from mlm_train.checkpoint.hf_files import carried, special_tokens
from mlm_train.checkpoint.hf_folder import write_folder
from mlm_train.checkpoint.load import config_of, load_weights, open_checkpoint
from mlm_train.checks import Check
from mlm_train.model.logical import named_pieces
from mlm_train.model.transformer import Transformer


def export_checkpoint(source: Path, output: Path, dtype: str, verify: Check = "full") -> Path:
    """Write the export of a checkpoint (or of a run's newest); returns the checkpoint's folder.

    What lies beside the weights in the run's folder goes along: the tokenizer, and of a run that started from
    an import what that had. Raises UserError for a damaged checkpoint or an existing output folder.
    """
    import torch

    folder = resolve(source)
    manifest = open_checkpoint(folder, verify)
    config = config_of(manifest).model
    model = Transformer(config)
    load_weights(folder, model)
    home = folder.absolute().parent.parent
    write_folder(
        output,
        config,
        named_pieces(model),
        carried(home),
        getattr(torch, dtype),
        tokens=special_tokens(home).ended_by(manifest.data.eod_id).begun_by(manifest.data.bos_id),
    )
    return folder
