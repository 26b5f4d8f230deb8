"""A crash between the two rows of a session's end: nothing is charged after the first, and the second is written."""

from __future__ import annotations

import pytest

from fedveil.client import round as line
from fedveil.common.errors import ProtocolError
from fedveil.privacy.report.charges import compose
from fedveil.privacy.start import start


def test_after_its_last_model_was_noted_a_session_charges_nothing(world) -> None:
    w = world().begin()
    line.contribute(w.sites[0], w.request())
    w.sites[0].ledger.note("model", session=w.session, round=1, model_hash=start(w.plan).hash)
    site = w.reopen(0)  # the crash: session.end was not written
    with pytest.raises(ProtocolError, match="has ended"):
        line.contribute(site, w.request(2))
    assert w.spends() == [1]
    line.finish(site, w.finish())
    found = compose(site.ledger.journal.rows, w.session)
    assert found.end is not None
    assert [row.body["model_hash"] for row in found.models] == [start(w.plan).hash] * 2
    other = world().begin()
    assert line.contribute(other.sites[0], other.request()).header["round"] == 1
