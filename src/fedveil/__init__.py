"""fedveil: federated learning whose privacy claim anybody can check."""

import os
from typing import Any

__version__ = "0.2.0"

# gRPC reads this once, when anything first imports it. Its own complaints about a peer's handshake are not for a user's
# terminal; what matters of them is raised as a TransportError.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

# For researchers, loaded when they are asked for: an auditor has neither torch nor flwr. Types: __init__.pyi.
_LAZY = {
    "split": "fedveil.deploy.lab.split",
    "simulate": "fedveil.deploy.lab.api",
    "resume": "fedveil.deploy.lab.api",
    "sweep": "fedveil.deploy.lab.api",
    "load": "fedveil.deploy.lab.api",
    "baselines": "fedveil.deploy.lab.api",
    "compare": "fedveil.deploy.lab.comparison",
    "track": "fedveil.deploy.lab.tracking",
    "Run": "fedveil.deploy.lab.run",
    "Runs": "fedveil.deploy.lab.runs",
    "Sites": "fedveil.deploy.lab.sites",
    "Iid": "fedveil.deploy.lab.partition",
    "Dirichlet": "fedveil.deploy.lab.partition",
    "Shards": "fedveil.deploy.lab.partition",
    "Quantity": "fedveil.deploy.lab.partition",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fedveil' has no attribute {name!r}")
    import importlib

    found = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
