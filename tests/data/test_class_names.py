"""Classes are the same if their names are, in whatever order and however they are written."""

from __future__ import annotations

import numpy as np
import pytest

from softcache.data.class_names import MappedSource, align_classes, match_names
from softcache.data.source import ArraySource, Source
from softcache.errors import DataError


def source(*names: str, labels: tuple[int, ...] = (0, 1, 2, -1)) -> Source:
    values = np.asarray(labels, np.int64)
    return ArraySource("mine", np.zeros((len(values), 2), np.float32), values, tuple(names))


def labels_of(aligned: Source) -> list[int]:
    return [int(label) for label in aligned.fetch(range(len(aligned)))[1]]


@pytest.mark.parametrize(
    ("own", "names", "mapping"),
    [
        (["a", "b", "c"], ["c", "a", "b"], (1, 2, 0)),
        (["0", "10", "2"], ["0", "2", "10"], (0, 2, 1)),
        (["a", "c"], ["a", "b", "c"], (0, 2)),
        (["Sea_Lion", "dog"], ["dog", "sea lion"], (1, 0)),
        (["tench", "shark"], ["great white shark, shark", "tench, Tinca tinca"], None),
        (["tench", "hen"], ["hen", "tench, Tinca tinca"], (1, 0)),
        (["a", "b"], ["a", "x"], None),
        (["a", "A"], ["A", "a"], (1, 0)),
        (["sea lion", "Sea-Lion"], ["sea_lion", "SEA LION"], None),
    ],
)
def test_names_are_matched_where_that_is_certain(
    own: list[str], names: list[str], mapping: tuple[int, ...] | None
) -> None:
    assert match_names(own, names) == mapping


def test_wordnet_ids_in_order_are_as_many_words() -> None:
    ids = [f"n{number:08}" for number in range(1000)]
    words = [f"word {number}" for number in range(1000)]
    assert match_names(ids, words) == match_names(words, ids) == tuple(range(1000))
    assert match_names(ids[::-1], words) is None
    assert match_names(ids[:20], words[:20]) is None


def test_labels_are_mapped_and_the_missing_ones_stay_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    aligned = align_classes(source("b", "c", "a"), ["a", "b", "c"], "teacher t")
    assert labels_of(aligned) == [1, 2, 0, -1]
    assert aligned.class_names == ("a", "b", "c")
    assert "mine has its classes in another order than teacher t" in capsys.readouterr().out
    some = align_classes(source("c", "a", labels=(0, 1, -1)), ["a", "b", "c"], "t", quiet=True)
    assert labels_of(some) == [2, 0, -1]
    assert capsys.readouterr().out == ""


def test_a_label_out_of_range_stays_out_of_range() -> None:
    mapped = MappedSource(source("b", "a", labels=(0, 1, 2, 7)), (1, 0), ("a", "b"))
    assert labels_of(mapped) == [1, 0, 2, 7]


@pytest.mark.parametrize("numbers", [["0", "1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"]])
def test_classes_that_are_only_numbered_have_any_name(numbers: list[str]) -> None:
    names = source("a", "b", "c")
    assert align_classes(names, numbers, "t") is names
    assert align_classes(source(*numbers), ["a", "b", "c"], "t").class_names == tuple(numbers)
    assert align_classes(source(), ["a", "b", "c"], "t").class_names == ()


def test_other_names_are_refused_unless_they_are_said_to_be_the_same() -> None:
    with pytest.raises(
        DataError, match=r"'x' of the former are not .*\('c' of which.*--same-class"
    ):
        align_classes(source("a", "b", "x"), ["a", "b", "c"], "t")
    same = align_classes(source("a", "b", "x"), ["a", "b", "c"], "t", same_classes=True)
    assert labels_of(same) == [0, 1, 2, -1]
    with pytest.raises(DataError, match="--same-classes: mine has 3 classes, and t has 2"):
        align_classes(source("a", "b", "c"), ["x", "y"], "t", same_classes=True)
