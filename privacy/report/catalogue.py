"""The one catalogue of messages: every text of a report, its pages and its cards, in every language."""

from __future__ import annotations

import tomllib
from functools import lru_cache
from importlib.resources import files
from typing import Any

from fedveil.common.errors import UsageError

CATALOGUE = "catalogue.toml"
LANGUAGES = ("en", "zh")
TAGS = {"en": "en", "zh": "zh-Hans"}  # what a page declares itself to be written in (BCP 47)


@lru_cache(maxsize=1)
def messages() -> dict[str, dict[str, str]]:
    """Every message: ``{"section.name": {"en": ..., "zh": ...}}``, with ``{placeholders}`` as in :meth:`str.format`."""
    text = files("fedveil.privacy.report").joinpath(CATALOGUE).read_text(encoding="utf-8")
    return {f"{s}.{name}": texts for s, section in tomllib.loads(text).items() for name, texts in section.items()}


class Speaker:
    """One language of the catalogue.

    Raises:
        UsageError: the catalogue does not have the language.
    """

    def __init__(self, lang: str) -> None:
        if lang not in LANGUAGES:
            raise UsageError(f"there is no catalogue in {lang[:16]!r}", hint=f"one of {', '.join(LANGUAGES)}")
        self.lang = lang

    @property
    def tag(self) -> str:
        """The BCP 47 tag of the language."""
        return TAGS[self.lang]

    def __call__(self, key: str, /, **values: object) -> str:
        """The message, its placeholders filled; a :class:`KeyError` is a mistake of the program."""
        text = messages()[key][self.lang]
        return text.format(**values) if values else text

    def named(self, section: str, value: Any) -> str:
        """The word for a value of a closed table (a status, a mode); the value itself if the table lacks it."""
        found = messages().get(f"{section}.{value}")
        return str(value) if found is None else found[self.lang]
