"""A stand-in for Google's object storage, under its own name: `gs://` URLs that lead to this process's memory.

As in the real one there are objects but no folders, an object appears when it is whole, reading fetches ranges of
bytes, and errors bear no number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fsspec.registry import _registry, register_implementation
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class Bucket(AbstractFileSystem):
    """What the stand-in keeps: contents and version of each object, by its name without `gs://`."""

    protocol = ("gs", "gcs")
    cachable = False
    objects: dict[str, tuple[bytes, int]] = {}
    # Raised, one each, by the next requests for bytes.
    failures: list[Exception] = []
    # The objects and ranges that were asked for.
    fetched: list[tuple[str, int, int]] = []

    @classmethod
    def put(cls, url: str, content: bytes) -> str:
        """Make an object; return its URL."""
        cls.write(url.removeprefix("gs://"), content)
        return url

    @classmethod
    def write(cls, name: str, content: bytes) -> None:
        cls.objects[name] = (content, cls.objects.get(name, (b"", 0))[1] + 1)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path, found = self._strip_protocol(path), {}
        for name, (content, version) in self.objects.items():
            child, deeper, _ = name.removeprefix(f"{path}/").partition("/") if path else name.partition("/")
            if name == path or (name.startswith(f"{path}/") and not deeper):
                found[name] = {"name": name, "size": len(content), "type": "file", "generation": version}
            elif not path or name.startswith(f"{path}/"):
                folder = f"{path}/{child}".removeprefix("/")
                found[folder] = {"name": folder, "size": 0, "type": "directory"}
        if path and not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def _open(self, path: str, mode: str = "rb", **options: Any) -> AbstractBufferedFile:
        return _Object(self, path, mode, **options)

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        self.write(self._strip_protocol(path2), self.objects[self._strip_protocol(path1)][0])

    def _rm(self, path: str) -> None:
        self.objects.pop(self._strip_protocol(path), None)

    def rm_file(self, path: str) -> None:
        if self.objects.pop(self._strip_protocol(path), None) is None:
            raise FileNotFoundError(path)

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def rmdir(self, path: str) -> None:
        pass


class _Object(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        if Bucket.failures:
            raise Bucket.failures.pop(0)
        Bucket.fetched.append((self.path, start, end))
        return Bucket.objects[self.path][0][start:end]

    def _initiate_upload(self) -> None:
        self._parts: list[bytes] = []

    def _upload_chunk(self, final: bool = False) -> bool:
        self._parts.append(self.buffer.getvalue())
        if final:
            Bucket.write(self.path, b"".join(self._parts))
        return True


@contextmanager
def standing_in() -> Iterator[type[Bucket]]:
    """Have `gs://` URLs lead to an empty stand-in."""
    before = {name: _registry[name] for name in Bucket.protocol if name in _registry}
    Bucket.objects, Bucket.failures, Bucket.fetched = {}, [], []
    for name in Bucket.protocol:
        register_implementation(name, Bucket, clobber=True)
    try:
        yield Bucket
    finally:
        for name in Bucket.protocol:
            _registry.pop(name, None)
        _registry.update(before)
