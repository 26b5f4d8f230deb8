"""What docs/data.md says about the engine runs as it stands there; and the file format that it shows is read."""

import re
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fedveil.common.errors import AnonymityError, ContractError, DataError, UsageError
from fedveil.privacy.anonymization import criteria, spec_file
from fedveil.privacy.anonymization.recheck import recheck

with warnings.catch_warnings():  # typer reads a name of click that click has deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    from typer.testing import CliRunner

    from fedveil.deploy.cli.data import app

DOCS = Path(__file__).parents[3] / "docs" / "data.md"
SECTION = DOCS.read_text(encoding="utf-8").partition("## Without a contract")[2].partition("\n## ")[0]
TOWNS = "Ulm;south;*\nJena;south;*\nBonn;north;*\nKiel;north;*\n"


def block(kind):
    (found,) = re.findall(rf"```{kind}\n(.*?)```", SECTION, re.DOTALL)
    return found


@pytest.fixture
def example():
    names = {}
    exec(compile(block("python"), str(DOCS), "exec"), names)
    return names


@pytest.fixture
def task(tmp_path):
    (tmp_path / "town.csv").write_text(TOWNS)
    path = tmp_path / "spec.toml"
    path.write_text(block("toml"))
    return path


def test_the_example_runs_and_its_release_verifies(example, tmp_path, capsys):
    released, spec, models = example["released"], example["spec"], example["models"]
    assert released.column_names == ["age", "town", "illness", "cost"]
    pq.write_table(released, tmp_path / "r.parquet")
    found = recheck(tmp_path / "r.parquet", spec, models)
    assert found.met
    assert len(found.findings) == 3


def test_every_criterion_is_documented():
    known = {
        c for c in dir(criteria) if isinstance(getattr(criteria, c), type) and hasattr(getattr(criteria, c), "name")
    }
    known -= {"Criterion", "Reference"}
    assert set(re.findall(r"^\| `(\w+)\(", SECTION, re.MULTILINE)) == known
    assert {*re.findall(r"[a-z]+(?:-[a-z]+)+", block("toml"))} >= set(spec_file.CRITERIA)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def test_a_parquet_file_from_the_command_line(example, task, tmp_path):
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(example["table"], source)
    done = run("anonymize-parquet", source, out, "--spec", task)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "entropy l-diversity" in done.output
    assert "not of the original records" in done.output
    read = spec_file.load(task)
    assert recheck(out, read.spec, read.models).met
    assert pq.read_table(out).num_rows >= 190
    assert isinstance(run("anonymize-parquet", source, out, "--spec", task).exception, UsageError)  # it exists
    assert isinstance(run("anonymize-parquet", source, tmp_path / "o.csv", "--spec", task).exception, UsageError)
    absent = run("anonymize-parquet", tmp_path / "none.parquet", tmp_path / "n.parquet", "--spec", task)
    assert isinstance(absent.exception, DataError)
    pq.write_table(example["table"].slice(0, 3), source)
    refused = run("anonymize-parquet", source, tmp_path / "n.parquet", "--spec", task)
    assert isinstance(refused.exception, AnonymityError)
    assert not (tmp_path / "n.parquet").exists()


GOOD = "[[quasi]]\nname = 'a'\n[[criterion]]\nis = 'k-anonymity'\nk = 2"
WRONG = {
    "no TOML": ("x = ", "not a readable TOML"),
    "an unknown key": ("k = 5", "'k' is not understood"),
    "no quasi-identifier": ("keep = ['a']\n[[criterion]]\nis = 'k-anonymity'\nk = 2", "no column is a quasi"),
    "no criterion": ("[[quasi]]\nname = 'a'", "no criterion"),
    "a table for a list": ("[quasi]\nname = 'a'", "not a list of tables"),
    "an unknown criterion": ("[[quasi]]\nname = 'a'\n[[criterion]]\nis = 'l'\nl = 2", "of no known kind"),
    "an argument missing": ("[[quasi]]\nname = 'a'\n[[criterion]]\nis = 'k-anonymity'", "lacks k"),
    "an argument too many": (
        "[[quasi]]\nname = 'a'\n[[criterion]]\nis = 'k-anonymity'\nk = 2\nl = 2",
        "'l' is not und",
    ),
    "a text for a number": ("[[quasi]]\nname = 'a'\n[[criterion]]\nis = 'k-anonymity'\nk = '2'", "k is not a whole"),
    "a column without a name": ("[[quasi]]\nfixed_level = 1", "has no name"),
    "an absent hierarchy": ("[[quasi]]\nname = 'a'\nhierarchy = 'none.csv'", "cannot be read"),
    "a hierarchy of rows": ("[[quasi]]\nname = 'a'\nhierarchy = [['a', '*']]", "names no file"),
    "values that are numbers": ("[[sensitive]]\nname = 'a'\nvalues = [1, 2]", "not a list of texts"),
    "a name for a list": ("keep = 'a'\n[[quasi]]\nname = 'b'", "keep is not a list"),
    "a percentage": ("suppression_limit = 5\n[[quasi]]\nname = 'a'\n[[criterion]]\nis = 'k-anonymity'\nk = 2", "share"),
    "an unknown method": ("method = 'best'\n[[quasi]]\nname = 'a'\n[[criterion]]\nis = 'k-anonymity'\nk = 2", "method"),
    "deep nesting": ("x = " + "[" * 3000 + "]" * 3000, "not a readable TOML"),
    "more than is read": (f"{GOOD}#{'x' * spec_file.MAX_FILE_BYTES}\n[[criterion]]\nis = 'l'", "longer than 4 MiB"),
    "a zero byte in a name": ("[[quasi]]\nname = 'a'\nhierarchy = \"b\\u0000c\"", "cannot be read"),
    "a limit beyond floats": (f"suppression_limit = {'9' * 400}\n{GOOD}", "not a share"),
    "a k beyond floats": (GOOD.replace("k = 2", f"k = {'9' * 400}"), "k is too large"),
    "an l beyond floats": (
        f"{GOOD}\n[[sensitive]]\nname = 's'\n[[criterion]]\nis = 'entropy-l'\nl = {'9' * 400}",
        "too large",
    ),
    "a text for a choice": (
        f"{GOOD}\n[[sensitive]]\nname = 's'\n[[criterion]]\nis = 'beta-likeness'\nbeta = 1\nenhanced = 'no'",
        "must be true or false",
    ),
    "a value twice": ("[[quasi]]\nname = 'a'\n[[sensitive]]\nname = 's'\nvalues = ['a', 'a', 'b']", "a value twice"),
    "numeric as text": ("[[quasi]]\nname = 'a'\nnumeric = 'yes'", "must be true or false"),
}


@pytest.mark.parametrize("how", WRONG)
def test_what_is_wrong_with_a_file_is_said(tmp_path, how):
    text, words = WRONG[how]
    path = tmp_path / "s.toml"
    path.write_text(text)
    with pytest.raises(ContractError, match=words) as refused:
        spec_file.load(path)
    assert refused.value.hint


def test_numbers_over_a_hierarchy_of_words_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("1;x;*\nunknown;x;*\n")
    (tmp_path / "s.toml").write_text(GOOD.replace("'a'", "'a'\nhierarchy = 'a.csv'\nnumeric = true"))
    with pytest.raises(ContractError, match="values of its hierarchy are not numbers"):
        spec_file.load(tmp_path / "s.toml")


def test_every_kind_of_criterion_can_be_written(tmp_path):
    arguments = {"k-anonymity": "k = 2", "distinct-l": "l = 2", "entropy-l": "l = 1.5", "recursive-cl": "c = 2\nl = 2",
                 "t-closeness": "t = 0.5\ndistance = 'ordered'", "alpha-k": "alpha = 0.5\nk = 2",
                 "beta-likeness": "beta = 1\nenhanced = false", "delta-disclosure": "delta = 2"}  # fmt: skip
    assert set(arguments) == set(spec_file.CRITERIA)
    text = "[[quasi]]\nname = 'q'\nnumeric = true\nfixed_level = 1\n[[sensitive]]\nname = 's'\nvalues = ['a', 'b']\n"
    text += "".join(f"[[criterion]]\nis = '{name}'\n{rest}\n" for name, rest in arguments.items())
    (tmp_path / "s.toml").write_text(text)
    read = spec_file.load(tmp_path / "s.toml")
    assert [type(m) for m in read.models] == list(spec_file.CRITERIA.values())
    assert all(m.column == "s" for m in read.models[1:])
    assert read.spec.quasi[0].numeric
