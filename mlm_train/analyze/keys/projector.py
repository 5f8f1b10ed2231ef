"""A layer of an analysis as a folder for TensorBoard's embedding projector: tab-separated files."""

from pathlib import Path

from torch import Tensor

from mlm_train.analyze.keys.folder import KeysFolder
from mlm_train.errors import UserError
from mlm_train.utils.files import new_folder, write_text

CONFIG, METADATA = "projector_config.pbtxt", "metadata.tsv"


def write_projector(folder: KeysFolder, layer: int, out: str | Path) -> int:
    """Write the tokens on a layer's map: their principal components, and their places. Returns how many.

    Raises UserError for a layer without a map and for an output that exists.
    """
    ids, components, places, labels = folder.tensors(
        layer, "map_tokens", "map_components", "map_places", "cluster"
    )
    if not len(ids):
        raise UserError(f"{folder.path} has no map of layer {layer}: it was written with --map-tokens 0")
    clusters = folder.statistics(layer).clusters
    metadata = [("token", "text", "cluster", "name")]
    for token in ids.tolist():
        cluster = clusters[int(labels[token])]
        text = folder.texts[token]
        shown = f"#{token}" if text is None else repr(text)[1:-1]
        metadata.append((str(token), shown, str(cluster.cluster), cluster.name))
    with new_folder(Path(out)) as draft:
        embeddings = []
        for name, rows in (("coefficients", components), ("map", places)):
            write_text(draft / f"{name}.tsv", _tsv(rows))
            embeddings.append(
                f'embeddings {{\n  tensor_name: "layer {layer} {name}"\n  tensor_path: "{name}.tsv"\n'
                f'  metadata_path: "{METADATA}"\n}}\n'
            )
        write_text(draft / METADATA, "".join("\t".join(row) + "\n" for row in metadata))
        write_text(draft / CONFIG, "".join(embeddings))
    return len(ids)


def _tsv(rows: Tensor) -> str:
    return "".join("\t".join(f"{value:.6g}" for value in row) + "\n" for row in rows.tolist())
