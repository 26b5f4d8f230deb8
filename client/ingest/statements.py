"""A site's query is one SELECT: it reads, and changes nothing.

Two defences. The text is looked at here: one statement that begins with SELECT or WITH (or VALUES) and holds no word
that changes data. And the connection is made read-only where the database offers that, see :mod:`.databases`; a
function that a SELECT calls can only be stopped there.
"""

from __future__ import annotations

import re

from fedveil.common.errors import UsageError

MAX_CHARACTERS = 1 << 20
HINT = "--query 'SELECT ... ORDER BY ...': a single one, that only reads; quote columns called after a statement"
_QUOTED = re.compile(
    r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`(?:[^`]|``)*`|\[[^\]]*\]|\$(\w*)\$.*?\$\1\$|--[^\r\n]*|/\*(?!!).*?\*/",
    re.DOTALL,
)
_FIRST = ("select", "with", "values")
_CHANGING = frozenset(
    ("alter", "attach", "call", "copy", "create", "delete", "detach", "drop", "exec", "execute", "grant", "insert",
     "install", "into", "merge", "revoke", "truncate", "update", "vacuum")
)  # fmt: skip


def require_select(query: str) -> None:
    """Refuse anything but one reading statement; quoted texts and comments do not count.

    Raises:
        UsageError: empty, too long, several statements, another first word, a word that changes data, an open quote.
            The message does not repeat the query.
    """
    if len(query) > MAX_CHARACTERS:
        raise UsageError("the query is too long", hint=f"at most {MAX_CHARACTERS} characters")
    bare = _QUOTED.sub(" ", query).strip().removesuffix(";").strip()
    words = re.findall(r"[^\W\d]\w*", bare.lower())
    if ";" in bare:
        raise UsageError("the query holds more than one statement", hint=HINT)
    if any(mark in bare for mark in ("'", '"', "`", "/*")):
        raise UsageError("the query holds a quote or a comment that is not closed, or an executable comment", hint=HINT)
    if not words or words[0] not in _FIRST:
        raise UsageError("the query is no SELECT", hint=HINT)
    if changing := sorted(_CHANGING & set(words)):
        raise UsageError(f"the query holds {changing[0].upper()}: it would change the database", hint=HINT)
