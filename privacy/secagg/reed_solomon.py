"""Wrong answers among right ones: Reed-Solomon decoding modulo P.

Answers are values of polynomials of degree below T, one per coefficient, at the helpers' points. An answer with one
wrong coefficient is wrong as a whole. So the wrong helpers are found once, in a random linear combination of the
coefficients, by Gao's decoder (A new algorithm for decoding Reed-Solomon codes, 2003). A wrong row survives it with
probability 1/P; it is repeated until the remaining rows agree exactly. Up to f wrong rows among R >= T + 2 f are found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedveil.privacy.secagg import shamir
from fedveil.privacy.secagg.shamir import P

Poly = NDArray[np.int64]  # coefficients, lowest first, no leading zero; empty for zero
_COMBINATIONS = 8


def wrong_rows(points: Sequence[int], values: NDArray[np.int64], threshold: int) -> tuple[int, ...] | None:
    """Which rows of ``values`` are not on the polynomials of degree below ``threshold`` that most rows are on.

    Args:
        points: R distinct points in 1..P-1.
        values: (R, N) in [0, P): row r holds the N polynomials' values at ``points[r]``.
        threshold: T <= R.

    Returns:
        Indices in rising order; at most (R - T) // 2. None if more rows are wrong than that.
    """
    if _consistent(points, values, threshold, ()):
        return ()
    most = (len(points) - threshold) // 2
    wrong = set[int]()
    for _ in range(_COMBINATIONS):
        # Products below 2^32, N of them added: exact in float64 up to N = 2^21.
        weights = shamir.uniform(values.shape[1]).astype(np.float64)
        combined = (values.astype(np.float64) @ weights).astype(np.int64) % P
        found = decode(points, combined, threshold)
        if found is None:
            return None
        wrong |= set(found)
        if len(wrong) > most:
            return None
        if _consistent(points, values, threshold, wrong):
            return tuple(sorted(wrong))
    return None


def decode(points: Sequence[int], word: NDArray[np.int64], threshold: int) -> tuple[int, ...] | None:
    """Positions of the errors in one received word, (R,) values; None beyond (R - T) // 2 errors."""
    x = np.asarray(points, np.int64)
    product, interpolant = _interpolant(x, word)
    a, b = product, interpolant
    u, v = np.zeros(0, np.int64), np.ones(1, np.int64)
    while 2 * (len(b) - 1) >= len(points) + threshold:
        quotient, rest = _divide(a, b)
        a, b = b, rest
        u, v = v, _subtract(u, _times(quotient, v))
    message, rest = _divide(b, v)
    if len(rest) or len(message) > threshold:
        return None
    errors = np.flatnonzero(_evaluate(message, x) != word)
    return tuple(errors.tolist()) if len(errors) <= (len(points) - threshold) // 2 else None


def _consistent(
    points: Sequence[int], values: NDArray[np.int64], threshold: int, without: Sequence[int] | set[int]
) -> bool:
    rows = [r for r in range(len(points)) if r not in without]
    first, others = rows[:threshold], rows[threshold:]
    if not others:
        return True
    expected = shamir.interpolate([points[r] for r in first], values[first], [points[r] for r in others])
    return np.array_equal(expected, values[others])


def _interpolant(x: NDArray[np.int64], y: NDArray[np.int64]) -> tuple[Poly, Poly]:
    """The product of all (X - x_r), and the polynomial through all (x_r, y_r), by Newton's divided differences."""
    differences = y % P
    for j in range(1, len(x)):
        step = shamir.inverse(x[j:] - x[:-j])
        differences[j:] = (differences[j:] - differences[j - 1 : -1]) * step % P
    product, total = np.ones(1, np.int64), np.zeros(len(x), np.int64)
    for root, difference in zip(x, differences, strict=True):
        total[: len(product)] = (total[: len(product)] + difference * product) % P
        product = _times(product, np.array([-root % P, 1]))
    return product, _trim(total)


def _times(a: Poly, b: Poly) -> Poly:
    if not len(a) or not len(b):
        return np.zeros(0, np.int64)
    if len(a) > len(b):
        a, b = b, a
    out = np.zeros(len(a) + len(b) - 1, np.int64)
    for i, coefficient in enumerate(a):
        out[i : i + len(b)] = (out[i : i + len(b)] + coefficient * b) % P
    return _trim(out)


def _subtract(a: Poly, b: Poly) -> Poly:
    out = np.zeros(max(len(a), len(b)), np.int64)
    out[: len(a)] = a
    out[: len(b)] -= b
    return _trim(out % P)


def _divide(a: Poly, b: Poly) -> tuple[Poly, Poly]:
    """Quotient and remainder; ``b`` is not zero."""
    rest, inverse = a.copy(), pow(int(b[-1]), -1, P)
    quotient = np.zeros(max(0, len(a) - len(b) + 1), np.int64)
    for i in range(len(quotient) - 1, -1, -1):
        factor = int(rest[i + len(b) - 1]) * inverse % P
        quotient[i] = factor
        rest[i : i + len(b)] = (rest[i : i + len(b)] - factor * b) % P
    return _trim(quotient), _trim(rest)


def _evaluate(a: Poly, x: NDArray[np.int64]) -> NDArray[np.int64]:
    out = np.zeros_like(x)
    for coefficient in a[::-1]:
        out = (out * x + coefficient) % P
    return out


def _trim(a: Poly) -> Poly:
    nonzero = np.flatnonzero(a)
    return a[: nonzero[-1] + 1] if len(nonzero) else np.zeros(0, np.int64)
