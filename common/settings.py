"""``federation.toml`` and ``site.toml`` as frozen values: every field with its unit, bound and default.

Unknown keys are refused. Paths in a file are relative to the file.
"""

from __future__ import annotations

import datetime
import tomllib
import zoneinfo
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedveil.common.errors import ConfigError
from fedveil.common.workload.model import Name as Network

Hex64 = Annotated[str, Field(pattern="^[0-9a-f]{64}$", max_length=64)]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
# An accountant over many steps drops tails of 1e-15 and rounds in double precision. A smaller δ would be lost in that.
MIN_DELTA = 1e-13
WEEK: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def _printable(value: str) -> str:
    """A printable text: it is written into signed rows that everybody reads and nobody can change."""
    if not value.isprintable():
        raise ValueError("has a character that cannot be printed (a tab, a line break, a text direction mark)")
    return value


Text = Annotated[str, AfterValidator(_printable)]


def endpoint(value: str, *, lowest: int = 1) -> tuple[str, int]:
    """Host and port of ``host:port``; an IPv6 address stands in brackets.

    Args:
        lowest: the smallest port. 0 is for an address to listen on, and then means any free port.

    Raises:
        ValueError: it is written otherwise.
    """
    host, _, port = value.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    plain = bare and not any(c.isspace() or c in "/@[]" for c in bare) and (bare is not host or ":" not in bare)
    if not plain or not (port.isascii() and port.isdecimal() and len(port) <= 5 and lowest <= int(port) < 1 << 16):
        raise ValueError(f"is not host:port (a port from {lowest} to 65535; no http://)")
    return bare, int(port)


def _endpoint(value: str) -> str:
    endpoint(value)
    return value


def _listening(value: str) -> str:
    endpoint(value, lowest=0)
    return value


Endpoint = Annotated[str, AfterValidator(_endpoint)]
Listening = Annotated[str, AfterValidator(_listening)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """TOML tells numbers, booleans and texts apart: a limit that is written as ``true`` is a mistake, not 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        several = get_origin(annotation) in (tuple, UnionType)
        kinds = set(get_args(annotation)) if several else {annotation}
        for one in value if isinstance(value, list | tuple) else [value]:
            if bool in kinds and type(one) is not bool:
                raise ValueError("must be true or false")
            if kinds & {int, float} and one is not None and type(one) not in (int, float):
                raise ValueError("must be a number")
        return value


class FederationSection(_Section):
    """Where the server listens and what its members agreed on."""

    name: str = Field(min_length=1, max_length=64, description="the federation's name")
    address: Listening = Field(description="host:port on which the server listens")
    identity: Path = Field(description="folder with the server's keys, certificate and the signed roster")
    contract: Path = Field(description="the data contract, signed by the consortium")
    runs: Path = Field(default=Path("runs"), description="folder that receives one sub-folder for each run")
    public_test: Path | None = Field(default=None, description="public table to evaluate on; belongs to no site")


class PrivacySection(_Section):
    """What the privacy plan is derived from."""

    mode: Literal["distributed", "local", "client"] = Field(
        default="distributed", description="who adds the noise: all sites together, each site alone, for whole clients"
    )
    sum: Literal["keysum", "sharedkey", "none"] = Field(
        default="keysum", description="how contributions are added unseen; none: mode local only"
    )
    epsilon: float | None = Field(
        default=None, description="ε of the run, above 0 and up to 600; leave out if noise_multiplier is given"
    )
    noise_multiplier: float | None = Field(default=None, gt=0, le=1e6, description="σ of the run; ε follows from it")
    delta: float = Field(default=1e-5, ge=MIN_DELTA, le=0.01, description="δ of the run")
    records: int = Field(
        ge=1, le=1 << 48, description="declared number of records in all: a public constant, not a count"
    )
    capacity: int | None = Field(
        default=None,
        ge=1,
        le=1 << 48,
        description="largest capacity of a site; default: all declared records, at most 10^7",
    )
    steps: int = Field(ge=1, le=1 << 20, description="secure sums in the run")
    sample_rate: float = Field(
        default=1.0, gt=0, le=1, description="chance of a record (mode client: a client) to enter a step"
    )
    clip: float = Field(ge=1e-6, le=1e9, description="L2 bound of one record's gradient")
    colluders: int | None = Field(
        default=None, ge=0, description="t, sites that may work together; default n // 6, at least 1"
    )
    dropouts: int | None = Field(
        default=None,
        ge=0,
        description="d, sites that may be missing from a round; default n // 6, at least 1 (0 if n = 3)",
    )
    reveal_to: Literal["server", "sites"] = Field(
        default="server", description="who reads the sums; sites needs keysum"
    )
    few_clients: bool = Field(default=False, description="allow mode client below 1000 clients")
    committee: int = Field(
        default=0, ge=0, le=200, description="number of helpers that open sums; 0: all sites, up to 200"
    )
    committee_seed: str = Field(
        default="", description="64 hexadecimal digits from a public beacon, which nobody could choose"
    )
    local_steps: int = Field(
        default=1,
        ge=1,
        le=1 << 16,
        description="mode client: passes over a client's records per round; mode local: noisy steps per round; else 1",
    )
    local_batch: int = Field(
        default=0, ge=0, le=1 << 16, description="records of a local step; 0: all of a client's (mode client only)"
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> PrivacySection:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("give privacy.epsilon or privacy.noise_multiplier, exactly one of the two")
        return self


class ModelSection(_Section):
    """Which network; inputs and classes come from the contract."""

    name: Network = Field(default="logistic", description="the network; what hidden holds for it: the guide")
    hidden: tuple[int, ...] = Field(default=(), max_length=16, description="sizes of the network")
    seed: int = Field(default=0, ge=0, description="of the first weights; it never seeds noise")


OptimizerName = Literal["sgd", "adam", "yogi", "adagrad"]
MAX_SCHEDULE = 64
Schedule = tuple[tuple[int, float], ...]
ScheduleName = Literal["constant", "linear", "cosine"]


class OptimizerSection(_Section):
    """How the model moves on the opened sums."""

    name: OptimizerName = Field(default="sgd", description="the step's rule; what each keeps and needs: the guide")
    learning_rate: float = Field(
        gt=0, le=1e6, description="of the step on the averaged sum; in mode client of the descent at each client"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of the first moment")
    second_moment: float = Field(default=0.99, gt=0, lt=1, description="beta_2 of adam and yogi")
    stabiliser: float = Field(default=1e-8, gt=0, le=1, description="added to the root of the second moment")
    server_rate: float = Field(
        default=1.0, gt=0, le=1e6, description="of the server's step on averaged updates (mode client only)"
    )
    schedule: ScheduleName | tuple[tuple[float, ...], ...] = Field(
        default="constant",
        description="constant, linear, cosine, or a table [[step, factor], ...]: from this step on, factor times the "
        "rate",
    )
    averaging: float = Field(
        default=0.0, ge=0, lt=1, description="decay of an average of the weights, which is then the model; 0: none"
    )
    proximal: float = Field(
        default=0.0, ge=0, le=1e6, description="FedProx: pull towards the round's start (mode client only)"
    )


class RunSection(_Section):
    """Time limits, in seconds, and what is kept of a run."""

    join_timeout: float = Field(default=300, gt=0, description="wait for every site to join")
    grace: float = Field(default=10, gt=0, description="wait for a site whose connection broke")
    round_timeout: float = Field(default=120, gt=0, description="wait for the answers of one step of a round")
    keep_ciphertexts: bool = Field(
        default=False, description="keep what sites send under keysum, for 'fedveil audit readd'; delete it afterwards"
    )
    patience: int = Field(
        default=0, ge=0, le=1 << 20, description="end after so many rounds without a better stop_metric; 0: never"
    )
    stop_metric: Literal["accuracy", "auc"] = Field(
        default="accuracy", description="on public_test, for patience; auc for two classes"
    )


class Federation(_Section):
    """``federation.toml``."""

    federation: FederationSection
    privacy: PrivacySection
    model: ModelSection = ModelSection()
    optimizer: OptimizerSection
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _measurable(self) -> Federation:
        if self.run.patience and (self.federation.public_test is None or self.privacy.reveal_to == "sites"):
            raise ValueError("run.patience needs federation.public_test, and sums that the server reads")
        return self


class SiteSection(_Section):
    """Who the site is, where its data are and where it keeps its state."""

    id: str = Field(description="the site's name on the roster")
    server: Endpoint = Field(description="host:port of the server; the site dials out")
    identity: Path = Field(description="folder with the site's keys, certificate and the pinned roster")
    contract: Path = Field(description="the data contract, signed by the consortium")
    data: Path = Field(description="the site's own table: CSV or Parquet")
    lineage: Text = Field(min_length=1, max_length=128, description="name of the data set the budget belongs to")
    capacity: int = Field(
        ge=1,
        le=1 << 48,
        description="the most records (or persons) that this data set may ever hold: an administrative number, never a "
        "count of the table; rows beyond it are left out",
    )
    state: Path = Field(default=Path("state"), description="folder for the ledger and what stays at the site")


class LimitsSection(_Section):
    """The site's own limits; no server can lift them. Safe by default."""

    max_epsilon: float = Field(gt=0, le=1000, description="cap of the lineage's ledger over all runs")
    max_epsilon_per_run: float | None = Field(default=None, gt=0, le=1000, description="ε of one run; default: the cap")
    delta: float = Field(default=1e-5, ge=MIN_DELTA, le=0.01, description="δ of the ledger, fixed when it is opened")
    min_noise_multiplier: float = Field(default=0.5, ge=0, description="smallest σ accepted in a plan")
    tasks: tuple[Literal["train", "stats"], ...] = Field(
        default=("train",), description="what a sum may be for: training, statistics"
    )
    metrics: tuple[Literal["count", "mean", "variance", "histogram", "accuracy", "confusion"], ...] = Field(
        default=("count", "mean", "variance", "histogram", "accuracy", "confusion"),
        description="which statistics the task 'stats' may ask for; each of them is charged",
    )
    modes: tuple[Literal["distributed", "local", "client"], ...] = Field(
        default=("distributed",), description="modes accepted in a plan"
    )
    sums: tuple[Literal["keysum", "sharedkey", "none"], ...] = Field(
        default=("keysum",), description="secure sums accepted in a plan"
    )
    min_colluders: int = Field(default=1, ge=0, description="smallest number of colluders t that a plan must withstand")
    committee: bool = Field(
        default=False, description="let a committee open sums; safe only if nobody could choose its seed"
    )
    min_sites: int = Field(default=3, ge=1, description="smallest number of sites in a plan")
    min_honest: int = Field(default=2, ge=1, description="smallest number of honest shares h in a plan")
    max_fallback_epsilon: float = Field(default=1000, gt=0, description="largest fallback ε in a plan")
    models: tuple[Hex64, ...] = Field(default=(), description="SHA-256 of the model specs allowed; empty: any")
    plans: tuple[Hex64, ...] = Field(default=(), description="hashes of the plans allowed; empty: any")
    min_k: int = Field(default=5, ge=1, description="smallest k that the data contract may require")
    min_l: int = Field(default=1, ge=1, description="smallest l that the data contract may require")
    max_t: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="largest t that the data contract may have; a contract without t is refused",
    )
    hours: str = Field(default="", description="HH:MM-HH:MM in which a run may begin and go on; empty: always")
    days: tuple[Day, ...] = Field(default=WEEK, min_length=1, description="days on which the hours hold")
    timezone: str = Field(default="UTC", description="IANA name of the zone of hours and days")
    approvals: int = Field(default=0, ge=0, le=8, description="persons who must approve each run at this site")
    approvers: tuple[Hex64, ...] = Field(default=(), description="public keys of those who may approve")
    max_unused_sessions: int = Field(
        default=32, ge=1, le=4096, description="most sessions in 24 hours that may begin and charge nothing"
    )

    @field_validator("hours")
    @classmethod
    def _clock_times(cls, value: str) -> str:
        if value:
            window(value)
        return value

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            zoneinfo.ZoneInfo(value)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as e:
            raise ValueError("no such time zone on this machine") from e
        return value

    @model_validator(mode="after")
    def _enough_approvers(self) -> LimitsSection:
        if len(set(self.approvers)) < self.approvals:
            raise ValueError(f"limits.approvals = {self.approvals} needs as many different keys in limits.approvers")
        return self


def window(hours: str) -> tuple[datetime.time, datetime.time]:
    """Start and end of ``HH:MM-HH:MM``. A window whose end is before its start goes over midnight.

    Raises:
        ValueError: it is written otherwise, or both ends are the same.
    """
    first, dash, last = hours.partition("-")
    ends = datetime.time.fromisoformat(first.strip()), datetime.time.fromisoformat(last.strip())
    if not dash or ends[0] == ends[1] or any(t.tzinfo for t in ends):
        raise ValueError("must be written HH:MM-HH:MM, for example 08:00-18:00")
    return ends


class TrainingSection(_Section):
    """How gradients are computed, and how much of the machine that may take."""

    engine: Literal["auto", "closed", "numpy", "book", "vmap", "opacus"] = Field(
        default="auto", description="how gradients are clipped; auto: the fastest that passes the site's tests"
    )
    precision: Literal["float32", "float64"] = Field(
        default="float32", description="of each record's gradient; norms and sums are float64 in any case"
    )
    microbatch: int = Field(
        default=0, ge=0, le=1024, description="rows computed at a time; 0: what is fastest; 1: no row has a neighbour"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where gradients are computed; auto: CUDA if there is a GPU"
    )
    threads: int = Field(default=0, ge=0, le=4096, description="CPU threads of one computation; 0: all")
    gpu_memory: float = Field(default=1.0, gt=0, le=1, description="fraction of the GPU's memory that may be used")


class DataSection(_Section):
    """How the site's table is written, and which version of the data set it is."""

    encoding: str = Field(default="auto", max_length=32, description="encoding of a CSV file")
    delimiter: str = Field(default="auto", max_length=4, description="separator of a CSV file; write tab for a tab")
    decimal: Literal[".", ","] = Field(default=".", description="decimal sign of a CSV file")
    thousands: str = Field(default="", max_length=1, description="sign between thousands in a CSV file")
    corrections: Path | None = Field(default=None, description="TOML file with the site's declared corrections")
    query: str = Field(default="", max_length=1 << 16, description="for a database: one SELECT with ORDER BY")
    url_file: Path | None = Field(default=None, description="file (mode 0600) with the URL of a SQL database")
    fhir: Path | None = Field(default=None, description="for .ndjson: TOML file with resource and [paths]")
    version: Text = Field(default="", max_length=128, description="version of the data set, fixed in its ledger")


class EgressSection(_Section):
    """When answers leave."""

    slot: float = Field(
        default=0.1,
        ge=0,
        le=60,
        description="seconds; an answer computed from records leaves at a multiple of this; 0: at once",
    )


class SiteSettings(_Section):
    """``site.toml``."""

    site: SiteSection
    limits: LimitsSection
    data: DataSection = DataSection()
    training: TrainingSection = TrainingSection()
    egress: EgressSection = EgressSection()


_T = TypeVar("_T", Federation, SiteSettings)
_NAMES: dict[type[BaseModel], str] = {Federation: "federation.toml", SiteSettings: "site.toml"}


def load(path: Path, kind: type[_T]) -> _T:
    """Read and validate a TOML file; relative paths become relative to its folder.

    Raises:
        ConfigError: the file cannot be read, or names every field that is wrong.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}", hint=f"give the path of a {_NAMES[kind]}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"{path} is not valid TOML: {e}", hint="correct the syntax at that place; TOML is UTF-8"
        ) from e
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
