"""The generated section of docs/performance.md: the text around it stays; targets and bounds are listed."""

import json
from pathlib import Path

import pytest

from mlm_train.bench import page, report
from mlm_train.bench.train_figures import ratios_of, rows_of
from tests.bench.test_train import measured, record


def kept(docs: Path) -> None:
    """Write a page and a report."""
    (docs / "bench").mkdir(parents=True)
    text = f"# Performance\nwords\n\n{page.BEGIN}\nold\n{page.END}\n\n## Loss\nothers\n"
    (docs / "performance.md").write_text(text)
    found = measured({"base": record(1.0), "noffn": record(0.5), "memory.table": record(0.6, ends=0.2)})
    tree = {"machine": report.machine(), "command": "mlm-train bench train"}
    tree |= {"rows": rows_of(found), "ratios": ratios_of(found), "notes": ["a note"]}
    (docs / "bench" / "train.tiny.json").write_text(json.dumps(tree))


def test_the_section_is_written_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    kept(tmp_path)
    assert page.main([str(tmp_path)]) == 0
    text = (tmp_path / "performance.md").read_text()
    assert text.startswith(f"# Performance\nwords\n\n{page.BEGIN}\n### Shape tiny\n")
    assert text.endswith(f"\n{page.END}\n\n## Loss\nothers\n") and "old" not in text
    assert "| `memory_ffn_cost_over_limit` | 1.000 | at most 1.2 | yes |" in text
    assert "- memory.table: matrix multiplications at peak" in text
    assert "71% of it is the time of the model without" in text
    assert "a note" in text and "bench/train.tiny.png" in text
    assert (tmp_path / "bench" / "train.tiny.png").read_bytes().startswith(b"\x89PNG")
    page.main([str(tmp_path)])
    assert (tmp_path / "performance.md").read_text() == text
    (tmp_path / "bench" / "train.tiny.json").write_text("{}")
    assert page.main([str(tmp_path)]) == 2
    assert "is not a report of `mlm-train bench train`" in capsys.readouterr().err


def test_the_real_page_has_the_marks() -> None:
    text = (Path(page.__file__).resolve().parents[2] / "docs" / "performance.md").read_text()
    assert text.count(page.BEGIN) == text.count(page.END) == 1
