"""Writes the pages of docs/reference that say what the code says: settings, commands, errors.

``python docs/site/pages.py`` writes them; ``make docs`` does so first. A test compares them with the code.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import typer

from fedveil.common import cli, errors, settings

FOLDER = Path(__file__).parents[1] / "reference"
NOTE = "<!-- Written by docs/site/pages.py: change the code, then give `make docs`. -->"
FILES = {"federation.toml": settings.Federation, "site.toml": settings.SiteSettings}
# What an example file says where a setting has no default, or none that shows its form.
SAMPLES: dict[str, object] = {
    "federation.name": "hearts", "federation.address": "0.0.0.0:8443", "federation.identity": "pki/server",
    "federation.contract": "contract.json", "federation.public_test": "public.csv", "privacy.epsilon": 2.0,
    "privacy.noise_multiplier": 5.0, "privacy.records": 4000, "privacy.capacity": 1000, "privacy.steps": 40,
    "privacy.clip": 0.5, "privacy.colluders": 1, "privacy.dropouts": 1, "optimizer.learning_rate": 0.5,
    "site.id": "a", "site.server": "server.example:8443", "site.identity": "identity",
    "site.contract": "contract.json", "site.data": "patients.csv", "site.lineage": "patients-2026",
    "site.capacity": 1000, "limits.max_epsilon": 3.0, "limits.max_epsilon_per_run": 2.5, "limits.max_t": 0.3,
    "data.corrections": "corrections.toml", "data.url_file": "database.url", "data.fhir": "fhir.toml",
}  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a Markdown table; a cell's bars are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines] + [""]


def number(value: float) -> str:
    """A bound as a person writes it: large powers of two by their exponent."""
    whole = int(value)
    if whole == value and whole > 4096 and whole & (whole - 1) == 0:
        return f"2^{whole.bit_length() - 1}"
    return f"{value:g}" if abs(value) < 1e6 else f"{value:.0e}".replace("e+0", "e")


def kind(schema: dict[str, Any]) -> str:
    """The type of a setting in words, from its JSON schema."""
    choices = [s for s in schema.get("anyOf", []) if s.get("type") != "null"]
    if choices:
        return kind(choices[0])
    if "enum" in schema:
        return ", ".join(f"`{x}`" for x in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {kind(schema['items'])}"
    if "pattern" in schema:
        return "64 hexadecimal digits"
    words = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}
    return "path" if schema.get("format") == "path" else words[schema["type"]]


def bounds(schema: dict[str, Any]) -> str:
    """What a value may be at most and at least."""
    inner = next((s for s in schema.get("anyOf", []) if s.get("type") != "null"), schema)
    words = {
        "minimum": "≥\u00a0{}", "exclusiveMinimum": ">\u00a0{}",
        "maximum": "≤\u00a0{}", "exclusiveMaximum": "<\u00a0{}",
        "minLength": "{} character or more", "maxLength": "at most {} characters",
        "minItems": "{} or more", "maxItems": "at most {}",
    }  # fmt: skip
    return ", ".join(text.format(number(inner[key])) for key, text in words.items() if key in inner)


def sections(model: type[settings.Federation | settings.SiteSettings]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, purpose and settings of each section: a name, its JSON schema with ``required``."""
    for name, field in model.model_fields.items():
        section: Any = field.annotation
        schema = section.model_json_schema()
        required = schema.get("required", [])
        yield name, section.__doc__, {k: v | {"required": k in required} for k, v in schema["properties"].items()}


def toml(value: object) -> str:
    """One value as TOML: JSON writes numbers, texts, lists, true and false in the same way."""
    return json.dumps(value, ensure_ascii=False)


def example(model: type[settings.Federation | settings.SiteSettings]) -> list[str]:
    """A whole file with every setting: what has no default is given, what is off stands in a comment."""
    lines: list[str] = []
    for name, _, fields in sections(model):
        lines += [f"[{name}]"]
        for key, schema in fields.items():
            path = f"{name}.{key}"
            value = SAMPLES.get(path, schema.get("default"))
            off = not schema["required"] and schema.get("default") is None and path != "privacy.epsilon"
            lines.append(f"{'# ' if off else ''}{key} = {toml(value)}")
        lines.append("")
    return lines[:-1]


def settings_page() -> str:
    """Every setting of both files."""
    lines = [
        "# Settings", "", NOTE, "",
        "`federation.toml` is the server's file, `site.toml` that of each site. An unknown name is refused, and so is "
        "a text where a number belongs. Paths are relative to the file. `fedveil plan federation.toml` and `fedveil "
        "client check site.toml` read them and say what is wrong.", "",
    ]  # fmt: skip
    for file, model in FILES.items():
        lines += [f"## {file}", ""]
        for name, purpose, fields in sections(model):
            lines += [f"### {file}: [{name}]", "", purpose, ""]
            rows = [
                (f"`{key}`", kind(s), default(s), bounds(s), html.escape(s.get("description", ""), quote=False))
                for key, s in fields.items()
            ]
            lines += table(("setting", "type", "default", "bounds", "what"), rows)
        lines += [f"### A whole {file}", "", "A line that begins with `#` is off by default.", ""]
        lines += ["```toml", *example(model), "```", ""]
    return "\n".join(lines)


def default(schema: dict[str, Any]) -> str:
    """The default in code letters; words where there is none."""
    if schema["required"]:
        return "**required**"
    return "none" if schema.get("default") is None else f"`{toml(schema['default'])}`"


def leaves(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that can be given, with its words."""
    if not isinstance(command, click.Group):
        yield words, command
        return
    for name in command.commands:
        found = command.get_command(click.Context(command), name)
        if found is not None and not found.hidden:
            yield from leaves(found, (*words, name))


def plain(text: str) -> str:
    """Help text for a table or a paragraph: one line, nothing that a page takes for HTML."""
    return html.escape(" ".join(text.split()), quote=False).replace("*", "\\*").replace("_", "\\_")


def commands_page() -> str:
    """Every command with its help, arguments and options."""
    lines = [
        "# Commands", "", NOTE, "",
        "What `fedveil COMMAND --help` says. Each names the smallest extra with which it works: `pip install "
        "'fedveil[sim]'`. Exit codes are on [their own page](errors.md).", "",
    ]  # fmt: skip
    group = ""
    for words, command in leaves(typer.main.get_command(cli.build()), ()):
        if words[0] != group:
            group = words[0]
            lines += [f"## fedveil {group}", "", plain(cli.COMMANDS[group]), ""]
        name = " ".join(words)
        if len(words) > 1:
            lines += [f"### fedveil {name}", ""]
            lines += [f"{plain(paragraph)}\n" for paragraph in (command.help or "").split("\n\n")]
        context = click.Context(command, info_name=f"fedveil {name}")
        usage = " ".join(command.collect_usage_pieces(context))
        lines += ["```text", f"Usage: fedveil {name} {usage}", "```", "", f"Extra: `{cli.needed(words)[1]}`", ""]
        records = [p.get_help_record(context) for p in command.params if p.name != "help"]
        rows = [(f"`{r[0]}`", plain(r[1])) for r in records if r is not None]
        lines += table(("argument or option", "what"), rows) if rows else []
    return "\n".join(lines)


def errors_page() -> str:
    """Every error with its exit code, and the codes that are no error's."""
    found: list[type[errors.FedveilError]] = []
    todo = [errors.FedveilError]
    while todo:
        found.append(cls := todo.pop())
        todo += [c for c in cls.__subclasses__() if c.__module__ == errors.__name__]
    rows = [
        (str(c.exit_code), f"`{c.__name__}`", f"`{c.mro()[1].__name__}`",
         plain((c.__doc__ or "").partition("\n\n")[0]).replace("``", "`"))
        for c in sorted(found, key=lambda c: c.exit_code)
    ]  # fmt: skip
    lines = [
        "# Errors and exit codes", "", NOTE, "",
        "A command that fails prints two lines: the error with what was wrong and where, then what to do. Neither "
        "shows a record's value. Its exit code is one of these. In Python every error is a "
        "`fedveil.common.errors.FedveilError` with `code`, `message`, `hint` and `exit_code`.", "",
        *table(("exit code", "error", "is a", "meaning"), rows),
        "## Other exit codes", "",
        *table(("exit code", "meaning"), [
            ("0", "fine"), ("1", "whoever read the output has gone away"), ("2", "the command line was wrong"),
            ("129, 130, 143", "a signal: SIGHUP, Ctrl-C, SIGTERM. It leaves nothing half made behind"),
        ]),
        "Code 3 (`BudgetExhausted`) is a normal ending: the site's budget is spent, and the last model is kept.", "",
    ]  # fmt: skip
    return "\n".join(lines)


PAGES = {"settings.md": settings_page, "commands.md": commands_page, "errors.md": errors_page}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for page, text in PAGES.items():
        (FOLDER / page).write_text(text(), encoding="utf-8")
