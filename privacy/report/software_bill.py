"""The software bill: what ran where the report was written, as its builder states it."""

from __future__ import annotations

import hashlib
import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import fedveil
from fedveil.common import canonical
from fedveil.common.errors import VerificationError

# What decides a number or a key, where it is installed.
PACKAGES = ("dp-accounting", "numpy", "scipy", "cryptography", "pydantic", "tenseal", "torch", "opacus", "flwr")
ROOMS = ("common", "privacy", "client", "server", "deploy")
MAX_PACKAGES, MAX_TEXT = 64, 64


@lru_cache(maxsize=1)
def software() -> dict[str, dict[str, str]]:
    """``{name: {"version", "sha256"}}`` of the interpreter, this package and what it stands on.

    The hash of a package is that of its ``RECORD``, which lists every installed file with its own hash; of this
    package, that of the list of its source files with theirs; empty where there is none.
    """
    found = {
        "python": {"version": platform.python_version(), "sha256": ""},
        "fedveil": {"version": fedveil.__version__, "sha256": _own()},
    }
    for name in PACKAGES:
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        record = installed.read_text("RECORD")
        digest = canonical.sha256_hex(record.encode()) if record else ""
        found[name] = {"version": installed.version, "sha256": digest}
    return found


def checked(value: Any) -> dict[str, dict[str, str]]:
    """``value``, if it has the form of :func:`software`, within bounds; else a :class:`VerificationError`."""
    if not isinstance(value, dict) or len(value) > MAX_PACKAGES or not all(map(_entry, value.items())):
        raise VerificationError("the software bill is malformed")
    return value


def _entry(item: tuple[Any, Any]) -> bool:
    name, entry = item
    if len(name) > MAX_TEXT or not isinstance(entry, dict) or set(entry) != {"version", "sha256"}:
        return False
    return all(isinstance(x, str) and len(x) <= MAX_TEXT for x in entry.values())


def _own() -> str:
    listed: list[str] = []

    def walk(folder: Traversable, path: str) -> None:
        for item in sorted(folder.iterdir(), key=lambda x: x.name):
            where = f"{path}/{item.name}"
            if item.is_dir():
                walk(item, where)
            elif not item.name.endswith((".pyc", ".so")):
                listed.append(f"{where} {hashlib.sha256(item.read_bytes()).hexdigest()}")

    for room in ROOMS:
        if (folder := files("fedveil").joinpath(room)).is_dir():
            walk(folder, room)
    return canonical.sha256_hex("\n".join(listed).encode())
