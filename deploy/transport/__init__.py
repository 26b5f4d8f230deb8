"""Engines under Flower's ``Grid``: mTLS gRPC, in process, Ray."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

# gRPC reads this when it is first imported. Its own complaints about a peer's handshake are not for a user's
# terminal: what matters of them reaches the user as a TransportError.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@dataclass(frozen=True)
class TlsFiles:
    """Where one member's TLS material lies (PEM files).

    Attributes:
        ca: certificate of the consortium's authority, the only one that is trusted.
        certificate: this member's certificate.
        key: its private key, mode 0600.
    """

    ca: Path
    certificate: Path
    key: Path


class Traffic:
    """Thread-safe counters of payload bytes per site, seen from the server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: dict[str, dict[str, int]] = {}

    def add(self, site: str, *, sent: int = 0, received: int = 0) -> None:
        """Count bytes to (``sent``) and from (``received``) ``site``."""
        with self._lock:
            row = self._bytes.setdefault(site, {"sent": 0, "received": 0})
            row["sent"] += sent
            row["received"] += received

    def snapshot(self) -> dict[str, dict[str, int]]:
        """A copy of the counters: site -> ``{"sent", "received"}``."""
        with self._lock:
            return {site: dict(row) for site, row in self._bytes.items()}
