"""The data a run reads: one prepared folder, or several with one tokenizer, mixed in fixed proportions."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from mlm_train.config import DataConfig
from mlm_train.data.prepared import PreparedData
from mlm_train.data.samples import Samples
from mlm_train.errors import UserError
from mlm_train.utils.checks import Check

PARTS = 100_000  # weights are rounded to whole parts of a blend: five decimals


@dataclass(frozen=True)
class Blend:
    """Prepared folders, and how many of every PARTS samples (and hence tokens) come from each.

    validation: further folders by name, of which a run only ever validates.
    """

    sources: Sequence[PreparedData]
    shares: Sequence[int]
    validation: Mapping[str, PreparedData] = field(default_factory=dict)

    @classmethod
    def open(cls, config: DataConfig) -> "Blend":
        """Open the folders of config section data; data.verify=full is left to one rank's `verify`.

        Raises UserError for a folder that does not match its manifest, for different tokenizers, for a
        weight too small to count, and for two validation curves of one name.
        """
        verify_now: Check = "none" if config.verify == "none" else "sizes"
        paths, shares = [config.path or ""], [1]
        if config.blend is not None:
            paths = [source.path for source in config.blend]
            shares = _shares([source.weight for source in config.blend])
        blend = cls(
            [PreparedData.open(path, verify_now) for path in paths],
            shares,
            {name: PreparedData.open(path, verify_now) for name, path in (config.validation or {}).items()},
        )
        blend._check_sources()
        blend._check_alike("data.blend", blend.sources)
        blend._check_alike("data.validation", blend.validation.values())
        return blend

    def verify(self) -> None:
        """Read and verify every file of every source. UserError names what is wrong."""
        for source in (*self.sources, *self.validation.values()):
            source.verify()

    @property
    def names(self) -> list[str]:
        """Display names of the sources: the folder's own name where it is unique, else its path."""
        return names_of([source.path for source in self.sources])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all that decides a sample except seed and length: contents, order and shares."""
        if len(self.sources) == 1:
            return self.sources[0].fingerprint
        parts = [[source.fingerprint, share] for source, share in zip(self.sources, self.shares, strict=True)]
        return hashlib.sha256(json.dumps(["mlm-blend", parts]).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Number of ids of the sources' common tokenizer."""
        return self.sources[0].vocab_size

    @property
    def eod_id(self) -> int:
        """The id that ends every document."""
        return self.sources[0].eod_id

    @property
    def bos_id(self) -> int | None:
        """The id that begins every document; None: there is none."""
        return self.sources[0].bos_id

    @property
    def tokenizer(self) -> Path:
        """Path of the tokenizer file in the first folder; the others have the same one."""
        return self.sources[0].path / self.sources[0].manifest.tokenizer.file

    def samples(self, split: str, sequence_length: int, seed: int | None) -> Samples:
        """The samples of `train` or `validation`, both blended by the same shares; seed None: in order."""
        streams = [source.split(split) for source in self.sources]
        return Samples(streams, sequence_length, seed, self.shares)

    def validation_samples(self, sequence_length: int) -> dict[str, Samples]:
        """The validation splits of the further folders, by name, in order."""
        return {
            name: Samples(source.split("validation"), sequence_length, None)
            for name, source in self.validation.items()
        }

    def __str__(self) -> str:
        return " + ".join(str(source.path) for source in self.sources)

    def _check_sources(self) -> None:
        folder, times = Counter(source.path.resolve() for source in self.sources).most_common(1)[0]
        if times > 1:
            raise UserError(
                f"data.blend: {folder} is given {times} times: give it once, with the weights added"
            )
        if len(self.sources) > 1 and (taken := self.validation.keys() & set(self.names)):
            name = min(taken)
            raise UserError(
                f"data.validation.{name}: a source of data.blend has that name: choose another, so that each "
                "has its own curve"
            )

    def _check_alike(self, field_name: str, others: Iterable[PreparedData]) -> None:
        """Raise UserError for a folder whose tokens do not mean what the first source's do."""
        first = self.sources[0]
        for other in others:
            same_file = other.manifest.tokenizer.sha256 == first.manifest.tokenizer.sha256
            if not same_file or (other.vocab_size, other.eod_id) != (first.vocab_size, first.eod_id):
                raise UserError(
                    f"{field_name}: {other.path} was prepared with a different tokenizer than {first.path}: "
                    f"prepare it again with --tokenizer {self.tokenizer}"
                )
            if other.bos_id != first.bos_id:
                with_bos, without = (other, first) if first.bos_id is None else (first, other)
                raise UserError(
                    f"{field_name}: {with_bos.path} was prepared with --add-bos and {without.path} was not: "
                    "prepare one of them again"
                )


def names_of(folders: Sequence[Path]) -> list[str]:
    """A folder's own name where it is unique among them, else its path."""
    short = [folder.resolve().name for folder in folders]
    count = Counter(short)
    return [name if count[name] == 1 else str(folder) for name, folder in zip(short, folders, strict=True)]


def _shares(weights: Sequence[float]) -> list[int]:
    """PARTS divided in proportion to the weights, by the largest remainder method."""
    exact = [Fraction(str(weight)) for weight in weights]
    parts = [weight * PARTS / sum(exact) for weight in exact]
    shares = [int(part) for part in parts]
    remainders = sorted(range(len(parts)), key=lambda i: (shares[i] - parts[i], i))
    for i in remainders[: PARTS - sum(shares)]:
        shares[i] += 1
    for i, share in enumerate(shares):
        if share == 0:
            raise UserError(
                f"data.blend.{i}.weight={weights[i]} is less than one of {PARTS:,} samples; raise it, or "
                "leave that source out"
            )
    return shares
