"""C++ sources of this package, compiled for this machine's processor when they are first needed."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

# Not -ffast-math: it would change how the whole process treats denormal numbers.
MATHS = ("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", *MATHS)


@functools.cache
def compiled_library(source: Path) -> ctypes.CDLL | None:
    """The functions of a C++ source; None, with a line in the log, where it cannot be compiled.

    The compiler is $CXX or c++. Compiled once per source, flags and kind of processor: libraries are kept in
    $XDG_CACHE_HOME/mlm_train (~/.cache/mlm_train).
    """
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
        library = library_file(source, compiler)
        if not _is_whole(library):
            _compile(compiler, source, library)
        return ctypes.CDLL(str(library))
    # ValueError: quotes in CXX without an end; RuntimeError: a user without a home
    except (OSError, subprocess.SubprocessError, ValueError, RuntimeError) as error:
        log.info("%s is not used, since it cannot be compiled: %s", source.name, _reason(error))
        return None


def _reason(error: Exception) -> str:
    """In one line: the compiler's first error, where it gave one."""
    said = getattr(error, "stderr", None)
    lines = said.strip().splitlines() if isinstance(said, str) else []  # bytes of one that took too long
    return next((line for line in lines if "error" in line), lines[-1] if lines else str(error))


def library_file(source: Path, compiler: list[str]) -> Path:
    """Where the library of a source is kept."""
    names = "\0".join([_processor(), *compiler, *FLAGS])
    digest = hashlib.sha256(names.encode() + source.read_bytes()).hexdigest()[:16]
    return _cache_folder() / f"{source.stem}-{digest}.so"


def _compile(compiler: list[str], source: Path, library: Path) -> None:
    """Processes may do this at the same time: each moves a whole library into place."""
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"there is no {compiler[0]}; install a C++ compiler, or name one in CXX")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [*compiler, *FLAGS, str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=120)
        with made.open("r+b") as file:
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)  # which a loader does not look at
        made.replace(library)


def _is_whole(library: Path) -> bool:
    """Whether a library ends in its digest: one that was cut off would end the process once it is used."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mlm_train"


def _processor() -> str:
    """What -march=native depends on: nodes of other kinds may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    telling = ("model name", "flags", "Features")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(telling)))
