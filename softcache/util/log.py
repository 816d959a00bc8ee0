"""The library's log. The library itself prints nothing.

The command line shows these lines; from Python, configure `logging.getLogger("softcache")`.
"""

from __future__ import annotations

import logging

from softcache.errors import printable

_LOG = logging.getLogger("softcache")
_VERDICTS = logging.getLogger("softcache.verdict")
_PROGRESS = logging.getLogger("softcache.progress")


def inform(text: str) -> None:
    """Log a finding or a finished step."""
    _LOG.info("%s", printable(text))


def warn(text: str) -> None:
    """Log something that may be wrong."""
    _LOG.warning("%s", printable(text))


def verdict(text: str) -> None:
    """A line about a result that cannot be right; the command line shows it last."""
    _VERDICTS.warning("%s", printable(text))


def report_progress(text: str) -> None:
    """Log a line of progress, instead of a progress bar, where there is no terminal."""
    _PROGRESS.info("%s", text)
