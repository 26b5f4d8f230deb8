"""Where a released table comes from: commitments that may leave the site, and the full record that may not.

With a plain hash of the data, anybody could confirm a guessed table. So an HMAC leaves the site instead. Its secret
stays there. Without the secret the HMAC says nothing. With it the site can later show which table it used.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedveil.common import canonical, identity
from fedveil.common.errors import ConfigError, IdentityError, VerificationError, WireError
from fedveil.common.files import replacing
from fedveil.common.identity import write_secret

DOMAIN = "fedveil/lineage/1"

KEY_FILE = "commitment.key"
SECRET_BYTES = 32
_CHUNK = 1 << 20


def commitment(secret: bytes, kind: Literal["source", "released"], path: Path) -> str:
    """HMAC-SHA256 (hex) under ``secret`` (at least 32 bytes) of ``kind || 0x00 || the bytes of path``.

    Hiding and binding as long as the secret is random and stays at the site. Because of ``kind``, the two commitments
    differ even if the bytes are equal.
    """
    mac = hmac.new(checked_secret(secret), kind.encode() + b"\0", hashlib.sha256)
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            mac.update(chunk)
    return mac.hexdigest()


def checked_secret(secret: bytes) -> bytes:
    """``secret``, if it is long enough to hide what is committed to."""
    if len(secret) < SECRET_BYTES:
        raise ConfigError(f"a commitment secret of {len(secret)} bytes is too short", hint="use 32 random bytes")
    return secret


def file_hash(path: Path) -> str:
    """Plain SHA-256 (hex) of a file: for the local record only."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def derived_key(secret: bytes) -> Ed25519PrivateKey:
    """The work folder's signing key, derived from its secret (HKDF-SHA256), for sites that name no key of their own."""
    seed = HKDF(hashes.SHA256(), 32, None, b"fedveil/lineage key/1").derive(checked_secret(secret))
    return Ed25519PrivateKey.from_private_bytes(seed)


def write_signed(path: Path, signature: Path, record: dict[str, Any], key: Ed25519PrivateKey) -> None:
    """Write ``record`` as canonical JSON, and beside it the signature over its hash."""
    data = canonical.dumps(record)
    write_private(signature, canonical.dumps(identity.signed(key, DOMAIN, {"sha256": canonical.sha256_hex(data)})))
    write_private(path, data)


def read_signed(path: Path, signature: Path, public: str) -> dict[str, Any]:
    """The record in ``path``, after its signature by ``public`` (64 hex digits) was verified.

    Raises:
        VerificationError: altered, unsigned, or signed by another key.
    """
    try:
        data = path.read_bytes()
        payload = identity.opened(canonical.loads(signature.read_bytes()), DOMAIN, public, what="the lineage record")
        record = canonical.loads(data)
    except (OSError, IdentityError, WireError) as e:
        raise VerificationError(
            f"the lineage record {path} is not signed by the given key",
            hint="give the public key of the site that wrote it",
        ) from e
    if payload != {"sha256": canonical.sha256_hex(data)} or not isinstance(record, dict):
        raise VerificationError(
            f"the lineage record {path} was changed after it was signed", hint="check the table again"
        )
    return record


def private_folder(work: Path) -> Path:
    """Create ``work`` with mode 0700, or check that it has it.

    Raises:
        ConfigError: others can read it. An existing folder is not changed: it may be the wrong one.
    """
    try:
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = work.stat().st_mode
    except OSError as e:
        raise ConfigError(f"the work folder {work} cannot be made: {e.strerror}", hint="name another folder") from e
    if mode & 0o077:
        raise ConfigError(f"others can read the work folder {work}", hint=f"chmod 700 {work}, or name a new folder")
    return work


def write_private(path: Path, data: bytes) -> None:
    """Write ``path`` with mode 0600, completely or not at all."""
    with replacing(path) as part:
        write_secret(part, data)


def site_secret(work: Path) -> bytes:
    """The commitment secret of a work folder: 32 bytes, made on first use from the operating system's randomness."""
    path = private_folder(work) / KEY_FILE
    if not path.exists():
        write_secret(path, secrets.token_bytes(SECRET_BYTES))
    data = path.read_bytes()
    if len(data) != SECRET_BYTES:
        raise ConfigError(f"{path} does not hold {SECRET_BYTES} bytes", hint="restore it from the site's backup")
    return data
