"""The tokens that end and begin documents: which ids they have, and whether a text can produce them."""

from pathlib import Path

from mlm_train.data.tokenizer_backends import Backend
from mlm_train.errors import UserError
from mlm_train.utils.records import read_json

USUAL_EOD_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>")
USUAL_BOS_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")
_DECLARED_IN = ("tokenizer_config.json", "special_tokens_map.json")  # beside a tokenizer.json
_FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
_SUGGESTED = 5  # special tokens that an error names


def find_eod_id(backend: Backend, eod: str | int | None, path: Path) -> int | None:
    """Id of the end-of-document token; see Tokenizer.load for `eod`. None where none is known.

    path: the tokenizer's file. Raises UserError where the tokenizer has no token `eod`.
    """
    if eod is None and backend.declared_eos is None:
        eod = declared_token(path, "eos_token")
    if eod is None:
        return _usual_eod_id(backend) if backend.declared_eos is None else backend.declared_eos
    eod_id = backend.id_of(eod) if isinstance(eod, str) else eod
    if eod_id is None or not 0 <= eod_id < backend.vocab_size:
        raise UserError(f"tokenizer {path} has no token {eod!r}; name one of its tokens with --eod")
    return eod_id


def find_bos_id(backend: Backend, declared: int | None) -> int | None:
    """`declared`, or the id of a special token with a usual name; None where there is neither."""
    usual = (backend.special.get(token) for token in USUAL_BOS_TOKENS)
    return next((bos_id for bos_id in (declared, *usual) if bos_id is not None), None)


def declared_token(path: Path, key: str) -> str | None:
    """The token that Hugging Face's files beside a tokenizer.json declare under a key such as eos_token."""
    for name in _DECLARED_IN:
        if path.suffix == ".json" and (path.parent / name).is_file():
            token = read_json(path.parent / name, "repair or remove it").get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
    return None


def recorded_eod_id(folder: Path) -> int | None:
    """eod_id of a folder's manifest.json, else eos_token_id of its config.json, else None."""
    for name, key in (("manifest.json", "eod_id"), ("config.json", "eos_token_id")):
        try:
            eod_id = read_json(folder / name, "").get(key)
        except UserError:
            continue  # only a hint here: the folder's own reader reports a broken file
        if isinstance(eod_id, list):  # chat models have several; the first ends what they were pretrained on
            eod_id = next(iter(eod_id), None)
        if isinstance(eod_id, int):
            return eod_id
    return None


def text_can_produce(backend: Backend, token_id: int, token: str) -> bool:
    """Whether a text that spells a token, also as normalizers may rewrite it, is encoded as that token.

    Many vocabularies store special tokens like ordinary words, and some models look them up like words.
    """
    spellings = {token, token.upper(), token.lower(), token.translate(_FULL_WIDTH)}
    around = ("", " ", "\n", "a", ".")
    texts = [before + spelled + after for spelled in spellings for before in around for after in around]
    return any(token_id in ids for ids in backend.encode_batch(texts))


def alternatives(backend: Backend) -> str:
    """A fix for an unusable end-of-document token: the special tokens that no text can produce."""
    special = backend.special.items()
    safe = [token for token, token_id in special if not text_can_produce(backend, token_id, token)]
    if not safe:
        return "it has none such: use another tokenizer"
    more = f" and {len(safe) - _SUGGESTED} more" if len(safe) > _SUGGESTED else ""
    return f"name another with --eod: {', '.join(map(repr, safe[:_SUGGESTED]))}{more}"


def _usual_eod_id(backend: Backend) -> int | None:
    """The first special token with a usual name that no text can produce."""
    usual = ((backend.special.get(token), token) for token in USUAL_EOD_TOKENS)
    return next((i for i, token in usual if i is not None and not text_can_produce(backend, i, token)), None)
