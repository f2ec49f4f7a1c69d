"""Files wherever they are: local paths, and URLs of any file system that fsspec knows, such as gs:// and s3://.

What is done at a URL may fail for a moment: everything here can be repeated, and is (`persistently`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from gemma_xla.errors import UserError

Result = TypeVar("Result")

# Seconds to wait before each further try.
DELAYS = (1, 2, 4, 8)
# What waiting does not mend. Not all file systems give their errors a number.
_LASTING = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, EOFError, UserError)
_LASTING_CODES = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "ENOENT", "ENOTDIR", "EISDIR", "ENAMETOOLONG")
}


def location(text: str | Path) -> Path:
    """Return the path of a local file or folder or, for a URL, an object with the methods of one.

    Raises:
        UserError: nothing installed can read such URLs.
    """
    if not is_url(text):
        return Path(text).expanduser()
    if str(text).startswith("file://"):
        return Path(str(text).removeprefix("file://"))
    from upath import UPath  # loads fsspec, which takes a while and which most runs do without

    try:
        path = UPath(text)
        path.fs  # noqa: B018 (imports what the protocol needs)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{text}: such URLs cannot be opened: {error}; gs:// needs gcsfs and s3:// needs s3fs (pip install them)"
        ) from error
    return path


def is_url(text: str | Path) -> bool:
    return "://" in str(text)


def is_local(path: Path) -> bool:
    return isinstance(path, Path)


def replace_text(path: Path, text: str) -> None:
    """Write a small file that is never seen half-written."""
    if not is_local(path):
        # Objects appear when they are whole.
        persistently(lambda: path.write_text(text, encoding="utf-8"), f"writing {path}")
        return
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a local file's bytes, or a local folder's list of files, are on the disk."""
    if not is_local(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_file(path: Path) -> None:
    """Delete a file, if it is there."""
    persistently(lambda: path.unlink(missing_ok=True), f"removing {path}", path)


def remove_tree(folder: Path) -> None:
    """Delete a folder and what it holds, if it is there."""
    if is_local(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return

    def rest() -> None:
        if folder.exists():
            folder.fs.rm(folder.path, recursive=True)

    for path in persistently(lambda: folder.fs.find(folder.path), f"listing {folder}"):
        remove_file(folder / PurePosixPath(path).relative_to(folder.fs._strip_protocol(folder.path)))
    persistently(rest, f"removing {folder}")


def move(source: Path, target: Path) -> None:
    """Move a folder to a free name of the same file system."""
    if is_local(source):
        source.rename(target)
        return
    files, begin = source.fs, source.path.rstrip("/")
    # One by one: fsspec's own move, begun again, would put them into a folder of the target.
    for path in persistently(lambda: files.find(begin), f"listing {source}"):
        copy = target.path.rstrip("/") + path.removeprefix(files._strip_protocol(begin))
        persistently(partial(files.cp_file, path, copy), f"moving {source}")
    remove_tree(source)


def copy_tree(source: Path, target: Path) -> None:
    """Copy the files of a folder, and of the folders in it, into another that may be elsewhere."""
    make_folder(target)
    for path in persistently(lambda: list(source.iterdir()), f"listing {source}", source):
        if path.is_dir():
            copy_tree(path, target / path.name)
        else:
            copy_file(path, target / path.name)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, a piece at a time."""

    def copy() -> None:
        with source.open("rb") as read, target.open("wb") as write:
            shutil.copyfileobj(read, write, 1 << 20)

    persistently(copy, f"copying {source}", source, target)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where they are missing."""
    persistently(lambda: folder.mkdir(parents=True, exist_ok=True), f"making {folder}", folder)


def read_text(path: Path) -> str:
    return persistently(lambda: path.read_text(encoding="utf-8"), f"reading {path}", path)


@contextlib.contextmanager
def fetched(folder: Path) -> Iterator[Path]:
    """A local folder as it is; for another, a copy of it on this machine until the end of the block."""
    if is_local(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as parent:
        local = Path(parent) / folder.name
        copy_tree(folder, local)
        yield local


def persistently(action: Callable[[], Result], what: str, *paths: Path) -> Result:
    """Return ``action()``, `retried` where one of the paths is a URL (or none is given), and else as it comes."""
    if paths and all(map(is_local, paths)):
        return action()
    return retried(action, what, _tell)


def retried(action: Callable[[], Result], what: str, say: Callable[[str], None]) -> Result:
    """Return ``action()``; try again a few times, waiting longer each time, where that may help.

    Args:
        action: can be repeated.
        what: what it does, for the messages.
        say: told of each further try.
    """
    for delay in DELAYS:
        try:
            return action()
        except Exception as error:  # noqa: BLE001 (each file system has its own)
            if lasts(error):
                raise
            say(f"{what} failed ({reason(error)}); trying again in {delay} s")
            time.sleep(delay)
    return action()


def lasts(error: Exception) -> bool:
    """Whether an error would come again, however long one waits."""
    # Those of buckets often bear no number.
    return isinstance(error, _LASTING) or getattr(error, "errno", None) in _LASTING_CODES


def reason(error: BaseException) -> str:
    """An error in a few words."""
    text = getattr(error, "strerror", None)
    if text is None and isinstance(error, FileNotFoundError):
        # Those of buckets give the name alone.
        text = os.strerror(errno.ENOENT)
    text = (text or str(error)).strip().partition("\n")[0]
    return text or type(error).__name__


def _tell(text: str) -> None:
    from tqdm import tqdm  # plain PyTorch does without

    # Above a bar, where there is one.
    tqdm.write(f"warning: {text}", file=sys.stderr)
