"""Where a journal stands, in the form in which others keep it: its head, and the owner's word for it."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.common import canonical
from fedveil.common.errors import IdentityError, ProtocolError
from fedveil.common.identity import sign, verify

HEAD = "fedveil/head/1"
MAX_ROWS = 1 << 22
_HEX = re.compile("[0-9a-f]*")


class Head(NamedTuple):
    """Number of rows and the hash of the last one: what peers exchange and keep."""

    rows: int
    hash: str


class Copy(NamedTuple):
    """A journal's head in the form in which others keep it and pass it on, with its owner's word for it.

    Attributes:
        head: where the journal stood.
        ledger: hash of its first row: which journal it is.
        data_set: the data set whose budget it counts (see :func:`~fedveil.privacy.joining.data_set`).
        signature: the owner's, over all of this and the owner's name. Empty in copies written by older versions: these
            are hearsay, and nobody passes them on.
    """

    head: Head
    ledger: str
    data_set: str = ""
    signature: str = ""

    @classmethod
    def from_json(cls, value: Any) -> Copy:
        """What :meth:`to_json` gave; the signature is not checked. Anything else is a :class:`ProtocolError`."""
        ok = isinstance(value, list) and len(value) in (3, 5) and type(value[0]) is int
        if not ok or not 0 <= value[0] <= MAX_ROWS or not all(map(hexadecimal, value[1:], (64, 64, 64, 128))):
            raise ProtocolError("a journal head is malformed")
        return cls(Head(value[0], value[1]), *value[2:])

    def to_json(self) -> list[int | str]:
        """``[rows, hash, ledger, data set, signature]``; hearsay has the first three only."""
        own = [*self.head, self.ledger]
        return [*own, self.data_set, self.signature] if self.signature else own

    def by(self, owner: str, key: Ed25519PrivateKey) -> Copy:
        """The same, signed by its owner."""
        return self._replace(signature=sign(key, HEAD, _word(owner, self)).hex())

    def signed_by(self, owner: str, public: str) -> bool:
        """Whether this is a head of ``owner``'s journal by the word of the key ``public`` (hex)."""
        return bool(self.signature) and _is_word_of(owner, public, self)


def hexadecimal(value: Any, length: int) -> bool:
    """True for so many lower-case hexadecimal digits."""
    return type(value) is str and len(value) == length and _HEX.fullmatch(value) is not None


def _word(owner: str, copy: Copy) -> bytes:
    rows, last = copy.head
    named = {"site": owner, "rows": rows, "hash": last, "ledger": copy.ledger, "data_set": copy.data_set}
    return canonical.dumps(named)


@lru_cache(maxsize=1 << 14)  # many pass on one head
def _is_word_of(owner: str, public: str, copy: Copy) -> bool:
    try:
        verify(public, HEAD, _word(owner, copy), bytes.fromhex(copy.signature), what="a journal head")
    except (IdentityError, ValueError):
        return False
    return True
