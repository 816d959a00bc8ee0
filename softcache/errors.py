"""The errors that softcache raises on purpose.

Every message says the value, what was expected, where, and what to do next. The command line
prints the message in one line and exits with the error's `exit_code`.
"""

from __future__ import annotations

LONGEST = 900  # characters of a message; in a longer one, the middle is left out


class SoftcacheError(Exception):
    """Something the user can fix; `exit_code` is what the command line exits with."""

    exit_code = 1

    def __str__(self) -> str:
        """The message; what it quotes from a file may not control a terminal, or fill it."""
        text = printable(super().__str__())
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 3 :]}"


def printable(text: str) -> str:
    """A text with its control characters, other than line breaks and tabs, written as escapes."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1]
        for character in text
    )


class FormatError(SoftcacheError, ValueError):
    """A file is not a cache, or breaks a rule of FORMAT.md."""


class SettingsError(SoftcacheError, ValueError):
    """An option or a specification is invalid, or a combination of them is."""

    exit_code = 2


class DataError(SoftcacheError, ValueError):
    """The samples are not what they should be, or not those the cache was made from."""


class ModelError(SoftcacheError, ValueError):
    """A teacher or a student cannot be built, loaded or run."""


class RemoteError(SoftcacheError):
    """A server cannot be reached, or does not return what it should."""


class MissingCacheError(FormatError, FileNotFoundError):
    """There is no such cache file."""


class MissingDataError(DataError, FileNotFoundError):
    """A data specification names a file or folder that does not exist."""


class MissingModelError(ModelError, FileNotFoundError):
    """A model specification or --weights names a file that does not exist."""


class MissingFileError(SettingsError, FileNotFoundError):
    """An option names a file that does not exist."""


class InUseError(SoftcacheError):
    """Another process is writing the same file or folder."""


class Interrupted(SoftcacheError):
    """The user stopped the run; finished work is kept."""

    exit_code = 130
