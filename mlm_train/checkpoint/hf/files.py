"""The files beside a Llama's weights: tokenizer, chat template, generation config with its end tokens.

They are carried over from a Hugging Face folder into an import, from there into the folder of a run that
starts from it, and from the run into its export.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from mlm_train.data.tokenizer import Tokenizer, tokenizer_file
from mlm_train.utils.files import sha256_of, write_json
from mlm_train.utils.records import read_json, record_of

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADJUSTED = "tokenizer.4.0.json"  # for transformers from 4.0 on, in place of tokenizer.json (hf/beside.py)
ADD_BOS = "add_bos_token"  # in tokenizer_config.json, and in an export's config.json
CARRIED = (
    "tokenizer.json",
    "tokenizer.model",
    ADJUSTED,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION,
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2}  # transformers' defaults
_FIX = "correct it, or copy the folder again"


class SpecialTokens(NamedTuple):
    """Ids that begin a text, that end one (the first also ends documents), and that pad a batch.

    add_bos: whether the model's texts begin with bos; None: unknown.
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    add_bos: bool | None = None

    def ended_by(self, eod_id: int | None) -> "SpecialTokens":
        """A copy whose first end is eod_id; unchanged for None."""
        return self._replace(eos=_distinct(([] if eod_id is None else [eod_id], self.eos)))

    def begun_by(self, bos_id: int | None) -> "SpecialTokens":
        """A copy for a model whose training documents began with bos_id, or (None) with none."""
        return self._replace(bos=self.bos if bos_id is None else bos_id, add_bos=bos_id is not None)

    def tree(self) -> dict[str, int | list[int] | None]:
        """The fields of config.json and generation_config.json."""
        eos = list(self.eos) if len(self.eos) > 1 else next(iter(self.eos), None)
        return dict(zip(_IDS, (self.bos, eos, self.pad), strict=True))


NO_TOKENS = SpecialTokens()


class _TokenFields(BaseModel):
    """The fields about special tokens in one of the files."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    add_bos_token: bool | None = None

    @property
    def ends(self) -> list[int]:
        """The end ids as a list."""
        eos = self.eos_token_id
        return [] if eos is None else eos if isinstance(eos, list) else [eos]


def special_tokens(folder: Path) -> SpecialTokens:
    """Special tokens of a folder's config.json and generation_config.json, with the ends of both.

    add_bos is that of config.json, else of tokenizer_config.json. Raises UserError naming the file for an
    invalid id.
    """
    trees = {name: read_json(folder / name, _FIX) for name in (CONFIG, GENERATION) if _exists(folder, name)}
    if trees.get(CONFIG, {}).get("model_type") == "llama":
        unset = (name for name in _LLAMA_IDS if not any(name in tree for tree in trees.values()))
        trees[CONFIG] = trees[CONFIG] | {name: _LLAMA_IDS[name] for name in unset}
    files = [record_of(_TokenFields, tree, folder / name, _FIX) for name, tree in trees.items()]
    bos = (file.bos_token_id for file in files if file.bos_token_id is not None)
    pad = (file.pad_token_id for file in files if file.pad_token_id is not None)
    if _exists(folder, TOKENIZER_CONFIG):
        tree = {
            ADD_BOS: read_json(folder / TOKENIZER_CONFIG, _FIX).get(ADD_BOS)
        }  # its other fields are not ids
        files.append(record_of(_TokenFields, tree, folder / TOKENIZER_CONFIG, _FIX))
    add_bos = (file.add_bos_token for file in files if file.add_bos_token is not None)
    return SpecialTokens(
        next(bos, None), _distinct(file.ends for file in files), next(pad, None), next(add_bos, None)
    )


def first_id(folder: Path) -> int | None:
    """The id that texts of an export or a Llama begin with; None: there is none.

    As in transformers: where no file has add_bos_token, the id that the tokenizer.json puts before a text.
    """
    tokens, file = special_tokens(folder), tokenizer_file(folder)
    tokenizer = None if file is None else Tokenizer.load(file)
    add_bos = tokens.add_bos
    if add_bos is None:
        add_bos = tokenizer is not None and tokenizer.prepends_bos
    if not add_bos:
        return None
    declared = None if tokenizer is None else tokenizer.declared_bos_id
    return tokens.bos if declared is None else declared


def _distinct(lists: Iterable[Iterable[int]]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(token for tokens in lists for token in tokens))


def _exists(folder: Path, name: str) -> bool:
    return (folder / name).exists()


def carried(folder: Path) -> list[Path]:
    """The files of CARRIED that a folder has."""
    return [folder / name for name in CARRIED if (folder / name).is_file()]


def set_add_bos(folder: Path, tokens: SpecialTokens) -> None:
    """Set add_bos_token in a carried-over tokenizer_config.json, which transformers follows."""
    if tokens.add_bos is None or not _exists(folder, TOKENIZER_CONFIG):
        return
    tree = read_json(folder / TOKENIZER_CONFIG, _FIX)
    if tree.get(ADD_BOS) != tokens.add_bos:
        write_json(folder / TOKENIZER_CONFIG, tree | {ADD_BOS: tokens.add_bos})


def carry_over(source: Path, run: Path, tokenizer: Path, eod_id: int) -> list[str]:
    """Copy the files beside the weights that a run starts from. Returns the names of files left behind.

    `tokenizer`, `eod_id`: of the run's data. Where the source has another tokenizer, or none, its files do
    not apply to the run. generation_config.json is written with the ids of config.json too.
    """
    own = tokenizer_file(source)
    same = own is not None and own.name == tokenizer.name and sha256_of(own) == sha256_of(tokenizer)
    if not same:
        return [file.name for file in carried(source)]
    for file in carried(source):
        shutil.copyfile(file, run / file.name)
    generation = read_json(source / GENERATION, _FIX) if _exists(source, GENERATION) else {}
    ids = special_tokens(source).ended_by(eod_id).tree()
    write_json(
        run / GENERATION, generation | {name: value for name, value in ids.items() if value is not None}
    )
    return []
