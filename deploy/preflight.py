"""``fedveil client check``: everything that can stop a site, looked at before a run, each with its remedy.

Nothing is sent but a TLS handshake with the server; nothing is charged; the site's ledger is read and not written.
Words about data name the check that failed and the report that says more, never a count.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedveil.client import policy
from fedveil.client.records.release.pipeline import QUALITY_HTML, RELEASED
from fedveil.client.train import pick_device
from fedveil.common import contract as contracts
from fedveil.common import identity
from fedveil.common.contract import DataContract
from fedveil.common.errors import (
    AnonymityError,
    BudgetExhausted,
    ConfigError,
    ContractError,
    DataError,
    FedveilError,
    IdentityError,
    JournalError,
    StoreError,
    TransportError,
    VerificationError,
)
from fedveil.common.identity import Roster
from fedveil.common.journal import Row, parse, verify_rows, without_torn_end
from fedveil.common.settings import SiteSettings, endpoint
from fedveil.common.units import site_id
from fedveil.deploy.enrol.join import due
from fedveil.deploy.enrol.provision import load_roster, load_tls
from fedveil.deploy.enrol.revoked import Revoked
from fedveil.deploy.ledger_file import tally_of
from fedveil.deploy.site_process import LEDGER, ingested, subject_salt, unit_of
from fedveil.deploy.transport.handshake import trusted
from fedveil.privacy.joining import data_set
from fedveil.privacy.report.bundle import read_bounded

MIN_FREE_BYTES = 1 << 30
_TIMEOUT_S = 5.0
_LIKELY_S = 60.0
_LEDGER_BYTES = 1 << 28
_WORK = "check"
# What to do where an error names no remedy of its own, by check.
_REMEDIES = {
    "certificate": "install the consortium's answer again: fedveil client join KEYS --reply reply.json",
    "roster": "correct [site] id, or take the latest roster: fedveil client join KEYS --roster roster.json",
    "contract": "correct [site] contract; take the signed file, and consortium.pub, as the consortium sent them",
}
_ELSEWHERE = "see docs/institution.md"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        ok: None for a check that was left out.
        exit_code: of the error that would stop the site; 0 if nothing does.
    """

    check: str
    ok: bool | None
    message: str
    remedy: str = ""
    exit_code: int = 0

    def to_json(self) -> dict[str, Any]:
        """The finding, for programs."""
        return {"check": self.check, "ok": self.ok, "message": self.message, "remedy": self.remedy}


class Preflight:
    """The checks of one site, in the order in which they would stop it.

    Args:
        settings: ``site.toml``.
        gpu: a GPU is needed.
        offline: leave out what needs the network.
    """

    def __init__(self, settings: SiteSettings, *, gpu: bool = False, offline: bool = False) -> None:
        self._all, self._site = settings, settings.site
        self._gpu = gpu or settings.training.device == "cuda"
        self._offline = offline
        self._free = True

    def run(self) -> list[Finding]:
        """All checks; one that fails does not keep the others from being made."""
        network = "" if not self._offline else "left out: --offline"
        return [
            self._made("certificate", self.certificate),
            self._made("roster", self.roster),
            self._made("clock", self.clock),
            self._made("dns", self.dns, network),
            self._made("port", self.port, network),
            self._made("tls", self.tls, network),
            self._made("contract", self.contract),
            self._made("disk", self.disk),
            self._made("ledger", self.ledger),
            self._made("data", self.data, "" if self._free else "left out: the site is running"),
            self._made("gpu", self.gpu, "" if self._gpu else "left out: ask with --gpu"),
        ]

    def _made(self, name: str, check: Callable[[], str], left_out: str = "") -> Finding:
        if left_out:
            return Finding(name, None, left_out)
        try:
            return Finding(name, True, check())
        except FedveilError as e:
            return Finding(name, False, e.message, e.hint or _REMEDIES.get(name, _ELSEWHERE), e.exit_code)
        except OSError as e:
            path = "a file" if e.filename is None else os.fsdecode(e.filename)
            remedy = "check the path and its permissions"
            return Finding(name, False, f"{path}: {e.strerror}", remedy, StoreError.exit_code)
        except Exception as e:
            return Finding(name, False, f"{type(e).__name__}", "report this as a fault of the program", 1)

    # --- who we are -----------------------------------------------------------------------------------------

    def certificate(self) -> str:
        """It is from this authority, for this key, and holds now."""
        load_tls(self._site.identity)
        days, soon = due(self._site.identity)
        if soon:
            return f"holds for {days:.1f} more days: renew it now (fedveil client renew {self._site.identity})"
        return f"holds for {days:.0f} more days"

    def roster(self) -> str:
        """This site is on it, with the keys of its folder, and nobody on it was revoked."""
        member = self._roster.member(site_id(self._site.id))
        key = identity.load_signing_key(self._site.identity / "signing.key")
        if member.signing_key != identity.public_hex(key):
            raise IdentityError(
                "the roster names another signing key for this site", hint="correct [site] id or identity"
            )
        if member.tls_key != identity.spki_sha256((self._site.identity / "tls.pem").read_bytes()):
            raise IdentityError(
                "the roster names another TLS key for this site", hint="take the latest roster: client join --roster"
            )
        listed = Revoked(self._site.identity, self._site.state, keeps=False)()
        try:
            for member in (self._roster.server, *self._roster.sites):
                listed.refuse(member.site, member.tls_key)
        except IdentityError as e:
            raise IdentityError(
                e.message, hint="no run begins with it: ask the consortium for a roster without it"
            ) from e
        return f"version {self._roster.version}, {len(self._roster.sites)} sites"

    def clock(self) -> str:
        """The clock is not years behind, nor behind the last row of the ledger."""
        now = time.time()
        if now < datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC).timestamp():
            raise ConfigError("the clock is years behind", hint="set it: systemctl start systemd-timesyncd, or chrony")
        rows: list[Row] = []
        with suppress(FedveilError):  # the ledger check says what is wrong with a ledger
            rows = self._rows()[0]
        if rows and rows[-1].at > now + _LIKELY_S:
            raise ConfigError(
                "the clock is behind the last row of the ledger", hint="set it: chrony or systemd-timesyncd"
            )
        return "not behind the site's own records"

    # --- the way to the server ------------------------------------------------------------------------------

    def dns(self) -> str:
        """The server's name has an address."""
        host, port = self._address
        try:
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as e:
            raise TransportError(
                f"the name {host!r} has no address", hint="check [site] server and this machine's DNS"
            ) from e
        return f"{host} has an address"

    def port(self) -> str:
        """Something listens on the server's port."""
        host, port = self._address
        try:
            socket.create_connection((host, port), timeout=_TIMEOUT_S).close()
        except OSError as e:
            raise TransportError(
                f"nothing answers at {host}:{port}",
                hint=f"start the server, and allow outbound TCP to port {port}; --offline leaves this check out",
            ) from e
        return f"{host}:{port} answers"

    def tls(self) -> str:
        """The server proves that it is the one of the roster, in TLS 1.3."""
        try:
            trusted(self._all.site.server, load_tls(self._site.identity), self._roster.server.tls_key)
        except (OSError, ValueError) as e:
            raise TransportError(
                "the TLS 1.3 handshake failed", hint="a proxy may be in between: it has to pass TLS through"
            ) from e
        return "TLS 1.3 with the server of the roster"

    # --- what we bring --------------------------------------------------------------------------------------

    def contract(self) -> str:
        """Signed, in force, and not below the site's floor."""
        found = self._contract
        policy.check_contract(found, self._all.limits)
        return f"{found.name} {found.version}: k = {found.k}, l = {found.l}"

    def disk(self) -> str:
        """The state folder, or where it will be, can be written and has room."""
        folder = self._site.state
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise ConfigError(f"{folder} is a file and not a folder", hint="correct [site] state")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"{folder} cannot be written", hint="run this as the site's user, or correct [site] state"
            )
        if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
            raise ConfigError(f"less than 1 GiB is free at {folder}", hint="free space, or move [site] state")
        return "room for the state folder"

    def ledger(self) -> str:
        """The ledger verifies, no process holds it, and there is budget left. It is only read."""
        path, limits = self._ledger_path, self._all.limits
        if not path.exists() or not path.stat().st_size:
            return "will be made by the first run"
        self._free = _unlocked(path)
        if not self._free:
            raise JournalError(
                "the ledger is in use by another process", hint="the site is running already: stop it first"
            )
        key = identity.load_signing_key(self._site.identity / "signing.key")
        rows, torn = self._rows(identity.public_hex(key))
        if not rows:
            return "will be made by the first run; what a power cut left of its first row is dropped then"
        tally = tally_of(rows)
        if not (tally.lineage.isprintable() and tally.version.isprintable()):
            raise JournalError(
                "the ledger's lineage or version has a character that cannot be printed, so it cannot leave this site",
                hint="open a new ledger under another name; 'fedveil ledger import' counts what this one has spent",
            )
        if tally.lineage != self._site.lineage:
            raise JournalError("the ledger is another data set's", hint="correct [site] lineage or state")
        if tally.unit != (unit := unit_of(limits, self._contract)):
            raise JournalError(
                f"the ledger counts each {tally.unit[:32]!r}, but [limits] modes needs one for each {unit!r}",
                hint="use another [site] lineage and state for it",
            )
        if tally.data_set not in ("", data_set(self._contract.name, unit)):
            raise JournalError(
                "the ledger counts another data set than the one that the contract names",
                hint="a ledger of its own for each: another [site] lineage and state",
            )
        if tally.closed:
            raise JournalError(
                f"the ledger was closed: ledger {tally.closed[:16]}... counts it", hint="go on with that ledger"
            )
        if tally.epsilon >= limits.max_epsilon:
            raise BudgetExhausted(
                f"the budget of epsilon = {limits.max_epsilon:g} is spent", hint="a normal ending: no further runs"
            )
        spent = f"epsilon {tally.epsilon:.3f} of {limits.max_epsilon:g} is spent"
        return spent + ("; a last row was cut off while it was written: the next start drops it" if torn else "")

    def data(self) -> str:
        """The whole ingestion, in a private folder; what was released there is removed again."""
        work = self._site.state / _WORK
        key = identity.load_signing_key(self._site.identity / "signing.key")
        self._site.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._all.data.url_file is None and not self._site.data.exists():
            raise DataError(f"there is no file {self._site.data}", hint="correct [site] data")
        page = work / QUALITY_HTML
        page.unlink(missing_ok=True)  # from an earlier check
        try:
            ingested(self._all, self._contract, key, subject_salt(self._site.state, make=False), work)
        except AnonymityError as e:
            raise AnonymityError(
                "k or l of the contract is not met",
                hint=f"see {page} on this machine; coarser levels or more rows are needed",
            ) from e
        except DataError as e:
            raise DataError(
                "the table does not meet the contract",
                hint="run 'fedveil data check'" + (f", or see {page} on this machine" if page.exists() else ""),
            ) from e
        finally:
            (work / RELEASED).unlink(missing_ok=True)
        return "the table meets the contract, k and l included"

    def gpu(self) -> str:
        """CUDA computes, and the owner's share of its memory is free."""
        import torch

        if pick_device("cuda") != "cuda":
            raise ConfigError("no CUDA device is usable", hint="check nvidia-smi, the driver, and torch's CUDA build")
        try:
            free, total = torch.cuda.mem_get_info()
            one = torch.ones(64, 64, device="cuda")
            wrong = float((one @ one).sum()) != 64.0**3
        except RuntimeError as e:
            raise ConfigError("CUDA fails to compute", hint="check nvidia-smi for other processes and errors") from e
        share = self._all.training.gpu_memory
        if wrong or free < share * total / 2:
            raise ConfigError(
                "less than half of this site's share of the GPU's memory is free", hint="stop other jobs on it"
            )
        return f"{torch.cuda.get_device_name()}: share {share:.0%} of {total / 2**30:.0f} GiB"

    @cached_property
    def _roster(self) -> Roster:
        return load_roster(self._site.identity)

    @cached_property
    def _contract(self) -> DataContract:
        try:
            pin = (self._site.identity / "consortium.pub").read_text(encoding="ascii").strip()
        except (OSError, ValueError) as e:
            raise IdentityError("no consortium key is pinned", hint="enrol first: fedveil client join") from e
        if not self._site.contract.is_file():
            raise ContractError(f"there is no file {self._site.contract}", hint=_REMEDIES["contract"])
        return contracts.load_signed(self._site.contract, pin)

    @property
    def _ledger_path(self) -> Path:
        return self._site.state / LEDGER

    def _rows(self, public: str | None = None) -> tuple[list[Row], bool]:
        """The ledger's complete rows, as a start finds them, and whether a power cut left part of one more after them.

        Raises:
            VerificationError: with ``public`` also for a chain or a signature that does not hold.
        """
        path = self._ledger_path
        data = read_bounded(path, _LEDGER_BYTES) if path.exists() else b""
        try:
            whole = without_torn_end(data)
            rows = parse(whole)
            if rows and public is not None:
                verify_rows(rows, public, owner=self._site.id)
        except FedveilError as e:
            raise VerificationError(f"the ledger: {e.message}", hint="keep the file as evidence; do not edit it") from e
        return rows, len(whole) < len(data)

    @property
    def _address(self) -> tuple[str, int]:
        return endpoint(self._site.server)


def _unlocked(path: Path) -> bool:
    """Whether no process holds a ledger; the lock is tried and given back at once."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
