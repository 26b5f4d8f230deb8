"""Work in pieces over a few threads, with results in order: what is deterministic stays so for any number of threads.

AES, SHA-256, NumPy and SEAL let go of the interpreter's lock. So pieces that stay in a core's cache run beside each
other. A call has threads of its own, which are gone when it ends. With one thread, or one piece, there are none.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

from fedveil.common.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")
MAX_THREADS = 4096


def _present() -> int:
    """The cores that this process may use; fewer if OMP_NUM_THREADS says so, as in torch and NumPy."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, max(1, int(named))) if named.isascii() and named.isdigit() and len(named) < 6 else cores


_count = [_present()]  # of this process


def _keep_small_blocks() -> None:
    """Have glibc keep the memory of a chunk's temporaries for the next chunk.

    By itself it gives freed blocks back to the kernel at once. Then every chunk's memory is mapped and cleared anew,
    which costs more than most of the work on it. After it has freed one block of nearly 4 MiB, as any program with
    large arrays does, it keeps up to 8 MiB of smaller ones (mallopt(3), M_MMAP_THRESHOLD). Other libraries ignore it.
    """
    bytes((4 << 20) - (1 << 14))  # freed at once


_keep_small_blocks()


def use(count: int) -> None:
    """Let every later call of this process have ``count`` threads; :class:`ConfigError` outside 1..4096."""
    if not 1 <= count <= MAX_THREADS:
        raise ConfigError(f"{count} threads are outside 1..{MAX_THREADS}")
    _count[0] = count


def in_use() -> int:
    """How many threads a call has."""
    return _count[0]


def mapped(work: Callable[[T], R], pieces: Iterable[T]) -> Iterator[R]:
    """``work`` of each piece, in the order of the pieces.

    The pieces are taken in order, and in the caller's thread. A few are taken ahead of the results that were read. An
    exception of ``work`` is the caller's; pieces that were not begun are left out then. Whoever stops reading early
    closes the iterator, as a ``for`` loop does.
    """
    rest = iter(pieces)
    first = list(islice(rest, 2))
    count = in_use()
    if count == 1 or len(first) < 2:
        yield from map(work, chain(first, rest))
        return
    with ThreadPoolExecutor(count, "fedveil-pieces") as pool:
        waiting = deque[Future[R]]()
        try:
            for piece in chain(first, rest):
                waiting.append(pool.submit(work, piece))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def each(work: Callable[[T], object], pieces: Iterable[T]) -> None:
    """``work`` of each piece, where there is no result."""
    deque(mapped(work, pieces), maxlen=0)


def spans(stop: int, length: int, start: int = 0) -> Iterator[slice]:
    """``start..stop`` in slices of ``length``, the last one shorter."""
    for first in range(start, stop, length):
        yield slice(first, min(first + length, stop))
