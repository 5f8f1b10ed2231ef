"""Train a SentencePiece BPE tokenizer that encodes and decodes every text without loss."""

import io
from collections.abc import Iterable, Iterator

from mlm_train.data.fraction import text_fraction
from mlm_train.errors import UserError

MAX_TRAINING_BYTES = 100_000_000
"""Maximum text the trainer holds in memory; more text changes a BPE vocabulary little."""


def train_sentencepiece(texts: Iterable[str], vocab_size: int, total_bytes: int | None) -> bytes:
    """A serialised BPE model with `vocab_size` pieces; the same texts give the same bytes.

    No normalization, no added or removed spaces, byte pieces for rare characters; id 0 is <unk>,
    id 1 is </s> (end of document). total_bytes: rough size of all texts; above MAX_TRAINING_BYTES
    a sample chosen by content hash is used. Raises UserError where the texts do not fit vocab_size.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        # num_threads stays at its default: its value is stored in the model and would change the hash.
        SentencePieceTrainer.train(
            sentence_iterator=_lines(_sample(texts, total_bytes)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n", "\t", "\r"],
            max_sentence_length=1 << 16,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--tokenizer train:{vocab_size}: this text does not give a vocabulary of that size "
            f"({reason}); use more text or another size"
        ) from None
    return model.getvalue()


def _sample(texts: Iterable[str], total_bytes: int | None) -> Iterator[str]:
    """About MAX_TRAINING_BYTES of text, spread over the corpus independently of its order."""
    keep = MAX_TRAINING_BYTES / max(total_bytes or 0, MAX_TRAINING_BYTES)
    left = MAX_TRAINING_BYTES
    for text in texts:
        data = text.encode("utf-8")
        if keep < 1.0 and text_fraction(data, b"tokenizer") >= keep:
            continue
        left -= len(data)
        yield text
        if left <= 0:
            return


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of all texts: the trainer drops long sentences and does not split lines."""
    for text in texts:
        for line in text.split("\n"):
            if line:
                yield line
