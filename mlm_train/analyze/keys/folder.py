"""The folder that `analyze keys` writes: docs/analyze.md describes its files."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mlm_train.errors import UserError
from mlm_train.utils.files import new_folder, system_error, write_json
from mlm_train.utils.records import Count, Record, read_json, record_of

FORMAT = "mlm-keys-1"
INDEX, STATISTICS, TENSORS = "analysis.json", "statistics.json", "layer.safetensors"
TOKENS, KEYS = "tokens.parquet", "keys.parquet"
_FIX = "run `mlm-train analyze keys` again, into a new folder"
DEFINITIONS = {
    "c": "c_k = (q . W_up[k]) * silu(q . W_gate[k]), q = N_m(x0[t]); FFN-M(x0) = sum_k c_k W_down[:, k]",
    "top": "largest |c_k|, in descending order, with sign",
    "effective_keys": "(sum_k c_k^2)^2 / sum_k c_k^4 of a token",
    "share": "sum of c_k^2 over a token's top keys / over all keys",
    "usage": "tokens that have a key among their top keys",
    "outlier": "mean |c_k| over tokens > median + 6 * 1.4826 * MAD of the means of the layer's keys",
    "explained": "1 - within / total sum of squares of the clusters, over all tokens",
    "clustering_coefficient": "(R - R0) / (1 - R0): R explained by K-means on the sample, R0 on the "
    "sample with each column shuffled on its own",
}


class Settings(Record):
    """What an analysis was asked for; it goes on only with the same."""

    top_k: Count
    clusters: Count
    map_tokens: Count
    seed: Count


class Index(Record):
    """analysis.json. model: path of the export or checkpoint; fingerprint: OpenedModel.fingerprint."""

    format: str
    model: str
    fingerprint: str
    vocab_size: Count
    num_layers: Count
    keys: Count
    settings: Settings
    definitions: dict[str, str]


class Cluster(Record):
    """A cluster of tokens; central: the ids nearest to its centre."""

    cluster: Count
    name: str
    tokens: Count
    central: list[Count]


class Statistics(Record):
    """statistics.json of a layer. digest: LayerKeys.digest. Means are over tokens; see DEFINITIONS.

    sample: tokens behind silhouette and clustering_coefficient.
    """

    layer: Count
    digest: str
    mean_abs: float
    mean_norm: float
    mean_effective_keys: float
    mean_share: float
    unused_keys: Count
    outlier_keys: list[Count]
    explained: float
    silhouette: float | None
    clustering_coefficient: float
    sample: Count
    clusters: list[Cluster]
    seconds: float


class KeysFolder:
    """A folder of an analysis, with the layers that are finished. Raises UserError where it is none."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index = record_of(Index, read_json(self.path / INDEX, _FIX), self.path / INDEX, _FIX)
        if self.index.format != FORMAT:
            raise UserError(f"{self.path / INDEX} has format {self.index.format!r}, not {FORMAT}; {_FIX}")

    @classmethod
    def begin(cls, path: Path, index: Index) -> Self:
        """The folder of an analysis, new or unfinished. UserError where it is another's."""
        if not (path / INDEX).exists():
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / INDEX, index.model_dump())
        folder = cls(path)
        if folder.index.fingerprint != index.fingerprint:
            raise UserError(
                f"{path} is the analysis of another model ({folder.index.model}); name a new --output"
            )
        for name, value in folder.index.settings:
            if value != getattr(index.settings, name):
                option = name.replace("_", "-")
                raise UserError(
                    f"{path} was begun with --{option} {value}: give that, or name a new --output"
                )
        return folder

    def layer_path(self, layer: int) -> Path:
        """A layer's own folder, which exists when it is finished."""
        return self.path / f"layer-{layer:03d}"

    @property
    def layers(self) -> list[int]:
        """Finished layers, ascending."""
        return [layer for layer in range(self.index.num_layers) if self.layer_path(layer).is_dir()]

    def check_layer(self, layer: int) -> None:
        """UserError for a layer that is not finished or does not exist."""
        if layer not in self.layers:
            raise UserError(f"{self.path} has no layer {layer}; it has {self.layers}")

    def statistics(self, layer: int) -> Statistics:
        """A finished layer's statistics."""
        self.check_layer(layer)
        file = self.layer_path(layer) / STATISTICS
        return record_of(Statistics, read_json(file, _FIX), file, _FIX)

    def tensors(self, layer: int, *names: str) -> list[Tensor]:
        """Tensors of a finished layer. UserError for a damaged file."""
        self.check_layer(layer)
        file = self.layer_path(layer) / TENSORS
        try:
            with safe_open(file, framework="pt") as opened:
                return [opened.get_tensor(name) for name in names]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged ({error}); {_FIX}") from None

    @cached_property
    def texts(self) -> list[str | None]:
        """The text of every token; None without a tokenizer."""
        import pyarrow.parquet as parquet

        if not self.layers:
            raise UserError(f"{self.path} has no finished layer; run `mlm-train analyze keys` again")
        file = self.layer_path(self.layers[0]) / TOKENS
        try:
            texts: list[str | None] = parquet.read_table(file, columns=["text"])["text"].to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is damaged ({error}); {_FIX}") from None
        return texts

    def find(self, token: str) -> int:
        """The id of a token given as #id or as its text. UserError for none or several."""
        number = token[1:]
        if token[:1] == "#" and number.isascii() and number.isdecimal():
            if int(number) >= self.index.vocab_size:
                raise UserError(f"token {token}: ids are #0 to #{self.index.vocab_size - 1}")
            return int(number)
        found = [id_ for id_, text in enumerate(self.texts) if text == token]
        if len(found) == 1:
            return found[0]
        if found:
            several = " ".join(f"#{id_}" for id_ in found[:5])
            raise UserError(f"token {token!r}: {len(found)} tokens have this text ({several} ...); give #ID")
        raise UserError(f"token {token!r}: no token has this text (mind a leading space); give one, or #ID")

    def write_layer(
        self,
        statistics: Statistics,
        tensors: Mapping[str, Tensor],
        tokens: Mapping[str, Any],
        keys: Mapping[str, Any],
    ) -> None:
        """Write a layer's files, all or none. tokens, keys: columns of the parquets."""
        import pyarrow
        import pyarrow.parquet as parquet

        with new_folder(self.layer_path(statistics.layer)) as draft:
            try:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft / TENSORS)
            except SafetensorError as error:
                raise system_error(error) from None
            for name, columns in ((TOKENS, tokens), (KEYS, keys)):
                table = pyarrow.table({column: _column(values) for column, values in columns.items()})
                parquet.write_table(table, draft / name, compression="zstd")
            write_json(draft / STATISTICS, statistics.model_dump())


def _column(values: Tensor | Sequence[object]) -> Any:
    """A column of a parquet: a tensor [n], or [n, k] as lists of k."""
    import pyarrow

    if not isinstance(values, torch.Tensor):
        return pyarrow.array(values)
    flat = pyarrow.array(values.flatten().numpy())
    return flat if values.dim() == 1 else pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
