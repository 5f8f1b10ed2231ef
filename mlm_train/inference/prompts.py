"""Prompts from a file: a text per line, or JSON lines."""

from pathlib import Path
from typing import NamedTuple

from mlm_train.errors import UserError
from mlm_train.utils.records import json_value, read_regular


class FilePrompt(NamedTuple):
    """A prompt, text or ids, and where it is: "FILE, line 3"."""

    prompt: str | list[int]
    place: str


def read_prompts(path: Path) -> list[FilePrompt]:
    """The prompts of a file, in order; empty lines are left out.

    A `.jsonl` has objects with a field "prompt", text or ids; in any other file each line is a prompt.
    Raises UserError for a file that cannot be read or has none, and for a bad line.
    """
    try:
        text = read_regular(path).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompts {path} is not UTF-8; convert it") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    placed = [(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not placed:
        raise UserError(f"--prompts {path} has no prompts; give one per line")
    in_json = path.suffix == ".jsonl"
    return [FilePrompt(_prompt_of(line, place) if in_json else line, place) for line, place in placed]


def _prompt_of(line: str, place: str) -> str | list[int]:
    try:
        tree = json_value(line)
    except ValueError as error:
        raise UserError(f'{place} is not JSON ({error}); write {{"prompt": "..."}}') from None
    prompt = tree.get("prompt") if isinstance(tree, dict) else None
    if isinstance(prompt, str) or (isinstance(prompt, list) and all(type(item) is int for item in prompt)):
        return prompt
    raise UserError(f'{place} has no field "prompt" of a text or of ids; write {{"prompt": "..."}}')
