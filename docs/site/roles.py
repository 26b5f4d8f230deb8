"""For the API pages: docstrings name things by ``:class:`` and its like, which Markdown does not know."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Turns a role into the name in code letters, without its module."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of each thing that was read."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda m: f"`{_short(m[1])}`", obj.docstring.value)


def _short(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[-2:]) if len(parts) > 1 and parts[-2][:1].isupper() else parts[-1]
