"""``federation.toml`` and ``site.toml`` as frozen values: every field with its unit, bound and default.

Unknown keys are refused. Paths in a file are relative to the file.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedveil.common.errors import ConfigError

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class FederationSection(BaseModel):
    """Where the server listens and what its members agreed on."""

    model_config = _FROZEN
    name: str = Field(min_length=1, max_length=64, description="the federation's name")
    address: str = Field(description="host:port the server listens on")
    identity: Path = Field(description="folder with the server's keys, certificate and the signed roster")
    contract: Path = Field(description="the data contract, signed by the consortium")
    runs: Path = Field(default=Path("runs"), description="folder that receives one sub-folder for each run")
    public_test: Path | None = Field(default=None, description="public table to evaluate on; belongs to no site")


class PrivacySection(BaseModel):
    """What the privacy plan is derived from."""

    model_config = _FROZEN
    mode: Literal["distributed", "local", "client"] = "distributed"
    sum: Literal["keysum", "sharedkey", "none"] = "keysum"
    epsilon: float = Field(gt=0, le=1000, description="ε of the run")
    delta: float = Field(default=1e-5, gt=0, le=0.01, description="δ of the run")
    records: int = Field(ge=1, description="declared number of records in all: a public constant, not a count")
    steps: int = Field(ge=1, le=1 << 20, description="secure sums in the run")
    sample_rate: float = Field(default=1.0, gt=0, le=1, description="chance of a record to enter a step")
    clip: float = Field(gt=0, description="L2 bound of one record's gradient")
    colluders: int | None = Field(default=None, ge=0, description="sites that may work together; default n // 6")
    dropouts: int | None = Field(default=None, ge=0, description="sites that may be missing; default n // 6")
    reveal_to: Literal["server", "sites"] = Field(default="server", description="who reads the sums (sites: keysum)")
    few_clients: bool = Field(default=False, description="mode client below 1000 clients")
    committee: int = Field(default=0, ge=0, le=200, description="helpers that open sums; 0: all sites (to 200)")
    committee_seed: str = Field(default="", description="64 hexadecimal digits from a public beacon nobody chose")
    local_steps: int = Field(default=1, ge=1, description="local steps per round (mode client only)")


class ModelSection(BaseModel):
    """Which network; inputs and classes come from the contract."""

    model_config = _FROZEN
    name: Literal["logistic", "mlp", "cnn"] = "logistic"
    hidden: tuple[int, ...] = ()
    seed: int = Field(default=0, ge=0)


class OptimizerSection(BaseModel):
    """The server's step."""

    model_config = _FROZEN
    learning_rate: float = Field(gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)


class RunSection(BaseModel):
    """Time limits, in seconds."""

    model_config = _FROZEN
    join_timeout: float = Field(default=300, gt=0, description="wait for every site to join")
    grace: float = Field(default=10, gt=0, description="wait for a site whose connection broke")
    round_timeout: float = Field(default=120, gt=0, description="wait for the answers of one step of a round")


class Federation(BaseModel):
    """``federation.toml``."""

    model_config = _FROZEN
    federation: FederationSection
    privacy: PrivacySection
    model: ModelSection = ModelSection()
    optimizer: OptimizerSection
    run: RunSection = RunSection()


class SiteSection(BaseModel):
    """Who the site is, where its data are and where it keeps its state."""

    model_config = _FROZEN
    id: str = Field(description="the site's name on the roster")
    server: str = Field(description="host:port of the server; the site dials out")
    identity: Path = Field(description="folder with the site's keys, certificate and the pinned roster")
    contract: Path = Field(description="the data contract, signed by the consortium")
    data: Path = Field(description="the site's own table: CSV or Parquet")
    lineage: str = Field(min_length=1, max_length=128, description="name of the data set the budget belongs to")
    state: Path = Field(default=Path("state"), description="folder for the ledger and what stays at the site")


class LimitsSection(BaseModel):
    """The site's own limits; no server can lift them. Safe by default."""

    model_config = _FROZEN
    max_epsilon: float = Field(gt=0, le=1000, description="cap of the lineage's ledger over all runs")
    delta: float = Field(default=1e-5, gt=0, le=0.01, description="δ of the ledger, fixed when it is opened")
    min_noise_multiplier: float = Field(default=0.5, ge=0, description="smallest σ accepted in a plan")
    tasks: tuple[Literal["train", "stats"], ...] = Field(default=("train",), description="what sums may be for")
    modes: tuple[Literal["distributed", "local", "client"], ...] = ("distributed",)
    sums: tuple[Literal["keysum", "sharedkey", "plain", "none"], ...] = ("keysum",)
    min_colluders: int = Field(default=1, ge=0, description="fewest colluding sites a plan must stand (t)")
    committee: bool = Field(default=False, description="let a committee open sums: only if nobody chose its seed")
    min_sites: int = Field(default=3, ge=1, description="fewest sites of a plan")
    min_honest: int = Field(default=2, ge=1, description="fewest honest shares of a plan")
    max_fallback_epsilon: float = Field(default=1000, gt=0, description="largest ε if everybody else colludes")


class TrainingSection(BaseModel):
    """How gradients are computed."""

    model_config = _FROZEN
    engine: Literal["auto", "closed", "numpy", "book", "vmap", "opacus", "ghost"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"


class SiteSettings(BaseModel):
    """``site.toml``."""

    model_config = _FROZEN
    site: SiteSection
    limits: LimitsSection
    training: TrainingSection = TrainingSection()


_T = TypeVar("_T", Federation, SiteSettings)


def load(path: Path, kind: type[_T]) -> _T:
    """Read and validate a TOML file; relative paths become relative to its folder.

    Raises:
        ConfigError: the file cannot be read, or names every field that is wrong.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not valid TOML: {e}") from e
    try:
        return _anchored(kind.model_validate(raw), path.parent.resolve())
    except ValidationError as e:
        problems = "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors(include_input=False))
        raise ConfigError(f"{path}: {problems}") from None


def _anchored(settings: _T, base: Path) -> _T:
    sections: dict[str, Any] = {}
    for name in type(settings).model_fields:
        section = getattr(settings, name)
        paths = {k: base / v for k in type(section).model_fields if isinstance(v := getattr(section, k), Path)}
        sections[name] = section.model_copy(update=paths)
    return settings.model_copy(update=sections)
