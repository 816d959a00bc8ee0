"""The scores of a tuning, in a file, so that a stopped one goes on after its last round."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softcache.cache.fields import MAX_COUNT, integer, load_json
from softcache.errors import FormatError
from softcache.util.files import read_regular_file, replace_file

NAME = "tuning.json"
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Score:
    """How settings did in a round.

    Attributes:
        errors: on the held-out samples.
        differing: held-out samples that only these settings or only the default ones get right.
    """

    errors: int
    differing: int


@dataclass
class TuningRecord:
    """The scores of the finished rounds, in order, in each of which the default settings come first.

    Attributes:
        path: the file; None to write none.
        settings: what must be the same for the scores to count, as JSON.
    """

    path: Path | None
    settings: Mapping[str, Any]
    rounds: list[list[Score]] = field(default_factory=list)

    def add(self, scores: Sequence[Score]) -> None:
        """Add a round, and write the file."""
        self.rounds.append(list(scores))
        if self.path is None:
            return
        facts = {
            "settings": self.settings,
            "rounds": [[dataclasses.asdict(score) for score in scores] for scores in self.rounds],
        }
        text = json.dumps(facts, indent=1) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, lambda path: path.write_text(text))

    @classmethod
    def read(cls, path: Path, settings: Mapping[str, Any]) -> TuningRecord:
        """The record of an earlier run with the same settings; without rounds if there is none."""
        try:
            facts = load_json(read_regular_file(path, MAX_BYTES), path.name)
            if facts["settings"] != json.loads(json.dumps(settings)):
                return cls(path, settings)
            return cls(path, settings, [list(map(_score, scores)) for scores in facts["rounds"]])
        except (FormatError, OSError, LookupError, TypeError, ValueError):
            return cls(path, settings)  # it is made again


def _score(fields: dict[str, Any]) -> Score:
    return Score(*(integer(fields, name, 0, MAX_COUNT) for name in ("errors", "differing")))
