"""``fedveil track``: a tracker gets what is public or charged, once; one that is not installed is named."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import socket
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import fedveil as fv
from fedveil.common import cli
from fedveil.common.errors import FedveilError, UsageError
from fedveil.deploy.lab import simulate
from fedveil.deploy.lab.simulate import Config

STEPS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked") / "run"
    simulate.run(Config(clients=4, dataset="digits", sum="plain", steps=STEPS), folder, report=False)
    return folder


class FakeMlflow:
    """What is asked of MLflow's client, kept."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.uris: list[str] = []

    def __call__(self, tracking_uri: str) -> FakeMlflow:
        self.uris.append(tracking_uri)
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="7") if self.runs else None

    def create_experiment(self, name: str) -> str:
        return "7"

    def search_runs(self, experiments: list[str], wanted: str) -> list[Any]:
        found = [
            n for n, r in self.runs.items() if wanted == f"tags.`fedveil.session` = '{r['tags']['fedveil.session']}'"
        ]
        return [SimpleNamespace(info=SimpleNamespace(run_id=n)) for n in found]

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        self.runs[name := f"r{len(self.runs)}"] = {"tags": dict(tags), "params": {}, "metrics": [], "ended": None}
        return SimpleNamespace(info=SimpleNamespace(run_id=name))

    def set_tag(self, run: str, key: str, value: str) -> None:
        self.runs[run]["tags"][key] = value

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        self.runs[run]["metrics"] += metrics
        self.runs[run]["params"].update(params)

    def get_metric_history(self, run: str, key: str) -> list[Any]:
        return [SimpleNamespace(step=m[3]) for m in self.runs[run]["metrics"] if m[0] == key]

    def set_terminated(self, run: str, status: str) -> None:
        self.runs[run]["ended"] = status


def module(monkeypatch: pytest.MonkeyPatch, name: str, **holds: Any) -> None:
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for key, value in holds.items():
        setattr(made, key, value)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    pair = lambda *values: tuple(values)  # noqa: E731
    module(monkeypatch, "mlflow", __path__=[])
    module(monkeypatch, "mlflow.entities", Metric=pair, Param=pair)
    module(monkeypatch, "mlflow.tracking", MlflowClient=fake)
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(name, "")
    return fake


def public(run: Path) -> tuple[dict[str, Any], list[tuple[str, float, int]]]:
    """What may be told: the config and the plan's numbers; the rows of the metrics file."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [(k, v, r["round"]) for r in rows for k, v in {**r["metrics"], "epsilon": r["epsilon_opened"]}.items()]
    return json.loads((run / "config.json").read_text()), values


def test_mlflow_gets_what_is_public_and_charged_and_nothing_else(run, mlflow, tmp_path):
    where = fv.track(fv.load(run), "mlflow", tmp_path)
    assert mlflow.uris == [tmp_path.as_uri()]
    assert where == [f"{tmp_path.as_uri()}, experiment fedveil, run r0"]
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == os.environ["DO_NOT_TRACK"] == "true"
    held, (config, values) = mlflow.runs["r0"], public(run)
    assert sorted((k, v, r) for k, v, _, r in held["metrics"]) == sorted(values)
    assert len(values) == 2 * STEPS
    assert set(held["params"]) <= {*config, "sites", "noise_multiplier", "unit", "parameters"}
    assert held["params"]["dataset"] == "digits"
    assert held["tags"]["status"] == "COMPLETED"
    assert "SIMULATED" in held["tags"]["claim"]
    assert set(held["tags"]) == {"status", "claim", "fedveil.session"}
    assert held["ended"] == "FINISHED"


def test_a_second_export_adds_what_is_new(run, mlflow, tmp_path):
    """As for a run that was under way at the first: its metrics file grew since."""
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.json", "plan.json"):
        (copy / name).write_bytes((run / name).read_bytes())
    journal = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "journal.jsonl").write_bytes(b"".join(journal[:-1]))
    (copy / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[0])
    fv.track(fv.load(copy), "mlflow", "http://tracker.example:5000")
    assert mlflow.uris == ["http://tracker.example:5000"]
    assert os.environ["MLFLOW_ALLOW_FILE_STORE"] == ""
    assert (mlflow.runs["r0"]["tags"]["status"], mlflow.runs["r0"]["ended"]) == ("RUNNING", None)
    assert len(mlflow.runs["r0"]["metrics"]) == 2
    fv.track(fv.load(run), "mlflow", "http://tracker.example:5000")
    assert list(mlflow.runs) == ["r0"]
    assert len(mlflow.runs["r0"]["metrics"]) == 2 * STEPS
    assert mlflow.runs["r0"]["tags"]["status"] == "COMPLETED"


def test_tensorboard_gets_the_same(run, monkeypatch, tmp_path):
    told: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, filename_suffix: str) -> None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._path = Path(folder) / f"events.{len(told)}{filename_suffix}"

        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *_: object) -> None:
            self._path.write_text("x")

        def add_text(self, name: str, text: str) -> None:
            told.append((name, text))

        def add_scalar(self, *values: Any) -> None:
            told.append(values)

    module(monkeypatch, "tensorboard")
    module(monkeypatch, "torch.utils.tensorboard", __path__=[])
    module(monkeypatch, "torch.utils.tensorboard.writer", SummaryWriter=Writer)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.of.somebody").write_text("not ours")
    assert fv.track(fv.load(run), "tensorboard", tmp_path) == [str(tmp_path / "run")]
    config, values = public(run)
    assert sorted(t for t in told if len(t) == 3) == sorted(values)
    text = next(t[1] for t in told if t[0] == "run")
    assert "SIMULATED" in text
    assert f"|epsilon|{config['epsilon']}" in text
    fv.track(fv.load(run), "tensorboard", tmp_path)  # replaces what it wrote, and nothing else
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert len(names) == 2
    assert "events.of.somebody" in names


@pytest.mark.parametrize("tracker", ["mlflow", "tensorboard"])
def test_a_tracker_that_is_not_installed(run, monkeypatch, tmp_path, tracker):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == tracker else found(name, *a))
    with pytest.raises(FedveilError, match=f"needs the library {tracker}") as e:
        fv.track(fv.load(run), tracker, tmp_path)
    assert e.value.hint == f"pip install 'fedveil[{tracker}]'"
    done = CliRunner().invoke(cli.build(), ["track", str(run), f"--{tracker}", str(tmp_path)])
    assert isinstance(done.exception, FedveilError)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_and_none(run, tmp_path):
    with pytest.raises(UsageError, match="unknown tracker 'wandb'") as e:
        fv.track(fv.load(run), "wandb", tmp_path)
    assert "mlflow, tensorboard" in e.value.hint
    done = CliRunner().invoke(cli.build(), ["track", str(run)])
    assert isinstance(done.exception, UsageError)


def test_the_command(run, mlflow, tmp_path):
    done = CliRunner().invoke(cli.build(), ["track", str(run), "--mlflow", str(tmp_path)])
    assert done.exit_code == 0, done.exception
    assert "mlflow: file://" in done.output
    assert len(mlflow.runs) == 1


def _refuse(*_: Any) -> Any:
    raise AssertionError("a connection was asked for")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="pip install 'fedveil[mlflow]'")
@pytest.mark.filterwarnings("default")
def test_the_real_mlflow_writes_files_and_opens_no_connection(run, monkeypatch, tmp_path):
    monkeypatch.setattr(socket.socket, "connect", _refuse)
    monkeypatch.setattr(socket, "getaddrinfo", _refuse)
    for _ in range(2):
        fv.track(fv.load(run), "mlflow", tmp_path)
    lines = [p.read_text().splitlines() for p in tmp_path.rglob("metrics/epsilon")]
    assert [len(x) for x in lines] == [STEPS]
    values = sorted(v for k, v, _ in public(run)[1] if k == "epsilon")
    assert sorted(float(line.split()[1]) for line in lines[0]) == pytest.approx(values)
    assert {p.name for p in tmp_path.rglob("tags/*")} == {"claim", "fedveil.session", "mlflow.runName", "status"}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="pip install 'fedveil[tensorboard]'")
@pytest.mark.filterwarnings("default")
def test_the_real_tensorboard_reads_what_was_written(run, tmp_path):
    fv.track(fv.load(run), "tensorboard", tmp_path)
    loader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = loader.EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for name in ("accuracy", "epsilon"):
        wanted = [v for k, v, _ in public(run)[1] if k == name]
        assert [s.value for s in events.Scalars(name)] == pytest.approx(wanted, rel=1e-6)
        assert [s.step for s in events.Scalars(name)] == list(range(1, STEPS + 1))
