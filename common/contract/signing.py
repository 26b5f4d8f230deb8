"""A contract's signature: by the consortium, over its canonical form and hash."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.common import canonical, identity
from fedveil.common.contract.agreement import DataContract, read_bounded
from fedveil.common.errors import ContractError, IdentityError, WireError

DOMAIN = "fedveil/contract/1"
VERSION = 2  # of the contract's fields


def sign_contract(contract: DataContract, key: Ed25519PrivateKey) -> dict[str, Any]:
    """The signed document ``{"payload": {"v", "contract", "hash"}, "signer", "signature"}``."""
    return identity.signed(key, DOMAIN, {"v": VERSION, "contract": contract.payload, "hash": contract.hash})


def open_contract(document: Any, pinned_public: str, *, today: dt.date | None = None) -> DataContract:
    """The contract in a signed document, once its signature by ``pinned_public`` (64 hex digits) and its hash hold.

    Args:
        today: the day on which it must not have expired; by default today in UTC.

    Raises:
        ContractError: unsigned, signed by another key, altered, of another version, inconsistent or expired.
    """
    try:
        payload = identity.opened(document, DOMAIN, pinned_public, what="the data contract")
    except (IdentityError, WireError) as e:
        raise ContractError(e.message, hint="take the contract from the consortium again; do not edit it") from e
    if not isinstance(payload, dict) or set(payload) != {"v", "contract", "hash"} or payload["v"] != VERSION:
        raise ContractError(
            "the signed data contract has a form that this version of fedveil does not use",
            hint="use the same version of fedveil, or sign the draft again",
        )
    contract = DataContract.model_validate(payload["contract"])
    if contract.hash != payload["hash"]:
        raise ContractError("the data contract's hash differs from the signed one", hint="sign the contract again")
    contract.require_current(today)
    return contract


def load_signed(path: Path, pinned_public: str, *, today: dt.date | None = None) -> DataContract:
    """Read a signed JSON document and :func:`open_contract` it."""
    try:
        document = canonical.loads(read_bounded(path))
    except WireError as e:
        raise ContractError(f"{path} is not a signed contract", hint="sign it with 'fedveil data contract sign'") from e
    return open_contract(document, pinned_public, today=today)
