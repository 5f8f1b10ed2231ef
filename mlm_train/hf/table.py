"""A ToL for a model in transformers."""

from pathlib import Path

import torch

from mlm_train.checkpoint.hf.folder import fingerprint
from mlm_train.checkpoint.hf.manifest import read_manifest
from mlm_train.errors import UserError
from mlm_train.hf.configuration import MemoryLLMConfig
from mlm_train.tol.format.index_file import read_index
from mlm_train.tol.serve.source import TolSource


def open_table(folder: str | Path, config: MemoryLLMConfig) -> TolSource:
    """Open a ToL's folder for the model of a config.

    Raises UserError for a damaged table, for one of a model of another shape and, where the model comes from
    a folder that `mlm-train export` wrote, for one that was built from anything else.
    """
    with torch.device("cpu"):  # from_pretrained makes models on the meta device
        source = TolSource.open_folder(folder, config.model_config())
    export = Path(config.name_or_path or "")
    manifest = read_manifest(export)
    if manifest is not None:  # its checksums save reading the weights
        known = {entry.file: entry.sha256 for entry in manifest.files}
        if fingerprint(export, known) != read_index(folder).source.checkpoint:
            raise UserError(
                f"{folder} was not built from {export}: build it with `mlm-train tol build {export}`"
            )
    return source
