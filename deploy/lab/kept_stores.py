"""The stores of a simulation's sites, in memory and in one file: to make a file for each name takes too long.

The file only grows, until more than half of it was erased; then it is written anew. It survives the process, not a
power cut.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from fedveil.common import canonical
from fedveil.common.errors import StoreError
from fedveil.common.files import replacing
from fedveil.common.units import SiteId
from fedveil.privacy.secagg.store import MemoryStore, Store

_ERASED = -1
_ROOM = 1 << 26  # bytes that were erased, before it is worth the time to write the file anew


class Stores:
    """One file for all sites of a run, of mode 0600: it holds their keys of the session.

    Args:
        path: the file; what it holds is read. An unfinished last entry was never acted upon, and is dropped.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: dict[str, dict[str, bytes]] = defaultdict(dict)
        self._live = self._dead = 0
        whole = self._read(path.read_bytes()) if path.exists() else 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.ftruncate(self._fd, whole)

    def of(self, site: SiteId) -> Store:
        """The store of one site."""
        return _Kept(self, site, self._held[site])

    def note(self, site: str, name: str, data: bytes | None, before: int = 0) -> None:
        """Write what was put, or with None that ``before`` bytes were erased; it survives the process afterwards."""
        self._append(_entry(site, name, data))
        if data is not None:
            self._live += len(data)
        else:
            self._live, self._dead = self._live - before, self._dead + before
        if self._dead > max(_ROOM, self._live):
            self._write_anew()

    def close(self) -> None:
        """Give the file back."""
        os.close(self._fd)

    def _append(self, entry: bytes) -> None:
        data = memoryview(entry)
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as e:
            raise StoreError(f"{self._path} could not be written: {e.strerror}", hint="free disk space") from e

    def _write_anew(self) -> None:
        with replacing(self._path) as part:
            os.close(self._fd)
            self._fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            for site, held in self._held.items():
                for name, data in held.items():
                    self._append(_entry(site, name, data))
        self._dead = 0

    def _read(self, data: bytes) -> int:
        at = 0
        while (end := data.find(b"\n", at)) >= 0:
            said = canonical.loads(data[at:end])
            held, size = self._held[said["site"]], said["size"]
            stop = end + 1 + max(size, 0)
            if stop > len(data):
                break
            if size == _ERASED:
                held.pop(said["name"], None)
            else:
                held[said["name"]] = data[end + 1 : stop]
            at = stop
        self._live = sum(len(d) for held in self._held.values() for d in held.values())
        self._dead = at - self._live
        return at


class _Kept(MemoryStore):
    def __init__(self, stores: Stores, site: SiteId, held: dict[str, bytes]) -> None:
        super().__init__()
        self._stores, self._site, self._data = stores, site, held

    def put(self, name: str, *parts: bytes) -> None:
        """See :meth:`Store.put`."""
        new = name not in self._data
        super().put(name, *parts)
        if new:
            self._stores.note(self._site, name, self._data[name])

    def erase(self, name: str) -> None:
        """See :meth:`Store.erase`."""
        if (data := self._data.get(name)) is not None:
            super().erase(name)
            self._stores.note(self._site, name, None, len(data))


def _entry(site: str, name: str, data: bytes | None) -> bytes:
    size = _ERASED if data is None else len(data)
    return canonical.dumps({"site": site, "name": name, "size": size}) + b"\n" + (data or b"")
