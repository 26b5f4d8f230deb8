"""Where a released table comes from: commitments that may leave the site, and the full record that may not.

A plain hash of data confirms a guessed table with certainty. What leaves the site is therefore an HMAC under a secret
that stays there: without the secret it says nothing, with it the site can later show what it used.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Literal

from fedveil.common.errors import ConfigError
from fedveil.common.identity import write_secret

SECRET_BYTES = 32
_CHUNK = 1 << 20


def commitment(secret: bytes, kind: Literal["source", "released"], path: Path) -> str:
    """HMAC-SHA256 (hex) under ``secret`` (at least 32 bytes) of ``kind || 0x00 || the bytes of path``.

    Hiding and binding as long as the secret is random and stays at the site. ``kind`` keeps the two commitments of
    equal bytes different.
    """
    if len(secret) < SECRET_BYTES:
        raise ConfigError(f"a commitment secret of {len(secret)} bytes is too short", hint="use 32 random bytes")
    mac = hmac.new(secret, kind.encode() + b"\0", hashlib.sha256)
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            mac.update(chunk)
    return mac.hexdigest()


def file_hash(path: Path) -> str:
    """Plain SHA-256 (hex) of a file: for the local record only."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def private_folder(work: Path) -> Path:
    """Create ``work`` with mode 0700, or check that it has it.

    Raises:
        ConfigError: others can read it. An existing folder is not changed: it may be the wrong one.
    """
    try:
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = work.stat().st_mode
    except OSError as e:
        raise ConfigError(f"the work folder {work} cannot be made: {e.strerror}") from e
    if mode & 0o077:
        raise ConfigError(f"others can read the work folder {work}", hint=f"chmod 700 {work}, or name a new folder")
    return work


def write_private(path: Path, data: bytes) -> None:
    """Write ``path`` with mode 0600, all of it or nothing."""
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    write_secret(part, data)
    os.replace(part, path)


def site_secret(work: Path) -> bytes:
    """The commitment secret of a work folder: 32 bytes, made on first use from the operating system's randomness."""
    path = private_folder(work) / "commitment.key"
    if not path.exists():
        write_secret(path, secrets.token_bytes(SECRET_BYTES))
    data = path.read_bytes()
    if len(data) != SECRET_BYTES:
        raise ConfigError(f"{path} does not hold {SECRET_BYTES} bytes", hint="restore it from the site's backup")
    return data
