"""Noise that can be drawn again: for debugging a simulation, and for nothing else. It protects NOBODY.

Inside a :func:`seeded` block, the three places that ask the operating system for randomness (the keys of the noise, the
sample with its places, the masks of drop-out layers) get bytes that follow from names. So two runs can be compared bit
by bit, whatever engine ran them and in whatever order. Outside of a block nothing changes.

Only the laboratory opens a block (``deploy/lab/seeded_noise.py``): the import rules and a test keep everybody else from
it. What it ran says NOT PRIVATE in its journal, and its report does not verify.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_DOMAIN = b"fedveil/debug-noise/NOT-PRIVATE/1"
_open: ContextVar[_Bytes | None] = ContextVar("debug-noise", default=None)  # of this thread alone


class _Bytes:
    def __init__(self, names: tuple[int | str, ...]) -> None:
        self._names, self._count = names, 0

    def draw(self, count: int) -> bytes:
        self._count += 1
        return hashlib.shake_256(repr((_DOMAIN, *self._names, self._count)).encode()).digest(count)


@contextmanager
def seeded(*names: int | str) -> Iterator[None]:
    """Until the end of the block, randomness follows from ``names``: a seed, a site, a round. NOT PRIVATE."""
    before = _open.set(_Bytes(names))
    try:
        yield
    finally:
        _open.reset(before)


def replayed(count: int) -> bytes | None:
    """``count`` bytes of the open block. None outside of one: then the operating system is asked."""
    source = _open.get()
    return None if source is None else source.draw(count)
