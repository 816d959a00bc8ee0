"""The one family of errors that softcache raises on purpose.

Every message says the value, what was expected, where, and what to do next. The command line
prints the message in one line and exits with the error's `exit_code`.
"""

from __future__ import annotations


class SoftcacheError(Exception):
    """Something the user can mend; `exit_code` is what the command line exits with."""

    exit_code = 1


class FormatError(SoftcacheError):
    """A file is not a cache, or breaks a rule of FORMAT.md."""


class SettingsError(SoftcacheError):
    """An option, a specification or a combination of them makes no sense."""

    exit_code = 2


class DataError(SoftcacheError):
    """The samples are not what they should be, or not those the cache was made from."""


class ModelError(SoftcacheError):
    """A teacher or a student cannot be built, loaded, or run."""


class RemoteError(SoftcacheError):
    """A server cannot be reached, or does not give what it should."""


class Interrupted(SoftcacheError):
    """The user stopped the work; what was done is kept."""

    exit_code = 130
