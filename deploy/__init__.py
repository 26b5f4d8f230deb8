"""The only room that knows both sides: transports, the simulator, the demo, provisioning."""

from __future__ import annotations

import os
import sys

# gRPC's Python interface cannot name the lowest TLS version. Its core reads this list of TLS 1.2 suites when it is
# first imported. The one suite here wants a pre-shared key, which no certificate can serve. So every handshake below
# TLS 1.3 fails. TLS 1.3 has suites of its own and is not touched.
_NO_TLS_1_2 = "ECDHE-PSK-AES128-CBC-SHA"
TLS13_ONLY = "grpc" not in sys.modules or os.environ.get("GRPC_SSL_CIPHER_SUITES") == _NO_TLS_1_2
os.environ["GRPC_SSL_CIPHER_SUITES"] = _NO_TLS_1_2
