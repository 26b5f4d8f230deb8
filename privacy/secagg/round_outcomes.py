"""Rounds that opened, rounds that were lost, and which sites are not asked any more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from fedveil.common.errors import SecureSumError
from fedveil.common.units import SiteId


class Conduct:
    """The bookkeeping of one session's rounds: bounded aborts, and helpers set aside.

    A wrong answer names its helper. But a member that dealt it a wrong share gives the same picture (there is no
    verifiable sharing). So a strike only means that others are asked to help. A helper that is set aside goes on
    contributing. Whom to exclude from a run is for people to decide.

    A member that does not vouch for a sum costs the whole round. So after as many strikes it is not asked to contribute
    any more. It may only have lost its connection at a bad time: that too is for people to judge.

    Args:
        max_aborts: how many rounds may be lost; one more is an error.
        strikes: after how many wrong answers a helper is set aside, and after how many sums that it did not vouch for
            a member is left out.
    """

    def __init__(self, max_aborts: int, strikes: int = 2) -> None:
        if max_aborts < 0 or strikes < 1:
            raise SecureSumError(f"{max_aborts} aborts and {strikes} strikes are no bounds")
        self._max_aborts, self._strikes = max_aborts, strikes
        self._counts: Counter[SiteId] = Counter()
        self._unvouched: Counter[SiteId] = Counter()
        self._last: int | None = None
        self.aborts = 0

    def opened(self, round: int, suspects: Iterable[SiteId]) -> None:
        """Record a round whose sum opened, with :attr:`ServerSum.suspects`."""
        self._next(round)
        self._counts.update(set(suspects))

    def aborted(self, round: int, unvouched: Iterable[SiteId] = ()) -> None:
        """Record a lost round, with :attr:`ServerSum.unvouched`.

        Raises:
            SecureSumError: more rounds are lost than the plan bears.
        """
        self._next(round)
        self._unvouched.update(set(unvouched))
        self.aborts += 1
        if self.aborts > self._max_aborts:
            raise SecureSumError(
                f"{self.aborts} rounds were lost; the plan bears {self._max_aborts}",
                hint="look at the suspects and at who was missing before a new run",
            )

    @property
    def set_aside(self) -> tuple[SiteId, ...]:
        """Helpers that gave at least ``strikes`` wrong answers, in order of name."""
        return tuple(sorted(site for site, count in self._counts.items() if count >= self._strikes))

    @property
    def left_out(self) -> tuple[SiteId, ...]:
        """Members that at least ``strikes`` times did not vouch for a sum, in order of name."""
        return tuple(sorted(site for site, count in self._unvouched.items() if count >= self._strikes))

    def _next(self, round: int) -> None:
        if self._last is not None and round <= self._last:
            raise SecureSumError(f"round {round} does not follow round {self._last}", hint="rounds only go forward")
        self._last = round
