"""The server's door to the secure sum."""

from __future__ import annotations

from fedveil.privacy.secagg.interface import ServerSum, SumSpec
from fedveil.privacy.secagg.keysum_server import KeysumServer
from fedveil.privacy.secagg.plain import PlainServer
from fedveil.privacy.secagg.sharedkey_server import SharedKeyServer


def server_sum(spec: SumSpec) -> ServerSum:
    """The server's half of ``spec.protocol``; :class:`SecureSumError` if its parameters cannot hold."""
    if spec.protocol in ("plain", "none"):
        return PlainServer(spec)
    if spec.protocol == "keysum":
        return KeysumServer(spec)
    return SharedKeyServer(spec)
