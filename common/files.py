"""Files that are either complete or absent after a crash, and the unfinished files beside them."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


def write_durably(path: Path, data: bytes) -> None:
    """Write ``path``, replacing what was there. After a crash it holds all of the old or all of the new bytes.

    Both the bytes and the name are on disk when this returns. The folder is made if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, part.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    sync_folder(path.parent)


def write(path: Path, data: bytes, *, durable: bool) -> None:
    """As :func:`write_durably`; in a simulation (``durable`` False) nothing waits for the disk."""
    if durable:
        write_durably(path, data)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name of a hidden file beside ``path``, to be written. After the block it is ``path``, or gone if that failed.

    It has the ending of ``path``. If a killed process left such a file, it is removed first.
    """
    part = path.with_name(f".part-{path.name}")
    part.unlink(missing_ok=True)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A hidden folder of mode 0700 beside ``path``, for as long as the block runs.

    Folders that killed processes left for the same ``path`` are removed first. A living process holds a lock.
    """
    prefix = f".{path.name}.scratch-"
    for left in path.parent.glob(f"{glob.escape(prefix)}*"):
        with _locked(left) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)
    with ExitStack() as stack:
        made = path
        # Until it is locked, another process may take it for a dead one's. Some file systems have no locks.
        for _ in range(5):
            folder = tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent, ignore_cleanup_errors=True)
            made = Path(stack.enter_context(folder))
            if stack.enter_context(_locked(made)) and made.is_dir():
                break
        yield made


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process has the folder's lock, until the end of the block."""
    with ExitStack() as stack:
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:  # another process has it, or the file system has no locks: then no folder is removed
            held = False
        yield held


def sync_folder(folder: Path) -> None:
    """Make new names in ``folder`` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
