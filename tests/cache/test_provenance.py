"""Statistics and provenance in a header that softcache would not write are refused."""

from __future__ import annotations

from typing import Any

import pytest

from softcache.cache import provenance
from softcache.errors import FormatError

SUMMARY = {"entropy": 0.5, "agreement": None, "rows": 3}
TEACHER = {"name": "t", "parameters": 1, "weight": 1.0}


@pytest.mark.parametrize("at", [{"2": None}, {"2": "x"}, {"2": float("inf")}, [], None, "x"])
def test_a_fidelity_is_numbers_by_temperature(at: object) -> None:
    good: dict[str, Any] = {"mean": 1e-8, "at": {"2": 1e-8}}
    assert provenance.summary(SUMMARY | {"fidelity": good})
    with pytest.raises(FormatError, match="summary has fidelity"):
        provenance.summary(SUMMARY | {"fidelity": good | {"at": at}})


@pytest.mark.parametrize("selected", ["{{ 7 * 7 }}", {}, {"classes": "3", "of": 4}, [3, 4]])
def test_a_selection_of_classes_is_two_numbers(selected: object) -> None:
    assert provenance.teachers([TEACHER | {"selected": {"classes": 3, "of": 4}}])
    with pytest.raises(FormatError, match="teachers is"):
        provenance.teachers([TEACHER | {"selected": selected}])
