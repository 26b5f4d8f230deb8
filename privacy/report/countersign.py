"""A site's own signature under a finished report, made only after it verified everything itself.

The report and the files beside it are read once, so exactly what was verified is signed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.common import canonical, identity
from fedveil.common.errors import IdentityError, VerificationError
from fedveil.common.identity import Roster
from fedveil.common.journal import parse
from fedveil.privacy.report import signatures
from fedveil.privacy.report.bundle import Bundle, journal_name
from fedveil.privacy.report.verify import examined


@dataclass(frozen=True)
class Seen:
    """A report that passed every check, as it was when it was checked.

    Attributes:
        document: the signed report ``{"payload", "signer", "signature"}``.
        roster: the run's, signed by the consortium.
        bundle: the files beside the report.
    """

    document: Any
    roster: Roster
    bundle: Bundle

    @property
    def session(self) -> str:
        """The session that the report is about."""
        return self.document["payload"]["session"]

    @cached_property
    def owners(self) -> dict[str, str]:
        """Whose each signing key (hex) is."""
        return {m.signing_key: m.site for m in self.roster.sites}

    @cached_property
    def digest(self) -> str:
        """What is signed of the report."""
        return canonical.digest(self.document)


def see(report: Path, consortium_key: str | None) -> Seen:
    """Verify ``report`` with the files beside it.

    Raises:
        VerificationError: a check failed.
    """
    verification, audit = examined(report, consortium_key=consortium_key)
    verification.raise_for_failure()
    return Seen(*audit.established)


def sign(seen: Seen, key: Ed25519PrivateKey, ledger: bytes | None = None) -> tuple[str, dict[str, Any]]:
    """The site whose key this is, and its signed statement that it has seen exactly this report.

    Args:
        ledger: the lines of the site's own ledger; they must begin with those that the report was made from, and hold
            nothing more about the report's session.

    Raises:
        IdentityError: the key belongs to no site on the roster.
        VerificationError: the report was made without this site's ledger, from another one or from a part of it.
    """
    site = seen.owners.get(identity.public_hex(key))
    if site is None:
        raise IdentityError("the key belongs to no site on the roster", hint="use the site's own signing.key")
    if ledger is not None:
        shown = seen.bundle.files.get(journal_name(site))
        if shown is None:
            raise VerificationError(f"the report was made without the ledger of {site}: it says nothing of this site")
        if not ledger.startswith(shown):
            raise VerificationError(
                f"the report was made from a ledger of {site} that is not this site's",
                hint="keep both as evidence; 'fedveil audit compare' names the row",
            )
        # A cut ledger is still a true beginning of the whole: so the report must hold all that this session charged.
        if any(r.kind != "refused" and r.body.get("session") == seen.session for r in parse(ledger[len(shown) :])):
            raise VerificationError(f"the report leaves out what the ledger of {site} says of this run later on")
    return site, identity.signed(key, signatures.DOMAIN, signatures.statement(site, seen.session, seen.digest))


def countersign(report: Path, key: Ed25519PrivateKey, consortium_key: str | None, ledger: bytes | None = None) -> str:
    """Verify ``report`` and add the signature of the site whose key this is; returns the site's name.

    Raises:
        VerificationError, IdentityError: see :func:`see` and :func:`sign`; nothing is signed.
    """
    site, statement = sign(see(report, consortium_key), key, ledger)
    signatures.keep(report.parent, {site: statement})
    return site
