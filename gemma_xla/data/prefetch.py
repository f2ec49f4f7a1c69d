"""Computing ahead of the consumer, in a thread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from queue import Empty, Queue
from threading import Event, Thread
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterable[Item], size: int) -> Iterator[Item]:
    """Yield ``items``, computing up to ``size`` ahead in a thread.

    An exception of ``items`` is raised here, after the items before it. The thread ends with the generator.
    """
    ready: Queue[tuple[Item | None, BaseException | None]] = Queue(size)
    stopped = Event()

    def work() -> None:
        try:
            for item in items:
                ready.put((item, None))
                if stopped.is_set():
                    return
            ready.put((None, StopIteration()))
        except BaseException as error:  # whatever it is, the consumer must see it
            ready.put((None, error))

    thread = Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()
        _drain(ready, thread)


def _drain(ready: Queue, thread: Thread) -> None:
    """Wait for the thread, which may be waiting for room in the queue."""
    while thread.is_alive():
        try:
            ready.get(timeout=0.02)
        except Empty:
            continue
