"""The files that transformers reads beside an export's weights, where the run has none from an import."""

from pathlib import Path
from typing import Any

from mlm_train.checkpoint.hf.fast_tokenizer import beginning_with, tokenizer_json
from mlm_train.checkpoint.hf.files import ADD_BOS, ADJUSTED, GENERATION, TOKENIZER_CONFIG, SpecialTokens
from mlm_train.config import ModelConfig
from mlm_train.data.tokenizer import FILE_OF_KIND, Tokenizer, tokenizer_file
from mlm_train.utils.files import write_json, write_text
from mlm_train.utils.records import read_json

TOKENIZER = FILE_OF_KIND["huggingface"]
# Read by transformers 4 and 5. Without a class a base model's tokenizer would be taken for Llama's.
_CLASS = "PreTrainedTokenizerFast"
_FILES = "fast_tokenizer_files"  # in tokenizer_config.json: tokenizer.VERSION.json, read from that version on


def write_missing(folder: Path, config: ModelConfig, tokens: SpecialTokens) -> None:
    """Write generation_config.json, tokenizer_config.json and, of a SentencePiece model, tokenizer.json.

    Files that are there stay. A tokenizer that tokenizer.json cannot express gets neither file.
    """
    ids = {name: value for name, value in tokens.tree().items() if value is not None}
    if ids and not (folder / GENERATION).exists():
        write_json(folder / GENERATION, ids)
    file = tokenizer_file(folder)
    if file is None:
        return
    if not (folder / TOKENIZER_CONFIG).exists():
        if not (folder / TOKENIZER).exists():
            text = tokenizer_json(file)
            if text is None:
                return
            write_text(folder / TOKENIZER, text)
        write_json(folder / TOKENIZER_CONFIG, _tokenizer_config(_load(file), config, tokens))
    if (folder / TOKENIZER).exists():
        _set_beginning(folder, file, tokens)


def _load(file: Path) -> Tokenizer:
    """A tokenizer for all but its end token: an import's files may declare one that it does not have."""
    return Tokenizer.load(file, eod=0)


def _tokenizer_config(tokenizer: Tokenizer, config: ModelConfig, tokens: SpecialTokens) -> dict[str, Any]:
    names = {"bos_token": tokens.bos, "eos_token": next(iter(tokens.eos), None), "pad_token": tokens.pad}
    tree: dict[str, Any] = {
        "tokenizer_class": _CLASS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        "padding_side": "left",  # a batch of prompts ends where generation begins
    }
    for name, token_id in names.items():
        if token_id is not None and 0 <= token_id < tokenizer.vocab_size:
            tree[name] = tokenizer.token_of(token_id)
    return tree if tokens.add_bos is None else tree | {ADD_BOS: tokens.add_bos}


def _set_beginning(folder: Path, file: Path, tokens: SpecialTokens) -> None:
    """Have transformers put the beginning before a text, or not, as the model was trained.

    Where there is a tokenizer.json, transformers 5 ignores add_bos_token, and that file alone decides. The
    tokenizer of the data (`file`) keeps its bytes, by which it is known: an adjusted one is written beside.
    """
    tree = read_json(folder / TOKENIZER_CONFIG, "correct it")
    (folder / ADJUSTED).unlink(missing_ok=True)  # an import's, for another run
    if tree.get(_FILES) == [ADJUSTED]:
        del tree[_FILES]
        write_json(folder / TOKENIZER_CONFIG, tree)
    tokenizer = _load(folder / TOKENIZER)
    first = tokens.bos if tokens.add_bos else None
    if tokens.add_bos in (None, tokenizer.prepends_bos) or (tokens.add_bos and first is None):
        return
    text = beginning_with(folder / TOKENIZER, None if first is None else (tokenizer.token_of(first), first))
    if file.name != TOKENIZER:
        write_text(folder / TOKENIZER, text)
        return
    write_text(folder / ADJUSTED, text)
    write_json(folder / TOKENIZER_CONFIG, tree | {_FILES: [ADJUSTED]})
