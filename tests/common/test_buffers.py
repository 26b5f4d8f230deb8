"""Bytes that are filled in place."""

from __future__ import annotations

import numpy as np
import pytest

from fedveil.common.buffers import Filled


@pytest.mark.parametrize("size", [0, 1, 4095, (4 << 20) - 1, 4 << 20, (6 << 20) + 5])
def test_what_was_written_comes_out_and_the_rest_is_zero(size: int) -> None:
    out = Filled(size)
    expected = np.zeros(size, np.uint8)
    expected[::7] = 3
    np.frombuffer(out.room, np.uint8)[::7] = 3
    data = out.value()
    assert type(data) is bytes
    assert data == expected.tobytes()


def test_nothing_is_written_afterwards() -> None:
    out = Filled(8)
    assert out.value() == bytes(8)
    with pytest.raises(ValueError, match="released"):
        out.room[0] = 1
