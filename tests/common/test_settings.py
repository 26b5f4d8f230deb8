"""federation.toml and site.toml: what is unknown, out of bounds or of another type is named and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from fedveil.common.errors import ConfigError
from fedveil.common.settings import Federation, LimitsSection, SiteSettings, endpoint, load

FEDERATION = """
[federation]
name = "hearts"
address = "localhost:9000"
identity = "keys"
contract = "../contract.json"
[privacy]
epsilon = 1.0
records = 1000
steps = 60
clip = 1.0
[optimizer]
learning_rate = 0.5
"""
SITE = """
[site]
id = "site-a"
server = "localhost:9000"
identity = "keys"
contract = "contract.json"
data = "/srv/data.csv"
lineage = "patients-2024"
capacity = 5000
[limits]
max_epsilon = 4.0
"""


def federation(folder: Path, text: str = FEDERATION) -> Federation:
    (folder / "federation.toml").write_text(text)
    return load(folder / "federation.toml", Federation)


def site(folder: Path, text: str = SITE) -> SiteSettings:
    (folder / "site.toml").write_text(text)
    return load(folder / "site.toml", SiteSettings)


def test_defaults_are_the_safe_ones(tmp_path: Path) -> None:
    f, s = federation(tmp_path), site(tmp_path)
    assert (f.privacy.mode, f.privacy.sum, f.privacy.sample_rate, f.privacy.delta) == (
        "distributed",
        "keysum",
        1.0,
        1e-5,
    )
    assert f.privacy.colluders is f.privacy.dropouts is None
    assert (f.model.name, f.federation.public_test) == ("logistic", None)
    assert (s.limits.modes, s.limits.sums, s.limits.min_sites, s.limits.min_honest) == (
        ("distributed",),
        ("keysum",),
        3,
        2,
    )
    assert s.limits.min_noise_multiplier == 0.5
    with pytest.raises(ValidationError, match="frozen"):
        s.limits.max_epsilon = 1000  # type: ignore[misc]


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)  # the caller's folder does not matter
    f, s = federation(folder), site(folder)
    assert f.federation.identity == folder / "keys"
    assert f.federation.contract.resolve() == tmp_path / "contract.json"
    assert f.federation.runs == folder / "runs"  # a default, too
    assert (s.site.identity, s.site.state) == (folder / "keys", folder / "state")
    assert s.site.data == Path("/srv/data.csv")  # an absolute path stays
    (folder / "site.toml").rename(folder / "other.toml")
    assert load(Path("site/other.toml"), SiteSettings) == s
    with_test = FEDERATION.replace('name = "hearts"', 'name = "hearts"\npublic_test = "test.csv"')
    assert federation(folder, with_test).federation.public_test == folder / "test.csv"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("epsilon = 1.0", "epsilon = 1.0\nepsilom = 2.0", "privacy.epsilom"),
        ("[privacy]", "[secrets]\nx = 1\n[privacy]", "secrets"),
        ("[optimizer]", "[model]\nname = 'mlp'\nhiden = [3]\n[optimizer]", "model.hiden"),
        ("epsilon = 1.0", "", "privacy.epsilon"),
        ("clip = 1.0", "", "privacy.clip"),
        ("epsilon = 1.0", "epsilon = 'much'", "privacy.epsilon"),
        ("epsilon = 1.0", "epsilon = 1.0\ndelta = 0.5", "privacy.delta"),
        ("epsilon = 1.0", "epsilon = 1.0\nmode = 'central'", "privacy.mode"),
        ("epsilon = 1.0", "epsilon = 1.0\nsum = 'plain'", "privacy.sum"),
        ("epsilon = 1.0", "epsilon = 1.0\nsample_rate = 1.5", "privacy.sample_rate"),
        ("epsilon = 1.0", "epsilon = 1.0\ncolluders = -1", "privacy.colluders"),
        ("records = 1000", "records = 0", "privacy.records"),
        ("records = 1000", "records = 10.5", "privacy.records"),
        ("steps = 60", "steps = 2000000", "privacy.steps"),
        ("clip = 1.0", "clip = 0.0", "privacy.clip"),
        ("learning_rate = 0.5", "learning_rate = 0.5\nmomentum = 1.0", "optimizer.momentum"),
        ("learning_rate = 0.5", "learning_rate = 0.5\n[run]\nround_timeout = 0", "run.round_timeout"),
        ('name = "hearts"', 'name = ""', "federation.name"),
    ],
)  # fmt: skip
def test_every_mistake_is_named(tmp_path: Path, old, new, named) -> None:
    with pytest.raises(ConfigError, match=named) as e:
        federation(tmp_path, FEDERATION.replace(old, new))
    assert "federation.toml" in e.value.message


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("max_epsilom = 3", "limits.max_epsilom"), ("modes = ['everything']", "limits.modes"),
        ("sums = ['xor']", "limits.sums"), ("min_sites = 0", "limits.min_sites"),
        ("min_honest = 0", "limits.min_honest"), ("delta = 0.0", "limits.delta"),
        ("min_noise_multiplier = nan", "limits.min_noise"),
        ("min_noise_multiplier = -1", "limits.min_noise_multiplier"),
        ("max_fallback_epsilon = 0", "limits.max_fallback_epsilon"), ("[training]\nengine = 'none'", "training.engine"),
    ],
)  # fmt: skip
def test_a_sites_limits_are_bounded_too(tmp_path: Path, line, named) -> None:
    with pytest.raises(ConfigError, match=named):
        site(tmp_path, SITE + line)


def test_a_list_of_numbers(tmp_path: Path) -> None:
    text = FEDERATION + '[model]\nname = "mlp"\nhidden = [32, 16]\n'
    assert federation(tmp_path, text).model.hidden == (32, 16)
    for bad in ("[true]", "['32']", "[1.5]", "32"):
        with pytest.raises(ConfigError, match="model.hidden"):
            federation(tmp_path, text.replace("[32, 16]", bad))


@pytest.mark.parametrize(
    "server", ["host", "host:", ":80", "host:x", "host:99999", "host:0", "http://host:80", "::1:80", "ho st:80", "h:٨٠"]
)
def test_a_server_without_host_and_port(tmp_path: Path, server) -> None:
    """Before anything is dialled: it would otherwise be tried again for as long as a site waits."""
    with pytest.raises(ConfigError, match="site.server.*host:port"):
        site(tmp_path, SITE.replace("localhost:9000", server))


def test_a_server_may_listen_on_any_free_port(tmp_path: Path) -> None:
    assert federation(tmp_path, FEDERATION.replace("localhost:9000", "0.0.0.0:0")).federation.address == "0.0.0.0:0"
    with pytest.raises(ConfigError, match="federation.address.*host:port"):
        federation(tmp_path, FEDERATION.replace("localhost:9000", "localhost"))


def test_an_address_in_brackets(tmp_path: Path) -> None:
    assert endpoint(site(tmp_path, SITE.replace("localhost:9000", "[::1]:9000")).site.server) == ("::1", 9000)


@pytest.mark.parametrize("sign", ["\\t", "\\n", "\\u202e", "\\u0000"])
@pytest.mark.parametrize("where", ["site.lineage", "data.version"])
def test_names_that_go_into_signed_rows_can_be_printed(tmp_path: Path, sign, where) -> None:
    """The gate lets no other leave: the ledger could never be handed over, and its first row never changes."""
    named = SITE.replace("patients-2024", f"patients{sign}2024")
    text = named if where == "site.lineage" else f'{SITE}[data]\nversion = "1{sign}2"\n'
    with pytest.raises(ConfigError, match=f"{where}.*printed"):
        site(tmp_path, text)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("delta = true", "limits.delta"), ("min_sites = '3'", "limits.min_sites"),
        ("min_sites = true", "limits.min_sites"),
        ("committee = 'yes'", "limits.committee"), ("committee = 1", "limits.committee"),
        ("max_t = '0.2'", "limits.max_t"), ("[egress]\nslot = true", "egress.slot"),
    ],
)  # fmt: skip
def test_a_limit_of_another_type_is_not_guessed(tmp_path: Path, line, named) -> None:
    with pytest.raises(ConfigError, match=named):
        site(tmp_path, SITE + line)


def test_all_mistakes_at_once_and_no_values(tmp_path: Path) -> None:
    text = FEDERATION.replace("epsilon = 1.0", "epsilon = 'hunter2'").replace("records = 1000", "records = -77")
    with pytest.raises(ConfigError) as e:
        federation(tmp_path, text)
    assert "privacy.epsilon" in str(e.value)
    assert "privacy.records" in str(e.value)
    assert "hunter2" not in str(e.value)
    assert "-77" not in str(e.value).replace(str(tmp_path), "")


def test_files_that_are_no_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "missing.toml", Federation)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path, Federation)
    (tmp_path / "bad.toml").write_text("[privacy\nx")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(tmp_path / "bad.toml", Federation)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(tmp_path / "bytes.toml", Federation)
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ConfigError, match="limits"):
        load(tmp_path / "empty.toml", SiteSettings)


def test_a_file_that_cannot_be_used_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[privacy\nx")
    for name in ("missing.toml", ".", "bad.toml"):
        with pytest.raises(ConfigError) as e:
            load(tmp_path / name, Federation)
        assert e.value.hint


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("learning_rate = 0.5", "learning_rate = inf"), ("learning_rate = 0.5", "learning_rate = 2e6"),
        ("clip = 1.0", "clip = inf"), ("clip = 1.0", "clip = 1e300"), ("clip = 1.0", "clip = 1.0\ndelta = 1e-14"),
        ("clip = 1.0", "clip = 1.0\nlocal_steps = 65537"), ("records = 1000", "records = 300000000000000"),
    ],
)  # fmt: skip
def test_what_a_plan_could_not_hold_is_no_setting(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=new.rpartition("\n")[2].partition(" ")[0]):
        federation(tmp_path, FEDERATION.replace(old, new))


def test_every_field_says_what_it_is() -> None:
    for name, info in LimitsSection.model_fields.items():
        assert info.description or name in ("modes", "sums")
