"""fedveil: federated learning whose privacy claim anybody can check."""

import os

__version__ = "0.2.0"

# gRPC reads this once, when anything first imports it. Its own complaints about a peer's handshake are not for a user's
# terminal; what matters of them is raised as a TransportError.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
