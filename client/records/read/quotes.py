"""Which quotes of a CSV file are open. This is followed block by block, while the reader reads the file.

If a quote is opened and never closed, all lines after it become part of one cell. If that cell belongs to a column that
nobody reads, no other check sees that the rows are gone. The rules are those of the reader: a quote opens a cell only
as its first character, two quotes inside a quoted cell stand for one, and any other quote is text.
"""

from __future__ import annotations

import codecs
import re

import numpy as np
from numpy.typing import NDArray

QUOTE, NEWLINE, RETURN = 0x22, 0x0A, 0x0D
_BOM = codecs.BOM_UTF8


class Quotes:
    """The state after the bytes fed so far.

    Args:
        delimiter: between cells.
        encoding: as the reader decodes the file; anything but UTF-16 writes quotes and separators as ASCII does.

    Attributes:
        opened: whether a quote is open.
        line: the line on which the last quote was opened, from 1.
        breaks: line ends inside quoted cells.
        held: bytes since the open quote; 0 where none is open.
        widest: bytes of the longest quoted cell so far, closed or not, among those that cross the end of a block. It
            may count only from the cell's last pair of quotes on. begun: the line on which that begins.
        longest: bytes of the longest line so far, among those that cross the end of a block.
    """

    def __init__(self, delimiter: str, encoding: str) -> None:
        self.opened, self.line, self.held, self.longest = False, 0, 0, 0
        self.widest, self.begun = 0, 0
        self._newlines, self._returns = np.zeros(2, np.int64), np.zeros(2, np.int64)  # outside, inside quotes
        self._stops = bytes([NEWLINE, RETURN]) + delimiter.encode()
        self._opening = re.compile(rb"(?<=[%s])\"" % re.escape(self._stops))
        self._last, self._first, self._run = NEWLINE, True, 0
        self._decode = codecs.getincrementaldecoder(encoding)("replace") if encoding.startswith("utf-16") else None

    @property
    def breaks(self) -> int:
        """Line ends inside quoted cells, for either sign that can end a line."""
        return int(max(self._newlines[1], self._returns[1]))

    @property
    def lines(self) -> int:
        """Line ends so far, inside quotes or not."""
        return int(max(self._newlines.sum(), self._returns.sum()))

    def feed(self, data: bytes) -> None:
        """The next block of the file."""
        if self._decode is not None:
            data = self._decode.decode(data).removeprefix("\ufeff" if self._first else "").encode()
        elif self._first:
            data = data.removeprefix(_BOM)
        self._first = self._first and not data
        if not data:
            return
        a = np.frombuffer(data, np.uint8)
        toggles = self._toggles(data, a, np.flatnonzero(a == QUOTE))
        before = int(self._newlines.sum() or self._returns.sum())
        newlines = np.flatnonzero(a == NEWLINE)
        self._count(newlines, toggles, self._newlines)
        returns = np.flatnonzero(a == RETURN)
        self._count(returns, toggles, self._returns)
        if self.opened:
            self._widen(self.held + (int(toggles[0]) if len(toggles) else len(data)))
        openings = toggles[int(self.opened) :: 2]
        ends = newlines if len(newlines) else returns
        if len(openings):
            self.line = before + int(np.searchsorted(ends, openings[-1])) + 1
        self.opened ^= len(toggles) % 2 == 1
        since = int(toggles[-1]) if len(toggles) else -self.held
        self.held = len(data) - since if self.opened else 0
        self._widen(self.held)
        self._run = len(data) - 1 - int(ends[-1]) if len(ends) else self._run + len(data)
        self.longest = max(self.longest, self._run)
        # After a quote that is text, a quote at the start of the next block does not continue a quoted cell.
        text = data[-1] == QUOTE and not (len(toggles) and int(toggles[-1]) == len(data) - 1)
        self._last = 0 if text else data[-1]

    def _widen(self, cell: int) -> None:
        if cell > self.widest:
            self.widest, self.begun = cell, self.line

    def _count(self, places: NDArray[np.intp], toggles: NDArray[np.intp], into: NDArray[np.int64]) -> None:
        inside = int(((np.searchsorted(toggles, places) + self.opened) % 2).sum())
        into += (len(places) - inside, inside)

    def _toggles(self, data: bytes, a: NDArray[np.uint8], quotes: NDArray[np.intp]) -> NDArray[np.intp]:
        """The quotes that open or close a cell. If two stand for one, the first closes and the second opens."""
        openings = quotes[int(self.opened) :: 2]
        previous = a[openings - 1]  # wrong for a block's first byte, and corrected below
        if len(openings) and openings[0] == 0:
            previous[0] = self._last
        stops = np.frombuffer(self._stops + bytes([QUOTE]), np.uint8)
        if np.isin(previous, stops).all():
            return quotes
        return self._one_by_one(data)

    def _one_by_one(self, data: bytes) -> NDArray[np.intp]:
        """As :meth:`_toggles`, for a block in which some quotes are text."""
        out: list[int] = []
        opened, at = self.opened, 0
        if not opened and data[0] == QUOTE and (self._last in self._stops or self._last == QUOTE):
            out, opened, at = [0], True, 1
        while True:
            if opened:
                at = data.find(b'"', at)
            else:
                again = out and out[-1] + 1 < len(data) and data[out[-1] + 1] == QUOTE and at == out[-1] + 1
                found = None if again else self._opening.search(data, at)
                at = at if again else found.start() if found else -1
            if at < 0:
                return np.array(out, np.intp)
            out.append(at)
            opened, at = not opened, at + 1
