"""A model in memory as an export."""

from pathlib import Path

import torch

from mlm_train.checkpoint.hf.files import carried, special_tokens
from mlm_train.checkpoint.hf.folder import write_folder
from mlm_train.checkpoint.reading.logical_folder import ModelFolder
from mlm_train.model.logical import named_pieces
from mlm_train.model.transformer import Transformer


def write_export(output: Path, origin: ModelFolder, model: Transformer, dtype: torch.dtype) -> None:
    """Write a model as an export, with the files beside the weights of the folder that it was read from."""
    tokens = special_tokens(origin.home)
    if origin.manifest is not None:
        tokens = tokens.ended_by(origin.manifest.data.eod_id).begun_by(origin.manifest.data.bos_id)
    pieces = named_pieces(model)
    write_folder(output, model.config, pieces, carried(origin.home), dtype, tokens=tokens, complete=True)
