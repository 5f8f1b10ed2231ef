"""What a report shows, read and checked: that its figures are of one vocabulary, and may be compared."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from mlm_train.analyze.ablate.study import Ablation, read_ablation
from mlm_train.analyze.keys.folder import KeysFolder
from mlm_train.checkpoint.reading.logical_folder import ModelFolder, find_model
from mlm_train.errors import UserError
from mlm_train.tol.serve.reader import TableReader
from mlm_train.tol.tools.vocabulary import Vocabulary
from mlm_train.utils.records import Count, Record, read_json, record_of

_SHARES = "give what `mlm-train analyze shares --json` printed"
_APART = "give those of one {}, or write two reports"


class Share(Record):
    """A part of a layer: analyze/hooks.py defines the means."""

    norm: float
    ratio: float
    share: float


class LayerShares(Record):
    """What the parts of a layer add; None for a part that it does not have."""

    layer: Count
    update: float
    growth: float
    attention: Share | None = None
    ffn: Share | None = None
    ffn_m: Share | None = None


class Shares(Record):
    """What `analyze shares --json` prints. model, data: fingerprints. length: tokens of a window."""

    model: str
    data: str
    windows: Count
    length: Count
    layers: list[LayerShares]


@dataclass
class Inputs:
    """Everything that was given, by its path."""

    models: dict[str, ModelFolder] = field(default_factory=dict)
    keys: dict[str, KeysFolder] = field(default_factory=dict)
    tables: dict[str, TableReader] = field(default_factory=dict)
    ablations: dict[str, Ablation] = field(default_factory=dict)
    shares: dict[str, Shares] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        models: Sequence[str],
        keys: Sequence[str],
        tables: Sequence[str],
        ablations: Sequence[str],
        shares: Sequence[str],
    ) -> Self:
        """Read all but tables' rows. UserError for another kind of file, or what does not belong together."""
        found = cls(
            {path: find_model(path) for path in models},
            {path: KeysFolder(path) for path in keys},
            {path: TableReader.open_folder(path) for path in tables},
            {path: read_ablation(Path(path)) for path in ablations},
            {path: record_of(Shares, read_json(Path(path), _SHARES), path, _SHARES) for path in shares},
        )
        found._check_vocabularies()
        found._check_text()
        found._check_tables()
        return found

    @property
    def texts(self) -> list[str | None]:
        """The text of every token; empty without an analysis of keys."""
        return next((folder.texts for folder in self.keys.values()), [])

    def _check_vocabularies(self) -> None:
        """One tokenizer: as many tokens everywhere, and the same texts where they are known."""
        sizes = {
            **{path: folder.index.vocab_size for path, folder in self.keys.items()},
            **{path: model.config.vocab_size for path, model in self.models.items()},
            **{path: table.index.vocab_size for path, table in self.tables.items()},
        }
        _same(((path, f"{size} tokens") for path, size in sizes.items()), "tokenizer")
        known = {path: folder.texts for path, folder in self.keys.items()}
        known |= {path: _texts(model) for path, model in self.models.items()}
        first = next((item for item in known.items() if _has_texts(item[1])), None)
        for path, texts in known.items():
            if first is None or not _has_texts(texts) or texts == first[1]:
                continue
            token = next(n for n, pair in enumerate(zip(texts, first[1], strict=True)) if pair[0] != pair[1])
            raise UserError(
                f"{path} and {first[0]} have different tokenizers: token {token} is {texts[token]!r} and "
                f"{first[1][token]!r}; {_APART.format('tokenizer')}"
            )

    def _check_text(self) -> None:
        """The same text: figures of others cannot be compared."""
        kinds: tuple[Mapping[str, Ablation | Shares], ...] = (self.ablations, self.shares)
        for found in kinds:
            for name in ("data", "windows", "length"):
                _same(((path, f"{name} {getattr(one, name)}") for path, one in found.items()), "text")

    def _check_tables(self) -> None:
        """Tables of one model, which is that of an analysis, an ablation or shares where there are any."""
        made = {path: table.index.source.checkpoint for path, table in self.tables.items()}
        _same(((path, f"model {fingerprint[:12]}") for path, fingerprint in made.items()), "model")
        analysed = {folder.index.fingerprint for folder in self.keys.values()}
        analysed |= {ablation.model for ablation in self.ablations.values()}
        analysed |= {shares.model for shares in self.shares.values()}
        for path, fingerprint in made.items():
            if analysed and fingerprint not in analysed:
                raise UserError(
                    f"{path} is of another model than --keys, --ablation and --shares: "
                    f"{_APART.format('model')}"
                )


Of = Literal["tokenizer", "text", "model"]


def _same(values: Iterable[tuple[str, str]], what: Of) -> None:
    """UserError for the first value that differs from the first of all; values: path and value."""
    first: tuple[str, str] | None = None
    for path, value in values:
        first = first or (path, value)
        if value != first[1]:
            raise UserError(f"{path} ({value}) and {first[0]} ({first[1]}) differ: {_APART.format(what)}")


def _texts(model: ModelFolder) -> list[str | None]:
    vocabulary = Vocabulary.of(model.config.vocab_size, model)
    return [vocabulary.text(token) for token in range(vocabulary.size)]


def _has_texts(texts: Sequence[str | None]) -> bool:
    return any(text is not None for text in texts)
