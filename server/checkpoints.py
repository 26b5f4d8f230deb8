"""The state from which a restarted server goes on. It is stored under its digest, which the signed journal names.

A round counts as applied when its journal row is on disk. The state that this row names was written before. So after
a crash at any byte, the journal's last applied row names a complete file.
"""

from __future__ import annotations

from pathlib import Path

from fedveil.common.errors import JournalError
from fedveil.common.files import write
from fedveil.common.wire import sha256
from fedveil.privacy.optimiser import ModelState

FOLDER = "checkpoints"  # of a run's folder
KEEP = 2


def save(folder: Path, state: ModelState, *, durable: bool = True) -> str:
    """Write ``state`` under its digest; returns it. All older states but one are removed.

    Args:
        durable: False in a simulation, which does not wait for the disk.
    """
    write(folder / f"{state.digest}.state", state.data, durable=durable)
    old = sorted(folder.glob("*.state"), key=lambda p: p.stat().st_mtime_ns)[:-KEEP]
    for path in old:
        path.unlink()
    return state.digest


def load(folder: Path, name: str) -> ModelState:
    """The state with the digest ``name``.

    Raises:
        JournalError: missing, or altered.
    """
    try:
        data = (folder / f"{name}.state").read_bytes()
    except OSError as e:
        raise JournalError(f"the checkpoint {name[:12]} named by the journal cannot be read") from e
    if sha256(data) != name:
        raise JournalError(f"the checkpoint {name[:12]} was altered")
    return ModelState.load(data)
