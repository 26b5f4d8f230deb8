"""The builder: a run's folder and the server's key give ``report.json``."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.common import canonical, fields, identity
from fedveil.common.errors import VerificationError
from fedveil.common.files import replacing
from fedveil.privacy import plan as plans
from fedveil.privacy.report import bundle as bundles
from fedveil.privacy.report import software_bill
from fedveil.privacy.report.bundle import JOINS, PLAN, REPORT, Bundle, journal_name
from fedveil.privacy.report.charges import compose
from fedveil.privacy.report.derive import Facts, derive
from fedveil.privacy.report.history import replay
from fedveil.privacy.report.signatures import SIGNATURES

DOMAIN = "fedveil/report/1"


def build_report(run: Path, server_key: Ed25519PrivateKey) -> dict[str, Any]:
    """Derive the report of a finished run from its folder, sign it, write ``report.json`` beside the journals.

    Sites' signatures under an older report are moved to ``signatures.json.old``.

    Args:
        run: the run's folder (plan, roster, joins, journals).
        server_key: the key that the roster names for the server.

    Returns:
        The signed document ``{"payload", "signer", "signature"}``.

    Raises:
        VerificationError: the folder is incomplete or a journal in it does not hold.
        PlanError: the plan is inconsistent.
    """
    facts = open_facts(bundles.read(run))
    if identity.public_hex(server_key) != facts.roster.server.signing_key:
        raise VerificationError(
            "the key is not the one that the roster names for the server", hint="use the server's signing.key"
        )
    payload = {**derive(facts), "software": software_bill.software(), "written_at": int(time.time())}
    document = identity.signed(server_key, DOMAIN, payload)
    if (held := run / SIGNATURES).exists():
        # They are under the report that this one replaces: kept, but no longer beside it.
        os.replace(held, run / f"{SIGNATURES}.old")
    with replacing(run / REPORT) as part:
        part.write_bytes(canonical.dumps(document) + b"\n")
    return document


def open_facts(bundle: Bundle) -> Facts:
    """Everything a payload is derived from, journals verified with the roster's keys."""
    roster = bundles.open_roster(bundle, bundle.pin)
    plan = plans.from_json(bundle.json(PLAN))
    rows = bundle.server_rows(roster)
    history = replay(rows)
    delivered: list[str] = [m.site for m in roster.sites if journal_name(m.site) in bundle.files]
    charges = {s: compose(bundle.site_rows(roster, s), history.session) for s in delivered}
    head = (len(rows), rows[-1].hash) if rows else (0, "0" * 64)
    found = bundle.metrics(), bundle.digests, bundle.roots, bundle.audit(plan)
    documents = fields.mapping(bundle.json(JOINS), JOINS)
    joins = {s: fields.mapping(fields.mapping(d, JOINS).get("payload"), JOINS) for s, d in documents.items()}
    return Facts(plan, roster, history, charges, head, *found, joins)
