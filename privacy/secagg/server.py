"""The server's door to the secure sum."""

from __future__ import annotations

from pathlib import Path

from fedveil.privacy.secagg.interface import ServerSum, SumSpec
from fedveil.privacy.secagg.kept import KeptCiphertexts
from fedveil.privacy.secagg.keysum_server import KeysumServer
from fedveil.privacy.secagg.plain import PlainServer
from fedveil.privacy.secagg.sharedkey_server import SharedKeyServer
from fedveil.privacy.secagg.store import DirectoryStore


def server_sum(spec: SumSpec, keep: Path | None = None) -> ServerSum:
    """The server's half of ``spec.protocol``; :class:`SecureSumError` if its parameters cannot hold.

    Args:
        keep: a folder in which ``keysum`` keeps the ciphertexts (:mod:`.kept`); None keeps none.
    """
    if spec.protocol in ("plain", "none"):
        return PlainServer(spec)
    if spec.protocol == "keysum":
        return KeysumServer(spec, None if keep is None else KeptCiphertexts(spec, DirectoryStore(keep)))
    return SharedKeyServer(spec)
