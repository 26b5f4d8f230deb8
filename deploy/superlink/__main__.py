"""Entry point of ``python -m fedveil.deploy.superlink``."""

from __future__ import annotations

import sys

from fedveil.common.errors import FedveilError
from fedveil.deploy.superlink.cli import app

try:
    app()
except FedveilError as e:
    sys.stderr.write(f"{e.code}: {e}\n")
    sys.exit(e.exit_code)
