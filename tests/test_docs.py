"""What the documents name is there: links, commands, options, fields of the config, layers."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest

from mlm_train.cli import COMMANDS
from mlm_train.config.renamed import RENAMED
from mlm_train.config.schema import Config
from mlm_train.config.section import Section
from tests.commands import ROOT
from tests.gpu.__main__ import parser as suite_parser
from tests.parsers import options, parsers
from tools.import_graph import LAYERS

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
FIELD = re.compile(rf"(?<![\w./-])({'|'.join(Config.model_fields)})((?:\.[a-z_0-9]+)+)(?![\w/*]|\.[a-z*])")
OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z0-9-]*)")
# Files whose names begin as a section of the config does.
SUFFIXES = {"log", "py", "json", "jsonl", "yaml", "safetensors", "idx", "bin", "png", "md"}
# Variants of `bench train` are named after the modes of FFN-M: memory.table.
VARIANTS = {"per_token", "unique", "table", "kept"}
# A command that docs/extending.md adds.
ADDED = {"count-rows"}
# Options of other programs.
FOREIGN = {
    "--export", "--extra-index-url", "--extra", "--hook-stage", "--no-build-isolation", "--no-deps",
    "--additional-config", "--api-key", "--chat-template", "--enforce-eager", "--hf-overrides",
    "--no-enforce-eager", "--pipeline-parallel-size",
    "--logdir",
    "--no-kill", "--nodes", "--nproc-per-node", "--ntasks-per-node", "--signal", "--test-only", "--all-files",
    "--array", "--chdir",
}  # fmt: skip


def named(document: Path) -> str:
    """A document's path in the repository."""
    return str(document.relative_to(ROOT))


def code(document: Path) -> Iterator[str]:
    """Its code, in lines: blocks (continued lines joined, comments cut), and words in backticks."""
    text = document.read_text(encoding="utf-8")
    blocks = [*FENCE.findall(text), *re.findall(r"^    .*$", text, re.MULTILINE)]
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        yield line.partition(" #")[0]
    yield from INLINE.findall(FENCE.sub("", text))


@cache
def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(FENCE.sub("", document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue  # of the web
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_commands_are_there(document: Path) -> None:
    for line in code(document):
        for words in re.findall(r"(?:mlm-train|-m mlm_train) ([^|;&`>]*)", line):
            check_command(words.split(), line)


def check_command(words: list[str], line: str) -> None:
    """Its command, its action and its options are some parser's."""
    if not words or words[0] in {"COMMAND", *ADDED} or words[0].startswith(("--help", "--version")):
        return
    assert words[0] in COMMANDS, line
    if words[0] == "serve" and "--" in words:
        words = words[: words.index("--")]  # the rest is vLLM's
    paths = [tuple(words[:length]) for length in (3, 2, 1) if tuple(words[:length]) in parsers()]
    actions = {path[1] for path in parsers() if path[0] == words[0] and len(path) == 2}
    assert not actions or len(words) == 1 or words[1] in actions or words[1].startswith("-"), line
    known = set().union(*(options(parsers()[path]) for path in paths))
    assert set(OPTION.findall(" ".join(words))) <= known, line


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_options_are_there(document: Path) -> None:
    known = FOREIGN.union(*map(options, (*parsers().values(), suite_parser())), pytest_options())
    for line in code(document):
        if "mlm-train" in line or "--" not in line:
            continue
        assert set(OPTION.findall(line)) <= known, line


def pytest_options() -> set[str]:
    """Options of the repository's own tools."""
    sources = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tools/*.py"))
    return set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', sources))


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_fields_of_the_config_are_there(document: Path) -> None:
    for line in code(document):
        for section, rest in FIELD.findall(line):
            names = rest[1:].split(".")
            if not SUFFIXES.isdisjoint(names) or (section == "memory" and names[0] in VARIANTS):
                continue
            if f"{section}{rest}" in dict(LAYERS) or (
                document.name == "CHANGELOG.md" and f"{section}{rest}" in RENAMED
            ):
                continue
            assert is_field([section, *names], Config), f"{section}{rest} in {line!r}"


def is_field(names: list[str], section: type[Section]) -> bool:
    """Whether a dotted name is of a field; lists of sections are entered by a number."""
    if names[0] not in section.model_fields:
        return False
    inner = section_in(section.model_fields[names[0]].annotation)
    rest = [name for name in names[1:] if not name.isdecimal()]
    return not rest or (inner is not None and is_field(rest, inner))


def section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_in, get_args(annotation))), None)


def test_the_table_of_layers_is_the_tested_one() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| (.+) \|$", text.partition("## Layers")[2], re.MULTILINE)
    assert tuple(rows) == tuple(LAYERS)


def test_every_document_is_linked() -> None:
    """From the README, or from a document that it names."""
    linked = {
        (document.parent / target.partition("#")[0]).resolve()
        for document in DOCUMENTS
        for target in LINK.findall(document.read_text(encoding="utf-8"))
    }
    assert [named(document) for document in DOCUMENTS if document not in linked] in ([], ["README.md"])
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 100
