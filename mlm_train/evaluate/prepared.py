"""Which prepared folders an evaluation is of: given ones, or those of a run's config."""

from collections.abc import Sequence
from pathlib import Path

from mlm_train.config import load_config
from mlm_train.data.blend import names_of
from mlm_train.data.prepared import PreparedData
from mlm_train.errors import UserError
from mlm_train.utils.checks import Check


def named_folders(given: Sequence[str], verify: Check) -> dict[str, PreparedData]:
    """Folders by the names under which they are reported, opened.

    A YAML file of a run stands for its data: every source of its blend, and every set of data.validation
    under its own name. Raises UserError for one that cannot be opened, and for a folder or a name that is
    given twice.
    """
    folders: list[Path] = []
    named: dict[str, Path] = {}
    for item in map(Path, given):
        if item.suffix not in (".yaml", ".yml"):
            folders.append(item)
            continue
        data = load_config(item).data
        folders += [Path(source.path) for source in data.blend or ()] or [Path(data.path or "")]
        for name, path in (data.validation or {}).items():
            if name in named:
                raise UserError(f"--data: two sets are named {name}: evaluate one config at a time")
            named[name] = Path(path)
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise UserError(f"--data {twice[0]} is given twice: give it once")
    own = dict(zip(names_of(folders), folders, strict=True))
    if taken := own.keys() & named.keys():
        raise UserError(f"--data: two sets are named {min(taken)}: give the folder by itself")
    return {name: PreparedData.open(path, verify) for name, path in (own | named).items()}
