"""What a peer may ask of the server: how fast it must move, how often it may fail, how much is kept for it.

No I/O and no threads. The clock is an argument, in seconds, so that tests need not wait. Time has one rule: a peer that
moves bytes at a decent pace is waited for, any other is given up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """The server's patience and memory.

    Attributes:
        stall: seconds for which a transfer may stand still.
        floor: bytes per second that a transfer must reach on average, after its first ``stall`` seconds.
        held: bytes of replies that may lie in memory at a time: arriving, or come and not yet taken by the app. One
            reply is let in whatever its size.
        burst: calls of one site that may fail in a row: refused, broken, or for nothing.
        refill: how many of them are forgiven in a second.
        longest: while bytes move, a question may take up to this many times its time limit.
    """

    stall: float = 20.0
    floor: float = 128 << 10
    held: int = 256 << 20
    burst: int = 100
    refill: float = 2.0
    longest: float = 3.0


class Pace:
    """The speed of one transfer."""

    def __init__(self, bounds: Bounds, now: float) -> None:
        self._bounds = bounds
        self._began = self._last = now
        self._bytes = 0

    def moved(self, count: int, now: float) -> None:
        """``count`` bytes have passed."""
        self._bytes += count
        self._last = now

    def pause(self, seconds: float) -> None:
        """Time that was our own fault does not count."""
        self._began += seconds
        self._last += seconds

    def late(self, now: float) -> bool:
        """Whether it stands still, or is slower than the floor."""
        b = self._bounds
        return now - self._last > b.stall or now - self._began > b.stall + self._bytes / b.floor


class Strikes:
    """A bucket of calls that may come to nothing."""

    def __init__(self, bounds: Bounds, now: float) -> None:
        self._bounds, self._left, self._at = bounds, float(bounds.burst), now

    def allows(self, now: float) -> bool:
        """Whether a further call is heard."""
        self._refill(now)
        return self._left >= 1

    def count(self, now: float) -> None:
        """One call was for nothing."""
        self._refill(now)
        self._left = max(0.0, self._left - 1)

    def _refill(self, now: float) -> None:
        self._left = min(self._bounds.burst, self._left + (now - self._at) * self._bounds.refill)
        self._at = now


class Intake:
    """Bytes of replies in memory, per message.

    A reply waits for room before its buffers are read, so that the peer's own flow control stops it. The app may wait
    for particular replies while others fill the room. To prevent a dead-lock, such a reply is let in over the bound
    whenever no other that the app waits for is held. So one of them is always on its way to the app.

    Args:
        lock: the lock that protects everything here; every method but the constructor is called with it held.
    """

    def __init__(self, bounds: Bounds, lock: threading.Lock) -> None:
        self._bounds = bounds
        self._held: dict[str, int] = {}
        self._wanted: set[str] = set()
        self.room = threading.Condition(lock)

    @property
    def held(self) -> int:
        """Bytes for which room was given."""
        return sum(self._held.values())

    def want(self, *message_ids: str) -> None:
        """The app waits for these."""
        self._wanted.update(message_ids)
        self.room.notify_all()

    def unwant(self, message_id: str) -> None:
        """The app does not wait for this one any more."""
        self._wanted.discard(message_id)
        self.room.notify_all()

    def reserve(self, message_id: str, size: int, goes_on: Callable[[], bool], evict: Callable[[], bool]) -> bool:
        """Wait for room; False when ``goes_on`` says that the wait has lost its meaning.

        Args:
            goes_on: looked at after every change and once a second.
            evict: gives up something that nobody reads at the moment; False if there is nothing.
        """
        while goes_on():
            if self._fits(message_id, size):
                self._held[message_id] = size
                return True
            if not evict():
                self.room.wait(1.0)
        return False

    def release(self, message_id: str) -> None:
        """The reply was taken, or is not coming."""
        self._wanted.discard(message_id)
        if self._held.pop(message_id, None) is not None:
            self.room.notify_all()

    def _fits(self, message_id: str, size: int) -> bool:
        if not self._held or self.held + size <= self._bounds.held:
            return True
        return message_id in self._wanted and not (self._wanted & self._held.keys())
