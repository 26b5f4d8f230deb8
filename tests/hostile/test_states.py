"""One model for all: a server that gives one site another model than the rest, or moves the model by any sum it likes.

The first attack is that of a server which reads one site's labels through the sum. Everybody but the victim computes
from weights under which only an output's bias moves. So what moves the other weights of the opened sum is the victim's
alone.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedveil.client.app import make_app as client_app
from fedveil.client.session import Site
from fedveil.common.errors import HelperRefusal, StateMismatch, UnverifiedOpening
from fedveil.common.units import SiteId
from fedveil.common.wire import Packet
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy.lab import virtual_sites
from fedveil.deploy.transport.inprocess import run_inprocess
from fedveil.privacy import norm_cap
from fedveil.privacy.joining import sum_spec
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.plan import Optimizer, PrivacyPlan, make_plan
from fedveil.privacy.secagg import keysum_site, lattice, opened_sum, verification
from fedveil.privacy.secagg.keysum_opening import Opening
from fedveil.privacy.secagg.keysum_server import KeysumServer
from fedveil.privacy.secagg.keysum_site import KeysumSite
from fedveil.privacy.secagg.params import Q, choose
from fedveil.server import job as jobs
from fedveil.server.app import make_app as server_app
from fedveil.server.opened_sums import OpenedSums

VICTIM, HIDDEN, LABELS = 2, 4, [9, 1]


class Run:
    """Four sites and a server in one process; the server may lie."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        values: dict[str, Any] = {
            "sites": 4, "records": 40, "epsilon": 60.0, "steps": 4, "clip": 1.0, "contract_hash": "c" * 64,
            "model": ModelSpec(name="mlp", inputs=3, classes=2, hidden=(HIDDEN,), seed=3),
            "optimizer": Optimizer(learning_rate=50.0, momentum=0.0),
        }  # fmt: skip
        self.plan: PrivacyPlan = make_plan(**{**values, **changes})
        self.folder, self.world = folder, virtual_sites.World.make(4)
        self.job = jobs.create(
            folder, self.plan, self.world.roster, self.world.server, documents=self.world.documents(), durable=False
        )
        kept = virtual_sites.Kept(self.site)
        self.resolve, self.sites = kept.resolve, kept.sites

    def site(self, index: int) -> Site:
        rng = np.random.default_rng(index)
        X = rng.standard_normal((10, 3)).astype(np.float32)
        y = np.repeat([0, 1], LABELS if index == VICTIM else [5, 5])
        return virtual_sites.make_site(
            self.world.roster, index, self.world.keys[index], self.plan, X, y, self.folder, cap=900.0, engine="closed"
        )

    def go(self) -> str:
        server, strategy = server_app(self.job)
        run_inprocess(server, client_app(self.resolve), self.world.sites, lambda _: {})
        return strategy.status

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return [r.body for r in self.job.journal.of_kind(kind)]

    def leading_to(self, state: ModelState, weights: np.ndarray, round_: int) -> tuple[Packet, ModelState]:
        """A sum that moves ``state`` to ``weights``, as near as the grid allows, and where it ends."""
        wanted = (state.weights - weights) * self.plan.divisor / self.plan.optimizer.learning_rate
        values = np.rint(wanted / self.plan.grid).astype(np.int64)
        spec = sum_spec(self.plan, self.job.session, self.world.roster)
        return opened_sum.pack(spec, round_, self.world.sites, values), state.after(self.plan, values)


def trap(hidden_bias: float) -> np.ndarray:
    """Weights of the network: all zero but the hidden layer's biases."""
    w = np.zeros(HIDDEN * 3 + HIDDEN + 2 * HIDDEN + 2)
    w[HIDDEN * 3 : HIDDEN * 4] = hidden_bias
    return w


def two_models(r: Run, monkeypatch: pytest.MonkeyPatch, *, compared: bool = True) -> dict[int, np.ndarray]:
    """The server sends the victim another first sum than the others; by round, what it opens from then on.

    No site verifies a sum: what stops the attack here is that the members' states are compared.
    """
    monkeypatch.setattr(KeysumSite, "opened", unverified)
    victim, read = r.world.sites[VICTIM], dict[int, np.ndarray]()
    honest, add, result = OpenedSums.packets, KeysumServer.add, KeysumServer.result
    start = r.job.state

    def packets(self: OpenedSums, sites: Iterable[SiteId], header: dict[str, Any], buffers: Any = None) -> Any:
        out = honest(self, sites, header, buffers)
        if header["kind"] != "contribute" or header["round"] == 1:
            return out
        for site in out:
            brought, after = r.leading_to(start, trap(20.0 if site == victim else 0.0), 1)
            out[site] = opened_sum.with_sums({**header, "state": after.digest}, buffers or {}, [brought])
        return out

    def takes_any(self: KeysumServer, site: SiteId, packet: Packet) -> None:
        self._state = packet.header["state"] if compared else ""
        add(self, site, packet)

    def opens(self: KeysumServer) -> Any:
        values, members = result(self)
        if self._round != 1:
            read[self._round or 0] = values * r.plan.grid
        return values, members

    monkeypatch.setattr(OpenedSums, "packets", packets)
    monkeypatch.setattr(KeysumServer, "add", takes_any)
    monkeypatch.setattr(KeysumServer, "result", opens)
    return read


def unverified(self: KeysumSite, packet: Packet) -> Any:
    return opened_sum.unpack(self._spec, packet)


def test_no_sum_is_opened_whose_members_were_given_two_models(tmp_path, monkeypatch):
    r = Run(tmp_path / "run")
    read = two_models(r, monkeypatch)
    assert r.go() == "ABORTED"
    assert read == {}
    assert [b["round"] for b in r.rows("round.applied")] == [1]
    refused = [b for b in r.rows("site.refused") if b.get("round") == 2]
    assert {b["code"] for b in refused} == {"HelperRefusal"}
    assert len(refused) == 4
    # What the victim computed from is in its signed ledger, where everybody can see that it differs.
    named = [[row.body["state"] for row in s.ledger.journal.of_kind("spend")] for s in r.sites]
    assert named[0][0] == named[VICTIM][0]
    assert named[0][1] != named[VICTIM][1]
    assert named[0] == named[1] == named[3]


def test_where_sites_do_not_compare_states_the_victims_labels_are_read(tmp_path, monkeypatch):
    """The negative control."""
    r = Run(tmp_path / "run")
    read = two_models(r, monkeypatch, compared=False)
    honest = keysum_site.messages.check_contribution

    def of_no_state(*args: Any) -> Any:
        return keysum_site.messages.Contribution(**{**vars(honest(*args)), "state": ""})

    monkeypatch.setattr(keysum_site.messages, "check_contribution", of_no_state)
    monkeypatch.setattr(keysum_site.Contributions, "said", lambda self, n: (_digest(self, n), ""))
    r.go()
    assert len(read) == 3
    seen = np.mean(list(read.values()), 0)[HIDDEN * 4 : HIDDEN * 6].reshape(2, HIDDEN).mean(1)
    # p - e_y in both outputs, with p = 1/2, clipped to 1: its length is sqrt(1/2 · (HIDDEN + 1)) before.
    counts = sum(LABELS) / 2 - seen * np.sqrt(0.5 * (HIDDEN + 1))
    assert np.abs(counts - LABELS).max() < 1.5


def _digest(self: Any, round_: int) -> str:
    packet = self.replay(round_)
    return "" if packet is None else keysum_site.canonical.digest(packet.header)


class TestNormCap:
    def too_long(self, r: Run) -> np.ndarray:
        D = r.plan.model.parameters
        values = np.full(D, norm_cap.cap(r.plan, 4) // int(np.sqrt(D)) + 2)
        assert values.max() <= r.plan.bound
        return values

    def test_the_server_applies_no_such_sum_and_the_round_stays_charged(self, tmp_path, monkeypatch):
        r = Run(tmp_path / "run", steps=3)
        values, result = self.too_long(r), KeysumServer.result
        monkeypatch.setattr(KeysumServer, "result", lambda self: (values, result(self)[1]))
        assert r.go() == "ABORTED"
        assert all("longer than" in b["reason"] for b in r.rows("round.aborted"))
        assert len(r.rows("round.aborted")) == 3
        assert r.rows("run.end")[0]["model_hash"] == r.rows("run.open")[0]["model_hash"]
        assert all(len(s.ledger.tally.by_round) == 3 for s in r.sites)
        monkeypatch.setattr(norm_cap, "cap", lambda *_: 1 << 40)  # negative control
        again = Run(tmp_path / "again", steps=3)
        assert again.go() == "COMPLETED"

    def test_sites_take_no_such_sum_from_a_server_that_does(self, tmp_path, monkeypatch):
        r = Run(tmp_path / "run", steps=4)
        monkeypatch.setattr(norm_cap, "cap", lambda *_: 1)  # so that the members' own sum is too long
        monkeypatch.setattr("fedveil.server.rounds.norm_cap.check", _only_at_sites(norm_cap.check))
        assert r.go() == "ABORTED"
        assert {b["code"] for b in r.rows("site.refused") if "round" in b} == {"SumTooLong"}
        assert all(list(s.ledger.tally.by_round) == [(r.job.session, 1)] for s in r.sites)

    def test_a_sum_that_the_server_cannot_see_does_not_move_the_sites_models(self, tmp_path, monkeypatch):
        monkeypatch.setattr(norm_cap, "cap", lambda *_: 1)
        r = Run(tmp_path / "run", steps=2, reveal_to="sites")
        assert r.go() == "COMPLETED"
        for s in r.sites:
            held = s.model(s.session(r.job.session)).held
            assert np.array_equal(held.state.weights, r.job.state.weights)
            assert (held.round, held.name) == (2, r.rows("run.end")[0]["model_hash"])


def _only_at_sites(check: Callable[..., None]) -> Callable[..., None]:
    def said(plan: PrivacyPlan, values: np.ndarray, members: int) -> None:
        caller = sys._getframe(1).f_globals["__name__"]
        if caller != "fedveil.server.rounds":
            check(plan, values, members)

    return said


class TestAgreement:
    """With the sum of keys alone: four of five helpers must sign."""

    @staticmethod
    def contributed(new_world, states):
        w = new_world(5, 0, 4, 3)
        w.packets = {
            s: site.contribute(1, "n", np.arange(6), None, state * 64)
            for (s, site), state in zip(w.sites.items(), states, strict=True)
        }
        return w

    def test_one_state_is_signed(self, new_world):
        w = self.contributed(new_world, "aaaaa")
        for s in w.names:
            w.sites[s].agree(w.announce(w.names))

    @pytest.mark.parametrize("members", [range(5), (0, 4), (3, 4)])
    def test_members_of_two_states_are_refused_by_everybody(self, new_world, members):
        w = self.contributed(new_world, "aaabb" if len(members) > 2 else "aabab")
        chosen = [w.names[i] for i in {*members, 0, 1, 2}]
        for s in w.names:
            with pytest.raises(HelperRefusal, match="model state"):
                w.sites[s].agree(w.announce(chosen))

    def test_a_helper_that_was_left_out_does_not_sign_another_state_than_its_own(self, new_world):
        w = self.contributed(new_world, "aaaab")
        with pytest.raises(HelperRefusal, match="another model state than this site"):
            w.sites[w.names[4]].agree(w.announce(w.names[:4]))
        w.sites[w.names[0]].agree(w.announce(w.names[:4]))

    def test_an_altered_state_breaks_the_signature(self, new_world):
        w = self.contributed(new_world, "aaaab")
        w.packets[w.names[4]].header["state"] = "a" * 64
        with pytest.raises(HelperRefusal):
            w.sites[w.names[0]].agree(w.announce(w.names))

    @pytest.mark.parametrize("state", ["", "x" * 64, 7, None, "a" * 63])
    def test_a_malformed_state_is_refused(self, new_world, state):
        w = self.contributed(new_world, "aaaaa")
        w.packets[w.names[1]].header["state"] = state
        with pytest.raises(HelperRefusal):
            w.sites[w.names[0]].agree(w.announce(w.names))

    def test_the_server_leaves_out_whoever_names_another_state(self, new_world):
        w = self.contributed(new_world, "aaaab")
        w.server.start_round(1, "n", "a" * 64)
        for s in w.names[:4]:
            w.server.add(s, w.packets[s])
        with pytest.raises(StateMismatch, match="another model state"):
            w.server.add(w.names[4], w.packets[w.names[4]])
        assert w.server.members == tuple(w.names[:4])

    def test_a_sum_of_other_members_than_the_helper_signed_is_not_taken(self, new_world, forge_opening):
        """Even if all of them collude."""
        w = self.contributed(new_world, "aaaaa")
        w.sites[w.names[0]].agree(w.announce(w.names))
        for members in (w.names, w.names[:4]):
            made = forge_opening(w.spec, w.keys, 1, np.zeros(6, np.int64), members=members)
            with pytest.raises(UnverifiedOpening, match="other members"):
                w.sites[w.names[0]].opened(made)
            assert w.sites[w.names[1]].opened(made)[1] == tuple(members)  # it signed none


_STEPPING = """
import numpy as np, torch
from fedveil.common.workload.model import ModelSpec
from fedveil.privacy.plan import Optimizer, make_plan
from fedveil.privacy.start import start
plan = make_plan(sites=3, records=90, epsilon=8.0, steps=200, clip=1.0, contract_hash="c" * 64, colluders=1, dropouts=0,
                 model=ModelSpec(name="mlp", inputs=40, classes=5, hidden=(33, 17), seed=5),
                 optimizer=Optimizer(learning_rate=0.3, momentum=0.9))
state, rng = start(plan), np.random.default_rng(1)
sums = rng.integers(-(1 << 20), 1 << 20, (200, plan.model.parameters))
for values in sums:
    state = state.after(plan, values)
print(state.digest, torch.backends.cpu.get_cpu_capability())
"""


def test_two_hundred_steps_end_in_one_hash_whatever_the_machine_computes_with():
    """Three sites with other thread counts and other vector units, in torch and in NumPy."""
    said = []
    for threads, torch_units, numpy_less in (("1", "default", ""), ("2", "avx2", ""), ("4", "avx512", "AVX2 FMA3")):
        env = os.environ | {
            "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "ATEN_CPU_CAPABILITY": torch_units,
            "NPY_DISABLE_CPU_FEATURES": numpy_less, "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        done = subprocess.run([sys.executable, "-c", _STEPPING], env=env, capture_output=True, text=True, check=True)
        said.append(done.stdout.split())
    assert len({digest for digest, *_ in said}) == 1
    assert len({" ".join(units) for _, *units in said}) > 1  # the vector units did differ


class TestVerifiedSums:
    """A server that steps every model by a sum of its own making."""

    def shift(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on the server adds 1000 to the first value of every sum that it opens."""
        result, opened = KeysumServer.result, KeysumServer.opened

        def false_result(self: KeysumServer) -> Any:
            values, members = result(self)
            return values + 1000 * (np.arange(values.size) == 0), members

        def false_opened(self: KeysumServer) -> Packet:
            o = Opening.parse(self._spec, opened(self))
            x = lattice.from_bytes(o.phases)
            x[0, 0] = (int(x[0, 0]) + 1000 * choose(self._spec).delta) % Q
            return dataclasses.replace(o, phases=lattice.to_bytes(x)).packet(self._spec)

        monkeypatch.setattr(KeysumServer, "result", false_result)
        monkeypatch.setattr(KeysumServer, "opened", false_opened)

    def test_no_site_steps_on_it_and_the_round_stays_charged(self, tmp_path, monkeypatch):
        r = Run(tmp_path / "run")
        self.shift(monkeypatch)
        assert r.go() == "ABORTED"
        refused = [b for b in r.rows("site.refused") if "round" in b]
        assert {b["code"] for b in refused} == {"UnverifiedOpening"}
        assert all(list(s.ledger.tally.by_round) == [(r.job.session, 1)] for s in r.sites)
        assert all(s.model(s.session(r.job.session)).held.round == 0 for s in r.sites)

    def test_without_the_verification_every_site_steps_on_it(self, tmp_path, monkeypatch):
        """The negative control."""
        r = Run(tmp_path / "run")
        self.shift(monkeypatch)
        monkeypatch.setattr(verification, "check", lambda _, o, blinds, reader: reader.take_all(o.phases))
        assert r.go() == "COMPLETED"
        assert all(
            np.array_equal(s.model(s.session(r.job.session)).held.state.weights, r.job.state.weights) for s in r.sites
        )
