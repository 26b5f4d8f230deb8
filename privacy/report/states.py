"""The chain of model states, and the opened sums that lead from one to the next, where the run's folder has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedveil.common import canonical
from fedveil.common.errors import FedveilError, VerificationError, WireError
from fedveil.common.identity import Roster
from fedveil.common.wire import Packet, sha256
from fedveil.privacy import norm_cap
from fedveil.privacy.joining import chained, sum_spec
from fedveil.privacy.optimiser import ModelState
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.report import bundle as bundles
from fedveil.privacy.report.history import History, Round
from fedveil.privacy.secagg.interface import SumSpec
from fedveil.privacy.secagg.keysum_opening import Opening, max_bytes
from fedveil.privacy.secagg.opened_sum import BUFFERS, FOLDER, KEYSUM, OPENED, unpack
from fedveil.privacy.secagg.params import choose
from fedveil.privacy.secagg.residuals import Reader

START = "start.f32"
_HEADER = 1 << 22


def chain(h: History) -> None:
    """Every round starts from the state before it; :class:`VerificationError` names the first that does not."""
    now = h.state
    for r in h.rounds:
        if r.state_in != now:
            raise VerificationError(f"round {r.number} does not start from the model state before it")
        now = r.state_out if r.outcome == "applied" else now


def steps(folder: Path, plan: PrivacyPlan, h: History, roster: Roster) -> str:
    """Take every step again, from the opened sums in the run's folder.

    None is too long, and each leads to the state that the journal names. Whether they are the sums of the members'
    contributions is not asked here: the sites did before they stepped, and ``fedveil audit readd`` does. Where only the
    sites read the sums, a model has the name of the blinded sums that it came from: then every name is computed again.
    Without the files there is nothing to do.

    Returns:
        What was found, in words.

    Raises:
        VerificationError: a file is missing among others, is not the one that the journal names, holds a sum longer
            than :func:`~fedveil.privacy.norm_cap.cap`, or leads to another state.
    """
    if not (folder / FOLDER).is_dir() or not h.applied:
        return "opened sums are not here"
    if plan.reveal_to == "sites":
        return _names(folder / FOLDER, h)
    first = bundles.read_bounded(folder / START, 4 * plan.model.parameters)
    if sha256(first) != h.model_hash or len(first) != 4 * plan.model.parameters:
        raise VerificationError(f"{START} is not the model that the journal begins with")
    state = ModelState.start(np.frombuffer(first, "<f4"), plan.optimizer)
    for r in h.applied:
        values = _values(folder / FOLDER, plan, r, sum_spec(plan, h.session, roster))
        try:
            norm_cap.check(plan, values, len(r.members or ()))
            state = state.after(plan, values)
        except FedveilError as e:
            raise VerificationError(f"round {r.number}: {e.message}") from e
        if (state.digest, state.hash) != (r.state_out, r.model_out):
            raise VerificationError(f"the opened sum of round {r.number} does not lead to the model after it")
    return f"{len(h.applied)} steps taken again from the opened sums"


def _names(folder: Path, h: History) -> str:
    now = h.model_hash
    for r in h.applied:
        try:
            header = canonical.loads(bundles.read_bounded(folder / f"{r.number}.json", _HEADER))
        except WireError as e:
            raise VerificationError(f"the sum of round {r.number}: {e.message}") from e
        digest = bundles.file_digest(folder / f"{r.number}.bin")
        if digest is None:
            raise VerificationError(f"the sum of round {r.number} is missing among the blinded ones")
        now = canonical.digest({"before": now, "header": header, "buffers": {BUFFERS[KEYSUM]: digest}})
        if r.model_out != now:
            raise VerificationError(f"the blinded sum of round {r.number} does not give the model named after it")
    return f"{len(h.applied)} blinded sums give the same names"


def _values(folder: Path, plan: PrivacyPlan, r: Round, spec: SumSpec) -> NDArray[np.int64]:
    header = canonical.loads(bundles.read_bounded(folder / f"{r.number}.json", _HEADER))
    kind = KEYSUM if plan.sum == "keysum" else OPENED
    limit = max_bytes(spec) if kind == KEYSUM else 8 * plan.model.parameters
    packet = Packet(header, {BUFFERS[kind]: bundles.read_bounded(folder / f"{r.number}.bin", limit)})
    if not isinstance(header, dict) or chained("", packet) != r.opened:
        raise VerificationError(f"the opened sum of round {r.number} is not the one that the journal names")
    if header.get("kind") != kind or header.get("members") != list(r.members or ()):
        raise VerificationError(f"the opened sum of round {r.number} is of other members than the journal names")
    try:
        return _read(spec, packet) if kind == KEYSUM else unpack(spec, packet)[0]
    except FedveilError as e:
        raise VerificationError(f"the opened sum of round {r.number}: {e.message}") from e


def _read(spec: SumSpec, packet: Packet) -> NDArray[np.int64]:
    opening = Opening.parse(spec, packet)
    reader = Reader(choose(spec), len(opening.members), spec.length, spec.bound)
    if not reader.take_all(opening.phases):
        raise VerificationError("its errors are not those of honest sites")
    return reader.values
