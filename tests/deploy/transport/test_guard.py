"""Patience, strikes and room, without a network and without waiting."""

from __future__ import annotations

import threading

from fedveil.deploy.transport.guard import Bounds, Intake, Pace, Strikes

B = Bounds(stall=10, floor=100, held=1000, burst=3, refill=0.5)


def test_a_transfer_that_stands_still_is_late() -> None:
    pace = Pace(B, 0)
    assert not pace.late(10)
    assert pace.late(10.1)
    pace.moved(10**9, 10)
    assert not pace.late(20), "what it sent before does not buy it a pause longer than any other"
    assert pace.late(20.1)


def test_a_drip_is_late_and_a_slow_line_is_not() -> None:
    drip, slow = Pace(B, 0), Pace(B, 0)
    late = 0
    for second in range(1, 100):
        drip.moved(1, second)
        slow.moved(100, second)
        late = late or (drip.late(second) and second)
        assert not slow.late(second)
    assert 10 < late < 13


def test_time_that_the_server_took_itself_does_not_count() -> None:
    pace = Pace(B, 0)
    pace.pause(100)
    assert not pace.late(109)
    assert pace.late(111)


def test_failures_are_forgiven_slowly() -> None:
    strikes = Strikes(B, 0)
    for _ in range(3):
        assert strikes.allows(0)
        strikes.count(0)
    assert not strikes.allows(0)
    assert not strikes.allows(1.9)
    assert strikes.allows(2.1)
    for _ in range(100):
        strikes.count(2.1)
    assert not strikes.allows(3.9), "the bucket has no depth below empty and no memory beyond it"
    assert strikes.allows(4.2)
    assert Strikes(B, 0).allows(10**9)


def intake() -> tuple[Intake, threading.Lock]:
    lock = threading.Lock()
    return Intake(B, lock), lock


def tried(room: Intake, name: str, size: int) -> bool:
    """Whether there is room at once."""
    asked: list[int] = []
    return room.reserve(name, size, lambda: not asked and not asked.append(1), lambda: True)


def test_room_is_bounded_and_one_reply_of_any_size_fits() -> None:
    room, lock = intake()
    with lock:
        assert tried(room, "huge", 10**12)
        assert not tried(room, "small", 1)
        room.release("huge")
        assert tried(room, "a", 600)
        assert tried(room, "b", 400)
        assert not tried(room, "c", 1)
        assert room.held == 1000
        room.release("a")
        room.release("a")
        assert tried(room, "c", 600)


def test_what_the_app_waits_for_gets_in_over_what_it_does_not_wait_for() -> None:
    room, lock = intake()
    with lock:
        assert tried(room, "nobody asks", 1000)
        room.want("a", "b")
        assert not tried(room, "neither", 1)
        assert tried(room, "a", 900), "or the app would wait for ever"
        assert not tried(room, "b", 900), "its turn comes when the app has taken the first"
        room.release("a")
        assert tried(room, "b", 900)
        room.unwant("b")
        room.release("b")
        assert not tried(room, "b", 900)


def test_half_sent_replies_make_way() -> None:
    room, lock = intake()
    with lock:
        assert tried(room, "parked", 1000)

        def evict() -> bool:
            room.release("parked")
            return True

        assert room.reserve("a", 500, lambda: True, evict)


def test_a_release_wakes_whoever_waits() -> None:
    room, lock = intake()
    with lock:
        assert tried(room, "a", 1000)
    got: list[bool] = []

    def wait() -> None:
        with lock:
            got.append(room.reserve("b", 1000, lambda: True, lambda: False))

    thread = threading.Thread(target=wait)
    thread.start()
    with lock:
        room.release("a")
    thread.join(600)
    assert got == [True]
