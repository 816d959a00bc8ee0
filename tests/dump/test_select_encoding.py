"""The choice of an encoding: the candidates, their measured error, and the one that is chosen."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softcache.cache import Basis, Dense, Encoding, Quantized, Sampled, TopK
from softcache.data.augment import parse_augment
from softcache.data.open import open_source
from softcache.dump import select_encoding
from softcache.dump.config import DumpConfig
from softcache.dump.fidelity import Pairs, draw_rows
from softcache.dump.loop import dump
from softcache.dump.prepare import draft_header, load_teachers
from softcache.dump.select_encoding import (
    Candidate,
    candidates,
    candidates_table,
    check_spec,
    fit_basis,
    select,
    spec_of,
)
from softcache.errors import SettingsError

CLASSES, WIDTH = 40, 6


def teacher_rows(rows: int = 200, classes: int = CLASSES, width: int | None = WIDTH) -> Tensor:
    """Log-probabilities (rows, classes) of a teacher at T = 1.

    Args:
        width: how many inputs the teacher's last layer has; None makes all logits independent.
    """
    random = np.random.default_rng(0)
    weight = random.standard_normal((width or classes, classes)) if width else np.eye(classes)
    logits = random.standard_normal((rows, width or classes)) @ weight
    return torch.log_softmax(torch.from_numpy(logits).float() * 2, -1)


@pytest.fixture(scope="module")
def measured() -> list[Candidate]:
    return candidates(teacher_rows(), temperature=1.0, seed=0)


def fake(size: int, *kl: float) -> Candidate:
    """A candidate of `size` bytes; its encoding does not matter for the choice."""
    by_temperature = dict(zip((1.0, 2.0, 4.0, 8.0), kl, strict=False))
    return Candidate(f"sampled:{size}", Sampled(size), {}, size, by_temperature)


# which candidate is chosen


def take(
    listed: list[Candidate], max_kl: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[Encoding, list[Candidate]]:
    with monkeypatch.context() as patch:
        patch.setattr(select_encoding, "candidates", lambda *_, **__: listed)
        encoding, _, shown = select("auto", teacher_rows(4), temperature=1.0, seed=0, max_kl=max_kl)
    return encoding, shown


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=8, unique=True),
    data=st.data(),
    max_kl=st.sampled_from([1e-4, 1e-3, 1e-2]),
)
def test_the_smallest_that_keeps_within_the_limit_at_every_temperature_is_taken(
    sizes: list[int], data: st.DataObject, max_kl: float
) -> None:
    kl = st.lists(st.sampled_from([0.0, 1e-4, 1e-3, 1e-2, 0.1]), min_size=4, max_size=4)
    listed = [fake(size, *data.draw(kl)) for size in sizes]
    accepted = [n for n, c in zip(sizes, listed, strict=True) if max(c.kl.values()) <= max_kl]
    with pytest.MonkeyPatch.context() as monkeypatch:
        if accepted:
            assert take(listed, max_kl, monkeypatch) == (Sampled(min(accepted)), listed)
        else:
            with pytest.raises(SettingsError, match=f"no encoding keeps KL within {max_kl:g} at"):
                take(listed, max_kl, monkeypatch)


def test_of_two_of_one_size_the_nearer_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [replace(fake(10, kl), encoding=Sampled(n)) for n, kl in ((1, 2e-4), (2, 1e-4))]
    assert take(listed, 1e-3, monkeypatch)[0] == Sampled(2)


def test_where_none_is_good_enough_the_best_is_told_with_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = [fake(10, 0.1, 0.2, 0.3, 0.4), fake(20, 0.01, 0.02, 0.05, 0.03)]
    with pytest.raises(
        SettingsError,
        match=r"^no encoding keeps KL within 0\.001 at T = 1, 2, 4, 8; the best has 5\.0e-02: allow "
        r"more with --max-kl$",
    ):
        take(listed, 1e-3, monkeypatch)


@pytest.mark.parametrize(
    "kl",
    [(math.nan, 0.0), (0.0, math.nan)],
)
def test_a_nan_is_not_good_enough(kl: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [fake(10, *kl), fake(20, 0.0, 0.0)]
    assert take(listed, 1e-3, monkeypatch)[0] == Sampled(20)


@pytest.mark.parametrize(("max_kl", "expected"), [(1e-9, None), (1e-5, Dense), (10.0, Basis)])
def test_auto_takes_what_the_teachers_rows_allow(
    max_kl: float, expected: type[Encoding] | None
) -> None:
    rows = teacher_rows(width=None)
    if expected is None:
        with pytest.raises(SettingsError, match="no encoding keeps KL within 1e-09 at T = 1, 2, 4"):
            select("auto", rows, temperature=1.0, seed=0, max_kl=max_kl)
        return
    encoding, shared, listed = select("auto", rows, temperature=1.0, seed=0, max_kl=max_kl)
    assert isinstance(encoding, expected)
    chosen = next(candidate for candidate in listed if candidate.encoding == encoding)
    assert max(chosen.kl.values()) <= max_kl
    assert shared.keys() == chosen.shared.keys()
    cheaper = [c for c in listed if c.bytes_per_row < chosen.bytes_per_row]
    assert all(max(candidate.kl.values()) > max_kl for candidate in cheaper)


def test_a_teacher_of_few_dimensions_gets_a_basis() -> None:
    encoding, shared, _ = select("auto", teacher_rows(), temperature=1.0, seed=0, max_kl=1e-3)
    assert isinstance(encoding, Basis)
    assert {name: tuple(tensor.shape) for name, tensor in shared.items()} == {
        "mean": (CLASSES,),
        "directions": (encoding.rank, CLASSES),
        "direction_steps": (encoding.rank,),
    }


def test_the_same_rows_give_the_same_choice() -> None:
    one, other = (
        select("auto", teacher_rows(), temperature=4.0, seed=0, max_kl=1e-3) for _ in "12"
    )
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    assert [c.to_json() for c in one[2]] == [c.to_json() for c in other[2]]


# the candidates


def test_candidates_are_unique_and_the_smallest_comes_first(measured: list[Candidate]) -> None:
    assert len({candidate.encoding for candidate in measured}) == len(measured)
    sizes = [candidate.bytes_per_row for candidate in measured]
    assert sizes == sorted(sizes)
    assert {type(candidate.encoding) for candidate in measured} == {Dense, Quantized, TopK, Basis}


def test_a_teacher_of_few_dimensions_would_have_duplicate_candidates() -> None:
    # larger budgets yield the same encoding when there are no directions left to spend them on
    largest = (
        fit_basis("basis:16,8", teacher_rows(), 1.0, 0),
        fit_basis("basis:19,8", teacher_rows(), 1.0, 0),
    )
    assert largest[0].encoding == largest[1].encoding


def test_candidates_say_the_bytes_that_a_row_takes(measured: list[Candidate]) -> None:
    for candidate in measured:
        arrays = candidate.encoding.arrays(CLASSES)
        assert candidate.bytes_per_row == sum(
            np.dtype(array.dtype).itemsize * math.prod(array.shape)
            for array in arrays
            if array.axis == "rows"
        )
        shared = {array.name for array in arrays if array.axis == "shared"}
        assert set(candidate.shared) == shared


def test_candidates_are_measured_at_every_temperature(measured: list[Candidate]) -> None:
    for candidate in measured:
        assert sorted(candidate.kl) == [1.0, 2.0, 4.0, 8.0]
        assert all(kl > -1e-6 for kl in candidate.kl.values())
    at_three = candidates(teacher_rows(), temperature=3.0, seed=0)
    assert all(sorted(candidate.kl) == [1.0, 2.0, 3.0, 4.0, 8.0] for candidate in at_three)
    assert all(3.0 in c.encoding.temperatures for c in at_three if isinstance(c.encoding, TopK))


def test_the_error_is_measured_on_rows_that_the_fit_has_not_seen() -> None:
    # with as many directions as rows, the fitted rows would be decoded almost exactly
    candidate = fit_basis("basis:50,1", teacher_rows(80, classes=200, width=None), 1.0, 0)
    assert isinstance(candidate.encoding, Basis)
    assert candidate.encoding.rank > 45
    assert candidate.kl[1.0] > 0.1


@pytest.mark.parametrize("classes", [2, 3, 5, 16, 17])
def test_few_classes_have_fewer_candidates(classes: int) -> None:
    listed = candidates(teacher_rows(classes=classes), temperature=1.0, seed=0)
    kinds = {type(candidate.encoding) for candidate in listed}
    assert {Dense, Quantized} <= kinds
    assert (TopK in kinds) == (classes >= 16)
    assert (Basis in kinds) == (classes >= 17)
    assert all(candidate.kl[1.0] < 1e-3 for candidate in listed if candidate.spec == "dense")


@pytest.mark.parametrize("spec", ["basis:3,2", "basis:8,8", "basis:12,1"])
def test_a_basis_takes_no_more_than_the_bytes_asked_for(spec: str) -> None:
    size, top = map(int, spec[6:].split(","))
    encoding, shared, listed = select(spec, teacher_rows(), temperature=1.0, seed=0, max_kl=1e-9)
    assert isinstance(encoding, Basis)
    assert encoding.top == top
    assert encoding.wide + encoding.narrow // 2 <= size
    assert [candidate.spec for candidate in listed] == [spec]
    assert listed[0].encoding == encoding
    assert len(shared["directions"]) == encoding.rank


# specifications


@pytest.mark.parametrize(
    ("spec", "expected"), [("dense", Dense()), ("quantized", Quantized()), ("topk:9", TopK(9))]
)
def test_what_needs_no_rows_is_taken_as_it_is(spec: str, expected: Encoding) -> None:
    assert not select_encoding.needs_rows(spec)
    assert select(spec, None, temperature=1.0, seed=0, max_kl=1e-3) == (expected, {}, [])


@pytest.mark.parametrize("spec", ["dense", "quantized", "topk:9", "sampled:5"])
def test_what_needs_no_rows_is_the_same_with_rows(spec: str) -> None:
    without = select(spec, None, temperature=1.0, seed=0, max_kl=1e-3)[0]
    encoding, shared, _ = select(spec, teacher_rows(), temperature=1.0, seed=0, max_kl=1e-3)
    assert (encoding, shared) == (without, {})


@pytest.mark.parametrize(
    "spec", ["auto", "dense", "quantized", "topk:39", "sampled:1000", "basis:40,8", "basis:1,1"]
)
def test_a_good_specification_passes(spec: str) -> None:
    check_spec(spec, 4.0, CLASSES)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zip", r"^encoding 'zip' is unknown; expected dense, quantized, topk:K, basis:BYTES,K, "),
        ("auto:3", r"^encoding 'auto:3' is unknown; expected .* packed:BYTES or auto$"),
        ("basis", r"^encoding 'basis' is unknown; expected .*basis:BYTES,K"),
        *(
            (spec, rf"^encoding '{spec}': expected basis:BYTES,K, .* as in basis:64,8$")
            for spec in ("basis:", "basis:64", "basis:64,", "basis:0,8", "basis:8,0", "basis:-8,8")
        ),
        ("basis:1,2,3", r"^encoding 'basis:1,2,3': expected basis:BYTES,K, "),
        ("basis:a,b", r"^encoding 'basis:a,b': expected basis:BYTES,K, "),
        ("basis:41,8", "needs more than 40 classes; use dense"),
        ("basis:8,41", "needs more than 40 classes; use dense"),
        ("topk:0", "needs k of at least 1"),
        ("topk:40", "topk:40 of 40 classes leaves no tail; use dense"),
        ("sampled:0", "sampled:0 draws; expected 1 to 65536"),
        ("sampled:65537", "sampled:65537 draws; expected 1 to 65536"),
    ],
)
def test_a_bad_specification_is_refused_with_what_was_expected(spec: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_spec(spec, 4.0, CLASSES)


@pytest.mark.parametrize(
    ("encoding", "spec"),
    [
        (Dense(), "dense"),
        (Quantized(), "quantized"),
        (TopK(32), "topk:32"),
        (Basis(10, 12, 8), "basis:16,8"),
        (Sampled(50), "sampled:50"),
    ],
)
def test_an_encoding_is_named_as_the_command_line_names_it(encoding: Encoding, spec: str) -> None:
    assert spec_of(encoding) == spec
    check_spec(spec, 4.0, 1000)


# the table


def test_the_table_marks_the_chosen_one(measured: list[Candidate]) -> None:
    for candidate in measured:
        lines = candidates_table(measured, candidate.encoding).splitlines()
        marked = [line for line in lines if line.startswith("*")]
        assert len(marked) == 1
        assert marked[0].split()[:2] == [f"*{candidate.spec}", f"{candidate.bytes_per_row:,}"]


def test_the_table_has_a_line_for_each_candidate_and_a_column_for_each_temperature() -> None:
    lines = candidates_table(
        [fake(10, 0.1, 0.2, 0.3, 0.4), fake(2000, 0, 0, 0, 1e-9)], Dense()
    ).splitlines()
    assert re.split(r"  +", lines[0]) == [
        "encoding",
        "bytes per row",
        *(f"KL at T={t}" for t in (1, 2, 4, 8)),
    ]
    assert lines[2].split() == ["sampled:10", "10", "1.0e-01", "2.0e-01", "3.0e-01", "4.0e-01"]
    assert lines[3].split()[:3] == ["sampled:2000", "2,000", "0.0e+00"]
    assert len(lines) == 4


def test_what_a_candidate_says_goes_into_the_header() -> None:
    assert fake(10, 0.1, 0.2).to_json() == {
        "encoding": "sampled:10",
        "bytes_per_row": 10,
        "kl": {"1": 0.1, "2": 0.2},
    }


# in a dump


def test_a_dump_records_what_it_chose_from(
    dump_config: DumpConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    header = dump(replace(dump_config, eval_data=None, encoding="auto", max_kl=0.01)).header
    assert header.encoding == Quantized()  # 7 bytes per row of 5 classes; dense takes 10
    assert header.choice is not None
    assert header.choice["asked"] == "auto"
    assert header.choice["max_kl"] == 0.01
    by_name = {listed["encoding"]: listed for listed in header.choice["candidates"]}
    assert {name: by_name[name]["bytes_per_row"] for name in by_name} == {
        "dense": 10,
        "quantized": 7,
    }
    assert by_name["quantized"]["kl"].keys() == {"1", "2", "4", "8"}
    assert max(by_name["quantized"]["kl"].values()) <= 0.01
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["*quantized", "dense"]


def test_a_dump_that_can_choose_none_writes_nothing(
    dump_config: DumpConfig, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SettingsError, match=r"no encoding keeps KL within 1e-12 at T = 4, 1, 2, 8"):
        dump(replace(dump_config, eval_data=None, encoding="auto", max_kl=1e-12))
    assert sorted(tmp_path.iterdir()) == before


# the rows it is measured on


def drawn_rows(config: DumpConfig, max_rows: int = 200) -> Tensor:
    source = open_source(config.data)
    augmentation = parse_augment(config.augment, seed=config.seed, total=len(source))
    teacher = load_teachers(config, source, augmentation)
    draft = draft_header(config, source, teacher)
    return select_encoding.draw_teacher_rows(
        draft, source, teacher, augmentation, config.workers, max_rows
    )


@pytest.mark.parametrize("augment", [None, "shift:2,mixup"])
def test_rows_to_choose_by_are_the_same_whatever_the_file_is_to_hold(
    augment: str | None, dump_config: DumpConfig
) -> None:
    config = replace(dump_config, augment=augment, seed=3)
    expected = drawn_rows(config)
    others = [replace(config, shard=(2, 3))]
    if augment:
        others += [replace(config, views=20), replace(config, views=2, first_view=9, shard=(0, 2))]
    for other in others:
        assert torch.equal(drawn_rows(other), expected)
    # they do change with the seed
    assert not torch.equal(drawn_rows(replace(config, seed=4)), expected)


def test_rows_to_choose_by_come_from_the_first_views_of_all_samples(
    dump_config: DumpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, int]] = []

    def note(views: int, samples: int, *others: int) -> Pairs:
        drawn.append((views, samples))
        return draw_rows(views, samples, *others)

    monkeypatch.setattr(select_encoding, "draw_rows", note)
    for augment, shard in ((None, (0, 1)), (None, (1, 3)), ("flip", (0, 1)), ("flip", (1, 3))):
        drawn_rows(replace(dump_config, augment=augment, shard=shard), max_rows=9)
    assert drawn == [(1, 300), (1, 300), (8, 300), (8, 300)]


def test_shards_come_to_the_same_encoding(dump_config: DumpConfig, tmp_path: Path) -> None:
    config = replace(dump_config, eval_data=None, encoding="basis:4,2", views=2, augment="shift:2")
    whole = dump(replace(config, out=tmp_path / "whole.h5"))
    for shard, first_view in (((0, 2), 0), ((1, 2), 9)):
        out = tmp_path / f"{shard[0]}.h5"
        part = dump(replace(config, out=out, shard=shard, first_view=first_view))
        assert part.header.encoding == whole.header.encoding
        for name in ("mean", "directions", "direction_steps"):
            np.testing.assert_array_equal(part.arrays[name], whole.arrays[name])
