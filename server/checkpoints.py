"""What a restarted server goes on from: content-addressed state, named by the signed journal.

A round counts as applied when its journal row is on disk; the state that row names was written before. So a
crash at any byte leaves a journal whose last applied row names a complete file.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np

from fedveil.common.errors import JournalError
from fedveil.common.wire import sha256
from fedveil.privacy.optim import ModelState

KEEP = 2


def encode(state: ModelState) -> bytes:
    """``state`` as an npz archive without pickles."""
    out = io.BytesIO()
    np.savez(out, weights=state.weights, velocity=state.velocity)
    return out.getvalue()


def save(folder: Path, state: ModelState) -> str:
    """Write ``state`` durably under the SHA-256 of its bytes; returns that hash. Older ones but one are removed."""
    data = encode(state)
    name = sha256(data)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.part"
    with temporary.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    temporary.rename(folder / f"{name}.npz")
    sync_folder(folder)
    old = sorted(folder.glob("*.npz"), key=lambda p: p.stat().st_mtime_ns)[:-KEEP]
    for path in old:
        path.unlink()
    return name


def sync_folder(folder: Path) -> None:
    """Make new names in ``folder`` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def load(folder: Path, name: str) -> ModelState:
    """The state whose bytes have the hash ``name``.

    Raises:
        JournalError: missing, or altered.
    """
    try:
        data = (folder / f"{name}.npz").read_bytes()
    except OSError as e:
        raise JournalError(f"the checkpoint {name[:12]} named by the journal cannot be read") from e
    if sha256(data) != name:
        raise JournalError(f"the checkpoint {name[:12]} was altered")
    with np.load(io.BytesIO(data), allow_pickle=False) as z:
        return ModelState(z["weights"], z["velocity"])
