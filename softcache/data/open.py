"""Open a data source from its specification."""

from __future__ import annotations

from softcache.data.source import Source
from softcache.data.spec import KINDS, parse_data
from softcache.errors import DataError


def open_source(text: str) -> Source:
    """Open a data specification; `softcache help specs` lists the forms.

    Raises:
        SettingsError: the specification has no known form, or an invalid option.
        DataError: the files are missing or invalid, or hold no samples.
    """
    spec = parse_data(text)
    source: Source = KINDS[spec.kind].load()(spec)
    if len(source) == 0:
        raise DataError(f"data {text} holds no samples; expected at least one")
    return source
