"""Fingerprints: whether the current inputs are those that the teacher saw."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from softcache.cache import Cache
from softcache.cache.arrays import FINGERPRINT
from softcache.data import augment
from softcache.data.augment import Augmentation, parse_augment
from softcache.data.open import open_source
from softcache.data.source import ArraySource, Source
from softcache.data.tokens import Document, language_source
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
from softcache.train.config import TrainConfig
from softcache.train.loop import train
from softcache.train.options import make_train_config
from softcache.train.student import Student
from softcache.util.counter_rng import Draws, uniform
from tests.configs import replace
from tests.conftest import CLASSES, SAMPLES, make_arrays
from tests.join.fingerprints_cases import AUGMENTATIONS, COUNT, changed

Indices = npt.NDArray[np.int64]
Alter = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


# fingerprints
def test_a_fingerprint_is_as_the_format_says() -> None:
    inputs = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    rows = inputs.double().flatten(1).numpy()
    expected = np.zeros((3, FINGERPRINT))
    for j in range(FINGERPRINT):
        for i in range(40):
            positive = uniform(0, j, np.array([i]), stream=0, draws=1)[0, 0] < 0.5
            expected[:, j] += (1 if positive else -1) * rows[:, i] / np.sqrt(40)
    prints = fingerprint(inputs)
    assert prints.shape == (3, FINGERPRINT)
    assert prints.dtype == np.float32
    np.testing.assert_allclose(prints, expected, rtol=1e-6, atol=1e-6)


def test_a_fingerprint_is_of_values_not_of_their_layout() -> None:
    inputs = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    channels_last = inputs.contiguous(memory_format=torch.channels_last)
    assert np.array_equal(fingerprint(channels_last), fingerprint(inputs))
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
    prints, rms = fingerprints(source, augmentation, views=range(3, 6), sample_ids=samples)
    assert prints.shape == (3, 2, FINGERPRINT)
    assert rms.shape == (3, 2)
    inputs = torch.from_numpy(source.inputs[samples]).float() / 255
    for row, view in enumerate(range(3, 6)):
        augmented = augmentation(inputs, None, view, samples)
        np.testing.assert_allclose(prints[row], fingerprint(augmented), atol=1e-6)
        expected_rms = augmented.square().mean((1, 2, 3)).sqrt()
        np.testing.assert_allclose(rms[row], expected_rms, rtol=1e-5)


# are the current inputs those of the dump?
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
    source_indices: Indices = IN_ORDER,
) -> None:
    """Check a whole cache with the augmentation of its header, or with another one."""
    augmentation = augmentation or replayed(cache.header, None)
    check_replay(cache, source, augmentation, source_indices, source_indices)


def with_array(cache: Cache, name: str, alter: Alter) -> Cache:
    """The cache with one array altered, as anyone with write access to the file could do."""
    return replace(cache, arrays={**cache.arrays, name: alter(np.array(cache.arrays[name]))})


def set_at(*index: int, to: float) -> Alter:
    def alter(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        values[index] = to
        return values

    return alter


def test_the_same_augmentation_passes(augmented_cache: Cache, train_source: Source) -> None:
    check(augmented_cache, train_source)


def test_reordered_data_pass_with_their_source_indices_and_not_without(
    augmented_cache: Cache, train_source: Source
) -> None:
    x, y = train_source.fetch(IN_ORDER.tolist())
    order = np.random.default_rng(0).permutation(SAMPLES)
    reordered = ArraySource("mine", x.numpy()[order], y[order])
    check(augmented_cache, reordered, source_indices=np.argsort(order))
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


def test_views_with_other_numbers_are_refused(augmented_cache: Cache, train_source: Source) -> None:
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
    # as another version of a library might draw
    def other(seed: int, view: int, samples: Indices, *, stream: int, draws: int) -> Draws:
        return 1 - uniform(seed, view, samples, stream=stream, draws=draws) * (1 - 2**-53)

    monkeypatch.setattr(augment, "uniform", other)
    with pytest.raises(DataError, match="is not what the teacher of"):
        check(augmented_cache, train_source)


@pytest.mark.parametrize(
    ("view", "number", "to"),
    [(0, 0, 9.0), (1, 0, float("nan")), (0, 7, float("inf")), (1, 3, -9.0)],
)
def test_a_tampered_fingerprint_is_named_by_its_sample_and_view(
    augmented_cache: Cache, train_source: Source, view: int, number: int, to: float
) -> None:
    tampered = with_array(augmented_cache, "fingerprints", set_at(view, number, 5, to=to))
    sample = fingerprinted_rows(SAMPLES)[number]
    with pytest.raises(DataError, match=rf"sample {sample} of .* in view {view} is not what"):
        check(tampered, train_source)


def test_the_sample_is_named_by_its_source_index(
    augmented_cache: Cache, train_source: Source
) -> None:
    x, y = train_source.fetch(IN_ORDER.tolist())
    backwards = IN_ORDER[::-1]
    reordered = ArraySource("mine", x.numpy()[backwards], y[backwards])
    tampered = with_array(augmented_cache, "fingerprints", set_at(1, 0, 0, to=9.0))
    with pytest.raises(DataError, match="sample 299 of mine in view 1 is not what"):
        check(tampered, reordered, source_indices=backwards)


@pytest.mark.parametrize(
    ("number", "row", "stored"),
    [(7, SAMPLES, "0 to 300"), (7, 1 << 40, f"0 to {1 << 40}"), (0, -1, "-1 to 299")],
)
def test_a_fingerprint_of_no_sample_is_refused(
    augmented_cache: Cache, train_source: Source, number: int, row: int, stored: str
) -> None:
    forged = with_array(augmented_cache, "fingerprinted", set_at(number, to=row))
    with pytest.raises(
        FormatError, match=rf"fingerprints of samples {stored}; expected 0 to 299: the file is dam"
    ):
        check(forged, train_source)


def test_samples_with_other_ids_are_compared_with_other_draws(
    augmented_cache: Cache, train_source: Source
) -> None:
    header = changed(augmented_cache.header, first_sample=1000)
    with pytest.raises(DataError, match=r"sample 0 of .* in view 0 is not what the teacher"):
        check(replace(augmented_cache, header=header), train_source)


@dataclasses.dataclass(frozen=True)
class Noisy(ArraySource):
    """Inputs with added noise, of a standard deviation of `noise`."""

    noise: float = 0.0

    def fetch(self, indices: Any) -> tuple[Tensor, Indices]:  # noqa: ANN401  # as in ArraySource
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
    check(cache, open_source(data), source_indices=np.arange(20))
    light = ArraySource("light", x + 3, np.arange(20) % CLASSES)
    with pytest.raises(DataError, match="sample 0 of light in view 0 is not what"):
        check(cache, light, source_indices=np.arange(20))


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
    dump_config: DumpConfig, train_config: TrainConfig, augment_file: Path
) -> None:
    spec = f"{augment_file}:mirror,shift:1,mixup"
    cache = dump(replace(dump_config, augment=spec, views=2))
    assert cache.header.augment == "aug.py:mirror,shift:1,mixup"
    with pytest.raises(SettingsError, match=r"augmented by aug\.py:mirror,shift:1,mixup; give"):
        train(train_config)
    train(replace(train_config, augment=spec))


@pytest.mark.parametrize("rest", ["", ",flip,mixup"])
def test_teacher_and_student_are_built_for_the_shape_that_a_callable_gives(
    rest: str,
    dump_config: DumpConfig,
    train_config: TrainConfig,
    augment_file: Path,
    tmp_path: Path,
) -> None:
    spec = f"{augment_file}:larger{rest}"
    teacher = build("mlp:4", input_shape=(1, 12, 12), classes=CLASSES)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    config = replace(
        dump_config,
        teacher="mlp:4",
        weights=tmp_path / "teacher.safetensors",
        augment=spec,
        views=2,
        eval_data=None,
    )
    cache = dump(config)
    assert cache.header.teachers[0]["parameters"] == 144 * 4 + 4 + 4 * 5 + 5
    train(replace(train_config, augment=spec))
    facts = json.loads((train_config.out / "config.json").read_text())
    assert facts["input_shape"] == [1, 12, 12]
    weights = load_file(train_config.out / "student.safetensors")
    assert weights["1.weight"].shape == (4, 144)
    # weights for samples of the original size do not fit
    small = build("mlp:4", input_shape=(1, 8, 8), classes=CLASSES)
    save_file(small.state_dict(), tmp_path / "teacher.safetensors")
    with pytest.raises(
        ModelError, match=r"1\.weight is \(4, 64\) in the file, \(4, 144\) in the m"
    ):
        dump(replace(config, out=tmp_path / "small.h5"))


def test_a_file_that_has_changed_since_the_dump_is_refused(
    dump_config: DumpConfig, train_config: TrainConfig, augment_file: Path
) -> None:
    dump(replace(dump_config, augment=f"{augment_file}:noise"))
    augment_file.write_text(AUGMENTATIONS.replace("0.1 * torch.rand", "0.2 * torch.rand"))
    with pytest.raises(DataError, match=r"sample 0 of .* in view 0 is not what the teacher"):
        train(replace(train_config, augment=f"{augment_file}:noise"))
    assert not train_config.out.exists()


def check_own(cache: Cache, source: Source, spec: str) -> None:
    """Check a cache as train does, which imports the file again."""
    check(cache, source, replayed(cache.header, spec))


@pytest.mark.parametrize("name", ["unseeded", "counts", "seeded"])
def test_a_callable_that_cannot_be_replayed_is_refused_by_the_dump(
    dump_config: DumpConfig, augment_file: Path, name: str
) -> None:
    expected = r"sample \d+ of .* in view 0 is different when it is loaded again: .* draw only from"
    with pytest.raises(DataError, match=expected):
        dump(replace(dump_config, augment=f"{augment_file}:{name}"))
    assert not dump_config.out.exists()


@pytest.mark.parametrize("name", ["mirror", "noise"])
def test_a_callable_without_a_state_is_not(
    dump_config: DumpConfig, train_source: Source, augment_file: Path, name: str
) -> None:
    spec = f"{augment_file}:{name}"
    check_own(dump(replace(dump_config, augment=spec, views=2)), train_source, spec)


def inputs_seen(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The inputs of all steps of a student."""
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
    # the second flip must not undo the first one in every sample
    dump(replace(dump_config, augment="flip"))
    plain = {image.tobytes() for image in make_arrays()[0]}
    seen = inputs_seen(replace(train_config, extra_augment="flip"), monkeypatch)
    raw = (seen * 255).round().to(torch.uint8).numpy()
    unflipped = sum(image.tobytes() in plain for image in raw)
    assert 100 < unflipped < 200


@pytest.mark.parametrize("extra", ["mixup", "{augment_file}:mirror"])
def test_extra_augmentation_that_cannot_be_added_is_refused(
    dump_config: DumpConfig, train_config: TrainConfig, augment_file: Path, extra: str
) -> None:
    dump(dump_config)
    with pytest.raises(SettingsError, match="extra-augment"):
        train(replace(train_config, extra_augment=extra.format(augment_file=augment_file)))


def test_a_dump_by_workers_is_the_same_to_the_byte(
    dump_config: DumpConfig, augment_file: Path, tmp_path: Path
) -> None:
    config = replace(dump_config, augment=f"{augment_file}:noise,mixup")
    alone = dump(config)
    together = dump(replace(config, out=tmp_path / "workers.h5", workers=2))
    assert together.path.read_bytes() == alone.path.read_bytes()


def test_padding_has_no_part_in_the_fingerprint_of_tokens() -> None:
    documents = [Document(np.arange(1, size, dtype=np.int32)) for size in (4, 9, 30)]
    source = language_source("tokens", documents, {}, length=64)
    every, alone = (
        fingerprints(
            source, Augmentation(None, 0), views=range(1), sample_ids=np.array(samples, np.int64)
        )[0][0]
        for samples in ([0, 1, 2], [0])
    )
    np.testing.assert_array_equal(every[0], alone[0])
    assert (np.abs(np.diff(every, axis=0)) > 0.1).any(1).all()
