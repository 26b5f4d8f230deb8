"""Which examples the property tests try, where public data lies, and which ports are free.

The default suite must give one answer for one commit: its examples are derived from each test's own source. ``make
test-deep`` looks for what they miss: random examples, ``FEDVEIL_EXAMPLES`` times as many.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import is_hypothesis_test, settings

# Small computations in many processes: threads that spin while they wait for each other cost most of a busy machine.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

DATA = Path(os.environ.get("FEDVEIL_DATA") or Path(__file__).parents[2] / "shared" / "data")
FACTOR = int(os.environ.get("FEDVEIL_EXAMPLES", "0"))

# Loaded before any test module is: the settings written there take over what they do not name.
settings.register_profile("same", derandomize=True, print_blob=True, deadline=None)
settings.register_profile("deep", derandomize=False, print_blob=True, deadline=None)
settings.load_profile("deep" if FACTOR else "same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that none is left for the end; skip what lacks its data, by name; ``FACTOR``."""
    items.sort(key=lambda item: not any(folder in item.path.parts for folder in ("e2e", "lab", "hostile")))
    for item in items:
        for name in (n for mark in item.iter_markers("data") for n in mark.args if not (DATA / n).exists()):
            item.add_marker(pytest.mark.skip(reason=f"needs ../shared/data/{name} (or FEDVEIL_DATA)"))
    if not FACTOR:
        return
    for function in {getattr(i, "function", None) for i in items}:
        if function is None or not is_hypothesis_test(function):
            continue
        here = function._hypothesis_internal_use_settings
        function._hypothesis_internal_use_settings = settings(here, max_examples=here.max_examples * FACTOR)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Where public data lies; a test that uses it names its files with the mark ``data``."""
    return DATA


def _free_port() -> int:
    """A TCP port of 127.0.0.1 below those that the system gives away, so that no connection takes it meanwhile."""
    while True:
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port := 12_000 + secrets.randbelow(20_000)))
            except OSError:
                continue
            return port


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Finds free ports."""
    return _free_port


@pytest.fixture(scope="session")
def forge_opening() -> Callable[..., Any]:
    """Makes an opened sum of ``keysum`` out of any values, for whoever has the signing keys of all its members."""
    return _forge_opening


def _forge_opening(
    spec: Any, keys: Any, round: int, values: Any, *, nonce: str = "n", members: Any = None, digests: Any = None
) -> Any:
    """The packet that a server and members who all collude send: every site takes it.

    Args:
        keys: signing keys by site.
        members: names; None for the whole roster.
        digests: of the members' signed contributions; None for made-up ones.
    """
    from fedveil.common.wire import sha256
    from fedveil.privacy.secagg import _seal, lattice, shamir
    from fedveil.privacy.secagg import fingerprint as fingerprints
    from fedveil.privacy.secagg import keysum_common as messages
    from fedveil.privacy.secagg.keysum_opening import Answer, Opening, Vouched
    from fedveil.privacy.secagg.params import N, choose

    p, sites = choose(spec), tuple(members or (m.site for m in spec.roster.sites))
    digests = digests or dict.fromkeys(sites, "a" * 64)
    key = lattice.small(lattice.Stream.fresh(), (N,))
    padded = np.zeros(p.blocks * p.per_coefficient * N, np.int64)
    padded[: spec.length] = values
    x = lattice.encode(padded.reshape(p.blocks, p.per_coefficient, N), p)
    x = lattice.reduce(x + lattice.small(lattice.Stream.fresh(), x.shape))
    public = lattice.PublicPolynomials(spec.session, round, nonce).take(p.blocks)
    total = lattice.to_bytes(lattice.reduce((x - _seal.engine(p.plain_bits).multiply(public, key)).view(np.int64)))
    digest, answers = messages.members_digest(spec, round, digests), dict[Any, Answer]()
    shares = shamir.share(key, spec.threshold, len(spec.all_helpers))
    for site, row in list(zip(spec.all_helpers, shares, strict=True))[: spec.threshold]:
        data = row.astype("<u2").tobytes()
        header = messages.answer_header(spec, round, site, digest, sha256(data))
        answers[site] = Answer(data, messages.sign_header(keys[site], header)["signature"])
    opening = Opening(round, nonce, sha256(total), {}, answers, lattice.to_bytes(x))
    opening.members.update({s: Vouched(d, (0,) * fingerprints.ROWS, "") for s, d in digests.items()})
    challenge, whole = opening.challenge(spec), sites[-1]
    for site in sites:
        found = fingerprints.of(challenge, total) if site == whole else (0,) * fingerprints.ROWS
        header = messages.fingerprint_header(spec, round, site, digest, challenge, found)
        opening.members[site] = Vouched(digests[site], found, messages.sign_header(keys[site], header)["signature"])
    return opening.packet(spec)
