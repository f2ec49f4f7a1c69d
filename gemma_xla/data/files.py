"""Finding the files that a path of the config stands for."""

from __future__ import annotations

import contextlib
import glob
import sysconfig
from pathlib import Path, PurePath, PurePosixPath

from gemma_xla.errors import UserError
from gemma_xla.storage import is_url, location, reason

# Files of any other suffix are text.
_KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# A path that ends so is a file, even where none is: hub names do not.
_SUFFIXES = (*_KINDS, ".txt", ".md", ".py", ".gz")
# Folders of Python's standard library that are not the library.
_STDLIB_EXCLUDED = {"site-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3"}


def are_files(path: str) -> bool:
    """Whether ``path`` means files, of this machine or in a bucket, rather than a data set of the hub."""
    marked = path.startswith(("/", "./", "../", "~", "{stdlib}")) or glob.has_magic(path) or is_url(path)
    return marked or path.endswith(_SUFFIXES) or Path(path).exists()


def find_files(path: str, field: str) -> tuple[str, ...]:
    """Return the files that a path or URL, a folder (searched recursively) or a glob stands for, sorted.

    Raises:
        UserError: there are none, one is a link to nothing, or the bucket cannot be asked.
    """
    if is_url(path):
        return _found(_in_bucket(path, field), path, field)
    stdlib = sysconfig.get_path("stdlib")
    root = Path(path.replace("{stdlib}", stdlib)).expanduser()
    if glob.has_magic(str(root)) and not root.exists():
        # Unlike Path.glob, it leaves hidden files out.
        found = [Path(name) for name in glob.glob(str(root), recursive=True)]  # noqa: PTH207
    elif root.is_dir():
        found = [file for file in root.rglob("*") if not _hidden(file.relative_to(root))]
    elif root.exists() or root.is_symlink():
        found = [root]
    else:
        raise UserError(f"{field}.path: there is no file or folder {str(root)!r}; check the path")
    if "{stdlib}" in path:
        found = [file for file in found if not _STDLIB_EXCLUDED.intersection(file.relative_to(stdlib).parts)]
    if broken := [file for file in found if not file.exists()]:
        raise UserError(f"{field}.path: {broken[0]} is a link to a file that is not there; mend or remove it")
    return _found([str(file) for file in found if file.is_file()], path, field)


def _in_bucket(path: str, field: str) -> list[str]:
    try:
        root = location(path)
    except UserError as error:
        raise UserError(f"{field}.path: {error}") from error
    files, name = root.fs, root.path
    try:
        if glob.has_magic(name) and not files.exists(name):
            found, root = files.glob(name, detail=True), _fixed(name)
        elif files.isfile(name):
            return [files.unstrip_protocol(name)]
        else:
            found, root = files.find(name, detail=True), name
        if not found:
            with contextlib.suppress(FileNotFoundError):
                files.ls(root)  # unlike those, it says so when it may not look
    except Exception as error:  # noqa: BLE001 (each file system has its own)
        raise UserError(
            f"{field}.path: {path!r} cannot be read ({reason(error)}); check the name of the bucket and your "
            "credentials"
        ) from error
    # Consoles make empty objects with a slash at their end, to have folders to show.
    named = [name for name, about in found.items() if about["type"] == "file" and not name.endswith("/")]
    return [files.unstrip_protocol(name) for name in named if not _hidden(PurePosixPath(name[len(root) :]))]


def _fixed(pattern: str) -> str:
    """The folder that everything that a glob matches is in."""
    return pattern[: next(at for at, letter in enumerate(pattern) if letter in "*?[")].rpartition("/")[0]


def _found(files: list[str], path: str, field: str) -> tuple[str, ...]:
    if not files:
        raise UserError(f"{field}.path: {path!r} matches no file; check the folder or pattern")
    return tuple(sorted(files))


def file_kind(files: tuple[str, ...], field: str) -> str:
    """Return what the files hold by their suffix, that of compression aside: ``json``, ``parquet`` or ``text``.

    Raises:
        UserError: there are several kinds: read as text, the braces of records would be learnt.
    """
    kinds = {_KINDS.get(Path(file.removesuffix(".gz")).suffix.lower(), "text") for file in files}
    if len(kinds) > 1:
        raise UserError(
            f"{field}.path: it holds files of several kinds ({', '.join(sorted(kinds))}); name one, such as "
            "'folder/**/*.jsonl'"
        )
    return kinds.pop()


def _hidden(file: PurePath) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in file.parts)
