"""Every choice that a table lists is accepted where the table is used: settings, options, hints."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest

from fedveil.client.records.read import files
from fedveil.common import cli, errors, settings
from fedveil.common.contract import DataContract, dates
from fedveil.common.workload import statistics as stats_spec
from fedveil.common.workload.model import ModelSpec
from fedveil.common.workload.torch.networks import build
from fedveil.deploy import site_process
from fedveil.deploy.lab import demo_hospitals
from fedveil.privacy import plan as plans
from fedveil.privacy.anonymization import anonymizer, stability
from fedveil.privacy.dp.clipping import core
from fedveil.privacy.report import catalogue
from fedveil.privacy.secagg import interface

CONTRACT = cast(DataContract, SimpleNamespace(rows_per_person=None))


def listed(section: Any, name: str) -> tuple[str, ...]:
    """The words that a setting can be: a Literal, or a tuple of them."""
    args = get_args(section.model_fields[name].annotation)
    return get_args(args[0]) if args[-1] is Ellipsis else args


def plan(mode: str, sum_: str, sites: int = 6, **more: Any) -> plans.PrivacyPlan:
    return plans.make_plan(
        mode=mode, sum=sum_, sites=sites, records=600, epsilon=4.0, steps=2, clip=1.0,  # type: ignore[arg-type]
        model=ModelSpec(name="logistic", inputs=4, classes=2), optimizer=plans.Optimizer(learning_rate=0.1),
        contract_hash="c" * 64, few_clients=True, **more,
    )  # fmt: skip


def test_a_site_can_allow_what_a_federation_can_ask_for_and_nothing_else():
    for one, several in (("mode", "modes"), ("sum", "sums")):
        assert listed(settings.PrivacySection, one) == listed(settings.LimitsSection, several)
    assert listed(settings.LimitsSection, "tasks") == ("train", "stats")
    assert set(listed(settings.LimitsSection, "metrics")) == set(stats_spec.WHAT) - {"quantiles"}


@pytest.mark.parametrize("mode", listed(settings.PrivacySection, "mode"))
@pytest.mark.parametrize("sum_", listed(settings.PrivacySection, "sum"))
def test_every_mode_and_sum_of_the_settings_makes_a_plan(mode, sum_):
    if sum_ == "none" and mode != "local":
        with pytest.raises(errors.PlanError, match="without a secure sum"):  # as docs and help say
            plan(mode, sum_)
        return
    assert plan(mode, sum_).sum == sum_
    limits = settings.LimitsSection(max_epsilon=4.0, modes=(mode,), sums=(sum_,))
    assert site_process.unit_of(limits, CONTRACT) == plan(mode, sum_).unit


def test_every_reader_of_the_sums_makes_a_plan():
    for reader in listed(settings.PrivacySection, "reveal_to"):
        assert plan("distributed", "keysum", reveal_to=reader).reveal_to == reader


@pytest.mark.parametrize("name", listed(settings.ModelSection, "name"))
def test_every_network_of_the_settings_is_built(name):
    hidden = {
        "logistic": (), "mlp": (8,), "cnn": (2, 4), "resnet": (1, 2), "transformer": (9, 4, 2, 1), "lstm": (9, 4, 3),
        "lora-mlp": (2, 8), "lora-transformer": (2, 9, 4, 2, 1),
    }[name]  # fmt: skip
    spec = ModelSpec(name=name, inputs=64, classes=3, hidden=hidden)
    assert sum(p.numel() for p in build(spec).parameters() if p.requires_grad) == spec.parameters


@pytest.mark.parametrize("engine", listed(settings.TrainingSection, "engine"))
def test_every_engine_of_the_settings_is_one_and_computes(engine):
    assert engine == "auto" or engine in core.BACKENDS
    from fedveil.client.train import clipper

    assert clipper(ModelSpec(name="logistic", inputs=4, classes=2), engine, "cpu") is not None


def test_a_hints_tables_are_those_of_the_types():
    assert interface.PROTOCOLS == get_args(plans.Sum)
    assert set(core.BACKENDS) == set(get_args(core.Engine))
    assert set(get_args(anonymizer.Method)) == {"fixed", *stability.DATA_DRIVEN}
    assert stability.STEPS == get_args(stability.Step)


@pytest.mark.parametrize("method", get_args(anonymizer.Method))
def test_every_method_has_a_stability(method):
    assert stability.stability(method, (), suppression_limit=0.0, steps=get_args(stability.Step)[:1]) is not None


@pytest.mark.parametrize("what", stats_spec.WHAT)
def test_every_statistic_can_be_asked_for(what):
    network = ModelSpec(name="logistic", inputs=demo_hospitals.contract().width, classes=2)
    metric = stats_spec.MetricSpec(network=network, model_hash="a" * 64, confusion=what == "confusion")
    asked = stats_spec.request(
        demo_hospitals.contract(), [what], metric=metric if what in ("accuracy", "confusion") else None
    )
    assert asked.parameters >= 1


def test_every_other_word_of_a_hint_is_taken():
    for encoding in files.ENCODINGS:
        for delimiter in ("auto", *files.DELIMITERS):
            files.Dialect(encoding, delimiter, ".", "")
        "a".encode("utf-8" if encoding == "auto" else encoding)
    for language in catalogue.LANGUAGES:
        assert catalogue.Speaker(language)("page.cap")
    assert set(dates.PERIODS.values()) <= set(range(1, 121))


def test_help_lists_exactly_the_choices():
    help_of = {}
    todo: list[tuple[tuple[str, ...], Any]] = [((name,), cli.load(name)) for name in cli.COMMANDS]
    while todo:
        path, command = todo.pop()
        todo += [((*path, name), c) for name, c in getattr(command, "commands", {}).items()]
        help_of |= {(" ".join(path), p.name): getattr(p, "help", "") or "" for p in command.params}
    for (command, option), words in {
        ("data anonymize", "method"): get_args(anonymizer.Method), ("stats", "what"): stats_spec.WHAT,
        ("audit render", "lang"): (*catalogue.LANGUAGES, "all"), ("audit pdf", "lang"): catalogue.LANGUAGES,
    }.items():  # fmt: skip
        shown = help_of[command, option].replace("(the contract's levels)", "").partition(": ")
        found = (shown[2] or shown[0]).rstrip(".").replace(" or ", ", ").replace(" ", "").split(",")
        assert set(found) == set(words), (command, option)
