"""The state from which a restarted server goes on. It is stored under its hash, which the signed journal names.

A round counts as applied when its journal row is on disk. The state that this row names was written before. So after
a crash at any byte, the journal's last applied row names a complete file.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from fedveil.common.errors import JournalError
from fedveil.common.files import write_durably
from fedveil.common.wire import sha256
from fedveil.privacy.optimiser import ModelState

KEEP = 2


def encode(state: ModelState) -> bytes:
    """``state`` as an npz archive without pickles."""
    out = io.BytesIO()
    np.savez(out, weights=state.weights, velocity=state.velocity)
    return out.getvalue()


def save(folder: Path, state: ModelState) -> str:
    """Write ``state`` durably under the SHA-256 of its bytes; returns it. All older states but one are removed."""
    data = encode(state)
    name = sha256(data)
    write_durably(folder / f"{name}.npz", data)
    old = sorted(folder.glob("*.npz"), key=lambda p: p.stat().st_mtime_ns)[:-KEEP]
    for path in old:
        path.unlink()
    return name


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
