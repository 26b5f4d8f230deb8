"""Persons who must approve a run before it begins at this site. Each has a key of their own.

::

    <state>/requests/<plan hash>/request.json        what was asked for and which ledger pays, written by the site
    <state>/requests/<plan hash>/<approver>.json     one person's signed yes, named by the public key

An approval is for one plan (its hash), one ledger (the hash of its first row) and one run. The first session that is
accepted under it is written into that ledger, with the digests and the persons' keys of all approvals that the request
had. After that these approvals are used up, and the request is removed. In another ledger, even of the same data, they
never count.
Approvers' keys are Ed25519 keys of persons, listed in ``[limits] approvers``. The site's process holds none of them, so
it cannot approve anything itself.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedveil.common import canonical, identity
from fedveil.common.errors import MALFORMED, ConfigError, FedveilError, PolicyRefusal
from fedveil.common.settings import LimitsSection
from fedveil.common.units import SiteId
from fedveil.privacy import plan as plans
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.secagg.interface import is_hex

DOMAIN = "fedveil/approval/1"
VALID_S = 7 * 86400.0
MAX_WAITING = 64
MAX_BYTES = 1 << 22
_REQUEST = "request.json"
_KEYS = {"payload", "signer", "signature"}
_ACCOUNT = "run this under the account that the site runs under, or as root"
_REMOVE = "remove the request's folder, and start the run again"
_LOG = logging.getLogger("fedveil.approval")


@dataclass(frozen=True)
class Waiting:
    """A plan that somebody asked for. ``folder`` holds it and its approvals so far. ``ledger`` would be charged."""

    folder: Path
    plan: PrivacyPlan
    ledger: str
    given: int

    def to_json(self) -> dict[str, Any]:
        """What a person needs to know to decide."""
        p = self.plan
        return {
            "plan_hash": p.hash,
            "ledger": self.ledger,
            "model": p.model.name,
            "model_hash": p.workload_hash,
            "task": p.task,
            "mode": p.mode,
            "sum": p.sum,
            "epsilon": p.epsilon,
            "delta": p.delta,
            "fallback_epsilon": p.fallback,
            "steps": p.steps,
            "sites": p.sites,
            "approvals": self.given,
        }


class Approvals:
    """The site's side: asks for approvals, and finds them.

    Args:
        folder: ``<state>/requests``; made when the first request is written.
        clock: seconds since 1970.
    """

    def __init__(
        self, folder: Path, site: SiteId, limits: LimitsSection, clock: Callable[[], float] = time.time
    ) -> None:
        self._folder, self._site, self._limits, self._clock = folder, site, limits, clock

    def require(self, plan: PrivacyPlan, ledger: str, used: Iterable[str]) -> dict[str, str]:
        """All valid approvals of ``plan``, by their persons' keys: digests, none of them in ``used``.

        Empty if no approval is needed.

        Args:
            ledger: the hash of the first row of the ledger that is charged.

        Raises:
            PolicyRefusal: too few approvals. The request is then in the folder, for ``fedveil client requests``.
        """
        need = self._limits.approvals
        if not need:
            return {}
        spent, own = set(used), self._folder / plan.hash
        found = {a: names[0] for a, names in self._valid(own, plan.hash, ledger) if spent.isdisjoint(names)}
        if len(found) >= need:
            return found  # one run uses up all of them
        self._clear(ledger, spent)
        self._ask(plan, ledger)
        raise PolicyRefusal(
            f"this run needs the approval of {need} persons at this site and has {len(found)}: plan {plan.hash}",
            hint="'fedveil client approve' at the site gives one; then start the run again",
        )

    def remove(self, plan: PrivacyPlan) -> None:
        """Remove the request for a run that has begun. Called when the ledger names the approvals that the run used."""
        if (self._folder / plan.hash).is_dir():
            shutil.rmtree(self._folder / plan.hash)

    def _clear(self, ledger: str, spent: set[str]) -> None:
        """Remove requests that nobody needs: those of another ledger, and those whose approvals are all used up."""
        for own in _named(self._folder):
            try:
                if _read(own)[0] != ledger:
                    shutil.rmtree(own)
                    continue
            except FedveilError:  # not written by this class, or altered: it stays for the owner to look at
                continue
            given = [p for p in own.iterdir() if is_hex(p.stem, 64)]
            used = [p for p in given if _is_spent(p, spent)]
            for path in used:
                path.unlink()
            if used and len(used) == len(given):
                shutil.rmtree(own)

    def _ask(self, plan: PrivacyPlan, ledger: str) -> None:
        """Keep the plan for a person to read. The number is limited, because whoever asks is not trusted."""
        own = self._folder / plan.hash
        if own.exists():
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if sum(1 for _ in self._folder.iterdir()) >= MAX_WAITING:
            raise PolicyRefusal(
                f"{MAX_WAITING} runs wait for an approval at this site",
                hint="its owner approves or rejects some first: 'fedveil client requests' lists them",
            )
        part = self._folder / f".{secrets.token_hex(8)}"
        part.mkdir(mode=0o700)
        document = {"v": 1, "site": self._site, "ledger": ledger, "plan": plan.to_json()}
        (part / _REQUEST).write_bytes(canonical.dumps(document))
        part.rename(own)

    def _valid(self, own: Path, plan_hash: str, ledger: str) -> Iterator[tuple[str, tuple[str, str]]]:
        """(approver, digests) of every approval that is valid now. Other files are skipped."""
        for public in dict.fromkeys(self._limits.approvers):
            try:
                document = _document(own / f"{public}.json")
                said = identity.opened(document, DOMAIN, public, what="an approval")
                wanted = {"site": self._site, "plan_hash": plan_hash, "ledger": ledger}
                ok = isinstance(said, dict) and all(said.get(k) == v for k, v in wanted.items())
                if ok and float(said["at"]) - 600 <= self._clock() < float(said["until"]):
                    yield public, _digests(document)
                else:
                    _LOG.warning("an approval by %s... is for another run or ledger, or has expired", public[:16])
            except FileNotFoundError:
                continue
            except OSError as e:
                _LOG.warning("an approval by %s... cannot be read: %s", public[:16], e.strerror)
            except (*MALFORMED, FedveilError):
                _LOG.warning("an approval by %s... is malformed, or its signature does not hold", public[:16])


def waiting(folder: Path) -> list[Waiting]:
    """Every request in a site's folder, in the order of their names; one that cannot be read is logged."""
    out: list[Waiting] = []
    for own in _named(folder):
        try:
            out.append(_waiting(own))
        except ConfigError as e:
            _LOG.warning("passed over: %s; %s", e.message, e.hint)
    return out


def find(folder: Path, run: str) -> Waiting:
    """The one request whose plan hash begins with ``run`` (8 digits or more).

    Raises:
        ConfigError: there is none, or more than one; or it cannot be read.
    """
    found = [own for own in _named(folder) if len(run) >= 8 and own.name.startswith(run)]
    if len(found) != 1:
        raise ConfigError(
            f"{len(found)} waiting runs begin with {run[:64]!r}",
            hint="'fedveil client requests' lists them; give at least 8 digits of the plan's hash",
        )
    return _waiting(found[0])


def approve(
    wanted: Waiting, site: SiteId, limits: LimitsSection, key: Ed25519PrivateKey, clock: Callable[[], float] = time.time
) -> Path:
    """Sign an approval of one run, valid for seven days. A later one of the same person replaces it.

    The file gets the owner of the request's folder, so that the site can read it even if root wrote it.

    Raises:
        ConfigError: the key is not one of the site's approvers; the file cannot be written.
    """
    public = identity.public_hex(key)
    if public not in limits.approvers:
        raise ConfigError(
            "this key is not among [limits] approvers of site.toml", hint=f"the site's owner adds {public} there"
        )
    if wanted.folder.name != wanted.plan.hash:
        raise ConfigError(f"{wanted.folder} holds another plan than its name says: it was altered", hint=_REMOVE)
    now = int(clock())
    said = {
        "v": 1, "site": site, "plan_hash": wanted.plan.hash, "ledger": wanted.ledger,
        "at": now, "until": now + int(VALID_S), "nonce": secrets.token_hex(16),
    }  # fmt: skip
    path = wanted.folder / f"{public}.json"
    part = wanted.folder / f".{public}.{secrets.token_hex(8)}"
    try:
        # A new file, so that no link is followed: the folder is the site's, and root may be the one who writes.
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as f:
            f.write(canonical.dumps(identity.signed(key, DOMAIN, said)))
            owner = wanted.folder.stat()
            if os.geteuid() != owner.st_uid:
                os.fchown(f.fileno(), owner.st_uid, owner.st_gid)
        part.replace(path)
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e.strerror}", hint=_ACCOUNT) from e
    finally:
        part.unlink(missing_ok=True)
    return path


def reject(wanted: Waiting) -> None:
    """Remove a request and its approvals."""
    try:
        shutil.rmtree(wanted.folder)
    except OSError as e:
        raise ConfigError(f"{wanted.folder} cannot be removed: {e.strerror}", hint=_ACCOUNT) from e


def _named(folder: Path) -> list[Path]:
    """The folders of single requests, in the order of their names.

    Raises:
        ConfigError: the folder cannot be read.
    """
    try:
        return sorted(p for p in folder.iterdir() if is_hex(p.name, 64))
    except FileNotFoundError:
        return []
    except OSError as e:
        raise ConfigError(f"{folder} cannot be read: {e.strerror}", hint=_ACCOUNT) from e


def _waiting(own: Path) -> Waiting:
    ledger, plan = _read(own)
    return Waiting(own, plan, ledger, sum(1 for p in own.iterdir() if is_hex(p.stem, 64)))


def _read(own: Path) -> tuple[str, PrivacyPlan]:
    """The ledger and the plan of one request.

    Raises:
        ConfigError: it cannot be read, or has a form that this version does not write.
    """
    try:
        with (own / _REQUEST).open("rb") as f:
            document = canonical.loads(f.read(MAX_BYTES + 1), limit=MAX_BYTES)
        ledger, plan = document["ledger"], plans.from_json(document["plan"])
    except FileNotFoundError as e:
        raise ConfigError(f"{own} holds no request of this version", hint=_REMOVE) from e
    except OSError as e:
        raise ConfigError(f"{own} cannot be read: {e.strerror}", hint=_ACCOUNT) from e
    except (*MALFORMED, FedveilError) as e:
        raise ConfigError(f"{own / _REQUEST} is not a request of this version", hint=_REMOVE) from e
    if not is_hex(ledger, 64):
        raise ConfigError(f"{own / _REQUEST} names no ledger", hint=_REMOVE)
    return ledger, plan


def _document(path: Path) -> dict[str, Any]:
    """An approval's file. It has only one form: nothing in it is unsigned, and the signature is in lower case.

    Raises:
        PolicyRefusal, WireError: it has another form.
        OSError
    """
    with path.open("rb") as f:
        document = canonical.loads(f.read(MAX_BYTES + 1), limit=MAX_BYTES)
    signature = document.get("signature") if isinstance(document, dict) else None
    if not isinstance(signature, str) or not is_hex(signature, 128) or set(document) != _KEYS:
        raise PolicyRefusal("an approval has other fields than payload, signer and signature")
    return document


def _digests(document: dict[str, Any]) -> tuple[str, str]:
    """How a ledger names an approval: by the digest of what is signed or, in older rows, of the whole file."""
    return canonical.digest(document["payload"]), canonical.digest(document)


def _is_spent(path: Path, spent: set[str]) -> bool:
    """Whether the ledger names the approval in this file. False if the file holds no approval."""
    try:
        return not spent.isdisjoint(_digests(_document(path)))
    except (OSError, FedveilError):
        return False
