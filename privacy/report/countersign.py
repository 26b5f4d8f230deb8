"""A site's own signature under a finished report, made only after it verified everything itself."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.common import canonical, identity
from fedveil.common.errors import IdentityError
from fedveil.privacy.report import bundle as bundles
from fedveil.privacy.report.signatures import DOMAIN, SIGNATURES, read, statement
from fedveil.privacy.report.verify import verify_report


def countersign(report: Path, key: Ed25519PrivateKey, consortium_key: str | None) -> str:
    """Verify ``report`` and add the signature of the site whose key this is; returns the site's name.

    Raises:
        VerificationError: a check failed, so that nothing is signed.
        IdentityError: the key belongs to no site on the roster.
    """
    verify_report(report, consortium_key=consortium_key).raise_for_failure()
    bundle = bundles.read(report.parent)
    roster = bundles.open_roster(bundle, consortium_key or bundle.pin)
    site = next((m.site for m in roster.sites if m.signing_key == identity.public_hex(key)), None)
    if site is None:
        raise IdentityError("the key belongs to no site on the roster", hint="use the site's own signing.key")
    document = canonical.loads(report.read_bytes())
    held = read(report.parent)
    held[site] = identity.signed(key, DOMAIN, statement(site, document["payload"]["session"], document))
    partial = report.with_name(f".{SIGNATURES}.part")
    partial.write_bytes(canonical.dumps(held) + b"\n")
    os.replace(partial, report.with_name(SIGNATURES))
    return site
