"""Replay: views are the same in any process, and a cache's augmentation is checked, never run."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from softcache.cache import Header
from softcache.data.augment import Augmentation, parse_augment
from softcache.data.loader import augmented, loader, make_request
from softcache.data.source import ArraySource, Source
from softcache.errors import DataError, SettingsError
from softcache.join.fingerprints import replayed
from softcache.types import Views
from tests.conftest import SAMPLES
from tests.join.fingerprints_cases import COUNT, changed


def view_of(
    source: Source, augmentation: Augmentation, *, batch_size: int = 16, workers: int = 0
) -> Tensor:
    """All samples in view 1, as the student's loader makes them."""
    sample_ids = np.arange(len(source))
    parts = np.split(sample_ids, range(batch_size, len(sample_ids), batch_size))
    requests = [make_request(augmentation, part.tolist(), 1, part) for part in parts]
    batches = loader(source, requests, augmentation=augmentation, workers=workers)
    cpu = torch.device("cpu")
    return torch.cat(
        [
            augmented(batch, augmentation, 1, part, cpu)
            for batch, part in zip(batches, parts, strict=True)
        ]
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
    augment_file: Path, source: ArraySource, spec: str
) -> None:
    augmentation = parse_augment(spec.replace("OWN", f"{augment_file}:noise"), seed=5, total=COUNT)
    expected = view_of(source, augmentation)
    for batch_size, workers in WAYS:
        images = view_of(source, augmentation, batch_size=batch_size, workers=workers)
        if "crop" in spec:  # its last bits can differ with the position of a sample in its batch
            torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
        else:
            assert torch.equal(images, expected), (batch_size, workers)
        without_workers = view_of(source, augmentation, batch_size=batch_size)
        assert torch.equal(images, without_workers), (batch_size, workers)
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
        sample_ids = batch.sample_ids.numpy()
        inputs = augmented(batch, augmentation, 1, sample_ids, torch.device("cpu"))
        digest.update(inputs.numpy().tobytes())
    print(digest.hexdigest())
"""


def test_another_process_draws_the_same(
    augment_file: Path, source: ArraySource, tmp_path: Path
) -> None:
    np.savez(tmp_path / "mine.npz", x=source.inputs, y=source.labels)
    specs = [spec.replace("OWN", f"{augment_file}:noise") for spec in SPECS]
    digests = []
    for seed in "12":  # the seed of string hashes, which differs between processes
        command = [sys.executable, "-c", REPLAY, f"npz:{tmp_path / 'mine.npz'}", *specs]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
        digests.append(result.stdout.split())
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == len(SPECS)
    for spec, process_digest in zip(specs, digests[0], strict=True):
        augmentation = parse_augment(spec, seed=5, total=COUNT)
        assert digest(view_of(source, augmentation, batch_size=7)) == process_digest
        other = parse_augment(spec, seed=6, total=COUNT)
        assert digest(view_of(source, other, batch_size=7)) != process_digest


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("spec", SPECS)
def test_samples_of_one_batch_may_each_have_a_view_of_their_own(
    augment_file: Path, source: ArraySource, spec: str, workers: int
) -> None:
    augmentation = parse_augment(spec.replace("OWN", f"{augment_file}:noise"), seed=5, total=COUNT)
    sample_ids, cpu = np.arange(COUNT), torch.device("cpu")

    def inputs_in(view: Views) -> Tensor:
        request = make_request(augmentation, sample_ids.tolist(), view, sample_ids)
        batches = loader(source, [request], augmentation=augmentation, workers=workers)
        return augmented(next(iter(batches)), augmentation, view, sample_ids, cpu)

    views = np.random.default_rng(0).integers(3, 6, COUNT)
    each = torch.stack([inputs_in(view) for view in range(3, 6)])
    expected = each[views - 3, sample_ids]
    assert torch.equal(inputs_in(views), expected)
    others = each[(views - 2) % 3, sample_ids]  # another view differs in nearly all samples
    assert (others != expected).flatten(1).any(1).double().mean() > 0.8


def test_a_callable_with_a_state_of_its_own_would_be_noticed(
    augment_file: Path, source: ArraySource
) -> None:
    augmentation = parse_augment(f"{augment_file}:counts", seed=5, total=COUNT)
    assert not torch.equal(view_of(source, augmentation), view_of(source, augmentation))


def test_states_left_by_others_do_not_reach_the_callable(
    augment_file: Path, source: ArraySource
) -> None:
    augmentation = parse_augment(f"{augment_file}:noise", seed=5, total=COUNT)
    expected = view_of(source, augmentation)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    assert torch.equal(view_of(source, augmentation), expected)


def next_numbers() -> tuple[float, float, float]:
    numpy_state: Any = np.random  # the global generator, which a user's transform draws from
    return random.random(), float(numpy_state.rand()), float(torch.rand(1))


def seed_all() -> None:
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)


def test_the_random_states_are_put_back_after_the_callable(
    augment_file: Path, source: ArraySource
) -> None:
    seed_all()
    expected = next_numbers()
    augmentation = parse_augment(f"{augment_file}:noise", seed=5, total=COUNT)
    seed_all()
    augmentation.transformed(source.fetch(range(5))[0], 0, np.arange(5))
    assert next_numbers() == expected


def test_they_are_put_back_after_it_has_raised(augment_file: Path, source: ArraySource) -> None:
    seed_all()
    expected = next_numbers()
    augmentation = parse_augment(f"{augment_file}:draws_and_raises", seed=5, total=COUNT)
    seed_all()
    with pytest.raises(Exception, match="no such image"):
        augmentation.transformed(source.fetch(range(5))[0], 0, np.arange(5))
    assert next_numbers() == expected


def test_states_that_are_not_put_back_would_be_noticed(
    augment_file: Path, source: ArraySource
) -> None:
    seed_all()
    expected = next_numbers()
    transform = parse_augment(f"{augment_file}:noise", seed=5, total=COUNT).transform
    assert transform is not None
    seed_all()
    transform(source.fetch([0])[0][0])
    assert next_numbers() != expected


@pytest.mark.parametrize(("seed", "view", "first"), [(6, 1, 0), (5, 2, 0), (5, 1, 8)])
def test_another_seed_view_or_sample_draws_other_numbers(
    augment_file: Path, seed: int, view: int, first: int
) -> None:
    image = torch.zeros(1, 1, 8, 8).expand(8, 1, 8, 8)
    base = parse_augment(f"{augment_file}:noise", seed=5, total=COUNT).transformed(
        image, 1, np.arange(8)
    )
    other = parse_augment(f"{augment_file}:noise", seed=seed, total=COUNT).transformed(
        image, view, np.arange(first, first + 8)
    )
    assert not (base == other).flatten(1).all(1).any()


def test_a_partner_draws_other_numbers_than_the_sample_itself(augment_file: Path) -> None:
    image = torch.zeros(1, 1, 8, 8).expand(8, 1, 8, 8)
    augmentation = parse_augment(f"{augment_file}:noise,mixup", seed=5, total=COUNT)
    inputs = augmentation.transformed(image, 1, np.arange(8))
    partners = augmentation.transformed(image, 1, np.arange(8), partner=True)
    assert not (inputs == partners).flatten(1).all(1).any()


def test_a_callable_comes_before_operations_and_mixup(
    augment_file: Path, source: ArraySource
) -> None:
    spec = f"{augment_file}:noise,flip,mixup"
    whole = parse_augment(spec, seed=5, total=COUNT)
    raw, sample_ids = source.fetch(range(COUNT))[0], np.arange(COUNT)
    partner_ids = whole.partners(1, sample_ids)
    assert partner_ids is not None
    inputs = whole.transformed(raw, 1, sample_ids)
    partners = whole.transformed(raw[partner_ids], 1, sample_ids, partner=True)
    rest = parse_augment("flip,mixup", seed=5, total=COUNT)
    assert torch.equal(view_of(source, whole), rest(inputs, partners, 1, sample_ids))


def test_bytes_that_a_callable_gives_become_floats_up_to_one(
    augment_file: Path, source: ArraySource
) -> None:
    inputs = view_of(source, parse_augment(f"{augment_file}:as_array", seed=5, total=COUNT))
    np.testing.assert_allclose(inputs, source.inputs // 2 / 255, rtol=1e-6)


def test_keys_are_of_the_sample_as_it_was(augment_file: Path, source: ArraySource) -> None:
    augmentation = parse_augment(f"{augment_file}:noise", seed=5, total=COUNT)
    request = make_request(augmentation, [3, 4], 1, np.array([3, 4]))
    batch = next(iter(loader(source, [request], augmentation=augmentation, keys=True)))
    plain = next(iter(loader(source, [[3, 4]], keys=True)))
    assert torch.equal(batch.keys, plain.keys)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_callable_that_raises_is_named_with_its_sample(
    augment_file: Path, source: ArraySource, workers: int
) -> None:
    augmentation = parse_augment(f"{augment_file}:raises", seed=5, total=COUNT)
    expected = (
        r"^augmentation \S*aug\.py:raises raised OSError on sample \d+ in view \d+, a tensor "
        r"\(\d[^\n]*\) of torch\.\w+: the backgrounds are gone\Z"
    )
    with pytest.raises(DataError, match=expected):
        view_of(source, augmentation, workers=workers)


def test_a_callable_that_gives_several_shapes_is_named(
    augment_file: Path, source: ArraySource
) -> None:
    augmentation = parse_augment(f"{augment_file}:ragged", seed=5, total=COUNT)
    with pytest.raises(DataError, match=r"aug\.py:ragged returns different shapes .*; it must ret"):
        view_of(source, augmentation)


@pytest.mark.parametrize("own_spec", [None, "shift:2,flip"])
def test_a_built_in_augmentation_is_known_from_the_header(
    header: Header, own_spec: str | None
) -> None:
    # mixup draws from the whole data set, although the cache may be a shard of it
    whole = changed(header, augment="shift:2,flip", seed=9, data_samples=777)
    assert replayed(whole, own_spec) == parse_augment("shift:2,flip", seed=9, total=777)


def test_a_cache_that_is_not_augmented_is_replayed_so(header: Header) -> None:
    assert replayed(header, None) == Augmentation(None, 0, SAMPLES)


def test_a_callable_is_taken_from_the_file_that_the_user_gives(
    header: Header, augment_file: Path
) -> None:
    augmentation = replayed(
        changed(header, augment="aug.py:mirror,flip"), f"{augment_file}:mirror,flip"
    )
    assert augmentation.transform is not None
    assert augmentation.transform.__module__.startswith("softcache_user_aug")
    assert [str(op) for op in augmentation.ops] == ["Flip()"]


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
    header: Header, augment_file: Path, made_by: str | None, given: str, named: str
) -> None:
    spec = f"{augment_file.parent}/{given}" if ".py" in given else given
    advice = f"give all of {named}" if ".py" in named else "leave it out"
    expected = (
        rf"--augment .*{given} is not the cache's own \({named}\): .*; {advice}, or add it on top "
        "with --extra-augment"
    )
    with pytest.raises(SettingsError, match=expected):
        replayed(changed(header, augment=made_by), spec)


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path that exists once the file evil.py in the working folder has been run."""
    (tmp_path / "evil.py").write_text(
        "from pathlib import Path\nPath('was_run').touch()\ndef make(image):\n    return image\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path / "was_run"


@pytest.mark.parametrize("named", ["evil.py:make", "evil.py:make,flip,mixup", "flip,evil.py:make"])
def test_code_that_a_header_names_is_never_run(header: Header, trap: Path, named: str) -> None:
    with pytest.raises(
        SettingsError,
        match=f"augmented by {named}; give all of this with --augment, with the path to your "
        "file, since code",
    ):
        replayed(changed(header, augment=named), None)
    assert not trap.exists()


def test_nor_is_it_run_for_an_empty_augment(header: Header, trap: Path) -> None:
    with pytest.raises(SettingsError, match=r"augmented by evil\.py:make; give all of this with"):
        replayed(changed(header, augment="evil.py:make"), "")
    assert not trap.exists()


def test_the_trap_notices_code_that_is_run(header: Header, trap: Path) -> None:
    replayed(changed(header, augment="evil.py:make"), "evil.py:make")
    assert trap.exists()


def test_a_header_with_an_unknown_augmentation_is_refused(header: Header) -> None:
    with pytest.raises(SettingsError, match=r"augmentation 'rotate:3' in 'rotate:3' is unknown"):
        replayed(changed(header, augment="rotate:3"), None)
