"""Every error a user can meet, as one tree.

::

    FedveilError                exit 1
    ├── UsageError              exit 2    a command or an argument is wrong
    ├── ConfigError             exit 10   federation.toml, site.toml or a run's settings
    │   └── PlanError           exit 11   a privacy plan that cannot hold; carries the nearest valid one
    ├── ContractError           exit 20   the data contract: unsigned, altered, inconsistent
    ├── DataError               exit 21   a table does not meet its contract
    │   └── AnonymityError      exit 22   k-anonymity or l-diversity not met
    ├── IdentityError           exit 30   keys, certificates, the roster
    ├── ProtocolError           exit 40   a peer sent what the protocol does not allow
    │   ├── WireError           exit 41   a message breaks its size or shape bounds
     │   ├── SecureSumError      exit 42   the secure sum cannot go on
     │   │   ├── HelperRefusal   exit 43   a site refuses to help open a sum
     │   │   │   └── FreshLedger exit 46   a site's ledger was replaced by one that does not count it
     │   │   └── UnverifiedOpening exit 47 nothing shows that an opened sum is that of its members
     │   ├── StateMismatch       exit 44   two participants hold different states of one model
     │   └── SumTooLong          exit 45   an opened sum is longer than records and noise can make it
    ├── PolicyRefusal           exit 50   the site's own limits say no
    ├── JournalError            exit 51   a journal is torn, forged or in use
    ├── StoreError              exit 52   a file or folder of one's own cannot be read or written
    ├── BudgetExhausted         exit 3    the privacy budget is spent: a normal ending
    ├── VerificationError       exit 60   a report or journal does not say what it claims
    ├── ModelError              exit 70   a model that cannot be trained privately
    ├── DeviceError             exit 71   a GPU was lost, or another process has its memory
    ├── TransportError          exit 80   a port, a connection, a time limit
    ├── RunAborted              exit 90   a run ended before its plan was carried out
    └── Interrupted             exit 130  its user stopped a simulation; it can go on

A message says what was wrong and where; ``hint`` says what to do. Neither ever shows a record's value.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import ClassVar


class FedveilError(Exception):
    """Root of the tree. By itself: a library is not installed.

    Args:
        message: what was wrong and where; no record's value, no secret.
        hint: what the reader can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    @property
    def code(self) -> str:
        """The stable name under which this error is documented and sent to peers."""
        return type(self).__name__


class UsageError(FedveilError):
    """A command or an argument is wrong."""

    exit_code = 2


class ConfigError(FedveilError):
    """``federation.toml``, ``site.toml`` or a run's settings are wrong."""

    exit_code = 10


class PlanError(ConfigError):
    """A privacy plan that cannot hold; ``nearest`` describes the nearest one that does."""

    exit_code = 11

    def __init__(self, message: str, *, hint: str = "", nearest: dict[str, object] | None = None) -> None:
        super().__init__(message, hint=hint)
        self.nearest = nearest


class ContractError(FedveilError):
    """The data contract is unsigned, altered or inconsistent."""

    exit_code = 20


class DataError(FedveilError):
    """A table does not meet its contract."""

    exit_code = 21


class AnonymityError(DataError):
    """k-anonymity or l-diversity is not met, and suppression is not allowed to repair it."""

    exit_code = 22


class IdentityError(FedveilError):
    """A key, a certificate or the roster is missing, foreign, expired or used twice."""

    exit_code = 30


class ProtocolError(FedveilError):
    """A peer sent what the protocol does not allow."""

    exit_code = 40


class WireError(ProtocolError):
    """A message breaks its size or shape bounds, or is malformed."""

    exit_code = 41


class SecureSumError(ProtocolError):
    """The secure sum cannot go on."""

    exit_code = 42


class HelperRefusal(SecureSumError):
    """A site refuses to help open a sum: wrong set, second set, too few members, bad signature."""

    exit_code = 43


class FreshLedger(HelperRefusal):
    """A site takes part with a new ledger for a data set that another ledger of it counted, and has not imported it."""

    exit_code = 46


class UnverifiedOpening(SecureSumError):
    """Nothing shows that an opened sum is the sum of its members' signed contributions: nobody steps on it."""

    exit_code = 47


class StateMismatch(ProtocolError):
    """Two participants hold different states of one model: one of them was given another sum, or lacks one."""

    exit_code = 44


class SumTooLong(ProtocolError):
    """An opened sum is longer than the plan's records and noise can make it: nobody steps on it."""

    exit_code = 45


class PolicyRefusal(FedveilError):
    """The site's own limits say no."""

    exit_code = 50


class JournalError(FedveilError):
    """A journal is torn, forged or already open in another process."""

    exit_code = 51


class StoreError(FedveilError):
    """A file or folder of one's own cannot be read or written. Its message names paths and never leaves the machine."""

    exit_code = 52


class BudgetExhausted(FedveilError):
    """The privacy budget is spent. A normal ending: the last model is kept."""

    exit_code = 3


class VerificationError(FedveilError):
    """A report or a journal does not say what it claims."""

    exit_code = 60


class ModelError(FedveilError):
    """A model that cannot be trained with per-record clipping."""

    exit_code = 70


class DeviceError(FedveilError):
    """A GPU was lost, or another process has its memory."""

    exit_code = 71


class TransportError(FedveilError):
    """A port is in use, a peer is unreachable, a time limit has passed."""

    exit_code = 80


class RunAborted(FedveilError):
    """A run ended before its plan was carried out."""

    exit_code = 90


class Interrupted(FedveilError):
    """A user stopped a simulation. It can go on; the hint says how."""

    exit_code = 130


# What can be raised where a peer's value is parsed by hand. Every such parser turns all of these into one error of the
# tree. A parser has no list of its own, because such a list would lack the exception that nobody thought of.
MALFORMED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def trace(error: BaseException) -> str:
    """Where an exception that is not ours came from: its class, and file and line of every frame, innermost last.

    The message is left out, because libraries write the values they were given into it.
    """
    frames = traceback.extract_tb(error.__traceback__)
    places = " > ".join(f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno}" for f in frames)
    return f"{type(error).__name__} at {places or 'no frame'}"


def by_code(code: str) -> type[FedveilError]:
    """The class documented under ``code``; :class:`ProtocolError` for names outside the tree."""
    todo: list[type[FedveilError]] = [FedveilError]
    while todo:
        cls = todo.pop()
        if cls.__name__ == code:
            return cls
        todo.extend(cls.__subclasses__())
    return ProtocolError
