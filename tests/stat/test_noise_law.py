"""The proposals' law by exact arithmetic, tails included, and the comparisons that few random bits do not decide."""

from __future__ import annotations

from typing import Any, cast

import mpmath
import numpy as np
import pytest
from scipy import stats
from tests.stat.test_noise import FALSE_ALARM, chi_square

from fedveil.privacy.dp import gaussian_table, noise
from fedveil.privacy.dp.gaussian_table import ACCEPT_BITS, CELLS, KEEP_BITS, MORE_BITS, acceptance, table
from fedveil.privacy.dp.noise import discrete_gaussian

mpmath.mp.prec = 700
WHOLE = 1 << KEEP_BITS + MORE_BITS


def cells(exact: tuple[int, ...], alias: np.ndarray) -> list[Any]:
    """The probability of each k, from a table's thresholds."""
    out = [mpmath.mpf(0)] * CELLS
    for i, own in enumerate(exact):
        out[i] += mpmath.mpf(own) / WHOLE / CELLS
        out[int(alias[i])] += 1 - mpmath.mpf(own) / WHOLE if own < WHOLE else 0
    # the alias' part was added whole: bring it to a cell's weight
    for i, own in enumerate(exact):
        if own < WHOLE:
            out[int(alias[i])] -= (1 - mpmath.mpf(own) / WHOLE) * (1 - mpmath.mpf(1) / CELLS)
    return out


def worst(std: float, exact: tuple[int, ...] | None = None) -> Any:
    """The largest relative error of the law of |x| up to 16 standard deviations."""
    t = table(std)
    p, s = cells(exact or t.exact, t.alias), 1 << t.shift
    sizes = range(int(16 * std) + 1)
    made = []
    for y in sizes:
        k, u = y >> t.shift, y & (s - 1)
        half = 2 if y == 0 else 1
        made.append(p[k] / s * mpmath.mpf(acceptance(std, k * s, u)) / (1 << ACCEPT_BITS + MORE_BITS) / half)
    law = [mpmath.exp(-(mpmath.mpf(y) ** 2) / (2 * mpmath.mpf(std) ** 2)) for y in sizes]
    scale = mpmath.fsum(law) - mpmath.mpf(1) / 2
    law = [v / (2 if y == 0 else 1) / scale for y, v in zip(sizes, law, strict=True)]
    total = mpmath.fsum(made)
    return max(abs(a / total - b) / b for a, b in zip(made, law, strict=True))


@pytest.mark.parametrize("std", [0.5, 0.7, 3.3, 8.0, 15.999, 16.0, 31.9, 57.31])
def test_the_law_is_exact_as_far_as_sixteen_standard_deviations(std) -> None:
    # 2^-250 of absolute error is this much of the smallest probability there, which is above 2^-192.
    assert worst(std) < mpmath.mpf(2) ** -50


def test_thresholds_in_double_precision_are_seen_in_the_tails() -> None:
    """Negative control: the same table, its thresholds rounded to 53 bits as a simpler program has them."""
    rounded = tuple(int(float(v)) if v >= WHOLE >> 1 else round(v / 2**227) * 2**227 for v in table(57.31).exact)
    assert worst(57.31, rounded) > 1e-3


@pytest.mark.parametrize("std", [0.5, 1.0, 8.0, 100.0, 1e6 + 0.5, 2.0**31, 2.0**48])
def test_a_table_is_made_of_probabilities(std) -> None:
    t = table(std)
    assert all(0 <= v <= WHOLE for v in t.exact)
    assert abs(mpmath.fsum(cells(t.exact, t.alias)) - 1) < mpmath.mpf(2) ** -250
    s = 1 << t.shift
    assert s == 1 or 7.99 <= std / s <= 16.01
    assert s * CELLS >= 15.9 * std


@pytest.mark.parametrize("std", [20.3, 40.0])
def test_what_double_precision_does_not_decide_is_decided_exactly(std, monkeypatch) -> None:
    """Most proposals are sent to the exact comparison, and the law stays; a wrong answer there is seen."""
    monkeypatch.setattr(noise, "_NEAR", 2.0**31)
    assert chi_square(discrete_gaussian(std, 10_000), std) > FALSE_ALARM
    monkeypatch.setattr(noise, "acceptance", lambda std, base, rest: 0 if rest else 1 << ACCEPT_BITS + MORE_BITS)
    assert chi_square(discrete_gaussian(std, 10_000), std) < FALSE_ALARM


class Fixed(noise.KeyStream):
    """A stream that repeats one word."""

    def __init__(self, word: int) -> None:
        self.word = word

    def words(self, count: int) -> Any:
        return np.full(count, self.word, np.uint64)


@pytest.mark.parametrize("nth", [0, 1, 40, 200])
def test_bits_equal_to_the_threshold_are_followed_by_more(nth) -> None:
    t = table(100.0)
    cell = [i for i in range(CELLS) if 0 < t.exact[i] < WHOLE][nth]
    bits = np.array([int(t.keep[cell]) << 8 | cell], np.uint32)
    assert noise._cells(t, bits, Fixed(0))[0] == cell
    assert noise._cells(t, bits, Fixed((1 << 64) - 1))[0] == t.alias[cell]


@pytest.mark.parametrize("std", [20.0, 2.0**34 + 0.5, 2.0**35 + 0.5, 2.0**36, 2.0**48])
def test_sign_and_low_bits_are_fair_and_do_not_know_each_other(std) -> None:
    """They come from one random word: of 32 bits up to s = 2^31, of 64 above."""
    draws = discrete_gaussian(std, 200_000)
    shift = table(std).shift
    negative, size = draws < 0, np.abs(draws)
    keep = size > 0
    for bit in {0, shift // 2, shift - 1}:
        one = (size >> bit & 1).astype(bool)
        counts = np.array([[(negative & one & keep).sum(), (negative & ~one & keep).sum()],
                           [(~negative & one & keep).sum(), (~negative & ~one & keep).sum()]])  # fmt: skip
        assert float(cast(Any, stats.chi2_contingency(counts))[1]) > FALSE_ALARM
    assert stats.binomtest(int(negative.sum()), int(keep.sum())).pvalue > FALSE_ALARM
    tied = np.array([[80_000, 20_000], [20_000, 80_000]])  # negative control
    assert float(cast(Any, stats.chi2_contingency(tied))[1]) < FALSE_ALARM


def test_below_is_exact() -> None:
    third = (1 << 280) // 3
    leading = third >> MORE_BITS
    rest = third & ((1 << MORE_BITS) - 1)
    assert gaussian_table.below(leading, third, lambda: rest - 1)
    assert not gaussian_table.below(leading, third, lambda: rest)
