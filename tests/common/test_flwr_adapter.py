"""Packets through Flower: exact round trips, refused shapes, errors that say only what they may."""

import json
import logging
import os
import subprocess
import sys

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.server.utils.validator import validate_message
from hypothesis import given
from hypothesis import strategies as st

from fedveil.common import errors
from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import BudgetExhausted, FedveilError, PlanError, ProtocolError, WireError
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("aä€𝄞\n"),
    lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text("abc_é", max_size=5), s, max_size=4),
    max_leaves=12,
)
PACKETS = st.builds(
    Packet,
    st.dictionaries(st.text("abcü", max_size=6), JSON, max_size=5),
    st.dictionaries(st.text("abc_9", min_size=1, max_size=8), st.binary(max_size=300), max_size=5),
)


@given(PACKETS)
def test_record_round_trip(packet: Packet) -> None:
    back = flower.from_record(flower.to_record(packet), Limits())
    assert back == packet


def test_buffers_are_shared_not_copied() -> None:
    data = bytes(1000)
    record = flower.to_record(Packet({"kind": "x"}, {"a": data}))
    assert flower.from_record(record, Limits()).buffers["a"] is data


def good(**arrays: Array) -> RecordDict:
    return RecordDict(
        {
            flower.HEADER: ConfigRecord({"json": b'{"kind":"x"}'}),
            flower.BUFFERS: ArrayRecord(arrays or {"a": Array("uint8", (3,), flower.STYPE, b"abc")}),
        }
    )


def test_the_hand_made_record_is_accepted() -> None:
    assert flower.from_record(good(), Limits()) == Packet({"kind": "x"}, {"a": b"abc"})


def replaced(key: str, record: object) -> RecordDict:
    content = good()
    del content[key]
    content[key] = record  # type: ignore[assignment]
    return content


def extended() -> RecordDict:
    content = good()
    content["more"] = ConfigRecord({})
    return content


HOSTILE = {
    "empty": RecordDict(),
    "extra record": extended(),
    "swapped types": replaced(flower.HEADER, ArrayRecord({})),
    "metrics": replaced(flower.BUFFERS, MetricRecord({"a": 1})),
    "extra key": replaced(flower.HEADER, ConfigRecord({"json": b"{}", "b": 1})),
    "str header": replaced(flower.HEADER, ConfigRecord({"json": "{}"})),
    "list header": replaced(flower.HEADER, ConfigRecord({"json": b"[]"})),
    "not JSON": replaced(flower.HEADER, ConfigRecord({"json": b"\xff{"})),
    "NaN": replaced(flower.HEADER, ConfigRecord({"json": b'{"a":NaN}'})),
    "duplicate key": replaced(flower.HEADER, ConfigRecord({"json": b'{"a":1,"a":2}'})),
    "white space": replaced(flower.HEADER, ConfigRecord({"json": b'{"a": 1}'})),
    "deep": replaced(flower.HEADER, ConfigRecord({"json": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"})),
    "dtype": good(a=Array("float32", (3,), flower.STYPE, b"abc")),
    "stype": good(a=Array("uint8", (3,), "numpy.ndarray", b"abc")),
    "short": good(a=Array("uint8", (4,), flower.STYPE, b"abc")),
    "two dimensions": good(a=Array("uint8", (1, 3), flower.STYPE, b"abc")),
    "name": good(**{"../a": Array("uint8", (3,), flower.STYPE, b"abc")}),
    "many": good(**{f"b{i}": Array("uint8", (0,), flower.STYPE, b"") for i in range(65)}),
    "too much": good(a=Array("uint8", (2001,), flower.STYPE, bytes(2001))),
    "long header": replaced(flower.HEADER, ConfigRecord({"json": b'{"a":"' + b"x" * 2000 + b'"}'})),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_records_are_refused(case: str) -> None:
    with pytest.raises(WireError):
        flower.from_record(HOSTILE[case], Limits(header=1000, buffers=2000))


@pytest.mark.parametrize("data", [bytearray(b"x"), memoryview(b"x")])
def test_only_bytes_are_sent(data: bytes) -> None:
    with pytest.raises(WireError, match="not bytes"):
        flower.to_record(Packet({"kind": "x"}, {"a": data}))


def test_node_ids_are_stable_and_distinct() -> None:
    sites = [SiteId(f"site-{i}") for i in range(4096)]
    ids = [flower.node_id(s) for s in sites]
    assert len(set(ids)) == len(ids)
    assert all(flower.SERVER_NODE < i < 2**56 for i in ids)
    assert flower.node_id(SiteId("clinic-a")) == flower.node_id(SiteId("clinic-a"))


def test_request_and_reply_carry_flowers_metadata() -> None:
    flower.set_task_identity(77)
    q = flower.request(Packet({"kind": "q"}), to=5, action="train.contribute", round=3, ttl=60)
    message_id = flower.stamp(q)
    assert (q.metadata.run_id, q.metadata.dst_node_id, q.metadata.group_id) == (77, 5, "3")
    assert (q.metadata.message_type, q.metadata.ttl) == ("train.contribute", 60)
    a = flower.reply(Packet({"kind": "a"}), q)
    assert (a.metadata.reply_to_message_id, a.metadata.src_node_id) == (message_id, 5)


def asked() -> Message:
    m = flower.request(Packet({"kind": "q"}), to=5, action="query.join", round=0)
    flower.stamp(m)
    return m


def tree(cls: type[FedveilError] = FedveilError) -> list[type[FedveilError]]:
    # Flower's and the tests' own subclasses are not part of the documented tree.
    return [cls, *(c for sub in cls.__subclasses__() if sub.__module__ == errors.__name__ for c in tree(sub))]


@pytest.mark.parametrize("cls", tree(), ids=lambda c: c.__name__)
def test_every_error_of_the_tree_survives_the_way(cls: type[FedveilError]) -> None:
    back = flower.reply_error(flower.error_reply(cls("what ü", hint="do"), asked()))
    assert back is not None
    assert type(back) is cls
    assert (back.message, back.hint) == ("what ü", "do")


def test_content_is_no_error() -> None:
    assert flower.reply_error(flower.reply(Packet({"kind": "a"}), asked())) is None


def test_errors_are_cut_and_cleaned() -> None:
    back = flower.reply_error(flower.error_reply(PlanError("x\x1b[2J" * 9999, hint="h" * 99999), asked()))
    assert isinstance(back, PlanError)
    assert len(back.message) == 2000
    assert "\x1b" not in back.message
    assert len(back.hint) == 1000


SECRET = "row 17: patient Meier"
FOREIGN = {
    "flower's own": Error(2, SECRET),
    "no reason": Error(flower.ERROR_CODE, None),
    "not JSON": Error(flower.ERROR_CODE, SECRET),
    "a list": Error(flower.ERROR_CODE, json.dumps([SECRET])),
    "wrong keys": Error(flower.ERROR_CODE, json.dumps({"code": "DataError", "message": SECRET})),
    "wrong types": Error(flower.ERROR_CODE, json.dumps({"code": "DataError", "message": [SECRET], "hint": ""})),
    "too long": Error(flower.ERROR_CODE, json.dumps({"code": "DataError", "message": SECRET * 999, "hint": ""})),
    "unknown class": Error(flower.ERROR_CODE, json.dumps({"code": "OSError", "message": SECRET, "hint": ""})),
    "internal": Error(flower.ERROR_CODE, json.dumps({"code": "InternalError", "message": SECRET, "hint": SECRET})),
    "surrogate": Error(flower.ERROR_CODE, "\ud800" + SECRET),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_errors_lose_their_text(case: str) -> None:
    back = flower.reply_error(Message(FOREIGN[case], reply_to=asked()))
    assert type(back) is ProtocolError
    assert "Meier" not in str(back)


def app_that(raises: Exception | None) -> ClientApp:
    app = ClientApp()

    @app.query("join")
    def join(message: Message, context: Context) -> Message:
        if raises is not None:
            raise raises
        return flower.reply(Packet({"kind": "a"}), message)

    return app


CONTEXT = Context(1, 5, {}, RecordDict(), {})


def test_answer_gives_the_reply_with_an_id() -> None:
    q = asked()
    a = flower.answer(app_that(None), q, CONTEXT)
    assert flower.from_record(a.content, Limits()).kind == "a"
    assert a.metadata.reply_to_message_id == q.metadata.message_id
    assert a.metadata.message_id


def test_the_answer_to_a_delivered_message_is_as_flower_makes_it() -> None:
    """Flower's own engines mark a message as delivered, and refuse an answer that inherits the mark."""
    q = asked()
    q.metadata.delivered_at = "2026-01-01T00:00:00"
    ours, flowers = flower.reply(Packet({"kind": "a"}), q), Message(RecordDict(), reply_to=q)
    for out in (ours, flowers):
        flower.stamp(out)
    assert validate_message(ours, is_reply_message=True) == validate_message(flowers, is_reply_message=True) == []
    own = {"_message_id", "_created_at", "_ttl"}
    assert {k: v for k, v in vars(ours.metadata).items() if k not in own} == {
        k: v for k, v in vars(flowers.metadata).items() if k not in own
    }


def test_our_errors_are_answered_and_others_stay_at_home(caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(
        flower.reply_error(flower.answer(app_that(BudgetExhausted("spent")), asked(), CONTEXT)), BudgetExhausted
    )
    with caplog.at_level(logging.ERROR, "fedveil.transport"):
        out = flower.answer(app_that(ValueError(SECRET)), asked(), CONTEXT)
    assert "Meier" not in (out.error.reason or "")
    assert type(flower.reply_error(out)) is ProtocolError
    # A library's words may quote a record: the site's own log has the class and the place, and not the words.
    assert "Meier" not in caplog.text
    assert "ValueError at " in caplog.text
    assert "test_flwr_adapter.py:" in caplog.text


def test_an_unknown_action_is_an_error_reply() -> None:
    m = flower.request(Packet({"kind": "q"}), to=5, action="query.nothing", round=0)
    assert type(flower.reply_error(flower.answer(app_that(None), m, CONTEXT))) is ProtocolError


def test_a_copy_shares_bytes_and_nothing_else() -> None:
    config, metrics = ConfigRecord({"l": [1, 2], "s": "x"}), MetricRecord({"x": 1.5})
    m = Message(RecordDict({"c": config, "a": good()[flower.BUFFERS], "m": metrics}), 5, "train")
    c = flower.copied(m)
    assert c.content == m.content
    assert c.content["a"]["a"].data is m.content["a"]["a"].data  # type: ignore[index,union-attr]
    c.content["c"]["l"].append(3)  # type: ignore[index,union-attr]
    c.content["a"]["a"].data = b""  # type: ignore[index,union-attr]
    c.metadata.dst_node_id = 6
    del c.content["m"]
    assert m.content["c"]["l"] == [1, 2]  # type: ignore[index]
    assert m.content["a"]["a"].data == b"abc"  # type: ignore[index,union-attr]
    assert m.metadata.dst_node_id == 5
    assert "m" in m.content


def test_importing_us_silences_flower_even_if_it_came_first() -> None:
    code = (
        "import flwr.supercore.telemetry as t; import logging, os;"
        "from fedveil.common import flwr_adapter as f; f.quiet_flower();"
        "print(t.FLWR_TELEMETRY_ENABLED, os.environ['FLWR_TELEMETRY_ENABLED'], os.environ['FLWR_DISABLE_UPDATE_CHECK'],"
        "os.environ['FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION'], logging.getLogger('flwr').level)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_")}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.split() == ["0", "0", "1", "1", "30"]
