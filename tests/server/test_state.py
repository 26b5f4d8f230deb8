"""The optimiser's step, checkpoints, metrics, and how a stopped run goes on."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.common import canonical, identity, threads
from fedveil.common.errors import DataError, FedveilError, JournalError, RunAborted, StoreError
from fedveil.common.files import write_durably
from fedveil.common.journal import Journal
from fedveil.common.workload.model import ModelSpec
from fedveil.deploy import server_process
from fedveil.deploy.lab import virtual_sites
from fedveil.privacy import optimiser
from fedveil.privacy.optimiser import ModelState
from fedveil.server import checkpoints
from fedveil.server import job as jobs
from fedveil.server.evaluate import Evaluator, area_under_roc

BINARY = ModelSpec(name="logistic", inputs=3, classes=2)


class TestStep:
    def test_momentum_by_hand(self, plans):
        plan = plans(momentum=0.5)
        state = ModelState.start(np.zeros(8, np.float32), plan.optimizer)
        for n in (1, 2):
            state = state.step(plan, np.full(8, 40.0))
            # v1 = 1, v2 = 1.5; w1 = -0.5, w2 = -1.25 at learning rate 0.5 and q·N = 40
            assert state.moments[0][0] == {1: 1.0, 2: 1.5}[n]
            assert state.weights[0] == {1: -0.5, 2: -1.25}[n]

    def test_client_updates_are_averaged_and_applied_as_they_are(self, plans):
        plan = plans(momentum=0.0, mode="client", few_clients=True, local_steps=5)
        state = ModelState.start(np.ones(8, np.float32), plan.optimizer).step(plan, np.full(8, 2.0))
        np.testing.assert_allclose(state.weights, 1 - 2.0 / plan.sites)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1.7e308])
    def test_what_leaves_the_numbers_is_refused(self, plans, bad):
        start = ModelState(np.zeros(8), (np.full(8, 1.7e308),))
        with pytest.raises(RunAborted, match="diverged"), np.errstate(over="ignore", invalid="ignore"):
            start.step(plans(), np.full(8, bad * 40))

    @pytest.mark.parametrize("size", [1, 9, 10, 11, 95])
    @pytest.mark.parametrize("more", [{"momentum": 0.9}, {"mode": "client", "few_clients": True, "local_steps": 5}])
    def test_chunks_and_threads_take_the_step_of_the_whole(self, plans, monkeypatch, size, more):
        plan, rng = plans(**more), np.random.default_rng(size)
        state = ModelState(rng.normal(size=size), (rng.normal(size=size),), 4)
        opened = rng.integers(-(1 << 40), 1 << 40, size)
        gradient = opened.astype(np.float64) * plan.grid / plan.divisor
        velocity = plan.optimizer.momentum * state.moments[0] + gradient
        rate = 1.0 if plan.mode == "client" else plan.optimizer.learning_rate
        expected = ModelState(state.weights - rate * velocity, (velocity,), 5)
        monkeypatch.setattr(optimiser, "_CHUNK", 10)
        for count in (1, 2, 3):
            monkeypatch.setattr(threads, "_count", [count])
            after = state.after(plan, opened)
            assert (after.data, after.digest, after.hash) == (expected.data, expected.digest, expected.hash)

    def test_what_was_last_computed_is_shared_for_equal_sums_that_cannot_change_and_for_no_other(self, plans):
        plan = plans()
        state = ModelState.start(np.zeros(8, np.float32), plan.optimizer)
        opened, same = np.arange(8), np.arange(8)
        first = state.after(plan, opened)
        assert state.after(plan, opened) is not first, "it could have been written to"
        opened.flags.writeable = False
        first = state.after(plan, opened)
        assert state.after(plan, opened) is state.after(plan, same) is first
        assert first.data == ModelState.load(state.data).after(plan, same).data
        for other in (same + 1, -same):
            assert state.after(plan, other).data != first.data
        assert first.after(plan, opened).data != first.data
        assert state.after(plans(momentum=0.25), opened) is not first

    def test_what_is_sent_is_what_the_hash_names(self):
        state = ModelState(np.array([1.0, 1e-50]), (np.zeros(2),))
        assert state.sent() == np.array([1, 0], "<f4").tobytes()
        assert state.hash == ModelState(np.array([1.0, 0.0]), (np.ones(2),)).hash
        assert state.hash != ModelState(np.array([1.0, 1.0]), (np.zeros(2),)).hash


class TestCheckpoints:
    def state(self, value):
        return ModelState(np.full(5, value), (np.full(5, -value),))

    def test_round_trip(self, tmp_path):
        name = checkpoints.save(tmp_path, self.state(0.1))
        back = checkpoints.load(tmp_path, name)
        np.testing.assert_array_equal(back.weights, self.state(0.1).weights)
        np.testing.assert_array_equal(back.moments[0], self.state(0.1).moments[0])

    def test_any_altered_byte_is_noticed(self, tmp_path):
        name = checkpoints.save(tmp_path, self.state(0.1))
        path = tmp_path / f"{name}.state"
        data = path.read_bytes()
        for at in range(0, len(data), 37):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(JournalError, match="altered"):
                checkpoints.load(tmp_path, name)
        path.unlink()
        with pytest.raises(JournalError, match="cannot be read"):
            checkpoints.load(tmp_path, name)

    def test_the_one_before_is_kept_and_older_ones_go(self, tmp_path):
        names = [checkpoints.save(tmp_path, self.state(float(i))) for i in range(4)]
        assert {p.stem for p in tmp_path.glob("*.state")} == set(names[-2:])
        assert not list(tmp_path.glob(".*"))

    def test_no_pickles(self, tmp_path):
        out = io.BytesIO()
        np.savez(out, weights=np.array([print], dtype=object), velocity=np.zeros(1))
        name = checkpoints.sha256(out.getvalue())
        (tmp_path / f"{name}.state").write_bytes(out.getvalue())
        with pytest.raises(StoreError, match="damaged"):
            checkpoints.load(tmp_path, name)


class TestMetrics:
    @given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=40))
    def test_auc_counts_pairs(self, rows):
        scores, positive = np.array([float(s) for s, _ in rows]), np.array([p for _, p in rows])
        if positive.all() or not positive.any():
            with pytest.raises(DataError):
                area_under_roc(scores, positive)
            return
        pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
        assert area_under_roc(scores, positive) == pytest.approx(float(np.mean(pairs)), abs=1e-12)

    def test_accuracy_and_auc_of_a_model(self):
        X = np.eye(3, dtype=np.float32)
        y = np.array([0, 1, 1])
        weights = np.array([1, -1, -1, -1, 1, 1, 0, 0], np.float64)  # class 0 for the first feature, else class 1
        assert Evaluator(BINARY, X, y)(weights) == {"accuracy": 1.0, "auc": 1.0}
        assert Evaluator(BINARY, X, 1 - y)(weights) == {"accuracy": 0.0, "auc": 0.0}

    def test_more_classes_have_no_auc(self):
        spec = ModelSpec(name="logistic", inputs=3, classes=3)
        assert set(Evaluator(spec, np.eye(3, dtype=np.float32), np.arange(3))(np.zeros(12))) == {"accuracy"}

    @pytest.mark.parametrize("y", [[0, 0], [1, 1], [], [0, 2], [-1, 1]])
    def test_a_table_that_cannot_be_scored_is_refused_before_a_run(self, y):
        with pytest.raises(DataError, match="public test table"):
            Evaluator(BINARY, np.zeros((len(y), 3), np.float32), np.array(y, np.int64))


class Crashed:
    """A run that stopped after two applied rounds, in the middle of the third."""

    def __init__(self, folder, plan):
        self.folder, self.plan = folder, plan
        self.world = virtual_sites.World.make(4)
        job = jobs.create(folder, plan, self.world.roster, self.world.server, documents=self.world.documents())
        job.joins = {"any": 1}
        write_durably(folder / "joins.json", canonical.dumps(job.joins))
        s = {"session": job.session}
        job.journal.append("run.joined", {**s, "joins_digest": canonical.digest(job.joins), "sites": []})
        self.states = [job.state]
        for n in (1, 2):
            job.journal.append("round.open", {**s, "round": n, "nonce": f"nonce-{n}", "model_hash": job.state.hash})
            job.state = job.state.step(plan, np.full(8, float(n)))
            body = {**s, "round": n, "members": [], "model_hash": job.state.hash, "checkpoint": job.checkpoint()}
            job.journal.append("round.applied", body)
            job.metrics({"round": n, "epsilon_opened": 0.25 * n})
            self.states.append(job.state)
        job.journal.append("round.open", {**s, "round": 3, "nonce": "nonce-3", "model_hash": job.state.hash})
        self.session = job.session
        job.journal.close()

    def resume(self, roster=None):
        return jobs.resume(self.folder, roster or self.world.roster, self.world.server)

    def append(self, kind, **body):
        with Journal.open(self.folder / "journal.jsonl", "server", self.world.server) as journal:
            journal.append(kind, {"session": self.session, **body})


@pytest.fixture
def crashed(tmp_path, plans):
    return Crashed(tmp_path / "run", plans())


class TestResume:
    def test_an_open_round_goes_on_under_its_nonce(self, crashed):
        job = crashed.resume()
        assert (job.session, job.first_round, job.nonce) == (crashed.session, 3, "nonce-3")
        assert job.state.hash == crashed.states[2].hash
        np.testing.assert_array_equal(job.state.moments[0], crashed.states[2].moments[0])
        assert job.joins == {"any": 1}
        job.journal.close()

    def test_after_a_finished_round_the_next_one_is_new(self, crashed):
        crashed.append("round.aborted", round=3, reason="")
        job = crashed.resume()
        assert (job.first_round, job.nonce, job.state.hash) == (4, "", crashed.states[2].hash)
        job.journal.close()

    def test_lines_of_metrics_that_a_crash_tore_or_doubled_are_dropped(self, crashed):
        with (crashed.folder / "metrics.jsonl").open("a") as f:
            f.write('{"round": 3}\n{"rou')
        crashed.resume().journal.close()
        lines = (crashed.folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(x)["round"] for x in lines] == [1, 2]

    def test_a_finished_run_stays_finished(self, crashed):
        crashed.append("run.end", status="COMPLETED")
        with pytest.raises(JournalError, match="ended or never began"):
            crashed.resume()

    def test_no_run(self, tmp_path, crashed):
        with pytest.raises(JournalError, match="holds no run"):
            jobs.resume(tmp_path / "nowhere", crashed.world.roster, crashed.world.server)

    def test_a_folder_is_used_once(self, crashed, plans):
        with pytest.raises(JournalError, match="holds a run already"):
            jobs.create(crashed.folder, plans(), crashed.world.roster, crashed.world.server, documents={})

    @pytest.mark.parametrize("name", ["plan.json", "joins.json"])
    @pytest.mark.parametrize("how", ["altered", "garbage", "missing"])
    def test_a_file_that_is_not_the_journals_is_refused(self, crashed, name, how):
        path = crashed.folder / name
        value = json.loads(path.read_text())
        if how == "missing":
            path.unlink()
        else:
            changed = {**value, "steps": 3} if name == "plan.json" else {**value, "more": 1}
            path.write_bytes(canonical.dumps(changed) if how == "altered" else b"\xff{")
        with pytest.raises(JournalError):
            crashed.resume()
        self.is_unlocked(crashed)

    def test_an_altered_checkpoint_is_refused(self, crashed):
        for path in (crashed.folder / "checkpoints").iterdir():
            path.write_bytes(path.read_bytes() + b"x")
        with pytest.raises(JournalError, match="altered"):
            crashed.resume()
        self.is_unlocked(crashed)

    def test_another_roster_is_refused(self, crashed):
        with pytest.raises(JournalError, match="another roster"):
            crashed.resume(virtual_sites.World.make(4).roster)
        self.is_unlocked(crashed)

    def test_another_servers_key_is_refused(self, crashed):
        with pytest.raises(JournalError):
            jobs.resume(crashed.folder, crashed.world.roster, identity.new_signing_key())

    def test_two_servers_never_write_one_journal(self, crashed):
        job = crashed.resume()
        with pytest.raises(JournalError, match="in use"):
            crashed.resume()
        job.journal.close()

    def is_unlocked(self, crashed):
        with Journal.open(crashed.folder / "journal.jsonl", "server", crashed.world.server) as journal:
            assert journal.head.rows > 0


class TestStatus:
    def test_of_a_stopped_and_of_an_ended_run(self, crashed):

        found = server_process.status(crashed.folder)
        assert (found["steps"], found["round"], found["epsilon_opened"]) == (4, 2, 0.5)
        assert "stopped" in found["status"]
        crashed.append("run.end", status="COMPLETED")
        assert server_process.status(crashed.folder)["status"] == "COMPLETED"

    @pytest.mark.parametrize("torn", ["no folder", "no journal", "torn line"])
    def test_of_what_is_no_run(self, crashed, torn):
        if torn == "no folder":
            shutil.rmtree(crashed.folder)
        elif torn == "no journal":
            (crashed.folder / "journal.jsonl").unlink()
        else:
            with (crashed.folder / "journal.jsonl").open("ab") as f:
                f.write(b'{"torn')
            assert "stopped" in server_process.status(crashed.folder)["status"]
            return
        with pytest.raises(FedveilError, match="holds no run") as refused:
            server_process.status(crashed.folder)
        assert str(crashed.folder) in refused.value.message
        assert "federation.toml says where" in refused.value.hint
