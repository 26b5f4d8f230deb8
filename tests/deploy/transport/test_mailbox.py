"""The mailbox without a network: who is owed what, and when waiting ends."""

import threading

import pytest
from flwr.app import Message

from fedveil.common import flwr_adapter as flower
from fedveil.common.errors import TransportError, WireError
from fedveil.common.units import SiteId
from fedveil.common.wire import Limits, Packet
from fedveil.deploy.transport import mailbox
from fedveil.deploy.transport.codec import Decoder
from fedveil.deploy.transport.mailbox import Mailbox, Parcel, Session

A, B = SiteId("a"), SiteId("b")


def message(n: int = 0, ttl: float = 60) -> Message:
    return flower.request(Packet({"kind": "q", "n": n}), to=5, action="query", round=n, ttl=ttl)


def given(box: Mailbox, site: SiteId, session: Session) -> Message:
    parcel = box.next_parcel(site, session)
    assert isinstance(parcel, Parcel)
    decoder = Decoder(Limits())
    for piece in parcel.pieces:
        decoder.feed(piece)
    return decoder.result()


def answer(box: Mailbox, site: SiteId, m: Message) -> bool:
    return box.accept(site, m.metadata.message_id, flower.reply(Packet({"kind": "a"}), m))


def test_one_message_at_a_time_in_order_and_again_after_a_new_session() -> None:
    box = Mailbox([A], grace=1)
    first = box.attach(A, "one")
    ids = [box.put(A, message(n)) for n in range(3)]
    m = given(box, A, first)
    box.detach(A, first)
    assert box.next_parcel(A, first) == ""
    second = box.attach(A, "two")
    again = given(box, A, second)
    assert again.metadata.message_id == m.metadata.message_id == ids[0]
    order = [again]
    for _ in range(2):
        assert answer(box, A, order[-1])
        order.append(given(box, A, second))
    assert [x.metadata.message_id for x in order] == ids
    assert not answer(box, A, order[0]), "an answer counts once"
    assert len(box.take(ids)) == 2
    assert box.take(ids) == []


def test_a_session_ends_what_it_replaces_and_nothing_else() -> None:
    box = Mailbox([A, B], grace=1)
    old = box.attach(A, "one")
    with pytest.raises(TransportError, match="another process"):
        box.attach(A, "two")
    new = box.attach(A, "one")
    assert not old.alive
    box.detach(A, old)
    assert box.connected() == [A]
    assert new.alive
    box.attach(B, "two")
    assert box.connected() == [A, B]
    box.detach(A, new)
    box.attach(A, "two")


def test_answers_are_taken_from_the_debtor_only() -> None:
    box = Mailbox([A, B], grace=1)
    session = box.attach(A, "one")
    message_id = box.put(A, message())
    m = given(box, A, session)
    assert not answer(box, B, m)
    assert not box.owes(B, message_id)
    assert box.owes(A, message_id)
    with pytest.raises(TransportError):
        box.begin_reply(B, "one", Limits())
    incoming = box.begin_reply(A, "one", Limits())
    with pytest.raises(TransportError, match="under way"):
        box.begin_reply(A, "one", Limits())
    box.end_reply(A, incoming, keep=True)
    with pytest.raises(TransportError, match="half-sent"):
        box.begin_reply(A, "one", Limits(), 17)
    box.begin_reply(A, "one", Limits())


def test_an_unreadable_answer_is_an_error_for_the_app() -> None:
    box = Mailbox([A], grace=1)
    message_id = box.put(A, message())
    assert box.accept(A, message_id, WireError("too large"))
    [reply] = box.collect([message_id], None)
    assert isinstance(flower.reply_error(reply), WireError)


class Clock:
    """The mailbox's clock; it stands still until a test moves it."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(mailbox, "time", made)
    return made


class Collecting(threading.Thread):
    """Waits for replies in a thread of its own."""

    def __init__(self, box: Mailbox, ids: list[str], timeout: float | None) -> None:
        super().__init__(daemon=True)
        self._work, self.came = lambda: box.collect(ids, timeout), list[Message]()
        self.start()

    def run(self) -> None:
        self.came += self._work()

    def waits(self) -> bool:
        """Whether it goes on waiting, as far as a quarter of a second shows."""
        self.join(0.25)
        return self.is_alive()

    def ended(self) -> list[Message]:
        self.join(600)
        assert not self.is_alive()
        return self.came


def test_waiting_ends_by_grace_or_by_timeout() -> None:
    """By the real clock. What is not there would be waited for for ever."""
    box = Mailbox([A], grace=0.2)
    assert box.collect([box.put(A, message())], None) == []  # never connected: the grace runs from the start
    session = box.attach(A, "one")
    assert box.collect([box.put(A, message())], 0.2) == []  # connected and silent: the timeout rules
    timer = threading.Timer(0.1, lambda: box.detach(A, session))
    timer.start()
    assert box.collect([box.put(A, message())], None) == []  # leaves while it is waited for
    timer.join()


def test_a_site_that_is_away_is_waited_for_once(clock: Clock) -> None:
    box = Mailbox([A], grace=3600.0)
    clock.now += 3599.5
    waiting = Collecting(box, [box.put(A, message())], None)
    assert waiting.waits()
    clock.now += 1
    assert waiting.ended() == []
    assert box.collect([box.put(A, message())], None) == []  # still away: no second wait
    session = box.attach(A, "one")
    box.detach(A, session)
    waiting = Collecting(box, [box.put(A, message())], None)
    assert waiting.waits(), "the grace begins anew"
    clock.now += 3601
    with box._lock:
        box._arrived.notify_all()
    assert waiting.ended() == []
    assert box.collect([], None) == []
    session = box.attach(A, "one")
    box.put(A, message(9))
    assert given(box, A, session).metadata.group_id == "9", "what was waited for in vain is withdrawn"


def test_an_answer_that_moves_is_waited_for_beyond_the_time_limit_and_not_for_ever(clock: Clock) -> None:
    """The limit of 0.3 s is for standing still; three times as much is the end."""
    box = Mailbox([A], grace=60)
    session = box.attach(A, "one")
    for ends_at in (0.8, 1.0):
        message_id = box.put(A, message())
        asked, began = given(box, A, session), clock.now
        waiting = Collecting(box, [message_id], 0.3)
        assert waiting.waits()
        incoming = box.begin_reply(A, "one", Limits())
        incoming.message_id = message_id
        clock.now = began + ends_at
        if ends_at < 3 * 0.3:
            assert waiting.waits()
            assert answer(box, A, asked)
            assert len(waiting.ended()) == 1
        else:
            assert waiting.ended() == []
            assert not answer(box, A, asked)
        box.end_reply(A, incoming, keep=False)


def test_expired_messages_are_not_delivered(clock: Clock) -> None:
    box = Mailbox([A], grace=60)
    stale = box.put(A, message(1, ttl=0.01))
    fresh = box.put(A, message(2))
    clock.now += 0.05
    assert given(box, A, box.attach(A, "one")).metadata.message_id == fresh
    assert box.collect([stale], None) == [], "the grace was waited for"


def test_the_end_reaches_every_session() -> None:
    box = Mailbox([A, B], grace=1)
    sessions = {s: box.attach(s, s) for s in (A, B)}
    box.put(A, message())
    given(box, A, sessions[A])
    ends: dict[str, object] = {}

    def stream(site: SiteId) -> None:
        ends[site] = box.next_parcel(site, sessions[site])
        box.detach(site, sessions[site])

    threads = [threading.Thread(target=stream, args=(s,)) for s in (A, B)]
    for t in threads:
        t.start()
    box.end("finished", 600)
    for t in threads:
        t.join(600)
    assert ends == {A: "finished", B: "finished"}
    assert box.connected() == []


def test_replies_are_given_away_in_the_order_in_which_they_come() -> None:
    box = Mailbox([A, B], grace=1)
    sessions = {s: box.attach(s, s) for s in (A, B)}
    ids = {s: box.put(s, message()) for s in (A, B)}
    asked = {s: given(box, s, sessions[s]) for s in (A, B)}
    replies = box.replies(ids.values(), 20)
    assert answer(box, B, asked[B])
    first = next(replies)
    assert first.metadata.reply_to_message_id == ids[B]
    assert box._replies == {}, "the mailbox keeps nothing of what it gave away"
    timer = threading.Timer(0.1, lambda: answer(box, A, asked[A]))
    timer.start()
    assert [m.metadata.reply_to_message_id for m in replies] == [ids[A]]
    timer.join()


def test_an_iterator_that_is_closed_withdraws_what_was_not_answered_and_what_was_not_taken() -> None:
    box = Mailbox([A, B], grace=1)
    sessions = {s: box.attach(s, s) for s in (A, B)}
    ids = [box.put(A, message(1)), box.put(B, message(2)), box.put(A, message(3))]
    asked = {s: given(box, s, sessions[s]) for s in (A, B)}
    replies = box.replies(ids, 20)
    assert answer(box, A, asked[A])
    assert next(replies).metadata.reply_to_message_id == ids[0]
    assert answer(box, B, asked[B])
    replies.close()
    assert (box._replies, box._owner) == ({}, {})
    assert not box.owes(A, ids[2])


def test_what_came_in_time_is_still_given_after_the_time_and_nothing_that_came_later(clock: Clock) -> None:
    box = Mailbox([A, B], grace=60)
    sessions = {s: box.attach(s, s) for s in (A, B)}
    ids = {s: box.put(s, message()) for s in (A, B)}
    asked = {s: given(box, s, sessions[s]) for s in (A, B)}
    late = box.put(B, message(2))
    replies = box.replies([*ids.values(), late], 0.2)
    for s in (A, B):
        assert answer(box, s, asked[s])
    assert next(replies).metadata.reply_to_message_id == ids[A]
    clock.now += 0.3  # the time is over while the first reply is worked on
    assert next(replies).metadata.reply_to_message_id == ids[B]
    assert not box.owes(B, late)
    assert list(replies) == []
