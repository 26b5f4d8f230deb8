"""A site's query is one SELECT: it reads, and changes nothing.

There are two defences. The text is checked here: it must be one statement that begins with SELECT or WITH (or VALUES)
and holds no word that changes data. And the connection is read-only if the database offers that, see
:mod:`.databases`. Only that can stop a function which a SELECT calls.

Databases differ in what is quoted and what is a comment. What two of them read in different ways (a backslash before a
quote, a comment inside a comment, ``--`` without white space after it) is refused. Quoting that only some of them know
(``[a]``, backticks, ``$$a$$``) is understood for these. For others it is refused, or read as plain text. A text must
never look quoted here and be run by the database.
"""

from __future__ import annotations

import re

from fedveil.common.errors import UsageError

MAX_CHARACTERS = 1 << 20
HINT = (
    "give one SELECT that only reads: --query 'SELECT ... ORDER BY ...' (query in [data] of site.toml); "
    "quote a column whose name is a SQL statement"
)
_MARK = re.compile(r"'|\"|`|\[|\$|#|--|/\*")
_ENDS = {
    "'": re.compile(r"'(?:[^']|'')*+'"),
    '"': re.compile(r'"(?:[^"]|"")*+"'),
    "`": re.compile(r"`(?:[^`]|``)*+`"),
    "[": re.compile(r"\[(?:[^\]]|\]\])*+\]"),
    "--": re.compile(r"--(?=[ \t\r\n]|\Z)[^\n]*"),
    "/*": re.compile(r"/\*(?!M?!)(?:[^*]|\*(?!/))*+\*/"),
}
_TAG = re.compile(r"\$(?:(?:[^\W\d]|[^\x00-\x7f])(?:\w|[^\x00-\x7f])*)?\$")
_BACKTICKS = frozenset(("mysql", "mariadb", "sqlite", "bigquery", "databricks"))
_BRACKETS = frozenset(("mssql", "sqlite"))
_DOLLARS = frozenset(("postgresql", "duckdb"))
_PLAIN_HASH = frozenset(("postgresql", "duckdb", "sqlite", "oracle", "mssql"))
_NAME = " _ "  # a name that stands in for every quoted name
_FIRST = ("select", "with", "values")
_CHANGING = frozenset(
    ("alter", "attach", "call", "copy", "create", "delete", "detach", "drop", "exec", "execute", "grant", "insert",
     "install", "into", "merge", "revoke", "truncate", "update", "vacuum")
)  # fmt: skip
# Databases that need a semicolon between statements. In all others any word of _BEGINNING may begin a statement.
_SEPARATE = frozenset(("postgresql", "mysql", "mariadb", "sqlite", "oracle", "duckdb"))
_BEGINNING = frozenset(
    ("add", "backup", "begin", "bulk", "checkpoint", "close", "commit", "dbcc", "deallocate", "declare", "deny",
     "disable", "enable", "kill", "move", "open", "print", "raiserror", "receive", "reconfigure", "restore", "revert",
     "rollback", "save", "send", "set", "shutdown", "updatetext", "use", "waitfor", "writetext")
)  # fmt: skip
_FUNCTIONS = frozenset(("insert", "truncate"))  # also names of functions: as statements, no bracket follows them


def require_select(query: str, database: str = "") -> None:
    """Refuse anything but one statement that only reads. Quoted texts and comments do not count.

    Args:
        database: its kind, as SQLAlchemy names it, or ``duckdb``. For unknown kinds the strictest rules hold.

    Raises:
        UsageError: empty, too long, several statements, another first word, a word that changes data, an open quote, or
            quotes and comments that databases read in different ways. The message does not repeat the query.
    """
    if len(query) > MAX_CHARACTERS:
        raise UsageError("the query is too long", hint=f"at most {MAX_CHARACTERS} characters")
    if "\0" in query:
        raise UsageError("the query holds a zero byte", hint=HINT)
    bare = _unquoted(query, database).strip().removesuffix(";").strip().lower()
    tokens = re.findall(r"\w+|[^\w\s]", bare)
    words = [t for t in tokens if t[0].isalpha() or t[0] == "_"]
    if ";" in bare:
        raise UsageError("the query holds more than one statement", hint=HINT)
    if not words or words[0] not in (*_FIRST, *(("from",) if database == "duckdb" else ())):
        raise UsageError("the query is not a SELECT", hint=HINT)
    refused = _CHANGING if database in _SEPARATE else _CHANGING | _BEGINNING
    if changing := sorted({t for i, t in enumerate(tokens) if t in refused and not _is_name(tokens, i)}):
        raise UsageError(f"the query holds {changing[0].upper()}: it would change the database", hint=HINT)


def _unquoted(query: str, database: str) -> str:
    """The query with a blank for every quoted text and comment, and a name for every quoted name."""
    out, at = [], 0
    while found := _MARK.search(query, at):
        start, mark = found.start(), found.group()
        out.append(query[at:start])
        end, left = start + 1, mark
        if mark == "$":
            end, left = _dollars(query, start, database)
        elif mark == "#":
            if database not in _PLAIN_HASH:
                raise UsageError(
                    "the query holds a # outside quotes: a comment to some databases",
                    hint="write comments as -- with a blank after it",
                )
        elif mark == "[" and database not in _SEPARATE | _BRACKETS:
            raise UsageError(
                "the query holds a [, which opens a quoted name in some databases", hint="call a function instead"
            )
        elif mark != "[" or database in _BRACKETS:
            end, left = _quoted(query, start, mark, database), " " if mark in ("'", "--", "/*") else _NAME
        out.append(left)
        at = end
    return "".join((*out, query[at:]))


def _quoted(query: str, start: int, mark: str, database: str) -> int:
    """Where the quoted text or comment ends."""
    found = _ENDS[mark].match(query, start)
    if found is None:
        what = "a -- without white space after it" if mark == "--" else "a quote or a comment that is not closed"
        raise UsageError(f"the query holds {what}, or an executable comment", hint=HINT)
    inside, before = found.group()[len(mark) :], query[max(0, start - 3) : start]
    if mark == "`" and database not in _BACKTICKS:
        raise UsageError("the query holds a backtick, which does not quote in every database", hint='quote as "name"')
    if mark in ("'", '"') and (re.search(r"\\['\"]", inside) or re.search(r"(?:^|\W)n?q$", before, re.IGNORECASE)):
        hint = "write a quote inside a text twice"
        raise UsageError("the query holds a quote that not every database reads as one", hint=hint)
    if mark in ("--", "/*") and ("/*" in inside or (mark == "--" and re.search(r"\r(?!\n|$)", inside))):
        raise UsageError(
            "the query holds a comment that ends at different places in different databases", hint="take it out"
        )
    return found.end()


def _dollars(query: str, start: int, database: str) -> tuple[int, str]:
    """Where a text between $ signs ends, and what stands in for it. A single $ is plain text."""
    tag = _TAG.match(query, start)
    if tag is None:
        return start + 1, "$"
    end = query.find(tag.group(), tag.end())
    follows = start and re.match(r"[\w$]|[^\x00-\x7f]", query[start - 1])  # then $ may be part of a name
    if database not in _DOLLARS or follows or end < 0:
        raise UsageError("the query holds a text between $ signs that is not closed or not known", hint="quote as 'a'")
    return end + len(tag.group()), " "


def _is_name(tokens: list[str], i: int) -> bool:
    """Whether the word is a column (``t.call``, ``AS call``) or a function. In ``1.call`` it begins a statement."""
    before = tokens[i - 1] if i else ""
    if before == "." and i > 1:
        return tokens[i - 2][0].isalpha() or tokens[i - 2][0] == "_"
    return before == "as" or (tokens[i] in _FUNCTIONS and tokens[i + 1 : i + 2] == ["("])
