"""The sum of per-record gradients, each clipped to L2 norm C over the whole model.

:class:`Clipper` computes it with one of five engines, :func:`choose` picks one. It compares every engine with a loop
over single records, drops those that fail the test of row independence, and takes the fastest of the rest.

========== ==================================================================================================
``closed`` chains of Linear (with a frozen base and an adapter, too) and an activation: norms and sum in closed form,
           no autograd (Goodfellow 2015, arXiv:1510.01799)
``numpy``  the same without torch, whose cost per call is most of a small network's time; on a CPU
``book``   book-keeping (Bu et al. 2023, arXiv:2210.00038): one backward pass for the layers' outputs only; norms and
           the clipped sum from inputs and output gradients; Linear, Conv2d, Embedding, LayerNorm, GroupNorm
``vmap``   torch.func's vmap(grad): any network that sees one record at a time
``opacus`` Opacus' GradSampleModule hooks
========== ==================================================================================================

Why one record cannot move another's contribution
-------------------------------------------------
A step has a number of places that no record decides, and each sampled record sits at a random one
(:mod:`fedveil.privacy.dp.places`). All places are computed, in microbatches of one shape. Nobody moves, and nothing is
computed again. If one record is added at a place that was empty, every other row is computed with the same shapes, at
the same place, from the same values. So its bits are the same: that is assumption A1, which :func:`problem` tests on
the machine at hand for every row. Norms are taken in float64 from the very values that are summed, and the sum over
places is float64; what its order may round away is a formula (:mod:`fedveil.privacy.dp.rounding`) and part of the
plan's sensitivity. The proof (``docs/sensitivity.md``) does not depend on the precision or on the weights. So float32
is the default.
"""

from fedveil.privacy.dp.clipping.core import ClippedSum, Clipper, Engine, Precision, passes
from fedveil.privacy.dp.clipping.guard import refuse_coupled
from fedveil.privacy.dp.clipping.probe import choose
from fedveil.privacy.dp.clipping.stand_alone import problem

__all__ = ["ClippedSum", "Clipper", "Engine", "Precision", "choose", "passes", "problem", "refuse_coupled"]
