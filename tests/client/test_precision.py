"""Single precision at a site: the default, written down before the first charge; float64 where its owner says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedveil.client import round as line
from fedveil.client import train
from fedveil.client.egress.ledger_rows import check_rows
from fedveil.common.errors import DeviceError, PolicyRefusal
from fedveil.common.journal import Row
from fedveil.common.settings import TrainingSection
from fedveil.common.workload.model import ModelSpec
from fedveil.privacy.dp.clipping import ClippedSum

CNN = ModelSpec(name="cnn", inputs=144, classes=10, hidden=(8, 8))


def accepted(site) -> Row:
    (row,) = site.ledger.journal.of_kind("plan.accepted")
    return row


def test_without_a_word_of_the_owner_everything_is_float32(world):
    w = world(sum="plain")
    site = w.sites[0]
    line.join(site, w.proposal())
    assert TrainingSection().precision == site.precision == "float32"
    assert train.clipper(CNN, "auto", "cpu").precision == "float32"
    row = accepted(site)
    assert row.body["precision"] == "float32"
    check_rows([row], site.id, None)
    assert not list(site.ledger.journal.of_kind("spend"))  # written before anything is charged


def test_what_the_owner_asks_for_is_obeyed_and_noted(world):
    w = world(sum="plain")
    site = w.sites[0]
    site.precision = "float64"
    line.join(site, w.proposal())
    assert "precision" not in accepted(site).body
    assert site.clipper(site.session(w.session)).precision == "float64"


@pytest.fixture
def on_a_gpu(world, monkeypatch):
    """Without a GPU: a clipper that says it is on one. What its steps raise is the second value's only entry."""
    w = world(sum="plain")
    steps, raises = train.clipper(w.plan.network, "closed", "cpu"), []

    def computed(X, y, clip, seats, persons, capacity):
        for error in raises:
            raise error
        return ClippedSum(np.zeros(steps.size), len(X), 0)

    monkeypatch.setattr(steps, "device", torch.device("cuda"))
    monkeypatch.setattr(steps, "clipped_sum", computed)
    return w, steps, raises


def step(w, steps):
    site = w.sites[0]
    return train.site_sum(steps, w.plan, np.zeros(steps.size, np.float32), site.X, site.y, 12)


def test_a_gpus_memory_is_given_back_after_the_run_and_not_after_a_step(on_a_gpu, monkeypatch):
    (w, steps, _), given = on_a_gpu, []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append(len(given)))
    line.join(w.sites[0], w.proposal())
    session = w.sites[0].session(w.session)
    session.clipper = steps
    step(w, steps)
    assert given == []
    session.release()
    assert given == [0]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), torch.AcceleratorError("lost")])
def test_a_lost_gpu_ends_the_step_by_its_name_before_any_charge(on_a_gpu, monkeypatch, error):
    w, steps, raises = on_a_gpu
    raises.append(error)
    monkeypatch.setattr(train, "failed", lambda error, device: device.type == "cuda")
    with pytest.raises(DeviceError, match="nothing was charged") as e:
        step(w, steps)
    assert "no memory" not in str(e.value)
    assert not list(w.sites[0].ledger.journal.of_kind("spend"))


def test_an_error_on_a_gpu_that_still_computes_does_not_show(on_a_gpu, monkeypatch):
    w, steps, raises = on_a_gpu
    monkeypatch.setattr(train, "failed", lambda error, device: False)
    raises.append(RuntimeError("a record's fault"))
    assert not step(w, steps).any()


@pytest.mark.parametrize("said", ["float64", "float16", 4711, None])
def test_no_other_precision_leaves(world, said):
    w = world(sum="plain")
    line.join(w.sites[0], w.proposal())
    row = accepted(w.sites[0])
    row.body["precision"] = said
    with pytest.raises(PolicyRefusal):
        check_rows([row], w.sites[0].id, None)


def test_site_toml_knows_two_precisions():
    assert TrainingSection(precision="float32").precision == "float32"
    with pytest.raises(ValidationError):
        TrainingSection.model_validate({"precision": "bfloat16"})


@pytest.mark.parametrize("engine", ["auto", "book", "vmap"])
def test_the_sum_is_the_same_to_single_precision(engine):
    rng = np.random.default_rng(5)
    X, y = rng.normal(size=(40, CNN.inputs)).astype(np.float32), rng.integers(0, 10, 40)
    expected = train.clipper(CNN, engine, "cpu", "float64").clipped_sum(X, y, 0.3).values
    found = train.clipper(CNN, engine, "cpu").clipped_sum(X, y, 0.3).values
    assert np.linalg.norm(found - expected) <= 2e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize(("accepted_under", "since"), [("float64", "float32"), ("float32", "float64")])
def test_a_session_keeps_the_precision_that_was_written_down(world, accepted_under, since):
    """The owner changes the settings and starts the site again within a run."""
    w = world(sum="plain")
    w.sites[0].precision = accepted_under
    w.begin()
    line.contribute(w.sites[0], w.request(1))
    site = w.reopen(0)
    site.precision = since
    line.contribute(site, w.request(2))
    assert site.session(w.session).precision == accepted_under
    assert accepted(site).body.get("precision", "float64") == accepted_under
