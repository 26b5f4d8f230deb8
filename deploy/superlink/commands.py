"""How SuperLink and SuperNode are started so that they start nothing themselves.

What executors and operators use is on loopback only, with ``--isolation process`` and a secret for whoever takes tasks.
SuperNodes' keys are the roster's TLS keys. Flower's telemetry, update check and dependency installation are off.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from pathlib import Path

from cryptography.hazmat.primitives import serialization as ser

from fedveil.common import identity
from fedveil.common.errors import IdentityError
from fedveil.deploy.enrol.provision import load_tls

SECRET, NODE_KEY = "superexec.secret", "supernode.key"
_SECRET_BYTES = 32
HOST = "127.0.0.1"


def secret(folder: Path) -> Path:
    """The file of the executors' secret in ``folder``: 32 random bytes, mode 0600, made when it is not there.

    Raises:
        IdentityError: it is not that.
    """
    path = folder / SECRET
    if not path.exists():
        # The two processes that share it may start at the same moment: it appears whole, and once.
        made = folder / f"{SECRET}.{secrets.token_hex(8)}"
        identity.write_secret(made, secrets.token_bytes(_SECRET_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(made, path)
        made.unlink()
    if path.stat().st_size != _SECRET_BYTES or path.stat().st_mode & 0o077:
        raise IdentityError(f"{path} is not a private file of {_SECRET_BYTES} bytes", hint="remove it, and start again")
    return path


def node_key(identity_folder: Path, state: Path) -> Path:
    """The site's TLS key in the form that SuperNode reads (OpenSSH), mode 0600, in ``state``."""
    files = load_tls(identity_folder)
    key = ser.load_pem_private_key(files.key.read_bytes(), None)
    data = key.private_bytes(ser.Encoding.PEM, ser.PrivateFormat.OpenSSH, ser.NoEncryption())
    path = state / NODE_KEY
    path.unlink(missing_ok=True)  # the key may have been rotated
    identity.write_secret(path, data)
    return path


def superlink(identity_folder: Path, port: int) -> list[str]:
    """The command for SuperLink on this machine's loopback address."""
    tls = load_tls(identity_folder)
    return [
        _tool("flower-superlink"), "--host", HOST, "--port", str(port),
        "--ssl-certfile", str(tls.certificate), "--ssl-keyfile", str(tls.key), "--ssl-ca-certfile", str(tls.ca),
        "--isolation", "process", "--superexec-auth-secret-file", str(secret(identity_folder)),
        "--enable-supernode-auth", "--disable-runtime-dependency-installation",
    ]  # fmt: skip


def supernode(identity_folder: Path, state: Path, server: str, port: int) -> list[str]:
    """The command for a site's SuperNode: dials ``server`` (host:port), serves its executor on loopback ``port``."""
    tls = load_tls(identity_folder)
    return [
        _tool("flower-supernode"), "--superlink", server, "--root-certificates", str(tls.ca),
        "--auth-supernode-private-key", str(node_key(identity_folder, state)), "--host", HOST, "--port", str(port),
        "--isolation", "process", "--superexec-auth-secret-file", str(secret(state)),
    ]  # fmt: skip


def environment(home: Path) -> dict[str, str]:
    """What Flower's processes find in their environment; ``home`` is where they keep their own files."""
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def _tool(name: str) -> str:
    """A command of the environment that this process runs in, not one that PATH finds first."""
    return str(Path(sys.executable).parent / name)
