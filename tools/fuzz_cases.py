"""The cases of tools/fuzz.py: which file is damaged and how, by seed and number, and the outcome."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mutations
from fuzz_artefacts import make_artefacts, reseal
from fuzz_pool import Outcome
from fuzz_readers import READERS, Refused

from mlm_train.config import Config
from mlm_train.errors import UserError


class Fuzz:
    """The artefacts, the readers, and the results of undamaged files; made before any process is forked."""

    def __init__(self, root: Path, seed: int, names: list[str]) -> None:
        self.root, self.seed = root, seed
        self.readers = {name: READERS[name] for name in names}
        self.order = [name for name in names for _ in range(READERS[name].share)]
        self.whole: dict[str, str | None] = {}

    def prepare(self) -> None:
        """Make artefacts and undamaged results in a child: this process must fork without threads."""
        done = self.root / "results.json"
        child = multiprocessing.get_context("fork").Process(target=self._prepare, args=(done,))
        child.start()
        child.join()
        if child.exitcode:
            print(f"fuzz: exit code {child.exitcode} for the undamaged files", file=sys.stderr)
            raise SystemExit(2)
        self.whole = json.loads(done.read_text())

    def _prepare(self, done: Path) -> None:
        make_artefacts(self.root)
        for name, beside in (("data", "data-of-run"), ("plain-table", "table-to-compress")):
            shutil.copytree(self.root / name, self.root / beside)
        results = {}
        for name, reader in self.readers.items():
            with self.copied(name) as folder:
                outcome, results[name] = self._read(Outcome(-1, name, "whole", ""), folder)
                if outcome.kind != "accepted" and name not in ("allocation, by command", "report"):
                    raise SystemExit(f"fuzz: undamaged {reader.folder} is rejected: {outcome.said}")
        done.write_text(json.dumps(results))

    @contextlib.contextmanager
    def copied(self, name: str) -> Iterator[Path]:
        """A copy of a reader's artefact, of hard links, beside the folders that readers need."""
        where = Path(tempfile.mkdtemp(dir=self.root, prefix="case-"))
        try:
            folder = self.readers[name].folder
            for beside in ("data-of-run", "table-to-compress"):
                (where / beside).symlink_to(self.root / beside)
            shutil.copytree(self.root / folder, where / folder, copy_function=os.link)
            yield where / folder
        finally:
            shutil.rmtree(where, ignore_errors=True)

    @contextlib.contextmanager
    def damaged(self, number: int) -> Iterator[tuple[str, Path, str, bool]]:
        """Reader, damaged artefact, description of the damage, and whether another result would be bad."""
        chance = random.Random(f"{self.seed}/{number}")
        name = chance.choice(self.order)
        with self.copied(name) as folder:
            what, sealed = self.damage(name, folder, chance)
            yield name, folder, what, sealed

    def run(self, number: int) -> Outcome:
        """Run a case in this process."""
        with self.damaged(number) as (name, folder, what, sealed):
            outcome, result = self._read(Outcome(number, name, what, ""), folder)
        if outcome.kind == "accepted" and sealed and result != self.whole[name]:
            return outcome._replace(kind="result", said=f"{result} instead of {self.whole[name]}")
        return outcome

    def lost(self, number: int, said: str) -> Outcome:
        """The outcome of a case whose process gave none."""
        with self.damaged(number) as (name, _, what, _):
            return Outcome(number, name, what, "time", said)

    def keep(self, outcome: Outcome, target: Path) -> None:
        """Keep a bad case: the damaged artefact, as far as it can be copied, and its outcome."""
        with self.damaged(outcome.number) as (_, folder, _, _):
            regular = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
            for path in regular:
                if path.stat().st_size < mutations.HUGE:
                    (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, target / path.relative_to(folder))
        target.mkdir(parents=True, exist_ok=True)
        found = outcome._asdict() | {"seed": self.seed}
        (target / "outcome.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def damage(self, name: str, folder: Path, chance: random.Random) -> tuple[str, bool]:
        """Damage one file. Returns a description, and whether another result would be bad."""
        reader = self.readers[name]
        files = sorted({path for glob in reader.files for path in folder.glob(glob)})
        small = [path for path in files if path.suffix in (".json", ".yaml")]
        path = chance.choice(small if small and chance.random() < 0.4 else files)
        file = path.relative_to(folder)
        sealed = reader.sealed(folder, file)
        if name == "overrides":
            path.unlink()
            path.write_bytes(overrides(chance))
            return f"{file}", False
        if chance.random() < 0.1:
            return f"{file}: {mutations.replace_file(path, chance)}", sealed
        data = path.read_bytes()
        path.unlink()  # a hard link to the artefact's file
        how, resealed = "bytes", False
        if path.suffix in (".json", ".measured", ".attempt") and chance.random() < 0.8:
            how = "json"
            out, resealed = mutations.damage_json(data, chance, reseal(path))
        elif path.suffix == ".jsonl" and chance.random() < 0.7:
            lines = data.splitlines(keepends=True)
            at = chance.randrange(len(lines))
            how, lines[at] = "json line", mutations.damage_json(lines[at], chance, None)[0] + b"\n"
            out = b"".join(lines)
        elif path.suffix == ".safetensors" and chance.random() < 0.6:
            how, out = "header", mutations.damage_safetensors(data, chance)
        elif path.suffix == ".model" and chance.random() < 0.6:
            how, out = "model", mutations.damage_sentencepiece(data, chance)
        elif path.suffix == ".yaml" and chance.random() < 0.8:
            how, out = "yaml", mutations.damage_yaml(data.decode(), chance).encode("utf-8", "surrogatepass")
        else:
            out = mutations.damage_bytes(data, chance)
        path.write_bytes(out)
        return f"{file}: {how}{', resealed' if resealed else ''}", sealed and not resealed

    def _read(self, outcome: Outcome, folder: Path) -> tuple[Outcome, str | None]:
        try:
            result = self.readers[outcome.reader].read(folder)
            return outcome._replace(kind="accepted"), result
        except Refused as error:
            kind = (
                "code"
                if error.code not in (2, 130)
                else "refused"
                if _is_user_message(error.said)
                else "traceback"
            )
            return outcome._replace(kind=kind, said=error.said), None
        except (UserError, OSError) as error:  # from a part of a command; cli.main would report it
            named = isinstance(error, UserError) or error.filename is not None
            said = "".join(traceback.format_exception(error))
            return outcome._replace(kind="refused" if named else "traceback", said=said), None
        except ValueError as error:
            expected = outcome.reader == "allocation" and type(error) is ValueError  # as documented
            said = "".join(traceback.format_exception(error))
            return outcome._replace(kind="refused" if expected else "traceback", said=said), None
        except BaseException as error:
            return outcome._replace(kind="traceback", said="".join(traceback.format_exception(error))), None


def _is_user_message(said: str) -> bool:
    """Whether the output is one line for the user, or one per damaged range of a table's rows."""
    lines = said.strip().splitlines()
    whole = all(line.startswith("damaged: ") for line in lines) or len(lines) == 1
    return whole and all(
        line.isprintable() and line.startswith(("mlm-train: ", "damaged: ")) for line in lines
    )


def overrides(chance: random.Random) -> bytes:
    """One to three overrides separated by NUL, with existing and unknown fields and values of any kind."""
    sections = [name for name in Config.model_fields if name != "context"]
    lines = []
    for _ in range(chance.choice((1, 1, 2, 3))):
        section = chance.choice(sections)
        kind: Any = Config.model_fields[section].annotation
        fields = list(getattr(kind, "model_fields", {"mode": None}))
        plain = (
            json.dumps(chance.choice(mutations.WORDS[:16])),
            str(chance.randrange(100)),
            f"{chance.random():.2g}",
        )
        value = chance.choice((chance.choice(mutations.YAML_TEXTS), *plain))
        line = f"{section}.{chance.choice(fields)}={value.replace(chr(0), '')}"
        lines.append(mutations.damage_text(line, chance).replace("\0", "") if chance.random() < 0.3 else line)
    return "\0".join(lines).encode("utf-8", "replace")
