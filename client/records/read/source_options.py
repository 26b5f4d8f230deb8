"""Which source, and how it is written, as a command line or ``[data]`` of site.toml names it."""

from __future__ import annotations

import tomllib
from pathlib import Path

from fedveil.client.records.read.sources import Dialect, DuckSource, FhirSource, Source, SqlSource
from fedveil.common.errors import ConfigError, UsageError

_QUERY = "give --query 'SELECT ... ORDER BY ...' (query in [data] of site.toml)"


def dialect_of(encoding: str, delimiter: str, decimal: str, thousands: str) -> Dialect:
    """The dialect that the options describe. ``tab`` stands for a tab."""
    return Dialect(encoding, "\t" if delimiter in ("tab", "\\t") else delimiter, decimal, thousands)


def source_of(table: Path, query: str, url_file: Path | None, fhir: Path | None) -> Source:
    """The source that the options name.

    Raises:
        UsageError: options that do not go together.
        ConfigError: the file with the URL can be read by others, or the paths are malformed.
    """
    if url_file is not None:
        if not query:
            raise UsageError("a database needs a query", hint=_QUERY)
        return SqlSource(_secret_line(url_file), query)
    if table.suffix.lower() in (".duckdb", ".ddb"):
        if not query:
            raise UsageError("a DuckDB file needs a query", hint=_QUERY)
        return DuckSource(table, query)
    if query:
        raise UsageError(
            "a query needs a database", hint="give --url-file (url_file in [data] of site.toml), or a .duckdb file"
        )
    if table.suffix.lower() == ".ndjson":
        if fhir is None:
            raise UsageError(
                "an .ndjson file needs its paths", hint="give --fhir paths.toml (fhir in [data] of site.toml)"
            )
        return _fhir_source(table, fhir)
    return table


def _fhir_source(table: Path, declared: Path) -> Source:
    try:
        data = tomllib.loads(declared.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = {}
    paths, resource = data.get("paths"), data.get("resource")
    strings = isinstance(paths, dict) and all(isinstance(v, str) for v in paths.values())
    if not strings or not isinstance(resource, str) or not isinstance(paths, dict):
        raise ConfigError(f"{declared} does not declare resource and [paths]", hint="see docs/data.md")
    return FhirSource(table, resource, paths)


def _secret_line(path: Path) -> str:
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} can be read by others", hint=f"chmod 600 {path}")
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read", hint="give a file of mode 0600 that holds one line, the URL") from e
