"""What a GPU needs: the settings that the proof counts on, its free memory, and a table that stays there.

Nothing here depends on what a record holds, or on how many there are. Memory is reserved for a table's capacity.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from fedveil.privacy.dp.clipping.gradient_factors import Batch
from fedveil.privacy.dp.places import EMPTY

_SHARE = 4  # a table that would take more than a quarter of the free memory stays where it is
_PART = 1 << 16
_ASSERT = 710  # cudaErrorAssert


def fix_arithmetic() -> None:
    """Set what decides how torch computes, in this one place. ``[training] precision`` is then what it says.

    One algorithm for one shape, chosen without trying. No product is shortened to TF32 or bfloat16. The proof of
    ``docs/sensitivity.md`` would allow that (what is stored is what is measured and summed), but the comparison with
    the definition would not.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first handle is made
    torch.use_deterministic_algorithms(True)
    # Nothing here reads what it has not written. By setattr, as torch's stubs do not know the attribute.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def free_bytes(device: torch.device) -> int:
    """How much memory of a GPU this process may still take: what is free, within its share (``gpu_memory``)."""
    free, total = torch.cuda.mem_get_info(device)
    held, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    share = int(torch.cuda.get_per_process_memory_fraction(device.index) * total)
    return max(0, min(free + held - used, share - used))


def failed(error: BaseException, device: torch.device) -> bool:
    """Whether the GPU is at fault for ``error``: it has no memory left, or does not compute any more.

    No record can cause either, as no shape depends on one. A failed assertion in a kernel does not count: that may
    come from data.
    """
    if device.type == "cpu":
        return False
    if isinstance(error, torch.OutOfMemoryError):
        return True
    try:
        return float(torch.ones(64, 64, device=device).sum()) != 64.0**2
    except RuntimeError as e:
        return getattr(e, "error_code", 0) != _ASSERT


def to_host(values: torch.Tensor) -> NDArray[np.float64]:
    """``values`` on the CPU: the one point of a step that waits for a GPU."""
    if not values.is_cuda:
        return values.cpu().numpy()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return host.numpy().copy()  # the pinned block goes back to torch


def rows_of(seats: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """``(B, R)``: the rows of those who sit at ``seats``, :data:`EMPTY` for none. The same work whoever sits there."""
    return np.where(seats[:, None] < 0, EMPTY, groups[np.maximum(seats, 0)] if len(groups) else EMPTY)


class Resident:
    """A table that was uploaded once. Steps gather their places from it, on the device.

    Args:
        X: ``(n, inputs)``. y: ``(n,)``. They are taken to stay as they are.
        good: ``(n,)`` bool, the rows that the network can take.
        rows: at least n; memory is taken for so many, whatever n is.
        dtype: the network's precision.
    """

    def __init__(
        self, X: NDArray[np.float32], y: NDArray[np.int64], good: NDArray[np.bool_], rows: int,
        device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.source, self._device, self._dtype = (X, y), device, dtype
        n, self._constant = len(X), rows  # one row more: the constant record, zeros of class 0
        self._features = torch.zeros((rows + 1, X.shape[1]), dtype=torch.float32, device=device)
        self._classes = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        for at in range(0, n, _PART):  # copied by parts, as a table may be read-only and large
            part = slice(at, min(n, at + _PART))
            self._features[part].copy_(torch.from_numpy(np.array(X[part], np.float32)))
            self._classes[part].copy_(torch.from_numpy(np.array(y[part], np.int64)))
        self._index = np.append(np.where(good, np.arange(n), rows), rows)  # the last entry is that of no row

    def batches(self, seats: NDArray[np.int64], groups: NDArray[np.int64], *, weighted: bool) -> Iterator[Batch]:
        """The microbatches of a step, one for each row of ``seats``; see ``Clipper.batch``.

        Which rows they hold is uploaded once, before the first.
        """
        many, each = seats.shape
        index = self._index[rows_of(seats.reshape(-1), groups)]  # -1, for no row, is the last entry
        good = index != self._constant
        counts = good.sum(1)
        at = self._upload(index.reshape(many, -1))
        keep = self._upload((counts > 0).reshape(many, each))
        shares = self._upload((good / np.maximum(counts, 1)[:, None]).reshape(many, each, -1)) if weighted else None
        for turn in range(many):
            yield Batch(
                self._features.index_select(0, at[turn]).to(self._dtype), self._classes.index_select(0, at[turn]),
                keep[turn], None if shares is None else shares[turn],
            )  # fmt: skip

    def _upload(self, values: NDArray[np.generic]) -> torch.Tensor:
        host = torch.from_numpy(values)
        if self._device.type == "cuda":
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)


def fits(rows: int, inputs: int, device: torch.device) -> bool:
    """Whether a table of so many rows is to stay on ``device``: public numbers and the device's memory decide."""
    return device.type == "cuda" and 4 * rows * (inputs + 2) * _SHARE <= free_bytes(device)
