"""The Python API as a researcher uses it: ten lines from records to a verified report, sweeps that go on, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import fedveil as fv
from fedveil.common.errors import PlanError, UsageError, VerificationError
from fedveil.deploy.lab import recipes
from fedveil.deploy.lab.choices import NETWORKS
from fedveil.deploy.lab.partition import parse
from fedveil.deploy.lab.simulate import Config, make_plan, proposal, recipe

QUICK: dict[str, Any] = {"sum": "plain", "steps": 2}


@pytest.fixture(scope="module")
def sites() -> fv.Sites:
    rng = np.random.default_rng(0)  # noqa: TID251 - made-up records
    X = rng.normal(size=(300, 4)).astype(np.float32)
    return fv.split((X, (X[:, 0] > 0).astype(int)), clients=4)


@pytest.fixture(scope="module")
def run(sites, tmp_path_factory) -> fv.Run:
    folder = tmp_path_factory.mktemp("api") / "run"
    return fv.simulate(None, sites, epsilon=8, sum="plain", out=folder)


def test_a_run_learns_and_its_report_verifies(run, sites):
    assert (run.status, run.unit, run.delta) == ("COMPLETED", "record", 1e-5)
    assert run.epsilon <= 8
    assert run.metrics["accuracy"] > 0.8
    assert run.report.verify().ok
    assert [row["round"] for row in run.history] == list(range(1, run.plan.steps + 1))
    assert run.history[-1]["accuracy"] == run.metrics["accuracy"]
    assert run.baselines["pooled, no privacy"]["accuracy"] > 0.8
    with torch.no_grad():
        guessed = run.model()(torch.from_numpy(sites.X_test)).argmax(1).numpy()
    assert (guessed == sites.y_test).mean() == pytest.approx(run.metrics["accuracy"])


def test_a_run_is_the_same_when_it_is_loaded(run):
    again = fv.load(run.folder)
    assert isinstance(again, fv.Run)
    assert (repr(again), again.table(), again.config) == (repr(run), run.table(), run.config)
    assert "each hospital alone, DP" in again._repr_html_()  # noqa: SLF001 - what a notebook calls
    assert "ε = " in repr(again)


def test_a_plot_shows_one_metric_or_all(run, tmp_path):
    assert run.plot("accuracy", path=tmp_path / "a.png").stat().st_size > 5000
    assert run.plot().name == "curve.png"
    with pytest.raises(UsageError, match="no metric 'f1'"):
        run.plot("f1")


def test_a_changed_report_is_told(run, tmp_path):
    import shutil

    shutil.copytree(run.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "report.json"
    path.write_text(path.read_text().replace('"COMPLETED"', '"EXHAUSTED"'))
    with pytest.raises(VerificationError):
        fv.load(tmp_path / "copy").report.verify()  # type: ignore[union-attr]


def test_a_sweep_compares_and_goes_on_where_it_stopped(sites, tmp_path):
    asked: Any = {"epsilon": [1.0, 4.0], "seeds": 2, "workers": 1, **QUICK}
    runs = fv.sweep("logistic", sites, out=tmp_path / "s", **asked)
    assert [(r["epsilon"], r["seeds"]) for r in runs.table()] == [(1.0, 2), (4.0, 2)]
    found = [run.metrics["accuracy"] for run in runs]
    assert runs.table()[0]["accuracy"] == pytest.approx(np.mean(found[:2]))
    assert runs.table()[0]["accuracy s.e."] == pytest.approx(np.std(found[:2], ddof=1) / 2**0.5)
    kept = {run.folder: (run.folder / "journal.jsonl").read_bytes() for run in runs}
    broken = runs[3].folder
    lines = (broken / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (broken / "journal.jsonl").write_bytes(b"".join(lines[:3]))  # as after a crash
    again = fv.sweep("logistic", sites, out=tmp_path / "s", **asked)
    assert [run.status for run in again] == ["COMPLETED"] * 4
    assert [run.folder for run in again] == list(kept)
    same = [(run.folder / "journal.jsonl").read_bytes() == kept[run.folder] for run in again]
    assert same == [True, True, True, False]
    with pytest.raises(UsageError, match="another sweep"):
        fv.sweep("logistic", sites, out=tmp_path / "s", **asked | {"epsilon": [2.0]})
    loaded = fv.load(tmp_path / "s")
    assert sorted(map(str, loaded.table())) == sorted(map(str, again.table()))  # type: ignore[union-attr]


def test_a_sweeps_table_in_every_form(sites, tmp_path):
    runs = fv.sweep("logistic", sites, epsilon=[1.0, 4.0], clip=[0.5, 1.0], out=tmp_path / "s", workers=1, **QUICK)
    assert runs.to_csv(tmp_path / "t.csv").splitlines()[0] == "epsilon,clip,seeds,accuracy,accuracy s.e.,auc,auc s.e."
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 5
    assert json.loads(runs.to_json())[3]["clip"] == 1.0
    assert runs.to_latex().count(r"\\") == 5
    assert runs.plot(path=tmp_path / "s.png").stat().st_size > 5000
    assert "<th>epsilon</th>" in runs._repr_html_()  # noqa: SLF001
    assert repr(runs).splitlines()[0].split()[:3] == ["epsilon", "clip", "seeds"]


@pytest.mark.slow
def test_a_sweep_runs_on_several_processes(sites, tmp_path):
    runs = fv.sweep("logistic", sites, epsilon=[1.0, 4.0], out=tmp_path / "s", workers=2, **QUICK)
    assert [run.status for run in runs] == ["COMPLETED"] * 2


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"epsilom": 1}, UsageError, "unknown settings: epsilom"),
        ({"clients": 3}, UsageError, "unknown settings: clients"),
        ({"epsilon": -1.0}, PlanError, "epsilon"),
        ({"mode": "central"}, UsageError, "unknown mode"),
    ],
)
def test_settings_that_do_not_work_are_named_before_a_folder_is_made(sites, tmp_path, settings, error, said):
    with pytest.raises(error, match=said):
        fv.simulate("logistic", sites, out=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_unknown_networks_and_folders_are_named(sites, tmp_path):
    with pytest.raises(UsageError, match="unknown network 'vgg'"):
        fv.simulate("vgg", sites)
    with pytest.raises(UsageError, match="holds no run"):
        fv.load(tmp_path)
    with pytest.raises(UsageError, match="nothing to run"):
        fv.sweep("logistic", sites, seeds=0)
    fv.simulate("logistic", sites, out=tmp_path / "run", report=False, compare=False, quiet=True, **QUICK)
    with pytest.raises(UsageError, match="holds a run already"):
        fv.simulate("logistic", sites, out=tmp_path / "run", **QUICK)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_makes_a_plan_or_says_which_sizes_it_needs(network):
    image = fv.split((np.random.default_rng(0).random((40, 64)), np.arange(40) % 2), clients=4)  # noqa: TID251
    config = Config(clients=4, dataset="arrays", network=network)
    if network in ("transformer", "lstm", "lora-transformer"):
        with pytest.raises(UsageError, match="needs its sizes"):
            make_plan(config, image)
    else:
        assert make_plan(config, image).network.name == network


def test_a_proposal_uses_public_numbers_alone_and_follows_epsilon():
    def proposed(**given: Any) -> recipes.Recipe:
        asked: dict[str, Any] = {"records": 5000, "inputs": 30, "classes": 2, "delta": 1e-5, "epsilon": 1.0}
        asked.update(given)
        return recipes.propose(**asked)

    assert proposed(epsilon=0.5).learning_rate < proposed(epsilon=8.0).learning_rate
    assert proposed().network == "mlp"
    assert proposed(records=100).network == "logistic"
    assert proposed(records=10**6).sample_rate < 0.01
    changed = recipe(Config(dataset="t.csv", learning_rate=0.5, steps=7), fv.split("trivial", clients=4))
    assert (changed.learning_rate, changed.steps) == (0.5, 7)


def test_importing_fedveil_loads_nothing_heavy():
    code = "import sys, fedveil; print(sorted(m for m in sys.modules if m in ('torch', 'flwr', 'numpy')), dir(fedveil))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ")
    assert "'simulate'" in done.stdout
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fv.nothing  # type: ignore[attr-defined]


class TestWhatARunSaysOfItself:
    @pytest.mark.parametrize(
        ("by", "said"),
        [
            (None, "iid"), (fv.Iid(), "iid"), (fv.Dirichlet(0.3), "dirichlet:0.3"), (fv.Shards(3), "shards:3"),
            (fv.Quantity(0.5), "quantity:0.5"), ("town", "column:town"),
        ],
    )  # fmt: skip
    def test_its_config_holds_how_the_records_were_dealt_out(self, by, said):
        rng = np.random.default_rng(0)  # noqa: TID251 - made-up records
        table = {"x": rng.normal(size=90), "town": np.repeat(["a", "b", "c"], 30), "ill": rng.integers(0, 2, 90)}
        sites = fv.split(table, "ill", clients=None if by == "town" else 3, by=by, test=0.3)
        assert sites.dealt == {"target": "ill", "test": 0.3, "by": said}
        parsed = parse(said)
        assert parsed == (fv.Iid() if by is None else by)

    def test_what_is_proposed_fits_the_steps_that_were_chosen(self, sites, capsys, tmp_path):
        few, many = (make_plan(Config(clients=4, dataset="arrays", epsilon=2.0, steps=n), sites) for n in (20, 300))
        assert many.optimizer.learning_rate < few.optimizer.learning_rate
        fv.simulate(None, sites, epsilon=2, steps=300, sum="plain", compare=False, report=False, out=tmp_path / "run")
        said = capsys.readouterr().out
        assert f"noise multiplier {many.noise_multiplier:.3g}" in said

    def test_an_adaptive_optimiser_says_its_own_rate(self, sites):
        config = Config(clients=4, optimizer="adam", epsilon=2.0)
        plan = make_plan(config, sites)
        assert f"learning_rate = {plan.optimizer.learning_rate:g}" in proposal(config, sites, plan)
        assert plan.optimizer.learning_rate != make_plan(Config(clients=4, epsilon=2.0), sites).optimizer.learning_rate
        client = Config(clients=4, optimizer="adam", mode="client", force=True, epsilon=8.0)
        assert "server_rate = " in proposal(client, sites, make_plan(client, sites))


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"epsilon": 2, "noise_multiplier": 3.0}, UsageError, "one of the two"),
        ({"epsilon": "2"}, UsageError, "epsilon = '2'"),
        ({"hidden": 32}, UsageError, "hidden = 32"),
        ({"schedule": None}, UsageError, "schedule = None"),
        ({"schedule": "warmup"}, PlanError, "unknown schedule"),
        ({"averaging": 1.0}, PlanError, "averaging"),
        ({"learning_rate": -1.0}, PlanError, "learning_rate"),
        ({"optimizer": "adamw"}, UsageError, "unknown optimizer"),
        ({"patience": 2, "stop_metric": "auc"}, None, ""),
    ],
    ids=str,
)
def test_settings_that_contradict_or_are_of_another_kind(sites, tmp_path, settings, error, said):
    if error is None:  # two classes have an area under the curve
        fv.simulate("logistic", sites, **(QUICK | settings), out=tmp_path / "run", compare=False, report=False)
        return
    with pytest.raises(error) as refused:
        fv.simulate("logistic", sites, **(QUICK | settings), out=tmp_path / "run", quiet=True)
    assert said in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_other_files_is_left_alone(sites, tmp_path):
    (tmp_path / "mine.toml").write_text("x = 1")
    with pytest.raises(UsageError, match="holds other files"):
        fv.simulate("logistic", sites, **QUICK, out=tmp_path, quiet=True, compare=False)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam", "averaging": 0.9, "schedule": "cosine"},
        {"optimizer": "yogi", "schedule": [[1, 1.0], [3, 0.1]], "reveal_to": "sites"},
        {"optimizer": "adagrad", "mode": "local", "sum": "none", "local_steps": 3},
        {"optimizer": "adam", "mode": "client", "force": True, "sample_rate": 0.5, "local_batch": 8, "proximal": 0.1},
    ],
    ids=lambda s: s["optimizer"] + "-" + s.get("mode", "distributed"),
)
def test_every_optimiser_runs_to_a_report_that_verifies(sites, tmp_path, settings):
    """From the plan over the sites' own steps to the verifier, who takes every step again from the opened sums."""
    run = fv.simulate(
        "logistic", sites, **({"epsilon": 8.0, "steps": 4} | settings), out=tmp_path / "run", compare=False, quiet=True
    )
    assert run.status == "COMPLETED"
    assert run.plan.optimizer.name == settings["optimizer"]
    found = run.report.verify()
    assert found.ok
    if run.plan.reveal_to == "server":
        assert "4 steps taken again" in str(found.checks)


def test_optimisers_are_compared_in_one_line(sites, tmp_path):
    runs = fv.sweep("logistic", sites, **QUICK, optimizer=["sgd", "adam"], seeds=2, out=tmp_path / "s", workers=1)
    assert [row["optimizer"] for row in runs.table()] == ["sgd", "adam"]
