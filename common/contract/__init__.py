"""The data contract: how the sites agree that their tables look. It is signed before anybody reads a row.

A contract fixes everything that must not depend on the data: the columns and their roles, public bounds, the leaves of
every category, the hierarchies and the levels to which quasi-identifiers are recoded, the required k, l and t, which
rows may be used and until when. So every site encodes to the same width, and neither the encoding nor the fixed
recoding reveals anything. Every round carries the contract's hash.

Rules of a contract (each broken one is a :class:`~fedveil.common.errors.ContractError`):

* exactly one target; at least one training feature; no column twice; every loaded column has a type;
* a number has public bounds ``low < high``, a category has ordered leaves ``values``, a date has a format;
* ``levels`` of a number are cut points strictly inside the bounds: ``[50]`` over 18..80 means ``[18,50)`` and
  ``[50,80]``; ``levels`` of a category are groups of leaves: every leaf in exactly one group;
* a hierarchy is a tree of equal depth over exactly the leaves; a ladder's coarser cuts are cuts of the finer level;
* quasi-identifiers have levels; so have sensitive numbers (diversity is counted over the levels);
* k >= 2; l is at most the number of values that every sensitive attribute can take; t is in [0, 1];
* the suppression limit is a fraction, not a percentage.
"""

from fedveil.common.contract.agreement import MAX_COLUMNS, MAX_FILE_BYTES, Consent, DataContract, Quality, Retention
from fedveil.common.contract.base import MAX_LEAVES, MISSING, OTHER
from fedveil.common.contract.columns import Column, Mask, Role, Step
from fedveil.common.contract.signing import DOMAIN, VERSION, load_signed, open_contract, sign_contract

__all__ = [
    "DOMAIN",
    "MAX_COLUMNS",
    "MAX_FILE_BYTES",
    "MAX_LEAVES",
    "MISSING",
    "OTHER",
    "VERSION",
    "Column",
    "Consent",
    "DataContract",
    "Mask",
    "Quality",
    "Retention",
    "Role",
    "Step",
    "load_signed",
    "open_contract",
    "sign_contract",
]
