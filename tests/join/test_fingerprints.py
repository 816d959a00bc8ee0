"""The user's own augmentation, and whether today's inputs are those that the teacher saw."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from softcache.cache import Cache, Header
from softcache.cache.header import FINGERPRINT
from softcache.data import augment
from softcache.data.augment import Augmentation, parse_augment
from softcache.data.loader import augmented, loader, make_request
from softcache.data.open import open_source
from softcache.data.source import ArraySource, Source
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import DataError, FormatError, ModelError, SettingsError
from softcache.join.fingerprints import (
    check_replay,
    fingerprint,
    fingerprinted_rows,
    fingerprints,
    replayed,
)
from softcache.models.build import build
from softcache.train.config import TrainConfig, make_train_config
from softcache.train.loop import train
from softcache.train.student import Student
from softcache.types import Views
from softcache.util.counter_rng import Draws, uniform
from tests.configs import replace
from tests.conftest import CLASSES, SAMPLES, make_arrays

AUGMENTATIONS = """
import random

import numpy as np
import torch

CALLS = 0
SEEDED, UNSEEDED = np.random.default_rng(0), np.random.default_rng()


def noise(image):
    # draws from all three generators that people use
    found = image.float() / 255 + 0.1 * torch.rand(image.shape)
    return found * random.random() + float(np.random.rand())

def noise_times(image):
    return noise(image) * 1.5

def mirror(image):
    return image.flip(-1) if random.random() < 0.5 else image

def counts(image):
    # its own state, which no seed puts back
    global CALLS
    CALLS += 1
    return torch.roll(image, CALLS, -1)

def seeded(image):
    return torch.roll(image, int(SEEDED.integers(8)), -1)

def unseeded(image):
    return torch.roll(image, int(UNSEEDED.integers(8)), -1)

def as_array(image):
    return image.numpy() // 2

def larger(image):
    left = random.randrange(5)
    return torch.nn.functional.pad(image, [left, 4 - left, 2, 2])

def raises(image):
    raise OSError("the backgrounds are gone")

def ragged(image):
    return image[:, : 1 + int(8 * random.random())]

def draws_and_raises(image):
    random.random(), np.random.rand(), torch.rand(1)
    raise ValueError("no such image")
"""

Indices = npt.NDArray[np.int64]
Alter = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
COUNT = 60


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A file with callables of a user's own."""
    path = tmp_path / "aug.py"
    path.write_text(AUGMENTATIONS)
    return path


@pytest.fixture
def source() -> ArraySource:
    return ArraySource("mine", *make_arrays(COUNT))


def view_of(
    source: Source, augmentation: Augmentation, *, batch_size: int = 16, workers: int = 0
) -> Tensor:
    """All samples in view 1, as the student's loader makes them."""
    numbers = np.arange(len(source))
    parts = np.split(numbers, range(batch_size, len(numbers), batch_size))
    requests = [make_request(augmentation, part.tolist(), 1, part) for part in parts]
    batches = loader(source, requests, augmentation=augmentation, workers=workers)
    cpu = torch.device("cpu")
    return torch.cat(
        [augmented(b, augmentation, 1, p, cpu) for b, p in zip(batches, parts, strict=True)]
    )


# the user's own callable


WAYS = [(batch_size, workers) for batch_size in (1, 7, 256) for workers in (0, 1, 4)]
SPECS = [
    "OWN",
    "OWN,shift:2,flip,mixup",
    "shift:2,flip,cutout:3,mixup",
    "crop:0.5,jitter:0.4",
]


def digest(inputs: Tensor) -> str:
    return hashlib.sha256(inputs.numpy().tobytes()).hexdigest()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("spec", SPECS)
def test_neither_workers_nor_batches_change_what_is_drawn(
    own: Path, source: ArraySource, spec: str
) -> None:
    augmentation = parse_augment(spec.replace("OWN", f"{own}:noise"), seed=5, total=COUNT)
    expected = view_of(source, augmentation)
    for batch_size, workers in WAYS:
        found = view_of(source, augmentation, batch_size=batch_size, workers=workers)
        if "crop" in spec:  # its last bits may differ with a sample's place in its batch
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        else:
            assert torch.equal(found, expected), (batch_size, workers)
        alone = view_of(source, augmentation, batch_size=batch_size)
        assert torch.equal(found, alone), (batch_size, workers)
    assert len(np.unique(expected.flatten(1).numpy(), axis=0)) == COUNT


# view 1 of all samples in an npz file, in batches of 7 that a worker process loads
REPLAY = """
import hashlib, json, sys
import numpy as np
import torch
from softcache.data.open import open_source
from softcache.data.loader import augmented, loader, make_request
from softcache.data.augment import parse_augment

source = open_source(sys.argv[1])
for spec in sys.argv[2:]:
    augmentation = parse_augment(spec, seed=5, total=len(source))
    requests = [
        make_request(augmentation, part.tolist(), 1, part)
        for part in np.split(np.arange(len(source)), range(7, len(source), 7))
    ]
    digest = hashlib.sha256()
    for batch in loader(source, requests, augmentation=augmentation, workers=1):
        numbers = batch.sample_ids.numpy()
        found = augmented(batch, augmentation, 1, numbers, torch.device("cpu"))
        digest.update(found.numpy().tobytes())
    print(digest.hexdigest())
"""


def test_another_process_draws_the_same(own: Path, source: ArraySource, tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", x=source.inputs, y=source.labels)
    specs = [spec.replace("OWN", f"{own}:noise") for spec in SPECS]
    found = []
    for seed in "12":  # of the hashes of strings, in which processes differ
        command = [sys.executable, "-c", REPLAY, f"npz:{tmp_path / 'mine.npz'}", *specs]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.append(done.stdout.split())
    assert found[0] == found[1]
    assert len(set(found[0])) == len(SPECS)
    for spec, there in zip(specs, found[0], strict=True):
        augmentation = parse_augment(spec, seed=5, total=COUNT)
        assert digest(view_of(source, augmentation, batch_size=7)) == there
        other = parse_augment(spec, seed=6, total=COUNT)
        assert digest(view_of(source, other, batch_size=7)) != there


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("spec", SPECS)
def test_samples_of_one_batch_may_each_have_a_view_of_their_own(
    own: Path, source: ArraySource, spec: str, workers: int
) -> None:
    augmentation = parse_augment(spec.replace("OWN", f"{own}:noise"), seed=5, total=COUNT)
    numbers, cpu = np.arange(COUNT), torch.device("cpu")

    def seen(view: Views) -> Tensor:
        request = make_request(augmentation, numbers.tolist(), view, numbers)
        batches = loader(source, [request], augmentation=augmentation, workers=workers)
        return augmented(next(iter(batches)), augmentation, view, numbers, cpu)

    views = np.random.default_rng(0).integers(3, 6, COUNT)
    each = torch.stack([seen(view) for view in range(3, 6)])
    expected = each[views - 3, numbers]
    assert torch.equal(seen(views), expected)
    others = each[(views - 2) % 3, numbers]  # another view would show, in nearly all
    assert (others != expected).flatten(1).any(1).double().mean() > 0.8


def test_a_callable_with_a_state_of_its_own_would_be_noticed(
    own: Path, source: ArraySource
) -> None:
    augmentation = parse_augment(f"{own}:counts", seed=5, total=COUNT)
    assert not torch.equal(view_of(source, augmentation), view_of(source, augmentation))


def test_states_left_by_others_do_not_reach_the_callable(own: Path, source: ArraySource) -> None:
    augmentation = parse_augment(f"{own}:noise", seed=5, total=COUNT)
    expected = view_of(source, augmentation)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    assert torch.equal(view_of(source, augmentation), expected)


def next_numbers() -> tuple[float, float, float]:
    numpy_state: Any = np.random  # the generator that a user's transform draws from
    return random.random(), float(numpy_state.rand()), float(torch.rand(1))


def seed_all() -> None:
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)


def test_the_random_states_are_put_back_after_the_callable(own: Path, source: ArraySource) -> None:
    seed_all()
    expected = next_numbers()
    augmentation = parse_augment(f"{own}:noise", seed=5, total=COUNT)
    seed_all()
    augmentation.transformed(source.fetch(range(5))[0], 0, np.arange(5))
    assert next_numbers() == expected


def test_they_are_put_back_after_it_has_raised(own: Path, source: ArraySource) -> None:
    seed_all()
    expected = next_numbers()
    augmentation = parse_augment(f"{own}:draws_and_raises", seed=5, total=COUNT)
    seed_all()
    with pytest.raises(Exception, match="no such image"):
        augmentation.transformed(source.fetch(range(5))[0], 0, np.arange(5))
    assert next_numbers() == expected


def test_states_that_are_not_put_back_would_be_noticed(own: Path, source: ArraySource) -> None:
    seed_all()
    expected = next_numbers()
    transform = parse_augment(f"{own}:noise", seed=5, total=COUNT).transform
    assert transform is not None
    seed_all()
    transform(source.fetch([0])[0][0])
    assert next_numbers() != expected


@pytest.mark.parametrize(("seed", "view", "first"), [(6, 1, 0), (5, 2, 0), (5, 1, 8)])
def test_another_seed_view_or_sample_draws_other_numbers(
    own: Path, seed: int, view: int, first: int
) -> None:
    image = torch.zeros(1, 1, 8, 8).expand(8, 1, 8, 8)
    one = parse_augment(f"{own}:noise", seed=5, total=COUNT).transformed(image, 1, np.arange(8))
    other = parse_augment(f"{own}:noise", seed=seed, total=COUNT).transformed(
        image, view, np.arange(first, first + 8)
    )
    assert not (one == other).flatten(1).all(1).any()


def test_a_partner_draws_other_numbers_than_the_sample_itself(own: Path) -> None:
    image = torch.zeros(1, 1, 8, 8).expand(8, 1, 8, 8)
    augmentation = parse_augment(f"{own}:noise,mixup", seed=5, total=COUNT)
    mine = augmentation.transformed(image, 1, np.arange(8))
    theirs = augmentation.transformed(image, 1, np.arange(8), partner=True)
    assert not (mine == theirs).flatten(1).all(1).any()


def test_a_callable_comes_before_operations_and_mixup(own: Path, source: ArraySource) -> None:
    spec = f"{own}:noise,flip,mixup"
    whole = parse_augment(spec, seed=5, total=COUNT)
    raw, numbers = source.fetch(range(COUNT))[0], np.arange(COUNT)
    partners = whole.partners(1, numbers)
    assert partners is not None
    mine = whole.transformed(raw, 1, numbers)
    theirs = whole.transformed(raw[partners], 1, numbers, partner=True)
    rest = parse_augment("flip,mixup", seed=5, total=COUNT)
    assert torch.equal(view_of(source, whole), rest(mine, theirs, 1, numbers))


def test_bytes_that_a_callable_gives_become_floats_up_to_one(
    own: Path, source: ArraySource
) -> None:
    found = view_of(source, parse_augment(f"{own}:as_array", seed=5, total=COUNT))
    np.testing.assert_allclose(found, source.inputs // 2 / 255, rtol=1e-6)


def test_keys_are_of_the_sample_as_it_was(own: Path, source: ArraySource) -> None:
    augmentation = parse_augment(f"{own}:noise", seed=5, total=COUNT)
    request = make_request(augmentation, [3, 4], 1, np.array([3, 4]))
    found = next(iter(loader(source, [request], augmentation=augmentation, keys=True)))
    plain = next(iter(loader(source, [[3, 4]], keys=True)))
    assert torch.equal(found.keys, plain.keys)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_callable_that_raises_is_named_with_its_sample(
    own: Path, source: ArraySource, workers: int
) -> None:
    augmentation = parse_augment(f"{own}:raises", seed=5, total=COUNT)
    expected = (
        r"^augmentation \S*aug\.py:raises raised OSError on sample \d+ in view \d+, a tensor "
        r"\(\d[^\n]*\) of torch\.\w+: the backgrounds are gone\Z"
    )
    with pytest.raises(DataError, match=expected):
        view_of(source, augmentation, workers=workers)


def test_a_callable_that_gives_several_shapes_is_named(own: Path, source: ArraySource) -> None:
    augmentation = parse_augment(f"{own}:ragged", seed=5, total=COUNT)
    with pytest.raises(DataError, match=r"aug\.py:ragged gives different shapes .*; it must give"):
        view_of(source, augmentation)


# which augmentation replays a cache


@pytest.fixture
def header(cache: Cache) -> Header:
    return cache.header


def changed(header: Header, **fields: Any) -> Header:
    return replace(header, **fields)


@pytest.mark.parametrize("own_spec", [None, "shift:2,flip"])
def test_a_built_in_augmentation_is_known_from_the_header(
    header: Header, own_spec: str | None
) -> None:
    # mixup draws among the whole data, of which the cache may hold a part
    whole = changed(header, augment="shift:2,flip", seed=9, data_samples=777)
    assert replayed(whole, own_spec) == parse_augment("shift:2,flip", seed=9, total=777)


def test_a_cache_that_is_not_augmented_is_replayed_so(header: Header) -> None:
    assert replayed(header, None) == Augmentation(None, 0, SAMPLES)


def test_a_callable_is_taken_from_the_file_that_the_user_gives(header: Header, own: Path) -> None:
    found = replayed(changed(header, augment="aug.py:mirror,flip"), f"{own}:mirror,flip")
    assert found.transform is not None
    assert found.transform.__module__.startswith("softcache_user_aug")
    assert [str(op) for op in found.ops] == ["Flip()"]


@pytest.mark.parametrize(
    ("made_by", "given", "named"),
    [
        (None, "flip", "none"),
        ("flip", "shift:2", "flip"),
        ("shift:2,flip", "flip,shift:2", "shift:2,flip"),
        ("flip", "flip,mixup", "flip"),
        ("aug.py:mirror", "aug.py:noise", "aug.py:mirror"),
        ("aug.py:mirror", "other.py:mirror", "aug.py:mirror"),
        ("aug.py:mirror", "flip", "aug.py:mirror"),
        (None, "aug.py:mirror", "none"),
    ],
)
def test_another_augmentation_than_the_caches_is_refused(
    header: Header, own: Path, made_by: str | None, given: str, named: str
) -> None:
    spec = f"{own.parent}/{given}" if ".py" in given else given
    expected = (
        rf"--augment .*{given} is not the cache's own \({named}\): .*leave it out, or add it on top "
        "by --extra-augment"
    )
    with pytest.raises(SettingsError, match=expected):
        replayed(changed(header, augment=made_by), spec)


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What exists once the file evil.py in the working folder has been run."""
    (tmp_path / "evil.py").write_text(
        "from pathlib import Path\nPath('was_run').touch()\ndef make(image):\n    return image\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path / "was_run"


@pytest.mark.parametrize("named", ["evil.py:make", "evil.py:make,flip,mixup", "flip,evil.py:make"])
def test_code_that_a_header_names_is_never_run(header: Header, trap: Path, named: str) -> None:
    with pytest.raises(
        SettingsError, match=f"augmented by {named}; give that file with --augment, code named"
    ):
        replayed(changed(header, augment=named), None)
    assert not trap.exists()


def test_nor_is_it_run_for_an_empty_augment(header: Header, trap: Path) -> None:
    with pytest.raises(SettingsError, match=r"augmented by evil\.py:make; give that file with"):
        replayed(changed(header, augment="evil.py:make"), "")
    assert not trap.exists()


def test_the_trap_notices_code_that_is_run(header: Header, trap: Path) -> None:
    replayed(changed(header, augment="evil.py:make"), "evil.py:make")
    assert trap.exists()


def test_a_header_with_an_unknown_augmentation_is_refused(header: Header) -> None:
    with pytest.raises(SettingsError, match=r"augmentation 'rotate:3' in 'rotate:3' is unknown"):
        replayed(changed(header, augment="rotate:3"), None)


# fingerprints


def test_a_fingerprint_is_as_the_format_says() -> None:
    inputs = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    rows = inputs.double().flatten(1).numpy()
    expected = np.zeros((3, FINGERPRINT))
    for j in range(FINGERPRINT):
        for i in range(40):
            low = uniform(0, j, np.array([i]), stream=0, draws=1)[0, 0] < 0.5
            expected[:, j] += (1 if low else -1) * rows[:, i] / np.sqrt(40)
    found = fingerprint(inputs)
    assert found.shape == (3, FINGERPRINT)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_a_fingerprint_is_of_values_not_of_their_layout() -> None:
    inputs = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    last = inputs.contiguous(memory_format=torch.channels_last)
    assert np.array_equal(fingerprint(last), fingerprint(inputs))
    exchanged = inputs.clone()
    exchanged[:, 0, 0, :2] = inputs[:, 0, 0, [1, 0]]
    assert not np.array_equal(fingerprint(exchanged), fingerprint(inputs))


@pytest.mark.parametrize("samples", [1, 2, 7, 8, 9, 60_000])
def test_a_few_samples_spread_evenly_have_fingerprints(samples: int) -> None:
    rows = fingerprinted_rows(samples)
    assert len(rows) == min(samples, 8)
    assert rows[0] == 0
    assert rows[-1] == samples - 1
    assert (np.diff(rows) > 0).all()
    if samples == 60_000:
        assert np.diff(rows).max() - np.diff(rows).min() <= 1


def test_fingerprints_come_by_view_and_sample_with_the_size_of_the_input(
    source: ArraySource,
) -> None:
    augmentation, samples = parse_augment("shift:1,flip", seed=5, total=COUNT), np.array([2, 50])
    found, sizes = fingerprints(source, augmentation, views=range(3, 6), sample_ids=samples)
    assert found.shape == (3, 2, FINGERPRINT)
    assert sizes.shape == (3, 2)
    inputs = torch.from_numpy(source.inputs[samples]).float() / 255
    for at, view in enumerate(range(3, 6)):
        seen = augmentation(inputs, None, view, samples)
        np.testing.assert_allclose(found[at], fingerprint(seen), atol=1e-6)
        rms = seen.square().mean((1, 2, 3)).sqrt()
        np.testing.assert_allclose(sizes[at], rms, rtol=1e-5)


# are today's inputs those of the dump?

IN_ORDER = np.arange(SAMPLES)


@pytest.fixture
def augmented_cache(dump_config: DumpConfig) -> Cache:
    """300 samples in two augmented views."""
    return dump(replace(dump_config, augment="shift:2,flip,mixup", views=2, seed=5))


@pytest.fixture
def train_source(dump_config: DumpConfig) -> Source:
    return open_source(dump_config.data)


def check(
    cache: Cache,
    source: Source,
    augmentation: Augmentation | None = None,
    places: Indices = IN_ORDER,
) -> None:
    """Check a whole cache against what it says of its augmentation, or against another."""
    own = augmentation or replayed(cache.header, None)
    check_replay(cache, source, own, places, places)


def with_array(cache: Cache, name: str, alter: Alter) -> Cache:
    """The cache with one array altered, as one who can write a file might."""
    return replace(cache, arrays={**cache.arrays, name: alter(np.array(cache.arrays[name]))})


def set_at(*at: int, to: float) -> Alter:
    def alter(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        values[at] = to
        return values

    return alter


def test_the_same_augmentation_passes(augmented_cache: Cache, train_source: Source) -> None:
    check(augmented_cache, train_source)


def test_reordered_data_pass_with_their_places_and_not_without(
    augmented_cache: Cache, train_source: Source
) -> None:
    x, y = train_source.fetch(IN_ORDER.tolist())
    order = np.random.default_rng(0).permutation(SAMPLES)
    reordered = ArraySource("mine", x.numpy()[order], y[order])
    check(augmented_cache, reordered, places=np.argsort(order))
    with pytest.raises(DataError, match="is not what the teacher of"):
        check(augmented_cache, reordered)


@pytest.mark.parametrize(
    "spec", ["shift:2,flip", "shift:1,flip,mixup", "flip,shift:2,mixup", "mixup", None]
)
def test_a_changed_augmentation_is_refused(
    augmented_cache: Cache, train_source: Source, spec: str | None
) -> None:
    other = parse_augment(spec, seed=5, total=SAMPLES)
    expected = (
        r"sample \d+ of npz:tiny\.npz@train in view \d is not what the teacher of .*tiny\.h5 saw "
        r"\(its fingerprint is off by [\d.e+-]+\): the augmentation or the data's own transform has "
        r"changed; no library version differs"
    )
    with pytest.raises(DataError, match=expected):
        check(augmented_cache, train_source, other)


def test_a_changed_seed_is_refused(augmented_cache: Cache, train_source: Source) -> None:
    other = replace(augmented_cache, header=changed(augmented_cache.header, seed=6))
    with pytest.raises(DataError, match=r"sample 0 of .* in view 0 is not what the teacher"):
        check(other, train_source)


def test_views_that_begin_elsewhere_are_refused(
    augmented_cache: Cache, train_source: Source
) -> None:
    header = changed(augmented_cache.header, first_view=1)
    with pytest.raises(DataError, match="is not what the teacher of"):
        check(replace(augmented_cache, header=header), train_source)


def test_another_total_for_mixup_is_refused(augmented_cache: Cache, train_source: Source) -> None:
    other = parse_augment("shift:2,flip,mixup", seed=5, total=SAMPLES - 100)
    with pytest.raises(DataError, match="is not what the teacher of"):
        check(augmented_cache, train_source, other)


def test_changed_hashing_is_refused(
    augmented_cache: Cache, train_source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as another version of a library might draw; the signs of fingerprints change with it
    def other(seed: int, view: int, samples: Indices, *, stream: int, draws: int) -> Draws:
        return 1 - uniform(seed, view, samples, stream=stream, draws=draws) * (1 - 2**-53)

    monkeypatch.setattr(augment, "uniform", other)
    with pytest.raises(DataError, match="is not what the teacher of"):
        check(augmented_cache, train_source)


@pytest.mark.parametrize(
    ("view", "place", "to"),
    [(0, 0, 9.0), (1, 0, float("nan")), (0, 7, float("inf")), (1, 3, -9.0)],
)
def test_a_tampered_fingerprint_is_named_by_its_sample_and_view(
    augmented_cache: Cache, train_source: Source, view: int, place: int, to: float
) -> None:
    tampered = with_array(augmented_cache, "fingerprints", set_at(view, place, 5, to=to))
    sample = fingerprinted_rows(SAMPLES)[place]
    with pytest.raises(DataError, match=rf"sample {sample} of .* in view {view} is not what"):
        check(tampered, train_source)


def test_the_sample_is_named_by_its_place_in_the_data(
    augmented_cache: Cache, train_source: Source
) -> None:
    x, y = train_source.fetch(IN_ORDER.tolist())
    backwards = IN_ORDER[::-1]
    reordered = ArraySource("mine", x.numpy()[backwards], y[backwards])
    tampered = with_array(augmented_cache, "fingerprints", set_at(1, 0, 0, to=9.0))
    with pytest.raises(DataError, match="sample 299 of mine in view 1 is not what"):
        check(tampered, reordered, places=backwards)


@pytest.mark.parametrize(
    ("place", "row", "found"),
    [(7, SAMPLES, "0 to 300"), (7, 1 << 40, f"0 to {1 << 40}"), (0, -1, "-1 to 299")],
)
def test_a_fingerprint_of_no_sample_is_refused(
    augmented_cache: Cache, train_source: Source, place: int, row: int, found: str
) -> None:
    forged = with_array(augmented_cache, "fingerprinted", set_at(place, to=row))
    with pytest.raises(
        FormatError, match=rf"fingerprints of samples {found}; expected 0 to 299: the file is dam"
    ):
        check(forged, train_source)


def test_samples_whose_numbers_begin_elsewhere_are_compared_with_other_draws(
    augmented_cache: Cache, train_source: Source
) -> None:
    header = changed(augmented_cache.header, first_sample=1000)
    with pytest.raises(DataError, match=r"sample 0 of .* in view 0 is not what the teacher"):
        check(replace(augmented_cache, header=header), train_source)


@dataclasses.dataclass(frozen=True)
class Noisy(ArraySource):
    """Inputs that differ by `noise` of their largest value each time."""

    noise: float = 0.0

    def fetch(self, indices: Any) -> tuple[Tensor, Indices]:  # noqa: ANN401  # as of ArraySource
        inputs, labels = super().fetch(indices)
        generator = torch.Generator().manual_seed(len(indices))
        return inputs + self.noise * torch.randn(inputs.shape, generator=generator), labels


@pytest.fixture
def float_cache(dump_config: DumpConfig, tmp_path: Path) -> Cache:
    x, y = make_arrays()
    np.savez(tmp_path / "floats.npz", x=x.astype(np.float32) / 255, y=y)
    data = f"npz:{tmp_path / 'floats.npz'}"
    config = replace(dump_config, data=data, eval_data=None, augment="shift:2,flip")
    return dump(config)


@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-5])
def test_float_noise_is_tolerated(float_cache: Cache, noise: float) -> None:
    x, y = make_arrays()
    check(float_cache, Noisy("mine", x.astype(np.float32) / 255, y, noise=noise))


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_more_than_float_noise_is_not(float_cache: Cache, noise: float) -> None:
    x, y = make_arrays()
    noisy = Noisy("mine", x.astype(np.float32) / 255, y, noise=noise)
    with pytest.raises(DataError, match="is not what the teacher of"):
        check(float_cache, noisy)


def test_library_versions_that_differ_are_listed(
    augmented_cache: Cache, train_source: Source
) -> None:
    software = augmented_cache.header.software | {"torch": "1.0", "numpy": "1.1"}
    header = changed(augmented_cache.header, seed=6, software=software)
    expected = rf"changed; torch was 1\.0, is {torch.__version__}.*; numpy was 1\.1, is"
    with pytest.raises(DataError, match=expected.replace("+", r"\+")):
        check(replace(augmented_cache, header=header), train_source)


def test_inputs_of_zero_have_fingerprints_too(dump_config: DumpConfig, tmp_path: Path) -> None:
    x = np.zeros((20, 1, 8, 8), np.uint8)
    np.savez(tmp_path / "dark.npz", x=x, y=np.arange(20) % CLASSES)
    data = f"npz:{tmp_path / 'dark.npz'}"
    cache = dump(replace(dump_config, data=data, eval_data=None))
    check(cache, open_source(data), places=np.arange(20))
    light = ArraySource("light", x + 3, np.arange(20) % CLASSES)
    with pytest.raises(DataError, match="sample 0 of light in view 0 is not what"):
        check(cache, light, places=np.arange(20))


# from the dump to the student


@pytest.fixture
def train_config(dump_config: DumpConfig, tmp_path: Path) -> TrainConfig:
    return make_train_config(
        student="mlp:4",
        data=dump_config.data,
        out=tmp_path / "run",
        cache=dump_config.out,
        epochs=1,
        device="cpu",
    )


def test_a_cache_of_an_own_callable_trains_with_that_file(
    dump_config: DumpConfig, train_config: TrainConfig, own: Path
) -> None:
    spec = f"{own}:mirror,shift:1,mixup"
    cache = dump(replace(dump_config, augment=spec, views=2))
    assert cache.header.augment == "aug.py:mirror,shift:1,mixup"
    with pytest.raises(SettingsError, match=r"augmented by aug\.py:mirror,shift:1,mixup; give"):
        train(train_config)
    train(replace(train_config, augment=spec))


@pytest.mark.parametrize("rest", ["", ",flip,mixup"])
def test_teacher_and_student_are_built_for_the_shape_that_a_callable_gives(
    rest: str, dump_config: DumpConfig, train_config: TrainConfig, own: Path, tmp_path: Path
) -> None:
    spec = f"{own}:larger{rest}"
    teacher = build("mlp:4", input_shape=(1, 12, 12), classes=CLASSES)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    made_with = replace(
        dump_config,
        teacher="mlp:4",
        weights=tmp_path / "teacher.safetensors",
        augment=spec,
        views=2,
        eval_data=None,
    )
    cache = dump(made_with)
    assert cache.header.teachers[0]["parameters"] == 144 * 4 + 4 + 4 * 5 + 5
    train(replace(train_config, augment=spec))
    facts = json.loads((train_config.out / "config.json").read_text())
    assert facts["input_shape"] == [1, 12, 12]
    weights = load_file(train_config.out / "student.safetensors")
    assert weights["1.weight"].shape == (4, 144)
    # weights for the samples as they are in the data do not fit
    small = build("mlp:4", input_shape=(1, 8, 8), classes=CLASSES)
    save_file(small.state_dict(), tmp_path / "teacher.safetensors")
    with pytest.raises(
        ModelError, match=r"1\.weight is \(4, 64\) in the file, \(4, 144\) in the m"
    ):
        dump(replace(made_with, out=tmp_path / "small.h5"))


def test_a_file_that_has_changed_since_the_dump_is_refused(
    dump_config: DumpConfig, train_config: TrainConfig, own: Path
) -> None:
    dump(replace(dump_config, augment=f"{own}:noise"))
    own.write_text(AUGMENTATIONS.replace("0.1 * torch.rand", "0.2 * torch.rand"))
    with pytest.raises(DataError, match=r"sample 0 of .* in view 0 is not what the teacher"):
        train(replace(train_config, augment=f"{own}:noise"))
    assert not train_config.out.exists()


def check_own(cache: Cache, source: Source, spec: str) -> None:
    """As train does, which imports the file anew."""
    check(cache, source, replayed(cache.header, spec))


@pytest.mark.parametrize("name", ["unseeded", "counts", "seeded"])
def test_a_callable_that_cannot_be_replayed_is_refused_by_the_dump(
    dump_config: DumpConfig, own: Path, name: str
) -> None:
    expected = r"sample \d+ of .* in view 0 comes out different the second time: .* draw only from"
    with pytest.raises(DataError, match=expected):
        dump(replace(dump_config, augment=f"{own}:{name}"))
    assert not dump_config.out.exists()


@pytest.mark.parametrize("name", ["mirror", "noise"])
def test_a_callable_without_a_state_is_not(
    dump_config: DumpConfig, train_source: Source, own: Path, name: str
) -> None:
    spec = f"{own}:{name}"
    check_own(dump(replace(dump_config, augment=spec, views=2)), train_source, spec)


def inputs_seen(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What the student sees in its steps."""
    seen = []

    def step(learner: Student, inputs: Tensor, *others: object) -> None:
        seen.append(inputs.clone())
        learner.losses.append(torch.zeros(3))

    monkeypatch.setattr(Student, "step", step)
    train(config)
    return torch.cat(seen)


def test_extra_augmentation_draws_numbers_of_its_own(
    dump_config: DumpConfig, train_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the second flip must not undo the first of every sample
    dump(replace(dump_config, augment="flip"))
    plain = {image.tobytes() for image in make_arrays()[0]}
    seen = inputs_seen(replace(train_config, extra_augment="flip"), monkeypatch)
    raw = (seen * 255).round().to(torch.uint8).numpy()
    as_they_are = sum(image.tobytes() in plain for image in raw)
    assert 100 < as_they_are < 200


@pytest.mark.parametrize("extra", ["mixup", "{own}:mirror"])
def test_extra_augmentation_that_cannot_be_added_is_refused(
    dump_config: DumpConfig, train_config: TrainConfig, own: Path, extra: str
) -> None:
    dump(dump_config)
    with pytest.raises(SettingsError, match="extra-augment"):
        train(replace(train_config, extra_augment=extra.format(own=own)))


def test_a_dump_by_workers_is_the_same_to_the_byte(
    dump_config: DumpConfig, own: Path, tmp_path: Path
) -> None:
    config = replace(dump_config, augment=f"{own}:noise,mixup")
    alone = dump(config)
    together = dump(replace(config, out=tmp_path / "workers.h5", workers=2))
    assert together.path.read_bytes() == alone.path.read_bytes()
