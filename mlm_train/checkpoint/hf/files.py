"""What lies beside a Llama's weights: its tokenizer's files, its chat template, the tokens that end a text.

They go along from a Hugging Face folder into an import, from there into the folder of a run that starts from
it, and from the run into its export.
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
ADD_BOS = "add_bos_token"  # in tokenizer_config.json, and in an export's config.json
CARRIED = (
    "tokenizer.json",
    "tokenizer.model",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION,
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LLAMA_IDS = {"bos_token_id": 1, "eos_token_id": 2}  # transformers', where no file says anything
_FIX = "correct it, or copy the folder again"


class SpecialTokens(NamedTuple):
    """Ids that begin a text, that end one (the first ends documents too), and that fill a batch.

    add_bos: whether the model's texts do begin with bos; None: nothing says.
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    add_bos: bool | None = None

    def ended_by(self, first: int | None) -> "SpecialTokens":
        """The same with another first end."""
        return self._replace(eos=_once(([] if first is None else [first], self.eos)))

    def begun_by(self, bos_id: int | None) -> "SpecialTokens":
        """The same of a model whose documents began with an id, or (None) with none."""
        return self._replace(bos=self.bos if bos_id is None else bos_id, add_bos=bos_id is not None)

    def tree(self) -> dict[str, int | list[int] | None]:
        """As config.json and generation_config.json say it."""
        eos = list(self.eos) if len(self.eos) > 1 else next(iter(self.eos), None)
        return dict(zip(_IDS, (self.bos, eos, self.pad), strict=True))


NO_TOKENS = SpecialTokens()


class _Said(BaseModel):
    """What one of the files says of them."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    add_bos_token: bool | None = None

    @property
    def ends(self) -> list[int]:
        """All of them."""
        eos = self.eos_token_id
        return [] if eos is None else eos if isinstance(eos, list) else [eos]


def special_tokens(folder: Path) -> SpecialTokens:
    """Of a folder's config.json and generation_config.json, the ends that either of them names.

    add_bos is config.json's, else tokenizer_config.json's. Raises UserError naming the file where an id is
    none.
    """
    trees = {name: read_json(folder / name, _FIX) for name in (CONFIG, GENERATION) if _is_there(folder, name)}
    if trees.get(CONFIG, {}).get("model_type") == "llama":
        silent = (name for name in _LLAMA_IDS if not any(name in tree for tree in trees.values()))
        trees[CONFIG] = trees[CONFIG] | {name: _LLAMA_IDS[name] for name in silent}
    said = [record_of(_Said, tree, folder / name, _FIX) for name, tree in trees.items()]
    bos = (one.bos_token_id for one in said if one.bos_token_id is not None)
    pad = (one.pad_token_id for one in said if one.pad_token_id is not None)
    if _is_there(folder, TOKENIZER_CONFIG):
        tree = {ADD_BOS: read_json(folder / TOKENIZER_CONFIG, _FIX).get(ADD_BOS)}  # its ids mean other things
        said.append(record_of(_Said, tree, folder / TOKENIZER_CONFIG, _FIX))
    add_bos = (one.add_bos_token for one in said if one.add_bos_token is not None)
    return SpecialTokens(
        next(bos, None), _once(one.ends for one in said), next(pad, None), next(add_bos, None)
    )


def first_id(folder: Path) -> int | None:
    """What a text begins with for the model of an export or a Llama; None: with nothing but itself.

    As transformers has it: where no file says add_bos_token, what the tokenizer.json puts before a text.
    """
    tokens, file = special_tokens(folder), tokenizer_file(folder)
    tokenizer = None if file is None else Tokenizer.load(file)
    adds = tokens.add_bos
    if adds is None:
        adds = tokenizer is not None and tokenizer.prepends_bos
    if not adds:
        return None
    declared = None if tokenizer is None else tokenizer.declared_bos_id
    return tokens.bos if declared is None else declared


def _once(lists: Iterable[Iterable[int]]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(token for tokens in lists for token in tokens))


def _is_there(folder: Path, name: str) -> bool:
    return (folder / name).exists()


def carried(folder: Path) -> list[Path]:
    """Those of CARRIED that a folder has."""
    return [folder / name for name in CARRIED if (folder / name).is_file()]


def say_begin(folder: Path, tokens: SpecialTokens) -> None:
    """Have a carried tokenizer_config.json say whether texts begin with bos: transformers does as it says."""
    if tokens.add_bos is None or not _is_there(folder, TOKENIZER_CONFIG):
        return
    tree = read_json(folder / TOKENIZER_CONFIG, _FIX)
    if tree.get(ADD_BOS) != tokens.add_bos:
        write_json(folder / TOKENIZER_CONFIG, tree | {ADD_BOS: tokens.add_bos})


def carry_over(source: Path, run: Path, tokenizer: Path, end: int) -> list[str]:
    """Give the folder of a run what lies beside the weights it starts from; names of what is left behind.

    `tokenizer`, `end`: of the run's data. Where the source has another tokenizer, or none, nothing that lies
    there means anything for the run. generation_config.json is written with the ids of config.json too.
    """
    theirs = tokenizer_file(source)
    same = theirs is not None and theirs.name == tokenizer.name and sha256_of(theirs) == sha256_of(tokenizer)
    if not same:
        return [file.name for file in carried(source)]
    for file in carried(source):
        shutil.copyfile(file, run / file.name)
    said = read_json(source / GENERATION, _FIX) if _is_there(source, GENERATION) else {}
    ids = special_tokens(source).ended_by(end).tree()
    write_json(run / GENERATION, said | {name: value for name, value in ids.items() if value is not None})
    return []
