"""What the library tells people while it works. It prints nothing itself.

The command line shows these lines; from Python, `logging.getLogger("softcache")` decides.
"""

from __future__ import annotations

import logging

_LOG = logging.getLogger("softcache")
_PROGRESS = logging.getLogger("softcache.progress")


def inform(text: str) -> None:
    """A line about what was found or done."""
    _LOG.info("%s", text)


def warn(text: str) -> None:
    """A line about something that may be wrong."""
    _LOG.warning("%s", text)


def report_progress(text: str) -> None:
    """A line that stands in for a progress bar where there is no terminal."""
    _PROGRESS.info("%s", text)
