"""Specifications: their parts, and the public name that is safe to share."""

from __future__ import annotations

from pathlib import Path

import pytest

from softcache.errors import SettingsError
from softcache.util.spec import CODE, Kind, Spec, check_options, forms, split_options


def test_options_follow_a_question_mark() -> None:
    assert split_options("vit") == ("vit", {})
    assert split_options("a/b?x=1&y=&z=u%26v") == ("a/b", {"x": "1", "y": "", "z": "u&v"})


def test_options_that_are_written_otherwise_are_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"'vit\?wide': options are written NAME=VALUE, separated"
    ):
        split_options("vit?wide")
    with pytest.raises(
        SettingsError, match=r"'vit\?a=1&a=2' repeats an option; give each option once"
    ):
        split_options("vit?a=1&a=2")
    with pytest.raises(SettingsError, match=r"'x\?b=1': unknown option 'b'; expected a, c"):
        check_options({"b": "1", "a": "2"}, ("a", "c"), "x?b=1")


def test_options_of_a_public_name_have_one_order() -> None:
    spec = Spec("hf:vit?b=2&a=1", "hf", "vit", options={"b": "2", "a": "1"})
    assert spec.public_name == "hf:vit?a=1&b=2"


@pytest.mark.parametrize(
    ("place", "public"),
    [("FOLDER/model", "model"), ("FOLDER/gone", "gone"), ("google/vit-base", "google/vit-base")],
)
def test_a_folder_of_this_machine_is_shown_by_its_name(
    place: str, public: str, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    place = place.replace("FOLDER", str(tmp_path))
    assert Spec(f"hf:{place}", "hf", place).public_name == f"hf:{public}"
    tokenizer = Spec(f"hf:x?tokenizer={place}", "hf", "x", options={"tokenizer": place})
    assert tokenizer.public_name == f"hf:x?tokenizer={public}"


def test_code_and_files_are_shown_by_the_name_of_the_file() -> None:
    code = Spec("/data/me/models.py:small", CODE, "/data/me/models.py", "small", split="test")
    assert code.public_name == "models.py:small@test"
    options = {"shuffle": "1", "classes": "a,b"}
    code = Spec("m.py:small", CODE, "/data/me/m.py", "small", options=options, split="test")
    assert code.public_name == "m.py:small?classes=a,b&shuffle=1@test"
    assert Spec("/tmp/a.pt2", "pt2", "/tmp/a.pt2", file=True).public_name == "a.pt2"
    assert Spec("npz:/tmp/a.npz", "npz", "/tmp/a.npz", split="test", file=True).public_name == (
        "npz:a.npz@test"
    )


def test_forms_are_listed_for_messages() -> None:
    kinds = {name: Kind(f"{name}:DIR", "") for name in ("a", "b", "c")}
    assert forms(kinds) == "a:DIR, b:DIR or c:DIR"


def test_a_handler_is_imported_when_it_is_needed() -> None:
    assert Kind("", "", "json:loads").load()("[1]") == [1]
