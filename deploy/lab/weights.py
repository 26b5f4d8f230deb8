"""The final model of a run as ``model.safetensors``: the network's parameters by their names.

``torch_module.load_state_dict(safetensors.torch.load_file(path))`` reads it. The format is 8 bytes with the length of a
JSON header, the header, and the raw values, little-endian.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.common.files import replacing

if TYPE_CHECKING:
    from torch import nn

FILE = "model.safetensors"
_KINDS = {"float32": "F32", "float64": "F64", "int64": "I64", "bool": "BOOL"}


def write(path: Path, network: nn.Module) -> None:
    """Write every parameter and buffer of ``network``, which is on the CPU, under its name in ``state_dict()``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data, at = list[bytes](), 0
    for name, tensor in network.state_dict().items():
        values = tensor.detach().contiguous().numpy()
        raw = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
        kind = _KINDS[values.dtype.name]
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [at, at + len(raw)]}
        data.append(raw)
        at += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    with replacing(path) as part:
        part.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *data]))
