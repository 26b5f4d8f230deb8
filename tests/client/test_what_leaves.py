"""What a site's app says when something fails: the error's class, and its words only if no record can be in them."""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from torch import nn

from fedveil.client import app as client_app
from fedveil.client import round as line
from fedveil.client import train
from fedveil.common import errors, flwr_adapter
from fedveil.common.errors import FedveilError
from fedveil.common.wire import Packet

CANARY = "4711-patient-Mayer"
SITE = SimpleNamespace(ledger=SimpleNamespace(journal=SimpleNamespace(dated=nullcontext)))  # of which nothing is asked


def every_error() -> list[type[FedveilError]]:
    todo, out = [FedveilError], []
    while todo:
        cls = todo.pop()
        out.append(cls)
        todo.extend(cls.__subclasses__())
    return [c for c in out if c.__module__ == errors.__name__]


SPOKEN = {
    "PolicyRefusal", "PlanError", "BudgetExhausted", "ProtocolError", "WireError", "SecureSumError", "HelperRefusal",
    "FreshLedger", "IdentityError", "ModelError", "StateMismatch", "SumTooLong", "UnverifiedOpening",
}  # fmt: skip


def ask(site, packet: Packet, action: str) -> Message:
    """One message through Flower's app, as an engine delivers it."""

    @contextmanager
    def resolve(_: Context):
        if isinstance(site, BaseException):
            raise site
        yield site

    message = flwr_adapter.request(packet, to=2, action=action, round=1)
    flwr_adapter.stamp(message)
    return flwr_adapter.answer(client_app.make_app(resolve), message, Context(1, 2, {}, RecordDict(), {}))


def text(reply: Message) -> str:
    return (reply.error.reason or "") if reply.has_error() else repr(flwr_adapter.from_record(reply.content, _LIMITS))


_LIMITS = flwr_adapter.Limits()


@pytest.mark.parametrize("cls", every_error(), ids=lambda c: c.__name__)
@pytest.mark.parametrize("where", ["handler", "opening the site"])
def test_only_classes_that_never_look_at_data_speak(cls, where, monkeypatch, caplog):
    error = cls(f"row 17 says {CANARY}", hint=f"look at {CANARY}")

    def failing(*_: object) -> Packet:
        raise error

    monkeypatch.setattr(line, "contribute", failing)
    with caplog.at_level(logging.WARNING):
        reply = ask(error if where != "handler" else SITE, Packet({"kind": "contribute"}), "train.contribute")
    said = flwr_adapter.reply_error(reply)
    assert said is not None
    assert said.code == cls.__name__
    assert (CANARY in text(reply)) is (cls.__name__ in SPOKEN)
    assert CANARY in caplog.text  # the site's own log keeps the words


@pytest.mark.parametrize("cls", [ValueError, KeyError, RuntimeError, AssertionError, MemoryError, UnicodeError])
def test_any_other_exception_says_nothing_at_all(cls, monkeypatch, caplog):
    def failing(*_: object) -> Packet:
        raise cls(CANARY)

    monkeypatch.setattr(line, "contribute", failing)
    reply = ask(SITE, Packet({"kind": "contribute"}), "train.contribute")
    assert reply.has_error()
    assert CANARY not in text(reply)
    assert cls.__name__ not in text(reply)
    assert CANARY not in caplog.text  # a library's words may quote a record
    assert f"{cls.__name__} at " in caplog.text
    assert "test_what_leaves.py:" in caplog.text


BROKEN = {
    "too few features": lambda X, y: (X[:, :2], y),
    "a class out of range": lambda X, y: (X, y + 7),
    "a negative class": lambda X, y: (X, y - 9),
    "labels of another length": lambda X, y: (X, y[:-1]),
    "all NaN": lambda X, y: (X * np.nan, y),
    "no records": lambda X, y: (X[:0], y[:0]),
    "text": lambda X, y: (np.full(X.shape, CANARY, dtype=object), y),
    "not a table": lambda X, y: (None, y),
}


@pytest.mark.parametrize("engine", ["closed", "opacus"])
@pytest.mark.parametrize("broken", BROKEN, ids=lambda x: x)
def test_broken_data_release_noise_and_nothing_else(world, broken, engine, caplog):
    w = world(sum="plain").begin()
    site = w.sites[0]
    site.engine = engine
    site.X, site.y = BROKEN[broken](site.X, site.y)
    reply = ask(site, w.request(), "train.contribute")
    assert not reply.has_error()
    packet = flwr_adapter.from_record(reply.content, _LIMITS)
    values = np.frombuffer(packet.buffers["values"], "<i8")
    assert w.spends() == [1]
    assert 0 < np.abs(values).max() < 8 * w.plan.share_std  # noise of the share's size, around zero
    assert CANARY not in text(reply)


def test_an_unforeseen_exception_in_the_step_does_not_show(world, monkeypatch, caplog):
    class Odd(Exception):
        """Of no class that anybody thought of."""

    def odd(*_: object) -> None:
        raise Odd(CANARY)

    w = world(sum="plain").begin()
    monkeypatch.setattr(train.clipping.Clipper, "clipped_sum", odd)
    reply = ask(w.sites[0], w.request(), "train.contribute")
    assert not reply.has_error()
    assert w.spends() == [1]
    assert CANARY not in text(reply) + caplog.text


def test_the_reply_to_every_message_of_an_honest_run_holds_no_record(world):
    w = world().begin()
    site = w.sites[0]
    site.X[:] = 0.123456789
    needle = site.X[:1].tobytes()
    assert needle in site.X.tobytes()  # the search finds what is there
    for packet, action in (
        (w.proposal(), "query.join"), (w.request(), "train.contribute"), (w.finish(), "query.finish"),
    ):  # fmt: skip
        reply = ask(site, packet, action)
        assert not reply.has_error()
        answer = flwr_adapter.from_record(reply.content, _LIMITS)
        blob = repr(answer.header).encode() + b"".join(answer.buffers.values())
        assert needle not in blob
        assert b"0.1234567" not in blob


class TestModels:
    def test_a_model_that_couples_records_is_refused_when_a_site_joins(self, world, monkeypatch):
        w = world()
        monkeypatch.setattr(train, "build", lambda spec: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
        train.clipper.cache_clear()
        reply = ask(w.sites[0], w.proposal(), "query.join")
        train.clipper.cache_clear()
        said = flwr_adapter.reply_error(reply)
        assert isinstance(said, errors.ModelError)
        assert "BatchNorm1d" in said.message
        assert "GroupNorm" in said.hint
        assert w.spends() == []


class TestTheStep:
    def test_a_record_moves_the_sum_by_at_most_the_clip(self, world):
        w = world()
        site, plan = w.sites[0], w.plan
        weights = np.linspace(-1, 1, plan.model.parameters).astype(np.float32)
        site.X[3] *= 1e4
        for engine in ("closed", "opacus"):
            steps = train.clipper(plan.model, engine, "cpu")
            whole = train.site_sum(steps, plan, weights, site.X, site.y, 12)
            for i in range(len(site.X)):
                keep = np.arange(len(site.X)) != i
                less = train.site_sum(steps, plan, weights, site.X[keep], site.y[keep], 12)
                assert np.linalg.norm(whole - less) <= plan.clip * (1 + 1e-4)  # other places: float32 rounds otherwise

    def test_a_client_moves_the_sum_by_at_most_the_clip_and_a_broken_one_by_nothing(self, world):
        w = world(mode="client", few_clients=True, local_steps=5, limits={"min_noise_multiplier": 0.0})
        site, plan = w.sites[0], w.plan
        steps = train.clipper(plan.model, "closed", "cpu")
        zero = np.zeros(plan.model.parameters, np.float32)
        update = train.site_sum(steps, plan, zero, 100 * site.X, site.y, 12)
        assert 0 < np.linalg.norm(update) <= plan.clip * (1 + 1e-9)
        for X, y in ((site.X * np.nan, site.y), (site.X[:0], site.y[:0]), (site.X, site.y + 5)):
            assert not train.site_sum(steps, plan, zero, X, y, 12).any()

    def test_poisson_sampling_takes_each_record_at_the_plans_rate(self, world):
        plan = world(sample_rate=0.25).plan
        steps = train.clipper(plan.model, "closed", "cpu")
        zero = np.zeros(plan.model.parameters, np.float32)
        X, y = np.ones((1, 3), np.float32), np.zeros(1, np.int64)
        hits = sum(bool(train.site_sum(steps, plan, zero, X, y, 12).any()) for _ in range(800))
        assert abs(hits - 200) < 5 * (800 * 0.25 * 0.75) ** 0.5

    def test_the_device(self):
        assert train.pick_device("cpu") == "cpu"
        assert train.pick_device("auto") in ("cpu", "cuda")
