"""A first draft of a contract from a sample: every column listed, every decision left to a person.

Roles are asked for and never guessed. Bounds and leaves are never taken from the sample, because they would then say
something about it. A comment beside each column says what the sample looks like.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import get_args

from fedveil.client.records.judge.profile import ColumnProfile, Profile
from fedveil.common.contract import Role

ROLES: tuple[str, ...] = get_args(Role)
Ask = Callable[[ColumnProfile], str]
_HEAD = """\
# Draft of a data contract. Every column needs a role: {roles}.
# An empty role is refused when the contract is signed. Bounds and values are public knowledge: never copy them from the
# data. Fields: docs/data.md.
name = {name}
version = "1"
purpose = ""
unit = "one row = one record"
k = 5
l = 1
suppression_limit = 0.0
"""


def draft(sample: Profile, name: str, ask: Ask) -> str:
    """The TOML text of a draft.

    Args:
        ask: returns the role of a column, or "" to leave it open.
    """
    parts = [_HEAD.format(roles=", ".join(ROLES), name=_quoted(name))]
    return "\n".join([*parts, *(_column(c, ask(c)) for c in sample.columns)])


def _column(c: ColumnProfile, role: str) -> str:
    lines = ["[[columns]]", f"name = {_quoted(c.name)}"]
    lines.append(f"role = {json.dumps(role)}")
    lines += [f"# {remark}" for remark in (f"looks like: {c.looks_like}", *c.remarks)]
    if role in ("identifier", "drop"):
        return "\n".join([*lines, ""])
    lines.append('# type = "number" with low, high and unit; "category" with values; "date" with format, low and high')
    if role in ("quasi", ""):
        lines.append("# levels = [...]  what a quasi-identifier is recoded to")
    codes = ["", *sorted(c.codes)]
    if c.empty or c.codes:
        lines.append(f'# missing = "indicator"  and  missing_codes = {json.dumps(codes)}')
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    """A TOML basic string: as in JSON, but DEL must be escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
