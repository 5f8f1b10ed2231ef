"""docs/findings.md from the files of the findings."""

from collections.abc import Sequence
from pathlib import Path

from mlm_train.reproduce.finding import Claim, Finding, read_finding
from mlm_train.utils.files import write_text

HEAD = """# Findings
What of the paper's tables and figures holds at the scale at which it was measured here. Written by
`mlm-train reproduce page` from [findings/](findings); [reproduce.md](reproduce.md) says how each figure is
measured, and how to measure it at another scale. Figures are means over seeds, with the range in brackets;
"clearly" means that the ranges of the seeds do not overlap.
"""


def write_page(folder: Path, page: Path) -> list[Finding]:
    """Write the page of all findings in a folder. Returns them, in order."""
    findings = sorted(map(read_finding, folder.glob("*.json")), key=lambda finding: _order(finding.item))
    parts = [HEAD, _summary(findings), *map(_section, findings)]
    write_text(page, "\n".join(parts))
    return findings


def _order(item: str) -> tuple[str, int]:
    letters = item.rstrip("0123456789")
    return ("" if letters == "table" else letters), int(item[len(letters) :] or 0)


def _summary(findings: Sequence[Finding]) -> str:
    lines = ["| | claim | holds here |", "|---|---|---|"]
    for finding in findings:
        link = f"[{finding.item}](#{_anchor(finding)})"
        lines += [f"| {link} | {claim.claim} | {verdict(claim)} |" for claim in finding.claims]
    return "\n".join(lines) + "\n"


def verdict(claim: Claim) -> str:
    """In words."""
    if claim.clear:
        return "clearly" if claim.holds else "no"
    return "yes, within the spread of seeds" if claim.holds else "no, within the spread of seeds"


def _heading(finding: Finding) -> str:
    kind = finding.item.rstrip("0123456789")
    return f"{kind.capitalize()} {finding.item[len(kind) :]}: {finding.title}"


def _anchor(finding: Finding) -> str:
    kept = "".join(c for c in _heading(finding).lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def in_cell(text: str) -> str:
    """Text as it is in a cell of a Markdown table: tokens may be anything."""
    return "".join(f"\\{c}" if c in "\\|`*_<>[]" else c for c in text)


def _section(finding: Finding) -> str:
    seeds = "1 seed" if finding.seeds == 1 else f"{finding.seeds} seeds"
    here = f"scale {finding.scale}, {seeds}, {finding.text}" if finding.trained else finding.text
    lines = [
        f"## {_heading(finding)}",
        f"The paper: {finding.paper}\n",
        f"Here, {here}:\n",
        "| " + " | ".join(finding.columns) + " |",
        "|" + "---|" * len(finding.columns),
        *(
            "| " + " | ".join("" if cell is None else in_cell(str(cell)) for cell in row) + " |"
            for row in finding.rows
        ),
        "",
        *(f"- {claim.claim}: **{verdict(claim)}** ({claim.seen})" for claim in finding.claims),
        "",
    ]
    count = len(finding.steps)
    steps = f", {count} step{'s' * (count != 1)}" if count else ""
    lines.append(f"`mlm-train {finding.command}`{steps} ([file](findings/{finding.item}.json))")
    return "\n".join(lines) + "\n"
