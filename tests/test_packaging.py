"""The package: ranges that hold the pins, and what a wheel and a source distribution carry."""

import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from mlm_train import __version__
from tests.commands import ROOT

BUILD_ONLY = {"setuptools"}  # pinned for `pip install --no-build-isolation`; nothing of ours imports it
PYTHONS = ("3.11", "3.12", "3.13")


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **words: found.update(words))
        runpy.run_path(str(ROOT / "setup.py"))
    return found


def ranges(lines: list[str]) -> dict[str, SpecifierSet]:
    """Name -> range."""
    return {canonicalize_name((needed := Requirement(line)).name): needed.specifier for line in lines}


def pins(name: str) -> dict[str, str]:
    """Name -> version of a file in which every line pins one."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if line and line[0] not in "#-"]
    assert all(found), name
    return {canonicalize_name(match[1]): match[2] for match in found if match}


@pytest.mark.parametrize("extra", ["", "dev", "wandb"])
def test_ranges_hold_the_pins(metadata: dict[str, Any], extra: str) -> None:
    wanted = ranges(metadata["extras_require"][extra] if extra else metadata["install_requires"])
    pinned = pins(f"requirements-{extra}.txt" if extra else "requirements.txt")
    assert pinned.keys() - BUILD_ONLY == wanted.keys()
    assert [name for name, allowed in wanted.items() if pinned[name] not in allowed] == []


def test_every_range_has_a_lower_bound_and_no_upper_one(metadata: dict[str, Any]) -> None:
    lists = [metadata["install_requires"], *metadata["extras_require"].values()]
    for name, allowed in (item for lines in lists for item in ranges(lines).items()):
        assert [part.operator for part in allowed] == [">="], name


def test_pythons_are_the_same_everywhere(metadata: dict[str, Any]) -> None:
    allowed = SpecifierSet(metadata["python_requires"])
    assert [version for version in map("3.{}".format, range(9, 20)) if version in allowed] == list(PYTHONS)
    assert ".".join(map(str, sys.version_info[:2])) in PYTHONS
    installer = (ROOT / "tools" / "install.py").read_text(encoding="utf-8")
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in installer
    assert metadata["version"] == __version__


def test_wheel_and_source_distribution(metadata: dict[str, Any], tmp_path: Path) -> None:
    """Both are built from a copy of what git tracks: a build writes beside its sources."""
    source, built = tmp_path / "source", tmp_path / "built"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", built, "sdist", "-d", built],
        cwd=source, check=True, capture_output=True,
    )  # fmt: skip
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (found,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(found).decode()
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    modules = {name for name in tracked if name.startswith("mlm_train/")}
    assert {name for name in names if name.startswith("mlm_train/")} == modules
    assert "mlm_train/py.typed" in modules and modules <= files
    assert {"README.md", "setup.py"} <= files
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert metadata["long_description"] == readme and text.endswith(readme)
    assert "Description-Content-Type: text/markdown" in text
