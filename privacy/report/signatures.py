"""Sites' signatures under a finished report: "I verified exactly this one".

The report follows from journals that every site signed already; a countersignature adds that the site has seen the
report itself. They lie in ``signatures.json`` beside it, ``{site: signed statement}``, and may be merged by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedveil.common import canonical, fields, identity
from fedveil.common.errors import FedveilError, VerificationError
from fedveil.common.files import replacing
from fedveil.common.identity import Roster
from fedveil.privacy.report import bundle as bundles

SIGNATURES = "signatures.json"
DOMAIN = "fedveil/report-seen/1"
_LIMIT = 1 << 23
_EARLIER = "0.1"  # the fedveil that wrote reports of the versions before this one


def check(folder: Path, roster: Roster, session: str, document: Any) -> list[str]:
    """The sites whose signatures under ``document`` lie in ``folder``, in the roster's order.

    Raises:
        VerificationError, IdentityError: a signature is a stranger's, does not hold, or is under another report.
    """
    held, known = read(folder), {str(m.site): m.signing_key for m in roster.sites}
    digest = canonical.digest(document) if held else ""
    for site in held:
        if site not in known:
            raise VerificationError(f"{SIGNATURES} holds a signature of {site[:64]!r}, who is not on the roster")
        require(site, known[site], session, digest, held[site])
    return [site for site in known if site in held]


def require(site: str, key: str, session: str, digest: str, signed: Any) -> None:
    """Raise unless ``signed`` is the statement of ``site``, under its ``key``, about the report of that digest.

    Raises:
        VerificationError, IdentityError: it does not hold, or is under another report.
    """
    what = f"the countersignature of {site}"
    if identity.opened(signed, DOMAIN, key, what=what) != statement(site, session, digest):
        raise VerificationError(f"{what} is under another report")


def require_version(found: Any, own: int) -> None:
    """Raise :class:`VerificationError` for a report of another version, and say what verifies it."""
    if found == own:
        return
    if found in (1, 2):
        raise VerificationError(
            f"this is a report of version {found}; fedveil {_EARLIER} verifies it, this fedveil reads version {own}",
            hint=f"install fedveil {_EARLIER} in an environment of its own, and verify it there",
        )
    raise VerificationError(
        f"the report is of a version that this fedveil does not know; it reads version {own}",
        hint="use the version of fedveil that wrote the report: its software bill names it",
    )


def keep(folder: Path, signed: Mapping[str, Any]) -> None:
    """Write statements beside the report in ``folder``, together with those that lie there already."""
    with replacing(folder / SIGNATURES) as part:
        part.write_bytes(canonical.dumps({**read(folder), **signed}) + b"\n")


def statement(site: str, session: str, digest: str) -> dict[str, Any]:
    """What ``site`` signs about the signed report whose canonical JSON has this digest."""
    return {"v": 1, "site": site, "session": session, "report": digest}


def read(folder: Path) -> dict[str, Any]:
    """The signed statements in ``folder``, by site; nothing is checked yet."""
    path = folder / SIGNATURES
    if not path.exists():
        return {}
    try:
        return fields.mapping(canonical.loads(bundles.read_bounded(path, _LIMIT), limit=_LIMIT), SIGNATURES)
    except VerificationError:
        raise
    except FedveilError as e:
        raise VerificationError(f"{SIGNATURES}: {e.message}") from e
