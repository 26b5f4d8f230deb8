"""The site's door to the secure sum."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.common.errors import SecureSumError
from fedveil.common.identity import public_hex
from fedveil.common.units import SiteId
from fedveil.privacy.secagg.interface import SiteSum, SumSpec
from fedveil.privacy.secagg.keysum_site import KeysumSite
from fedveil.privacy.secagg.plain import PlainSite
from fedveil.privacy.secagg.sharedkey_site import SharedKeySite
from fedveil.privacy.secagg.store import Store


def site_sum(spec: SumSpec, site: SiteId, key: Ed25519PrivateKey, store: Store) -> SiteSum:
    """The site's half of ``spec.protocol``.

    Args:
        spec: the session.
        site: this site's name on the roster.
        key: its Ed25519 signing key.
        store: where its session's state survives a restart.

    Raises:
        IdentityError: ``site`` is not on the roster.
        SecureSumError: the key is not the roster's, or the parameters of the protocol cannot hold.
    """
    if spec.protocol in ("plain", "none"):
        return PlainSite(spec, site, store)
    if spec.roster.member(site).signing_key != public_hex(key):
        raise SecureSumError(f"the signing key of {site!r} is not the one on the roster")
    if spec.protocol == "keysum":
        return KeysumSite(spec, site, key, store)
    return SharedKeySite(spec, site, key, store)
