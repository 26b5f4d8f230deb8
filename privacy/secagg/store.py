"""Where a site keeps what must survive a crash: write-once, atomic, readable by its owner only."""

from __future__ import annotations

import os
import re
import secrets
from abc import ABC, abstractmethod
from pathlib import Path

from fedveil.common.errors import SecureSumError, StoreError
from fedveil.common.files import sync_folder

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,159}")
_OVERWRITE_UP_TO = 1 << 16


class Store(ABC):
    """Named byte strings; what was written once never changes. Names are 1 to 160 characters of a-z, 0-9, '-'."""

    @abstractmethod
    def put(self, name: str, *parts: bytes) -> None:
        """Write the joined ``parts`` under ``name``; they survive a crash once this returns.

        Raises:
            SecureSumError: other bytes are stored under ``name`` (equal bytes are fine).
            StoreError: the disk refuses.
        """

    @abstractmethod
    def get(self, name: str) -> bytes | None:
        """The bytes under ``name``, or None."""

    @abstractmethod
    def erase(self, name: str) -> None:
        """Remove ``name``; nothing happens if it is not there."""

    @abstractmethod
    def names(self, prefix: str) -> list[str]:
        """What is stored under names that begin with ``prefix``, in order of name."""


class MemoryStore(Store):
    """For the simulator: lives as long as the object."""

    def __init__(self) -> None:
        self._data: dict[str, bytes] = {}

    def put(self, name: str, *parts: bytes) -> None:
        """See :meth:`Store.put`."""
        data = b"".join(parts)
        if self._data.setdefault(_checked(name), data) != data:
            raise _conflict(name)

    def get(self, name: str) -> bytes | None:
        """See :meth:`Store.get`."""
        return self._data.get(name)

    def erase(self, name: str) -> None:
        """See :meth:`Store.erase`."""
        self._data.pop(name, None)

    def names(self, prefix: str) -> list[str]:
        """See :meth:`Store.names`."""
        return sorted(name for name in self._data if name.startswith(prefix))


class DirectoryStore(Store):
    """One file per name, mode 0600, in a directory of mode 0700.

    A write goes to a new file in the same directory, is synced, and is then linked to its name, so that a
    crash leaves either nothing or everything. Directory entries are synced too.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
        except OSError as e:
            raise _unwritable(path, e) from e

    def put(self, name: str, *parts: bytes) -> None:
        """See :meth:`Store.put`; large parts are written as they are, without a copy."""
        target = self._path / _checked(name)
        held = self.get(name)
        if held is not None:
            if held != b"".join(parts):
                raise _conflict(name)
            return
        temporary = self._path / f".{name}.{secrets.token_hex(8)}"
        try:
            try:
                fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with os.fdopen(fd, "wb") as f:
                    f.writelines(parts)
                    f.flush()
                    os.fsync(f.fileno())
                # Linking, unlike renaming, fails if another process was faster: write-once holds between processes.
                os.link(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            self._sync()
        except FileExistsError as e:
            if self.get(name) != b"".join(parts):
                raise _conflict(name) from e
        except OSError as e:
            raise _unwritable(target, e) from e

    def get(self, name: str) -> bytes | None:
        """See :meth:`Store.get`."""
        try:
            return (self._path / _checked(name)).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as e:
            raise StoreError(
                f"{self._path / name} cannot be read: {e.strerror}", hint="check its permissions and the disk"
            ) from e

    def erase(self, name: str) -> None:
        """See :meth:`Store.erase`; short files (keys) are overwritten first, which helps where disks write in place.

        What a crash left of an unfinished write of ``name`` goes too.
        """
        target = self._path / _checked(name)
        try:
            for path in (target, *self._path.glob(f".{name}.*")):
                _shred(path)
            self._sync()
        except OSError as e:
            raise StoreError(f"{target} cannot be erased: {e.strerror}", hint="remove it by hand") from e

    def names(self, prefix: str) -> list[str]:
        """See :meth:`Store.names`."""
        try:
            found = (p.name for p in self._path.iterdir())
            return sorted(name for name in found if name.startswith(prefix) and _NAME.fullmatch(name))
        except OSError as e:
            raise StoreError(
                f"{self._path} cannot be read: {e.strerror}", hint="check its permissions and the disk"
            ) from e

    def _sync(self) -> None:
        sync_folder(self._path)


def _shred(path: Path) -> None:
    try:
        size = path.stat().st_size
        if size <= _OVERWRITE_UP_TO:
            with path.open("r+b") as f:
                f.write(bytes(size))
                f.flush()
                os.fsync(f.fileno())
        path.unlink()
    except FileNotFoundError:
        return


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise SecureSumError(f"{name[:64]!r} is not a valid name in a store")
    return name


def _conflict(name: str) -> SecureSumError:
    return SecureSumError(f"{name!r} was written before with other bytes", hint="what was promised once cannot change")


def _unwritable(path: Path, e: OSError) -> StoreError:
    return StoreError(f"{path} cannot be written: {e.strerror}", hint="check free disk space and permissions")
