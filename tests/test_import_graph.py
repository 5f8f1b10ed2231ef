"""The imports among the package's modules respect the order of layers (tools/import_graph.py)."""

from pathlib import Path

from tools.import_graph import COMMANDS, LAYERS, cycles, imports, layer_of, upward

ROOT = Path(__file__).parent.parent


def test_no_module_imports_one_that_imports_it() -> None:
    assert not cycles(imports(ROOT))


def test_every_module_has_a_layer_and_imports_none_of_a_higher_one() -> None:
    graph = imports(ROOT)
    assert not [name for name in graph if layer_of(name) is None]
    assert not upward(graph)


def test_every_entry_of_the_lists_is_of_some_module() -> None:
    graph = imports(ROOT)
    for prefix in (*(name for name, _ in LAYERS), *COMMANDS):
        assert any(name == prefix or name.startswith(f"{prefix}.") for name in graph), prefix


def test_lazy_and_typing_imports_are_seen(tmp_path: Path) -> None:
    package = tmp_path / "mlm_train"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("def f():\n    from mlm_train import two\n    return two\n")
    (package / "two.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mlm_train.one import f\n"
    )
    assert cycles(imports(tmp_path)) == [["one", "two"]]
