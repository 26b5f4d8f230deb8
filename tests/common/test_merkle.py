"""Merkle trees: the known answers of certificate transparency, a second definition, and forged proofs."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.common import merkle
from fedveil.common.errors import VerificationError

# The eight leaves and the roots of the first n of them that the certificate-transparency reference tests use.
LEAVES = [bytes.fromhex(x) for x in (
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
)]  # fmt: skip
ROOTS = (
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)
# The published audit paths of (leaf, tree size), counted from 1 there and from 0 here.
PATHS = {
    (0, 1): (),
    (0, 8): (
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ),
    (5, 8): (
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ),
    (2, 3): ("fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",),
}


def by_definition(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + by_definition(leaves[:k]) + by_definition(leaves[k:])).digest()


def test_the_known_roots() -> None:
    assert merkle.root([]).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert tuple(merkle.root(LEAVES[: n + 1]).hex() for n in range(8)) == ROOTS


@pytest.mark.parametrize("case", PATHS)
def test_the_known_paths(case) -> None:
    index, size = case
    assert tuple(h.hex() for h in merkle.prove(LEAVES[:size], index)) == PATHS[case]
    merkle.verify(bytes.fromhex(ROOTS[size - 1]), LEAVES[index], index, size, merkle.prove(LEAVES[:size], index))


leaves = st.lists(st.binary(max_size=8), min_size=1, max_size=70)


@settings(deadline=None)
@given(leaves)
def test_the_root_is_that_of_the_definition_and_every_leaf_can_be_proved(data) -> None:
    root = merkle.root(data)
    assert root == by_definition(data)
    for i, leaf in enumerate(data):
        path = merkle.prove(data, i)
        assert len(path) <= (len(data) - 1).bit_length()
        merkle.verify(root, leaf, i, len(data), path)


@settings(deadline=None)
@given(leaves, st.data())
def test_no_other_leaf_place_or_path_is_proved(data, draw) -> None:
    i = draw.draw(st.integers(0, len(data) - 1))
    root, path = merkle.root(data), merkle.prove(data, i)
    forged = draw.draw(st.sampled_from(["leaf", "index", "longer", "shorter", "byte", "order", "root"]))
    leaf, index, expected = data[i], i, root
    if forged == "leaf":
        leaf += b"x"
    elif forged == "index":
        index = draw.draw(st.integers(-1, len(data)).filter(lambda n: n != i))
        if 0 <= index < len(data) and data[index] == data[i] and merkle.prove(data, index) == path:
            return
    elif forged == "longer":
        path = [*path, bytes(32)]
    elif forged == "shorter" and path:
        path = path[:-1]
    elif forged == "byte" and path:
        at = draw.draw(st.integers(0, len(path) - 1))
        path[at] = bytes([path[at][0] ^ 1]) + path[at][1:]
    elif forged == "order" and len(set(path)) > 1:
        path = [*path[1:], path[0]]
    else:
        expected = bytes([root[0] ^ 1]) + root[1:]
    with pytest.raises(VerificationError, match="inclusion proof"):
        merkle.verify(expected, leaf, index, len(data), path)


def test_a_node_does_not_pass_for_a_leaf() -> None:
    """Without prefixes, the two hashes under the root of two leaves would be a leaf with the same root."""
    a, b = merkle.leaf_hash(b"a"), merkle.leaf_hash(b"b")
    root = merkle.root([b"a", b"b"])
    assert merkle.root([a + b]) != root
    with pytest.raises(VerificationError):
        merkle.verify(root, a + b, 0, 1, [])


@pytest.mark.parametrize("index", [-1, 8, 1 << 30])
def test_there_is_no_such_row(index) -> None:
    with pytest.raises(VerificationError, match="no row"):
        merkle.prove(LEAVES, index)


@pytest.mark.parametrize(("index", "size", "path"), [(0, 0, []), (3, 2, []), (0, 1 << 40, []), (0, 2, [b"short"])])
def test_malformed_proofs(index, size, path) -> None:
    with pytest.raises(VerificationError, match="malformed"):
        merkle.root_of_proof(b"", index, size, path)


def test_a_tree_of_many_rows_is_quick_and_its_proof_short() -> None:
    many = [b"%d" % i for i in range(10_000)]
    path = merkle.prove(many, 9_999)
    assert len(path) <= 14
    merkle.verify(merkle.root(many), b"9999", 9_999, 10_000, path)
