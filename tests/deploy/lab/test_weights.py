"""``model.safetensors``: the format's rules, read here by hand, and by the package where it is installed."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import torch
from torch import nn

import fedveil as fv
from fedveil.deploy.lab import simulate, weights
from fedveil.deploy.lab.simulate import Config


def read(data: bytes) -> dict[str, torch.Tensor]:
    """The format as its description says: length, header, values that follow each other without a gap."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert (8 + length) % 8 == 0
    body, at, found = data[8 + length :], 0, {}
    kinds = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "BOOL": "?"}
    for name, said in header.items():
        start, stop = said["data_offsets"]
        assert start == at
        at = stop
        found[name] = torch.from_numpy(
            np.frombuffer(body[start:stop], kinds[said["dtype"]]).reshape(said["shape"]).copy()
        )
    assert at == len(body)
    return found


@pytest.mark.parametrize("network", ["logistic", "mlp", "cnn", "lora-mlp"])
def test_the_final_model_by_the_names_of_its_parameters(tmp_path, network):
    config = Config(clients=4, dataset="digits", sum="plain", steps=1, network=network)
    simulate.run(config, tmp_path / "run", report=False)
    run = fv.load(tmp_path / "run")
    assert isinstance(run, fv.Run)
    found, model = read((tmp_path / "run" / weights.FILE).read_bytes()), run.model()
    assert list(found) == list(model.state_dict())
    other = run.model()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(found)
    X = torch.rand(5, 64)
    assert torch.equal(other(X), model(X))


def test_a_network_of_ones_own_and_every_kind_of_value(tmp_path):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1).double())
    net.register_buffer("mask", torch.tensor([True, False]))
    weights.write(tmp_path / "m.safetensors", net)
    found = read((tmp_path / "m.safetensors").read_bytes())
    for name, tensor in net.state_dict().items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


@pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="pip install safetensors, for a second reader"
)
def test_the_package_reads_the_same(tmp_path):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    weights.write(tmp_path / "m.safetensors", net)
    found = importlib.import_module("safetensors.torch").load_file(tmp_path / "m.safetensors")
    net.load_state_dict(found)
    assert all(torch.equal(found[n], t) for n, t in net.state_dict().items())


def test_there_is_none_where_only_the_sites_have_the_model(tmp_path):
    simulate.run(Config(clients=4, dataset="digits", steps=1, reveal_to="sites"), tmp_path / "run", report=False)
    assert not (tmp_path / "run" / weights.FILE).exists()
