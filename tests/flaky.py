"""A bucket that fails now and then, or from some moment on: whole objects only, as object storage has them."""

from __future__ import annotations

import collections
import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem


class ServiceUnavailable(Exception):
    """What a store's client raises, of no type that others know."""


ERRORS = [
    lambda: OSError(errno.EIO, "Input/output error"),
    lambda: ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    lambda: TimeoutError("the read operation timed out"),
    lambda: ServiceUnavailable("503 Service Unavailable"),
]


class Upload(MemoryFile):
    """An object that is there once all of it has arrived."""

    done = False

    def close(self) -> None:
        if not self.done:
            self.done = True
            self.fs.may_fail("commit", self.path)
            self.commit()


class FlakyFileSystem(MemoryFileSystem):
    """Each operation on each object fails ``failures`` times before it works once; from then on it always does."""

    protocol = "flaky"
    # Of its own: not those of memory://.
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures: ClassVar[int] = 0
    # Which operations on which paths always fail.
    denies: Callable[[str, str], bool] = staticmethod(lambda _operation, _path: False)
    calls: ClassVar[collections.Counter] = collections.Counter()
    raised: ClassVar[list[Exception]] = []

    @classmethod
    def may_fail(cls, operation: str, path: str) -> None:
        cls.calls[operation, path] += 1
        if cls.denies(operation, path) or cls.calls[operation, path] <= cls.failures:
            cls.raised.append(ERRORS[len(cls.raised) % len(ERRORS)]())
            raise cls.raised[-1]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("flaky://"))

    def _open(self, path, mode="rb", **options):
        path = self._strip_protocol(path)
        self.may_fail(f"open {mode}", path)
        if mode == "rb":
            return super()._open(path, mode, **options)
        assert mode == "wb", f"a bucket knows no {mode}"
        return Upload(self, path)

    def rm_file(self, path):
        self.may_fail("rm", path)
        super().rm_file(path)

    def _rm(self, path):
        self.may_fail("rm", path)
        super()._rm(path)


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)


def written_to(part: str) -> Callable[[str, str], bool]:
    """Denies to write where a path has this part."""
    return lambda operation, path: operation != "open rb" and part in path


@contextmanager
def flaky(failures: int = 0, denies: Callable[[str, str], bool] | None = None) -> Iterator[type[FlakyFileSystem]]:
    """The file system in that state, for a while."""
    kind = FlakyFileSystem
    before = kind.failures, kind.denies
    kind.failures = failures
    kind.calls.clear()
    kind.raised.clear()
    if denies:
        kind.denies = staticmethod(denies)
    try:
        yield kind
    finally:
        kind.failures, kind.denies = before[0], staticmethod(before[1])
