"""Logits of a model on given tokens, for comparison with other implementations."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mlm_train.checkpoint.reading.logical_folder import find_model, load_model
from mlm_train.errors import UserError
from mlm_train.memory import make_source
from mlm_train.utils.checks import Check
from mlm_train.utils.files import check_output, draft_of, sync, system_error, writing
from mlm_train.utils.signals import held

TENSOR = "tokens"


def dump_logits(
    model_dir: str | Path, tokens_file: str | Path, out_file: str | Path, verify: Check = "full"
) -> None:
    """Write `tokens` int64 [batch, sequence] and `logits` fp32 [batch, sequence, vocabulary].

    `tokens_file`: safetensors with the tensor `tokens`. Raises UserError for a missing or unsuitable tensor,
    ids out of the vocabulary, sequences longer than the model's maximum, and an existing output.
    """
    out = Path(out_file)
    if out.exists():
        raise UserError(f"{out} exists; name a new file, or remove it")
    check_output("--dump-logits", out, lambda _: False, "new file")
    tokens = _read_tokens(Path(tokens_file))
    model = load_model(find_model(model_dir, verify))
    config = model.config
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab_size:
        bad = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
        raise UserError(
            f"{tokens_file}: id {bad} is not in the vocabulary; ids are 0 to {config.vocab_size - 1}"
        )
    if tokens.shape[1] > config.max_position_embeddings:
        raise UserError(
            f"{tokens_file}: sequences of {tokens.shape[1]} tokens are longer than the model's "
            f"max_position_embeddings={config.max_position_embeddings}; cut them"
        )
    source = make_source("unique", model.memory_blocks()) if config.has_memory else None
    logits = torch.empty(*tokens.shape, config.vocab_size)
    with torch.no_grad():
        for sequence in range(
            tokens.shape[0]
        ):  # one by one: a whole batch's activations may not fit in memory
            logits[sequence] = model(tokens[sequence : sequence + 1], source)[0]
    with writing(out), _renamed_when_whole(out) as draft:
        try:
            save_file({TENSOR: tokens, "logits": logits}, draft)
        except SafetensorError as error:
            raise system_error(error) from None


@contextmanager
def _renamed_when_whole(out: Path) -> Iterator[Path]:
    """A temporary file to write, renamed to `out` at the end; an error removes it."""
    draft = draft_of(out)
    try:
        yield draft
        with held():
            sync(draft)
            draft.rename(out)
    finally:
        draft.unlink(missing_ok=True)


def _read_tokens(file: Path) -> Tensor:
    if not file.is_file():
        raise UserError(f"{file} does not exist; give a safetensors file with a tensor {TENSOR!r}")
    try:
        with safe_open(file, framework="pt") as opened:
            if TENSOR not in opened.keys():  # noqa: SIM118 - a handle, not a dict
                raise UserError(f"{file} has no tensor {TENSOR!r}; give int64 [batch, sequence]")
            tokens: Tensor = opened.get_tensor(TENSOR)
    except (SafetensorError, OSError, MemoryError) as error:
        reason = str(error).replace("\n", " ")
        raise UserError(f"{file} is not a valid safetensors file ({reason})") from None
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or not tokens.numel():
        raise UserError(
            f"{file}: {TENSOR!r} is {tokens.dtype} {list(tokens.shape)}; give int64 [batch, sequence]"
        )
    return tokens
