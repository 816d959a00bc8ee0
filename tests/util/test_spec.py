from __future__ import annotations

from pathlib import Path

import pytest

from softcache.errors import SettingsError
from softcache.util.spec import check_options, public_place, query_of, split_options


def test_options_stand_behind_a_question_mark() -> None:
    assert split_options("vit") == ("vit", {})
    assert split_options("a/b?x=1&y=&z=u%26v") == ("a/b", {"x": "1", "y": "", "z": "u&v"})


def test_options_that_are_written_otherwise_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"'vit\?wide': options are written NAME=VALUE, with &"):
        split_options("vit?wide")
    with pytest.raises(SettingsError, match=r"'vit\?a=1&a=2' has an option twice; give each once"):
        split_options("vit?a=1&a=2")
    with pytest.raises(SettingsError, match=r"'x\?b=1': unknown option 'b'; expected a, c"):
        check_options({"b": "1", "a": "2"}, ("a", "c"), "x?b=1")


def test_options_are_written_in_one_order() -> None:
    assert query_of({"b": "2", "a": "1"}) == "?a=1&b=2"
    assert query_of({}) == ""


def test_a_place_of_this_machine_is_public_by_its_name_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert public_place(str(tmp_path / "model")) == "model"
    assert public_place(str(tmp_path / "gone")) == "gone"
    assert public_place("google/vit-base") == "google/vit-base"
