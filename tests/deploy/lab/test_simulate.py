"""``fedveil simulate``: every mode and sum leaves the same kind of run folder with a report that verifies."""

from __future__ import annotations

import gc
import json
import stat
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from fedveil.common import cli
from fedveil.common.errors import BudgetExhausted, PlanError, RunAborted, UsageError
from fedveil.common.journal import parse
from fedveil.deploy.lab import baselines, datasets, simulate, virtual_sites
from fedveil.deploy.lab.choices import CHOICES
from fedveil.deploy.lab.partition import Dirichlet
from fedveil.deploy.lab.simulate import Config
from fedveil.privacy.report.bundle import SIMULATED_KEY
from fedveil.privacy.report.verify import verify_report

FILES = {
    "config.json", "consortium.pub", "curve.png", "joins.json", "journal.jsonl", "journals", "ledgers", "metrics.jsonl",
    "model.f32", "plan.json", "report.html", "report.json", "report.zh.html", "roster.json",
    "model-card.md", "model-card.zh.md", "data-card.md", "data-card.zh.md", "signatures.json", "signing.SIMULATED.key",
    "start.f32", "sums", "model.safetensors",
}  # fmt: skip
SMALL = Config(clients=4, dataset="digits", steps=2)


def report(run):
    result = verify_report(run / "report.json")
    assert result.ok, result.failed
    assert len(result.countersigned) == result.sites
    return json.loads((run / "report.json").read_text())["payload"]


@pytest.mark.parametrize(
    ("mode", "sum", "clients"),
    [
        ("distributed", "keysum", 4),
        ("distributed", "sharedkey", 3),
        ("distributed", "plain", 6),
        ("local", "keysum", 4),
        ("local", "none", 3),
        ("local", "plain", 4),
        ("client", "plain", 5),
    ],
)
def test_every_mode_leaves_a_whole_run(tmp_path, mode, sum, clients):
    config = replace(SMALL, mode=mode, sum=sum, clients=clients, force=True)
    done = simulate.run(config, tmp_path / "run")
    assert done.status == "COMPLETED"
    assert done.steps == 2
    assert {p.name for p in (tmp_path / "run").iterdir()} == FILES
    assert len(list((tmp_path / "run" / "journals").iterdir())) == clients
    found = report(tmp_path / "run")
    assert found["simulated"] is True
    assert "SIMULATED" in found["notice"]
    assert (found["trust"]["mode"], found["trust"]["sum"]) == (mode, sum)
    assert found["claim"]["epsilon"] <= config.epsilon + 1e-9
    assert found["claim"]["unit"] == ("client" if mode == "client" else "record")
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [x["round"] for x in lines] == [1, 2]
    assert lines[-1]["epsilon_opened"] == pytest.approx(found["claim"]["epsilon"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["clients"] == clients
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "model.f32").stat().st_size == 4 * done.plan.model.parameters


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"sum": "none"}, UsageError, "mode local only"),
        ({"sum": "none", "mode": "client", "force": True}, UsageError, "mode local only"),
        ({"mode": "client"}, PlanError, "hides a whole client"),
        ({"clients": 2}, PlanError, "2 sites"),
        ({"clients": 0}, UsageError, "0 clients"),
        ({"clients": 5000}, UsageError, "cannot share"),
        ({"dataset": "mnist"}, UsageError, "unknown dataset"),
        ({"by": "dirichlet:0"}, UsageError, "alpha"),
        ({"by": "dirichlet:-1"}, UsageError, "alpha"),
        ({"by": "evenly"}, UsageError, "dealt out"),
        ({"colluders": 3}, PlanError, "honest shares"),
        ({"engine": "dask"}, UsageError, "unknown engine"),
        ({"drop_rate": 1.5}, UsageError, "drop rate"),
        ({"drop_rate": -0.1}, UsageError, "drop rate"),
        ({"drop_rate": float("nan")}, UsageError, "drop rate"),
        ({"drop_rate": 0.5, "engine": "ray"}, UsageError, "no random drop-outs"),
        ({"cap": 0.0}, UsageError, "cap"),
        ({"cap": 0.01}, BudgetExhausted, "does not take part"),
    ],
)
def test_what_is_refused_and_before_a_folder_is_made(tmp_path, change, error, said):
    with pytest.raises(error, match=said):
        simulate.run(replace(SMALL, **change), tmp_path / "run")
    if error is not BudgetExhausted:
        assert not (tmp_path / "run").exists()


def test_an_audit_is_attached_afterwards_with_the_runs_own_key(tmp_path):
    run = tmp_path / "run"
    simulate.run(replace(SMALL, sum="plain"), run)
    assert stat.S_IMODE((run / SIMULATED_KEY).stat().st_mode) == 0o600
    call = lambda *arguments: CliRunner().invoke(cli.build(), ["audit", *map(str, arguments)])  # noqa: E731
    examined = ("conformance", run, "--rounds", 4, "--inputs", 64, "--attach")
    assert any(call(*examined).exit_code == 0 for _ in range(2))  # by chance one fails with 18e-5, both with 4e-8
    assert not verify_report(run / "report.json").ok
    done = call("report", run)
    assert done.exit_code == 0, done.exception
    assert "'fedveil audit sign' signs again" in done.stdout
    found = verify_report(run / "report.json")
    assert found.ok, found.failed
    assert found.countersigned == ()
    measured = json.loads((run / "report.json").read_text())["payload"]["audit"]["conformance"]
    assert measured["passed"] is True
    (run / SIMULATED_KEY).unlink()
    assert isinstance(call("report", run).exception, UsageError)


def test_a_virtual_site_does_not_sign_what_is_not_its_ledger(tmp_path, monkeypatch, caplog):
    make = virtual_sites.World.make
    worlds = []
    monkeypatch.setattr(virtual_sites.World, "make", lambda n: worlds.append(make(n)) or worlds[-1])
    simulate.run(replace(SMALL, sum="plain"), tmp_path / "run")
    ledgers, held = tmp_path / "run" / virtual_sites.LEDGERS, tmp_path / "run" / "signatures.json"
    held.unlink()
    lines = (ledgers / "site-0002.jsonl").read_bytes().splitlines(keepends=True)
    (ledgers / "site-0002.jsonl").write_bytes(b"".join(lines[:-1]))
    (ledgers / "site-0003.jsonl").unlink()
    worlds[0].countersign(tmp_path / "run")
    assert set(json.loads(held.read_text())) == {"site-0001", "site-0004"}
    assert "site-0002 does not sign" in caplog.text
    assert "site-0003 does not sign" in caplog.text
    assert verify_report(tmp_path / "run" / "report.json").countersigned == ("site-0001", "site-0004")


def test_a_thousand_clients_need_no_force(tmp_path):
    config = Config(clients=1000, dataset="trivial", mode="client", sum="plain", steps=1)
    split = datasets.load("trivial", 1000, 0)
    assert simulate.make_plan(config, split).few_clients is False
    with pytest.raises(PlanError):
        simulate.make_plan(replace(config, clients=999), datasets.load("trivial", 999, 0))


@pytest.mark.parametrize("mode", CHOICES["mode"])
def test_virtual_sites_take_whatever_the_command_plans(tmp_path, mode):
    """A fallback ε above what real sites accept is no reason to refuse."""
    config = Config(clients=60, dataset="trivial", mode=mode, sum="plain", epsilon=599.0, steps=5, force=True)
    if mode != "local":
        assert simulate.make_plan(config, datasets.load("trivial", 60, 0)).fallback > 1000
    assert simulate.run(config, tmp_path / "run").status == "COMPLETED"


@pytest.mark.slow
def test_a_thousand_clients_are_hidden_whole(tmp_path):
    words = ("--mode", "client", "--clients", "1000", "--epsilon", "8", "--sum", "plain")
    done = CliRunner().invoke(cli.build(), ["simulate", *words, "--steps", "2", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.exception
    assert report(tmp_path / "run")["claim"]["unit"] == "client"


def test_a_cap_that_carries_a_part_of_the_steps_ends_normally(tmp_path):
    done = simulate.run(replace(SMALL, sum="plain", steps=10, cap=1.0, epsilon=1.0), tmp_path / "run")
    assert done.status == "BUDGET_EXHAUSTED"
    assert 0 < done.steps < 10
    found = report(tmp_path / "run")
    assert found["steps"]["applied"] == done.steps
    assert all(s["exhausted"] for s in found["sites"].values())


def test_random_drop_outs(tmp_path):
    done = simulate.run(
        Config(clients=6, dataset="trivial", sum="plain", steps=12, drop_rate=0.25, colluders=1, dropouts=2),
        tmp_path / "run",
    )
    found = report(tmp_path / "run")
    missing = [m for r in found["rounds"] for m in r["missing"]]
    assert missing or found["steps"]["aborted"]
    assert {r["outcome"] for r in found["rounds"]} <= {"applied", "aborted"}
    assert all(len(r["missing"]) <= 2 for r in found["rounds"] if r["outcome"] == "applied")
    assert done.steps == found["steps"]["applied"]


def test_everybody_missing_is_an_abort_with_a_report(tmp_path):
    done = simulate.run(Config(clients=4, dataset="trivial", sum="plain", steps=5, drop_rate=1.0), tmp_path / "run")
    assert (done.status, done.steps) == ("ABORTED", 0)
    assert report(tmp_path / "run")["status"] == "ABORTED"


class TestSplits:
    def test_iid_covers_every_record_once_and_the_test_fifth_is_nobodys(self):
        split = datasets.load("digits", 7, seed=3)
        assert split.records == 1437
        assert len(split.y_test) == 360
        assert max(len(y) for _, y in split.parts) - min(len(y) for _, y in split.parts) <= 1
        rows = np.concatenate([X for X, _ in split.parts] + [split.X_test])
        whole = datasets.load("digits", 1, seed=4)
        other = np.concatenate([whole.parts[0][0], whole.X_test])
        assert sorted(map(bytes, rows)) == sorted(map(bytes, other))

    def test_dirichlet_skews_the_classes_and_loses_nobody(self):
        spread = {}
        for alpha in (0.1, 100.0):
            split = datasets.load("digits", 10, seed=0, by=Dirichlet(alpha))
            assert split.records == 1437
            shares = np.stack([np.bincount(y, minlength=10) for _, y in split.parts]) / split.records
            spread[alpha] = float(shares.std())
        assert spread[0.1] > 3 * spread[100.0]

    def test_a_client_without_a_record_takes_part(self, tmp_path):
        config = Config(clients=12, dataset="digits", sum="plain", steps=2, by="dirichlet:0.02")
        split = datasets.load("digits", 12, 0, by=Dirichlet(0.02))
        assert min(len(y) for _, y in split.parts) == 0
        done = simulate.run(config, tmp_path / "run")
        assert done.status == "COMPLETED"
        assert report(tmp_path / "run")["steps"]["applied"] == 2

    @pytest.mark.parametrize("name", ["digits", "trivial"])
    def test_a_seed_repeats_the_public_part(self, name):
        a, b, c = (datasets.load(name, 5, seed) for seed in (1, 1, 2))
        assert all(
            np.array_equal(x, z) and np.array_equal(y, w) for (x, y), (z, w) in zip(a.parts, b.parts, strict=True)
        )
        assert not np.array_equal(a.parts[0][0], c.parts[0][0])


def test_a_seed_repeats_the_split_and_never_the_noise(tmp_path):
    a, b = (simulate.run(replace(SMALL, sum="plain"), tmp_path / name, report=False) for name in "ab")
    assert a.plan.hash == b.plan.hash
    first = [parse((tmp_path / n / "journal.jsonl").read_bytes())[0].body for n in "ab"]
    assert first[0]["model_hash"] == first[1]["model_hash"]
    assert first[0]["session"] != first[1]["session"]
    assert (tmp_path / "a" / "model.f32").read_bytes() != (tmp_path / "b" / "model.f32").read_bytes()


class TestCommand:
    def invoke(self, *arguments):
        return CliRunner().invoke(cli.build(), ["simulate", *arguments])

    def test_a_run_and_its_table(self, tmp_path):
        done = self.invoke("--clients", "4", "--dataset", "trivial", "--sum", "plain", "--steps", "2",
                           "--seeds", "2", "--out", str(tmp_path / "run"))  # fmt: skip
        assert done.exit_code == 0, done.output
        assert "SIMULATED" in done.output
        assert "no encryption" in done.output
        assert "over 2 seeds" in done.output
        assert {p.name for p in (tmp_path / "run").iterdir()} == {"seed-0", "seed-1", "study.json", "summary.json"}
        for seed in (0, 1):
            folder = tmp_path / "run" / f"seed-{seed}"
            assert {p.name for p in folder.iterdir()} == FILES
            assert report(folder)["trust"]["sum"] == "plain"
            assert json.loads((folder / "config.json").read_text())["seed"] == seed
        found = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert [(r["seed"], r["folder"], r["status"]) for r in found["runs"]] == [
            (0, "seed-0", "COMPLETED"), (1, "seed-1", "COMPLETED"),
        ]  # fmt: skip
        a, b = (report(tmp_path / "run" / r["folder"])["metrics"]["final"] for r in found["runs"])
        for name, value in found["metrics"].items():
            assert value["mean"] == pytest.approx((a[name] + b[name]) / 2)
            assert value["standard_error"] == pytest.approx(abs(a[name] - b[name]) / 2)
        again = self.invoke("--dataset", "trivial", "--seed", "5", "--out", str(tmp_path / "run"))
        assert isinstance(again.exception, UsageError)

    @pytest.mark.parametrize(
        "arguments",
        [("--mode", "central"), ("--sum", "paillier"), ("--seeds", "0"), ("--reveal-to", "all"), ("--dataset", "iris")],
    )
    def test_unknown_words(self, tmp_path, arguments):
        done = self.invoke(*arguments, "--out", str(tmp_path / "run"))
        assert done.exit_code != 0
        assert isinstance(done.exception, (UsageError, SystemExit))
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("dataset", CHOICES["dataset"])
    def test_every_dataset_that_is_listed_runs(self, tmp_path, dataset):
        assert dataset in self.invoke("--help").output
        words = ("--dataset", dataset, "--clients", "4", "--sum", "plain", "--steps", "1")
        done = self.invoke(*words, "--out", str(tmp_path / "run"))
        assert done.exit_code == 0, done.exception
        unknown = self.invoke("--dataset", "iris", "--out", str(tmp_path / "none")).exception
        assert isinstance(unknown, UsageError)
        assert dataset in unknown.hint

    @pytest.mark.parametrize(("option", "value"), [(o, v) for o, values in CHOICES.items() for v in values])
    def test_every_choice_that_is_listed_is_taken(self, tmp_path, option, value):
        if value == "ray":
            return  # slow: see below
        asked = {"mode": "local" if value == "none" else "distributed", "sum": "keysum", option: value}
        words = [x for o, v in asked.items() for x in (f"--{o.replace('_', '-')}", v)]
        done = self.invoke(*words, "--clients", "4", "--dataset", "trivial", "--steps", "1", "--force",
                           "--out", str(tmp_path / "run"))  # fmt: skip
        assert done.exit_code == 0, done.exception
        assert value in self.invoke("--help").output

    def test_a_folder_that_holds_a_run_is_left_alone(self, tmp_path):
        words = (
            "--clients",
            "4",
            "--dataset",
            "trivial",
            "--sum",
            "plain",
            "--steps",
            "1",
            "--out",
            str(tmp_path / "r"),
        )
        assert self.invoke(*words).exit_code == 0
        before = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
        again = self.invoke(*words).exception
        assert isinstance(again, UsageError)
        assert "with --out" in again.hint  # its keys are gone: there is nothing to resume
        assert {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()} == before

    @pytest.mark.parametrize(
        ("words", "error", "said"),
        [
            (("--epsilon", "nan"), PlanError, "epsilon = nan"),
            (("--epsilon", "nan", "--dataset", "digits"), PlanError, "nan"),
            (("--seed", "-1"), UsageError, "seed -1"), (("--seed", str(1 << 32)), UsageError, "seed"),
            (("--by", "dirichlet:nan"), UsageError, "alpha"), (("--by", "quantity:inf"), UsageError, "alpha"),
            (("--cap", "nan"), UsageError, "cap"), (("--delta", "1e-17"), PlanError, "delta"),
            (("--delta", "nan"), PlanError, "delta"), (("--out", "/dev/null/run"), UsageError, "no folder can be made"),
        ],
    )  # fmt: skip
    def test_nonsense_is_refused_in_words(self, tmp_path, words, error, said):
        usual = ("--clients", "4", "--dataset", "trivial", "--sum", "plain", "--out", str(tmp_path / "run"))
        done = self.invoke(*usual, *words)
        assert isinstance(done.exception, error), done.exception
        assert said in str(done.exception)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("words", "error"), [(("--drop-rate", "1"), RunAborted), (("--steps", "9", "--cap", "0.6"), BudgetExhausted)]
    )
    def test_a_run_that_did_not_end_as_planned_says_so_with_its_exit_code(self, tmp_path, words, error):
        usual = ("--clients", "4", "--dataset", "trivial", "--sum", "plain", "--out", str(tmp_path / "run"))
        done = self.invoke(*usual, *words)
        assert isinstance(done.exception, error)
        assert "steps applied" in done.output
        assert report(tmp_path / "run")["status"] in ("ABORTED", "BUDGET_EXHAUSTED")

    def test_an_epsilon_that_protects_nobody_is_warned_of_and_stands_in_the_report(self, tmp_path):
        words = ("--clients", "4", "--dataset", "trivial", "--sum", "plain", "--steps", "1")
        assert "more than 10" not in self.invoke(*words, "--out", str(tmp_path / "low")).output
        assert not any("more than 10" in x for x in report(tmp_path / "low")["deviations"])
        done = self.invoke(*words, "--epsilon", "30", "--out", str(tmp_path / "run"))
        assert done.exit_code == 0, done.exception
        assert "warning: epsilon = 30 is more than 10" in " ".join(done.output.split())
        assert any("is more than 10" in x for x in report(tmp_path / "run")["deviations"])
        assert "is more than 10" in (tmp_path / "run" / "report.html").read_text()
        assert "超过 10" in (tmp_path / "run" / "report.zh.html").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray leaves /dev/null open
@pytest.mark.parametrize("sum", ["keysum", "plain"])
def test_the_ray_engine_runs_the_same_apps(tmp_path, sum):
    pytest.importorskip("ray")
    done = simulate.run(Config(clients=3, dataset="trivial", sum=sum, engine="ray", steps=2), tmp_path / "run")
    gc.collect()  # here, not within another test
    assert done.status == "COMPLETED"
    found = report(tmp_path / "run")
    assert {s["charged"] for s in found["sites"].values()} == {2}


class TestBaselines:
    @pytest.fixture(scope="class")
    @classmethod
    def setting(cls):
        split = datasets.load("digits", 4, 0)
        plan = simulate.make_plan(Config(clients=4, epsilon=4.0, steps=25), split)
        parts = [baselines.Table(X, y) for X, y in split.parts]
        return plan, parts, baselines.Table(split.X_test, split.y_test)

    def test_the_order_of_what_is_given_up(self, setting):
        plan, parts, test = setting
        found = {k: v["accuracy"] for k, v in baselines.compare(plan, parts, test).items()}
        assert found["pooled, no privacy"] > found["majority class"] + 0.3
        assert found["pooled, no privacy"] > found["each hospital alone, DP"]
        assert found["majority class"] < 0.15

    def test_without_noise_it_is_repeatable_and_with_noise_it_is_not(self, setting):
        plan, parts, _ = setting
        short = plan.model_copy(update={"steps": 2, "sample_rate": 1.0})
        assert np.array_equal(baselines.pooled(short, parts), baselines.pooled(short, parts))
        assert not np.array_equal(baselines.central(short, parts), baselines.central(short, parts))

    def test_the_noise_has_the_stated_size(self, setting):
        plan, parts, _ = setting
        short = plan.model_copy(update={"steps": 1, "sample_rate": 1.0})
        clean = baselines.pooled(short, parts)
        for make, factor in ((baselines.central, 1.0), (baselines.local, 2.0)):
            moved = make(short, parts) - clean
            step = plan.optimizer.learning_rate / sum(len(p.y) for p in parts)
            expected = factor * plan.noise_multiplier * plan.clip * step
            D = moved.size
            assert np.sqrt(np.mean(moved**2)) == pytest.approx(expected, rel=6 / np.sqrt(2 * D))
