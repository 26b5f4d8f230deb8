"""Ciphertexts that a server keeps so that an auditor can add them up again: opt-in, ``[run] keep_ciphertexts``.

Each lies in one file with its sender's signed header, readable by the owner only. The sealed shares of its key are
never kept. So who gets these files reads a contribution only with T helpers' shares of that very round.
"""

from __future__ import annotations

from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.privacy.secagg import fingerprint as fingerprints
from fedveil.privacy.secagg.contributions import from_bytes, to_parts
from fedveil.privacy.secagg.fingerprint import Fingerprint
from fedveil.privacy.secagg.interface import SumSpec
from fedveil.privacy.secagg.store import Store

FOLDER = "ciphertexts"  # of a run's folder


class KeptCiphertexts:
    """The ciphertexts of a session's rounds in ``store``. Those of lost rounds stay too."""

    def __init__(self, spec: SumSpec, store: Store) -> None:
        self._spec, self._store = spec, store

    def keep(self, round: int, site: SiteId, contribution: Packet) -> None:
        """Write the header and the ciphertext of a contribution; the same again does nothing."""
        data = {"ciphertext": contribution.buffers["ciphertext"]}
        self._store.put(name(self._spec, round, site), *to_parts(Packet(contribution.header, data)))

    def fingerprint(self, round: int, site: SiteId, challenge: str) -> Fingerprint | None:
        """The fingerprint of a kept ciphertext; None if it is not there."""
        held = self._store.get(name(self._spec, round, site))
        return None if held is None else fingerprints.of(challenge, from_bytes(held).buffers["ciphertext"])


def name(spec: SumSpec, round: int, site: SiteId) -> str:
    """The file of one site's ciphertext: round, and the site's place on the roster from 1."""
    return f"{round}-{spec.roster.index(site) + 1}"
