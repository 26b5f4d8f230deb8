"""The sum of per-record gradients, each clipped to L2 norm C over the whole model.

:class:`Clipper` computes it with one of six engines, :func:`choose` picks one: it compares every engine with a loop
over single records and takes the fastest of those that agree.

========== ==================================================================================================
``closed`` chains of Linear and an activation: norms and sum in closed form, no autograd (Goodfellow 2015,
           arXiv:1510.01799)
``numpy``  the same without torch, whose cost per call is most of a small network's time; on a CPU, in float64
``book``   book-keeping (Bu et al. 2023, arXiv:2210.00038): one backward pass for the layers' outputs only; norms and
           the clipped sum from inputs and output gradients; Linear, Conv2d, Embedding, LayerNorm, GroupNorm
``vmap``   torch.func's vmap(grad): any network that sees one record at a time
``opacus`` Opacus' GradSampleModule hooks
``ghost``  Opacus' ghost clipping: a pass for the norms, a second one with the clipped factor on each record's loss
========== ==================================================================================================

All work in microbatches that are summed on the fly, so memory does not grow with the batch.

Precision, and why one record cannot move another's contribution
----------------------------------------------------------------
The sensitivity argument needs every record's clipped contribution to be a function of that record alone. For another
batch size, a library of linear algebra may pick another kernel, and so another rounding. With weights chosen to cancel,
another rounding is another gradient. Therefore every pass runs on exactly one shape (a shorter microbatch is filled up
with copies whose factor is 0). Norms are taken in float64 from the very values that are summed, and the sum over
records is float64. So rounding inside a pass changes a record's contribution, but neither its bound nor another
record's. For the rest, the plan adds :data:`FLOAT_SLACK` (relative to C) to the sensitivity. The rest is: accumulation
(below), and a kernel that might treat the rows of a batch differently at one shape (the tail of a vectorised tanh).

* ``float64``: such a difference is some 1e-15 of a contribution, for networks that are not badly conditioned.
* ``float32``: it would be some 1e-7, too much for many records. :func:`position_free` looks for it bit for bit on the
  machine at hand, and :func:`choose` drops an engine that shows any; the claim then rests on the assumption that what
  holds for the probe's records holds for all. ``ghost`` is refused: its sum is accumulated in the network's precision.

Accumulation in float64 over B records, m at a time, in blocks of 1024 microbatches, is off by at most
(m + 1024 + B / 1024m) · 2^-53 · B · C: below 4e-7 · C for B up to 2^20 and every m allowed (1..1024). Larger batches
are summed all the same (a limit would let one record switch off the sum), with a bound that grows with B.
"""

from fedveil.privacy.dp.clipping.core import FLOAT_SLACK, ClippedSum, Clipper, Engine, Precision
from fedveil.privacy.dp.clipping.guard import refuse_coupled
from fedveil.privacy.dp.clipping.probe import choose, position_free

__all__ = [
    "FLOAT_SLACK",
    "ClippedSum",
    "Clipper",
    "Engine",
    "Precision",
    "choose",
    "position_free",
    "refuse_coupled",
]
