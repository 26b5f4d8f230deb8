"""The bundle that our runs travel under: SuperLink accepts no run without one.

A zip archive with one ``pyproject.toml`` and no code. It has the same bytes on every machine, so both sides can pin its
hash. The apps that it names exist nowhere, so Flower's own executors fail on it instead of running something else.
"""

from __future__ import annotations

import hashlib
import io
import zipfile

_PROJECT = """\
[project]
name = "pinned"
version = "1"
description = "Carries no code: both sides run the fedveil that is installed there, under executors of its own."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedveil"

[tool.flwr.app.components]
serverapp = "no_code_in_this_bundle:use_fedveils_executor"
clientapp = "no_code_in_this_bundle:use_fedveils_executor"
"""


def _archive() -> bytes:
    """Stored, not deflated, and with a fixed date: no library's version changes a byte."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        entry = zipfile.ZipInfo("pyproject.toml", (1980, 1, 1, 0, 0, 0))
        entry.create_system, entry.external_attr = 3, 0o100644 << 16
        archive.writestr(entry, _PROJECT)
    return out.getvalue()


BUNDLE = _archive()
PIN = hashlib.sha256(BUNDLE).hexdigest()
