"""Parameters of the secure sums, derived from a session's public figures, or refused.

keysum. q = 1012 * 2^46 + 1 and N = 4096: 56 bits, where the Homomorphic Encryption Standard (2018, table 1) allows
58 at this degree for 256-bit classical security. The plaintext modulus is t = 2^46 or, for many sites, a smaller
power of two; delta = (q - 1) / t, so that delta * t = -1 modulo q.

Decryption fails where the members' errors sum to delta / 2 or more. Each error is the difference of two sums of 42
fair bits, that is half of 84 Rademacher variables; by Hoeffding the sum E over n sites has
P(|E| >= x) <= 2 exp(-x^2 / (42 n)). The union over all coefficients of all planned rounds must stay below 2^-40.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedveil.common.errors import SecureSumError
from fedveil.privacy.secagg.committee import colluders as committee_colluders
from fedveil.privacy.secagg.interface import SumSpec

N = 4096
LOG_DELTA_T = 46
Q = 1012 * (1 << LOG_DELTA_T) + 1
COEFFICIENT_BYTES = 7  # q has 56 bits
BLOCK_BYTES = COEFFICIENT_BYTES * N
HALF_BITS = 42  # an error is the difference of two sums of so many bits: variance 21, at most 42
VARIANCE = HALF_BITS / 2
MAX_SITES = 1000  # the announcement of the members, 700 + 67 m bytes each, must fit into a header of 4 MiB
MAX_HELPERS = 200  # every site sends every helper a share of 8 KB
MAX_FAILURE_LOG2 = -40
_MIN_PLAIN_BITS = 43

CKKS_SLOTS = 2048
CKKS_SCALE_BITS = 21
CKKS_MAX_BOUND = (1 << 30) - 1
CKKS_MAX_VALUE = (1 << 31) - 1


@dataclass(frozen=True)
class KeysumParams:
    """What ``choose`` found.

    Attributes:
        plain_bits: t = 2^plain_bits.
        delta: (q - 1) / t, what a message is multiplied with.
        base: B, odd and at least 2 * bound + 1, the distance between values packed into one coefficient; as large as
            k values allow, so that a sum that leaves its bound is noticed in each of them.
        per_coefficient: k, values per coefficient; B^k <= t.
        blocks: polynomials per vector.
        failure_log2: log2 of the bound on the probability that any coefficient of the run decrypts wrongly.
    """

    plain_bits: int
    delta: int
    base: int
    per_coefficient: int
    blocks: int
    failure_log2: float

    @property
    def ciphertext_bytes(self) -> int:
        """Length of one packed ciphertext."""
        return self.blocks * BLOCK_BYTES


def choose(spec: SumSpec) -> KeysumParams:
    """Parameters of ``keysum`` for ``spec``: the most values per coefficient that the failure bound allows.

    Raises:
        SecureSumError: the threshold, the number of sites, the bound or the failure bound cannot hold.
    """
    _check_helpers(spec, len(spec.roster.sites))
    if spec.min_members < 2:
        raise SecureSumError("the sum of a single site could be opened", hint="allow for fewer drop-outs")
    return plaintext(len(spec.roster.sites), len(spec.all_helpers), spec.bound, spec.length, spec.rounds)


def plaintext(sites: int, helpers: int, bound: int, length: int, rounds: int) -> KeysumParams:
    """The parameters for vectors of ``length`` values whose sums stay within ``bound``.

    Raises:
        SecureSumError: so many sites or helpers cannot work together, or the sums do not fit.
    """
    if not 2 <= sites <= MAX_SITES:
        raise SecureSumError(f"keysum does not work with {sites} sites", hint=f"it takes 2 to {MAX_SITES}")
    if helpers > MAX_HELPERS:
        raise SecureSumError(
            f"keysum does not work with {helpers} helpers",
            hint=f"a committee of at most {MAX_HELPERS} ([privacy] committee, --committee of 'fedveil simulate'); a "
            "simulation may also say --sum plain",
        )
    for plain_bits in range(LOG_DELTA_T, _MIN_PLAIN_BITS - 1, -1):
        k = next((k for k in (4, 3, 2, 1) if (2 * bound + 1) ** k <= 1 << plain_bits), 0)
        if k and (failure := _failure_log2(sites, -(-length // k), rounds, plain_bits)) <= MAX_FAILURE_LOG2:
            base = int(2 ** (plain_bits / k))
            base -= 1 - base % 2
            return KeysumParams(plain_bits, (Q - 1) >> plain_bits, base, k, -(-length // (k * N)), failure)
    raise SecureSumError(
        f"a bound of {bound} over {sites} sites and {rounds} rounds does not fit any plaintext modulus",
        hint="plan with fewer sites or fewer steps",
    )


def modulus_bits(sites: int, length: int, rounds: int, values: int) -> int:
    """log2 of the largest plaintext modulus for ``values`` values per coefficient; 0 if none is small enough."""
    bits = range(LOG_DELTA_T, _MIN_PLAIN_BITS - 1, -1)
    return next((b for b in bits if _failure_log2(sites, -(-length // values), rounds, b) <= MAX_FAILURE_LOG2), 0)


def _check_helpers(spec: SumSpec, n: int) -> None:
    """Two sets of members can never both be agreed upon: 2T > m + c_m, the helpers and those of them who collude."""
    m, threshold = len(spec.all_helpers), spec.threshold
    colluding = committee_colluders(n, spec.colluders, m)
    if not m + colluding < 2 * threshold <= 2 * m:
        raise SecureSumError(
            f"a threshold of {threshold} does not fit {m} helpers of whom {colluding} may collude",
            hint="it must be more than half of both together; else two different sums could be opened",
        )


def _failure_log2(sites: int, coefficients: int, rounds: int, plain_bits: int) -> float:
    """log2 of the bound on the chance that any coefficient of the run decrypts wrongly."""
    # One less than half of delta for the rounding inside the decryption.
    exponent = (((Q - 1) >> plain_bits) / 2 - 1) ** 2 / (HALF_BITS * sites)
    whole = -(-coefficients // N) * N
    return 1 + math.log2(whole) + math.log2(rounds + 1) - exponent / math.log(2)


def check_sharedkey(spec: SumSpec) -> None:
    """Refuse a ``sharedkey`` session whose sums would not decode to exact integers.

    With a scale of 2^21 the coefficients of a sum stay below 2^51 < q/2 for a bound below 2^30. A slot's error is a
    sum of 4096 coefficients of variance 10.5 per site (SEAL's centred binomial, half of 42 Rademacher variables) and
    of the encoder's rounding: by Hoeffding within scale / 4 in all slots of the run except with probability 2^-40.
    """
    n = len(spec.roster.sites)
    if spec.bound > CKKS_MAX_BOUND:
        raise SecureSumError(
            f"a bound of {spec.bound} is too large for exact sums under CKKS",
            hint=f"it takes at most {CKKS_MAX_BOUND}: use keysum",
        )
    if spec.min_members < 2 or spec.threshold < 2:
        raise SecureSumError("a shared-key sum needs at least two members and two equal answers")
    slots = -(-spec.length // CKKS_SLOTS) * CKKS_SLOTS
    # Rounding is bounded by 1/2, so it too is sub-Gaussian, with variance proxy 1/4.
    variance = n * N * (10.5 + 0.25)
    # Half of the room for randomness, the other half for double-precision arithmetic inside the encoder.
    exponent = (2.0**CKKS_SCALE_BITS / 4) ** 2 / (2 * variance)
    if 1 + math.log2(slots) + math.log2(spec.rounds + 1) - exponent / math.log(2) > MAX_FAILURE_LOG2:
        raise SecureSumError(f"sums over {n} sites would not be exact under CKKS", hint="use keysum")
