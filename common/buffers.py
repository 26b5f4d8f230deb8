"""Bytes that are written in place before they are bytes: large ones are never held twice."""

from __future__ import annotations

import io


class Filled:
    """``size`` zero bytes to write to through :attr:`room`, until :meth:`value` gives them."""

    def __init__(self, size: int) -> None:
        self._out = io.BytesIO(bytes(size))
        self.room = self._out.getbuffer()

    def value(self) -> bytes:
        """What was written, without a copy; whoever looks into :attr:`room` has to have let go of it."""
        self.room.release()
        return self._out.getvalue()
