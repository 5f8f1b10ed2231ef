"""Write files so that a kill or a full disk never leaves an incomplete one under its final name."""

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlm_train.errors import UserError
from mlm_train.utils.signals import held

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = TypeVar("Result")
HASHED = 2**20  # bytes hashed at once
LARGEST_RESULT = 2**28  # bytes of a JSON file or a picture that a command writes; no real one is as large
# Files that mark a folder as a table, a table being built, prepared data or a checkpoint, and a model.
_MARKS = ("tol.index.json", "tol.build.json", "manifest.json", "config.json")
FULL = (errno.ENOSPC, errno.EDQUOT)
_REMEDY = {
    **dict.fromkeys(FULL, "free space or choose another location"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "check the permissions or choose another location"
    ),
    errno.EEXIST: "it is not a folder; choose another location",
    errno.ENOTDIR: "a part of that path is a file; choose another location",
    errno.EISDIR: "name a file",
    errno.EMFILE: "raise the limit of open files (ulimit -n 1024)",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class Unwritable(UserError):
    """Raised by `writing`; its cause is the OSError."""


def with_fix(error: OSError, otherwise: str = "choose another location") -> str:
    """An error's message and its fix, by errno; `otherwise`: the fix for any other errno."""
    return f"{error.strerror or error}; {_REMEDY.get(error.errno or 0, otherwise)}"


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file for reading. Raises OSError as open does, UserError for anything but a regular file.

    Reading a FIFO or a device could block forever.
    """
    return open(_descriptor(path, os.O_RDONLY), "rb")


def read_at(descriptor: int, buffer: memoryview, begin: int) -> int:
    """Fill a buffer with a file's bytes from `begin` on. Returns how many it has: fewer at the file's end."""
    done = 0
    while done < len(buffer) and (count := os.preadv(descriptor, [buffer[done:]], begin + done)):
        done += count
    return done


def append_regular(path: Path) -> io.FileIO:
    """Open a regular file for appending, unbuffered, creating it if missing. Raises as open_regular does."""
    return io.FileIO(_descriptor(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")


def _descriptor(path: Path, flags: int) -> int:
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ENXIO:  # a FIFO that nobody reads, a socket
            raise
    else:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            return descriptor
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise UserError(f"{path} is not a regular file: put the file itself there")


def system_error(error: Exception) -> OSError:
    """The OSError behind an error of a Rust library, which has the errno in its text only."""
    match = re.search(r"os error (\d+)", str(error))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else OSError(str(error))


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file. Raises as open_regular does."""
    return finished(hashing(path))


def hashing(path: Path) -> Generator[None, None, str]:
    """sha256_of, in blocks: yields after each, for a caller that reports progress."""
    digest, block = hashlib.sha256(), memoryview(bytearray(HASHED))
    with open_regular(path) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            yield
    return digest.hexdigest()


def finished(work: Generator[None, None, Result]) -> Result:
    """Run a generator to its end. Returns its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def is_plain_name(name: object) -> bool:
    """Whether a name is a plain file name on any system, not a path or `..`."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and name not in ("", ".", "..")
        and not set(name) & set("/\\\0")
    )


def listed(folder: Path, name: object, index: str, around: Path | None = None) -> Path:
    """Path of a file that `index` (a file of the same folder) lists.

    Raises UserError for a name that is not a plain file name, and for a link that leads out of the folder, or
    out of `around` where that is given. The file need not exist.
    """
    if not is_plain_name(name):
        raise UserError(
            f"{folder / index} names {name!r}, which is not a file of that folder: use another copy of it"
        )
    path = folder / str(name)
    target = Path(os.path.realpath(path))  # resolve() would raise for a loop of links
    if not target.is_relative_to((around or folder).resolve()):
        raise UserError(f"{path} is a link to {target}, out of its folder: put the file itself there (cp -L)")
    return path


def refuse_used(path: Path) -> None:
    """Raise UserError where an output folder exists and is not empty: nothing is overwritten."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if os.path.lexists(path):
        raise UserError(f"{path} exists already and nothing is overwritten; name a new folder, or remove it")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary sibling of `output` to write into, renamed to `output` when the block ends without error.

    An error removes it. A killed process leaves only `NAME.partial-*` behind, never `output`; the next writer
    of `output` removes that.
    Raises UserError where `output` exists and is not an empty folder, is being written, or cannot be written.
    """
    output = output.absolute()
    refuse_used(output)
    partial = output.with_name(f"{output.name}.partial-{uuid.uuid4().hex[:8]}")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with _lock_beside(output, "being written") as alone:
            refuse_used(output)  # again: the previous holder of the lock may have written it
            if alone:
                _remove_partials(output)
            try:
                partial.mkdir()
                yield partial
                with held():
                    for path in (*partial.iterdir(), partial):
                        sync(path)
                    partial.rename(output)
                    sync(output.parent)
            finally:
                with held():
                    shutil.rmtree(partial, ignore_errors=True)


def _remove_partials(output: Path) -> None:
    """Delete leftovers of killed writers of a folder: drafts, drafts of drafts, and the locks of drafts."""
    draft = r"\.partial-[0-9a-f]{8}"
    name = re.compile(rf"{re.escape(output.name)}{draft}({draft})?|\.{re.escape(output.name)}{draft}\.lock")
    for path in output.parent.iterdir():
        if name.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def draft_of(path: Path) -> Path:
    """Temporary path of a file that replace_file writes."""
    return path.with_name(f".{path.name}.writing")


def replace_file(path: Path, data: bytes) -> None:
    """Replace a small file atomically: readers see either the old bytes or the new ones."""
    draft = draft_of(path)
    with held():
        try:
            draft.write_bytes(data)
            sync(draft)
            draft.rename(path)
        except OSError as error:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            error.filename = str(path)  # rather than the draft's, which the caller does not know
            raise
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """replace_file of text in UTF-8."""
    replace_file(path, text.encode())


def json_text(tree: Any) -> str:
    """A JSON value in the layout of our files."""
    return json.dumps(tree, indent=1) + "\n"


def write_json(path: Path, tree: Any) -> None:
    """write_text of a JSON value."""
    write_text(path, json_text(tree))


def write_figure(path: Path, figure: "Figure") -> None:
    """Write a matplotlib figure as PNG. UserError where it cannot be written; an old file then stays."""
    data = io.BytesIO()
    figure.savefig(data, dpi=110, format="png", metadata={"Software": None})
    with writing(path):
        replace_file(path, data.getvalue())


def is_png(path: Path) -> bool:
    """Whether a file has the signature of a PNG."""
    with open_regular(path) as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


def check_output(option: str, name: str | Path, is_ours: Callable[[Path], bool], what: str) -> Path:
    """The path of an option's output file, checked before the work that produces it.

    Raises UserError where nothing can be written there, where the folder is a table's, a model's or data's,
    and where a file exists that is neither empty nor, by `is_ours`, an earlier result (`what`: its
    description).
    """
    path, folder = Path(name), Path(name).absolute().parent
    if not str(name) or path.is_dir() or not folder.is_dir():
        raise UserError(f"{option} {str(name) or repr('')}: name a file in a folder that exists")
    if mark := next((mark for mark in _MARKS if (folder / mark).exists()), None):
        raise UserError(
            f"{option} {path} is in the folder of {folder / mark}, which must hold no other files; "
            "name a file elsewhere"
        )
    if os.path.lexists(path):
        try:
            size = path.stat().st_size if path.is_file() else LARGEST_RESULT
            replaceable = size == 0 or (size < LARGEST_RESULT and is_ours(path))
        except OSError:
            replaceable = False
        if not replaceable:
            raise UserError(
                f"{option} {path} exists and is not a {what}: it is not replaced; name another file"
            )
    draft = draft_of(path)
    with writing(path), held(), suppress(FileExistsError):
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        draft.unlink()
    return path


@contextmanager
def locked(folder: Path, doing: str, patience: float = 0.0) -> Iterator[None]:
    """Lock a folder for this process; the lock is released when the process ends, however it ends.

    Raises UserError where another process holds the lock for more than `patience` seconds; `doing`: what that
    process does with the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock_beside(folder, doing, patience):
        yield


@contextmanager
def _lock_beside(folder: Path, doing: str, patience: float = 0.0) -> Iterator[bool]:
    """Like `locked`, for a folder that need not exist. Yields whether the file system supports locks."""
    path, end = folder.absolute().with_name(f".{folder.name}.lock"), time.monotonic() + patience
    while (lock := _lock(path, folder)) is None:
        if time.monotonic() >= end:
            raise UserError(f"{folder} is {doing} by another process; wait for it or name another")
        time.sleep(0.5)
    descriptor, is_locked = lock
    try:
        yield is_locked
    finally:
        with held():
            with suppress(OSError):
                path.unlink(missing_ok=True)
            os.close(descriptor)


def _lock(path: Path, folder: Path) -> tuple[int, bool] | None:
    """Try to lock: a file descriptor and whether it is locked; None where another process holds the lock.

    The lock is on a file beside the folder, since NFS cannot lock folders; on the folder itself where its
    parent is not writable.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            if not folder.is_dir():
                raise
            descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:
            return descriptor, False  # no lock support; unfinished files have unique names anyway
        if os.fstat(descriptor).st_nlink:
            return descriptor, True
        os.close(descriptor)  # the previous holder has removed the file


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError while writing `path`, such as a full disk or missing permissions, into a UserError.

    Of nested blocks the outermost names the path: the inner ones write drafts of it.
    """
    try:
        yield
    except OSError as error:
        raise Unwritable(f"{path} cannot be written: {with_fix(error)}") from error
    except Unwritable as error:
        assert isinstance(error.__cause__, OSError)
        raise Unwritable(f"{path} cannot be written: {with_fix(error.__cause__)}") from error.__cause__
