"""Where this program's own lines go: standard error, from one level upwards, whatever a library has set up before."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

_FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at that moment, because a progress bar replaces it for a while."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Python's own handler sets one when it is made."""


def to_stderr(level: int = logging.INFO) -> None:
    """Show the lines of ``fedveil.*`` from ``level`` upwards, and other libraries' from WARNING upwards.

    If a library's import has installed a handler, ``logging.basicConfig`` does nothing, and INFO lines are lost
    silently. Such a plain handler is replaced here. May be called again.
    """
    handler = _Stderr()
    handler.setFormatter(logging.Formatter(_FORMAT))
    root = logging.getLogger()
    for old in [h for h in root.handlers if type(h) in (logging.StreamHandler, _Stderr)]:
        root.removeHandler(old)
    root.addHandler(handler)
    logging.getLogger("fedveil").setLevel(level)
