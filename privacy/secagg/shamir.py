"""Shamir's secret sharing of small polynomials, coefficient by coefficient, modulo a 16-bit prime.

Helper i (1..n in the helpers' order) receives f(i) for a polynomial f of degree T - 1 with f(0) = the secret and
uniform other coefficients: T - 1 shares are uniform and independent of the secret, T give it (Shamir, CACM 1979).
Shares of a sum are the sum of shares. Products of two 16-bit numbers, at most 2^21 of them added, are exact in
float64, so that matrix products run in BLAS.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedveil.common.errors import SecureSumError

P = 65521
_COLUMNS = 512  # at a time: they stay in the cache


def share(secret: NDArray[np.int64], threshold: int, n: int) -> NDArray[np.uint16]:
    """Shares of ``secret``.

    Args:
        secret: (N,) integers in (-P/2, P/2).
        threshold: T in 1..n, how many shares give the secret back.
        n: number of shares, below P.

    Returns:
        (n, N): row i - 1 is helper i's.
    """
    if not 1 <= threshold <= n < P:
        raise SecureSumError(f"{threshold} of {n} is not a valid threshold below {P}")
    coefficients = np.empty((threshold, secret.size), np.float64)
    coefficients[0] = secret % P
    coefficients[1:] = uniform((threshold - 1) * secret.size).reshape(threshold - 1, secret.size)
    shares = evaluate(coefficients, range(1, n + 1), P).astype(np.uint16)
    coefficients.fill(0)
    return shares


def evaluate(coefficients: NDArray[np.float64], points: Sequence[int], prime: int) -> NDArray[np.int64]:
    """Values (points, N) modulo ``prime`` of the N polynomials whose coefficients are the (T, N) rows."""
    powers = np.ones((len(points), len(coefficients)))
    for j in range(1, powers.shape[1]):
        powers[:, j] = powers[:, j - 1] * np.asarray(points, np.float64) % prime
    out = np.empty((len(points), coefficients.shape[1]), np.int64)
    for at in range(0, out.shape[1], _COLUMNS):
        values = powers @ coefficients[:, at : at + _COLUMNS]  # whole numbers below 2^53
        # Their remainder, exact, in a fourth of the time of int64's: a quotient is a whole number, or at least 1/prime
        # from one, which is far more than its rounding.
        whole = values / prime
        np.floor(whole, out=whole)
        whole *= prime
        values -= whole
        out[:, at : at + _COLUMNS] = values
    return out


def interpolate(
    points: Sequence[int], values: NDArray[np.int64], at: Sequence[int] = (0,), prime: int = P
) -> NDArray[np.int64]:
    """The polynomials of degree below ``len(points)`` through ``values`` (points, N), evaluated ``at``: (at, N)."""
    x, places = np.asarray(points, np.int64), np.asarray(at, np.int64)[:, None]
    top, bottom = np.ones((len(at), len(x)), np.int64), np.ones(len(x), np.int64)
    for j in range(len(x)):
        others = np.arange(len(x)) != j
        top[:, others] = top[:, others] * (places - x[j]) % prime
        bottom[others] = bottom[others] * (x[others] - x[j]) % prime
    weights = top * inverse(bottom, prime) % prime
    return (weights.astype(np.float64) @ values.astype(np.float64)).astype(np.int64) % prime


def inverse(values: NDArray[np.int64], prime: int = P) -> NDArray[np.int64]:
    """1 / values modulo ``prime``, by Fermat: values^(prime - 2); none of them may be zero modulo ``prime``."""
    out, power, exponent = np.ones_like(values), values % prime, prime - 2
    while exponent:
        if exponent & 1:
            out = out * power % prime
        power, exponent = power * power % prime, exponent >> 1
    return out


def centred(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Residues modulo P as integers in (-P/2, P/2)."""
    return np.where(values > P // 2, values - P, values)


def uniform(count: int) -> NDArray[np.int64]:
    """``count`` independent uniform integers in [0, P) from the operating system, by rejection."""
    out, done = np.empty(count, np.int64), 0
    while done < count:
        words = np.frombuffer(os.urandom(2 * (count - done) + 64), np.uint16)
        good = words[words < P][: count - done]
        out[done : done + good.size] = good
        done += good.size
    return out
