"""A SentencePiece model as a tokenizer.json, which transformers loads without SentencePiece.

transformers converts a tokenizer.model itself, but as if it were a Llama's: it then puts a space before each
text, whatever the model says.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlm_train.data.tokenizer import Tokenizer

_SPACE = "\u2581"  # SentencePiece's spelling of a space
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_NORMAL, _CONTROL, _USER = 1, 3, 4  # SentencePiece.Type
_TEXTS = (
    "",
    " ",
    "def main(self):\n\treturn 'é' + str(0.5)  # \U0001f600 \ufb01 \uff21 \u3000\r\n\n\n x ",
    "  two  spaces,   three \n \n  and  lines\n",
    "0123456789 2026-11-27 aaaaaaaaaaaa ababababab bbbbbbbbbb" + " " * 77 + "!",
    "\u6f22\u5b57 \u0928\u092e\u0938\u094d\u0924\u0947 e\u0301 \x00\x01\x7f\u200b\ufeff",
)
_PIECES = 64  # of the vocabulary in one text


def tokenizer_json(file: Path) -> str | None:
    """The tokenizer.json that encodes and decodes like a SentencePiece `.model`; None where there is none.

    The two are compared on texts with every piece of the vocabulary. Differences that stay: a text that
    spells a control token has that token, as everywhere in transformers; U+2581 is a space; an unknown
    character is decoded as the name of the unknown token; a unigram model rarely chooses another of two
    segmentations with nearly equal scores.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    if proto.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        return None
    made = _convert(proto)
    ours = Tokenizer.load(file)
    for text in _texts(proto):
        ids = made.encode(text, add_special_tokens=False).ids
        if ids != ours.encode(text):
            return None
        unknown = proto.trainer_spec.unk_id in ids
        if not unknown and made.decode(ids, skip_special_tokens=False) != ours.decode(ids):
            return None
    return str(made.to_str(pretty=True))


def beginning_with(file: Path, first: tuple[str, int] | None) -> str:
    """A tokenizer.json changed so that it puts a token (its name and id) before each text, or none."""
    from tokenizers import Tokenizer, processors

    made = Tokenizer.from_file(str(file))
    begin = [] if first is None else [first[0]]
    pair = [*begin, "$A", *(f"{name}:1" for name in begin), "$B:1"]
    made.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A"], pair=pair, special_tokens=[] if first is None else [first]
    )
    return str(made.to_str(pretty=True))


def _convert(proto: Any) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    spec, byte_fallback = proto.normalizer_spec, proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == _UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        model: Any = models.Unigram(scores, proto.trainer_spec.unk_id, byte_fallback)
    else:
        ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
        unknown = proto.pieces[proto.trainer_spec.unk_id].piece
        model = models.BPE(ids, _merges(proto), unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
    tokenizer = Tokenizer(model)
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*back, decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else back
    )
    for kind in (_CONTROL, _USER):
        names = [piece.piece for piece in proto.pieces if piece.type == kind]
        tokenizer.add_tokens([AddedToken(n, normalized=False, special=kind == _CONTROL) for n in names])
    return tokenizer


def _merges(proto: Any) -> list[tuple[str, str]]:
    """All pairs that make a piece; SentencePiece joins the pair whose piece has the best score first."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    pairs = [
        (-score, at, piece[:at], piece[at:])
        for piece, score in scores.items()
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _texts(proto: Any) -> Iterator[str]:
    """Texts to compare, without what is known to differ."""
    yield from _TEXTS
    words = [p.piece.replace(_SPACE, " ") for p in proto.pieces if p.type in (_NORMAL, _USER)]
    for start in range(0, len(words), _PIECES):
        yield "".join(words[start : start + _PIECES])
        yield " ".join(words[start : start + _PIECES])
