"""The dump: what it writes, and that stopping and resuming changes no byte of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from softcache.cache import open_cache
from softcache.cache.reader import partial_path
from softcache.data.augment import Augmentation, parse_augment
from softcache.data.open import open_source
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.dump.prepare import draft_header, load_teachers
from softcache.errors import DataError, Interrupted, ModelError, SettingsError
from softcache.models.evaluate import data_digest
from softcache.util.callables import import_callable
from softcache.util.tensors import to_float
from tests.commands import IMPATIENT
from tests.conftest import CLASSES, SAMPLES, make_arrays
from tests.dump.loop_cases import (
    BATCHES,
    TEACHER,
    StopAt,
    batches_of,
    batches_seen,
    begin,
    committed,
    data_of,
    whole,
)

Floats = npt.NDArray[np.float64]


@pytest.fixture
def teacher_file(tmp_path: Path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(TEACHER)
    return path


def whole_bytes(config: DumpConfig) -> bytes:
    return dump(whole(config)).path.read_bytes()


def softened(config: DumpConfig, images: npt.NDArray[Any], temperature: float) -> Floats:
    """log softmax(z / T) for float images (B, 1, 8, 8), computed independently in float64."""
    weight = import_callable(str(config.teacher), what="teacher")().weight.detach().numpy()
    logits = images.reshape(len(images), -1).astype(np.float64) @ weight / temperature
    return np.asarray(logits - np.log(np.exp(logits).sum(1, keepdims=True)))


# what is in the file
def test_rows_are_the_teachers_softened_log_probabilities(dump_config: DumpConfig) -> None:
    cache = dump(dump_config)
    images, labels = make_arrays()
    expected = softened(dump_config, images / 255, 4.0)
    stored = cache.arrays["log_probs"][0].astype(np.float64)
    assert stored.shape == (SAMPLES, CLASSES)
    np.testing.assert_allclose(stored, expected, rtol=2**-10)  # float16 keeps 11 bits
    np.testing.assert_array_equal(cache.labels, labels)
    # the comparison would detect another temperature and rows of other samples
    assert not np.allclose(stored, softened(dump_config, images / 255, 3.9), rtol=2**-10)
    assert not np.allclose(stored, np.roll(expected, 1, 0), rtol=2**-10)


def test_keys_are_hashes_of_the_raw_samples(dump_config: DumpConfig) -> None:
    images, _ = make_arrays()
    seed = xxhash.xxh3_64_intdigest(b"|u1(1, 8, 8)")
    expected = [xxhash.xxh3_64_intdigest(image.tobytes(), seed) for image in images]
    assert dump(dump_config).keys.tolist() == expected


def test_the_header_says_what_was_asked_for(dump_config: DumpConfig) -> None:
    config = replace(dump_config, views=2, augment="shift:1", seed=3, precision="bf16")
    cache = dump(config)
    header = cache.header
    assert (header.views, header.samples, header.classes) == (2, SAMPLES, CLASSES)
    assert (header.temperature, header.augment, header.seed) == (4.0, "shift:1", 3)
    assert (header.precision, header.data) == ("bf16", "npz:tiny.npz@train")
    assert [teacher["name"] for teacher in header.teachers] == ["models.py:teacher"]
    assert cache.class_names == ["0", "1", "2", "3", "4"]
    assert cache.complete
    assert str(dump_config.out.parent).encode() not in cache.header_bytes


def test_the_summary_is_of_all_rows(dump_config: DumpConfig) -> None:
    summary = dump(dump_config).header.summary
    images, labels = make_arrays()
    log_probs = softened(dump_config, images / 255, 4.0)
    assert summary is not None
    assert summary["rows"] == SAMPLES
    entropy = -(np.exp(log_probs) * log_probs).sum(1).mean()
    assert summary["entropy"] == pytest.approx(entropy, rel=1e-3)
    assert summary["agreement"] == pytest.approx((log_probs.argmax(1) == labels).mean())


def test_evaluation_data_are_recorded(dump_config: DumpConfig) -> None:
    images, labels = make_arrays(100, seed=1)
    errors = int((softened(dump_config, images / 255, 1.0).argmax(1) != labels).sum())
    assert dump_config.eval_data is not None
    assert dump(dump_config).header.evaluation == {
        "data": "npz:tiny.npz@test",
        "digest": data_digest(open_source(dump_config.eval_data)),
        "errors": errors,
        "samples": 100,
    }
    assert 0 < errors < 100


def test_without_evaluation_data_none_are_recorded(dump_config: DumpConfig) -> None:
    assert dump(replace(dump_config, eval_data=None)).header.evaluation is None


def test_each_view_holds_the_teacher_on_that_views_images(dump_config: DumpConfig) -> None:
    config = replace(dump_config, views=3, augment="shift:2,flip", seed=11)
    cache = dump(config)
    images = to_float(open_source(config.data).fetch(range(SAMPLES))[0])
    augmentation = parse_augment(config.augment, seed=11, total=SAMPLES)
    for view in range(3):
        inputs = augmentation(images, None, view, np.arange(SAMPLES)).numpy()
        stored = cache.arrays["log_probs"][view].astype(np.float64)
        np.testing.assert_allclose(stored, softened(config, inputs, 4.0), rtol=2**-10)
    # views differ, so the comparison would detect swapped ones
    views = cache.arrays["log_probs"].astype(np.float64)
    assert not np.allclose(views[0], views[1], rtol=2**-10)
    assert not np.allclose(views[1], views[2], rtol=2**-10)


@pytest.mark.parametrize("augment", ["shift:2,flip", "shift:1,mixup"])
def test_shards_and_ranges_of_views_hold_what_the_whole_dump_has_there(
    augment: str, dump_config: DumpConfig, tmp_path: Path
) -> None:
    config = replace(dump_config, eval_data=None, augment=augment, seed=11)
    complete = dump(replace(config, views=4, out=tmp_path / "all.h5"))
    for part, (first, end) in enumerate([(0, 100), (100, 200), (200, 300)]):
        out = tmp_path / f"{part}.h5"
        cache = dump(replace(config, views=2, first_view=1, shard=(part, 3), out=out))
        header = cache.header
        assert (header.first_view, header.views) == (1, 2)
        assert (header.first_sample, header.samples, header.data_samples) == (first, 100, SAMPLES)
        for name in ("keys", "labels"):
            np.testing.assert_array_equal(cache.arrays[name], complete.arrays[name][first:end])
        stored = cache.arrays["log_probs"].astype(np.float64)
        expected = complete.arrays["log_probs"].astype(np.float64)
        # a row can round differently in a batch with other rows
        np.testing.assert_allclose(stored, expected[1:3, first:end], rtol=2**-9, atol=2**-9)
        assert not np.allclose(stored, expected[:2, first:end], rtol=0.01)  # other views differ


@pytest.mark.parametrize(("samples", "shards"), [(300, 7), (300, 300), (5, 4), (1, 1)])
def test_shards_are_of_nearly_one_size_and_hold_every_sample_once(
    samples: int, shards: int, dump_config: DumpConfig, tmp_path: Path
) -> None:
    images, labels = make_arrays(samples)
    config = data_of(dump_config, tmp_path, x_train=images, y_train=labels)
    source = open_source(config.data)
    teacher = load_teachers(config, source, Augmentation(None, 0))
    sample_ids: list[int] = []
    sizes = set()
    for part in range(shards):
        header = draft_header(replace(config, shard=(part, shards)), source, teacher)
        sample_ids += range(header.first_sample, header.first_sample + header.samples)
        sizes.add(header.samples)
    assert sample_ids == list(range(samples))
    assert max(sizes) - min(sizes) <= 1


def test_a_dump_like_another_takes_its_encoding_and_what_it_was_fitted_to(
    dump_config: DumpConfig, tmp_path: Path
) -> None:
    config = replace(dump_config, eval_data=None)
    first = dump(replace(config, encoding="basis:4,2", shard=(0, 2), out=tmp_path / "first.h5"))
    config = replace(config, augment="shift:2")  # a new fit would differ
    like = dump(replace(config, like=first.path, out=tmp_path / "like.h5"))
    fitted = dump(replace(config, encoding="basis:4,2", out=tmp_path / "fitted.h5"))
    assert like.header.encoding == first.header.encoding
    for name in ("mean", "directions", "direction_steps"):
        np.testing.assert_array_equal(like.arrays[name], first.arrays[name])
    assert not np.array_equal(like.arrays["mean"], fitted.arrays["mean"])
    assert like.header.samples == SAMPLES
    # the rows are those of its own samples
    assert like.header.summary is not None
    assert like.header.summary["fidelity"]["mean"] < 1e-3


def test_a_dump_goes_on_only_like_the_same(dump_config: DumpConfig, tmp_path: Path) -> None:
    config = replace(dump_config, eval_data=None, encoding="basis:4,2")
    one = dump(replace(config, shard=(0, 2), out=tmp_path / "one.h5"))
    two = dump(replace(config, augment="shift:2", out=tmp_path / "two.h5"))
    config = replace(config, shard=(1, 2))
    like = dump(replace(config, like=one.path))
    assert dump(replace(config, like=one.path)).content_id() == like.content_id()
    with pytest.raises(
        SettingsError, match=r"was started with another encoding than .*two\.h5's; u"
    ):
        dump(replace(config, like=two.path))
    like.path.rename(partial_path(like.path))
    with pytest.raises(
        SettingsError, match=r"was started with another encoding than .*two\.h5's; u"
    ):
        dump(replace(config, like=two.path))


def test_a_dump_like_one_of_other_classes_is_refused(
    dump_config: DumpConfig, teacher_file: Path, tmp_path: Path
) -> None:
    wide = replace(dump_config, teacher=f"{teacher_file}:wide", eval_data=None)
    first = dump(replace(wide, out=tmp_path / "wide.h5"))
    with pytest.raises(SettingsError, match=r"--like .*wide\.h5 has classes 2048; this dump has 5"):
        dump(replace(dump_config, like=first.path))
    assert not list(tmp_path.glob("tiny.h5*"))


def test_a_dump_anywhere_else_gives_the_same_bytes(
    dump_config: DumpConfig, teacher_file: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "other" / "folder"
    elsewhere.mkdir(parents=True)
    (elsewhere / "models.py").write_text(TEACHER)
    other = replace(dump_config, teacher=f"{elsewhere}/models.py:teacher", out=elsewhere / "o.h5")
    assert dump(other).path.read_bytes() == dump(dump_config).path.read_bytes()
    # the comparison would detect a change of a setting that determines the values
    warmer = replace(other, temperature=4.1, overwrite=True)
    assert dump(warmer).path.read_bytes() != dump_config.out.read_bytes()


def test_workers_change_no_byte(dump_config: DumpConfig) -> None:
    config = replace(dump_config, views=2, augment="flip", workers=2)
    assert dump(config).path.read_bytes() == whole_bytes(replace(config, workers=0))


# stops
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("batch", [1, 2, BATCHES, BATCHES + 1, 2 * BATCHES])
def test_a_resumed_dump_ends_in_the_same_bytes(
    batch: int, dump_config: DumpConfig, stop_at: StopAt, tmp_path: Path
) -> None:
    config = replace(dump_config, views=2, augment="shift:1", eval_data=None)
    partial = begin(config, stop_at, batch)
    view, done = divmod(batch - 1, BATCHES)
    whole_blocks = -(-SAMPLES // 7)
    assert committed(partial) == view * whole_blocks + done * 64 // 7  # finished work is kept
    saved = batches_of(whole(config), tmp_path) - batches_of(config, tmp_path)
    # the batch that holds the start of the unfinished block is computed again
    assert saved == batch - 1 - (done > 0)
    assert config.out.read_bytes() == whole_bytes(config)


@pytest.mark.usefixtures("small_blocks")
def test_a_dump_may_be_stopped_again_and_again(dump_config: DumpConfig, stop_at: StopAt) -> None:
    config = replace(dump_config, eval_data=None)
    kept = [committed(begin(config, stop_at, batch=3)) for _ in range(3)]
    assert kept == [128 // 7, 192 // 7, 256 // 7]
    dump(config)
    assert config.out.read_bytes() == whole_bytes(config)


@pytest.mark.usefixtures("small_blocks")
def test_a_row_damaged_between_two_runs_is_computed_again(
    dump_config: DumpConfig, stop_at: StopAt
) -> None:
    config = replace(dump_config, eval_data=None)
    partial = begin(config, stop_at)
    offset = open_cache(partial, unfinished=True).header.array("log_probs").offset
    raw = bytearray(partial.read_bytes())
    raw[offset + 100] ^= 1
    partial.write_bytes(raw)
    dump(config)
    assert config.out.read_bytes() == whole_bytes(config)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_kills_at_random_moments_lose_nothing(
    dump_config: DumpConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = replace(dump_config, views=2, augment="flip", batch_size=8, eval_data=None)
    config = replace(config, device="cpu")  # a forked child has no GPU
    whole = whole_bytes(config)
    monkeypatch.setenv("TEACHER_PAUSE", "0.005")
    random = np.random.default_rng(0)
    partial, kept = partial_path(config.out), [0]
    for _ in range(6):
        process = multiprocessing.get_context("fork").Process(target=dump, args=(config,))
        target = batches_seen(tmp_path) + int(random.integers(1, 10))
        process.start()
        wait_for_batches(tmp_path, target, process.is_alive)
        time.sleep(random.uniform(0, 0.01))
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert not config.out.exists()
        kept.append(committed(partial))
    assert kept == sorted(kept)
    assert 0 < kept[-1] < 2 * -(-SAMPLES // 7)
    monkeypatch.setenv("TEACHER_PAUSE", "0")
    dump(config)
    assert config.out.read_bytes() == whole


def wait_for_batches(folder: Path, count: int, alive: Callable[[], bool]) -> None:
    while batches_seen(folder) < count:
        assert alive(), "the dump ended too early"
        time.sleep(0.001)


def test_ctrl_c_stops_in_one_line_and_the_same_command_goes_on(
    data_file: Path, teacher_file: Path, tmp_path: Path
) -> None:
    # rows are so wide that the first of two blocks is whole before the last of ten batches
    config = DumpConfig(
        teacher=f"{teacher_file}:wide",
        data=f"npz:{data_file}",
        temperature=4.0,
        out=tmp_path / "wide.h5",
        batch_size=32,
    )
    command = [sys.executable, "-c", IMPATIENT, "dump", "--batch-size=32", "--temperature=4"]
    command += [f"--teacher={config.teacher}", f"--data={config.data}", f"--out={config.out}"]
    with subprocess.Popen(
        command,
        env=os.environ | {"TEACHER_AT": "10"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for_batches(tmp_path, 10, lambda: process.poll() is None)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == (
        f"Error: stopped; the finished rows are kept in {config.out}.partial: run the same command "
        "again to continue\n"
    )
    assert committed(partial_path(config.out)) == 1
    saved = batches_of(whole(config), tmp_path) - batches_of(config, tmp_path)
    assert saved == 256 // 32
    assert config.out.read_bytes() == whole_bytes(config)


def test_ctrl_c_is_told_as_such_to_callers(dump_config: DumpConfig, stop_at: StopAt) -> None:
    stop_at(3, KeyboardInterrupt)
    with pytest.raises(
        Interrupted, match=r"stopped; the finished rows are kept in .*tiny\.h5\.partial: run"
    ):
        dump(replace(dump_config, eval_data=None))
    assert Interrupted.exit_code == 130


@pytest.mark.usefixtures("small_blocks")
def test_a_teacher_that_raises_in_mid_dump_is_named_with_the_samples(
    dump_config: DumpConfig, stop_at: StopAt
) -> None:
    config = replace(dump_config, eval_data=None)
    stop_at(3)
    with pytest.raises(
        ModelError,
        match=r"models\.py:teacher raised ValueError on samples 128 to 191, inputs \(64, 1, 8, 8\) "
        "of torch.float32: no more",
    ):
        dump(config)
    assert committed(partial_path(config.out)) == 128 // 7


# augmentation
TRANSFORMS = """
import random

def cover(image):
    image = image.clone()
    image[:, random.randrange(8)] = 255
    return image

def boom(image):
    raise ValueError("no more")

def ragged(image):
    # the first sample, with which the teacher is tried, keeps all its rows
    return image[:, : 8 - int(image[0, 0, 0]) % 3]

def text(image):
    return "an image"

calls = 0

def counter(image):
    global calls
    calls += 1
    return image // (1 + calls % 7)

rng = random.Random(0)

def generator(image):
    return image // rng.randint(1, 250)
"""


@pytest.fixture
def transforms(tmp_path: Path) -> Path:
    path = tmp_path / "transforms.py"
    path.write_text(TRANSFORMS)
    return path


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("augment", ["crop:0.5,jitter:0.5,mixup", "OWN,flip,mixup"])
def test_a_resumed_dump_of_mixed_views_ends_in_the_same_bytes(
    augment: str, dump_config: DumpConfig, stop_at: StopAt, transforms: Path, tmp_path: Path
) -> None:
    images, labels = make_arrays(50)
    config = data_of(dump_config, tmp_path, x_train=images, y_train=labels)
    augment = augment.replace("OWN", f"{transforms}:cover")
    config = replace(config, views=2, augment=augment, eval_data=None, batch_size=16)
    begin(config, stop_at, batch=7)
    dump(config)
    assert config.out.read_bytes() == whole_bytes(config)
    assert open_cache(config.out).header.augment == augment.replace(f"{tmp_path}/", "")
    other = replace(config, seed=1, out=tmp_path / "other.h5")
    assert whole_bytes(config) != dump(other).path.read_bytes()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("boom", r"transforms\.py:boom raised ValueError on sample \d+ in view 0, .*no more"),
        (
            "ragged",
            r"transforms\.py:ragged returns different shapes.*view 0.*must return the same shape",
        ),
        (
            "text",
            r"transforms\.py:text raised .* on sample \d+ in view 0, .*returned str; expected",
        ),
    ],
)
def test_a_transform_that_fails_is_named(
    name: str, message: str, dump_config: DumpConfig, transforms: Path
) -> None:
    with pytest.raises(DataError, match=message):
        dump(replace(dump_config, augment=f"{transforms}:{name}"))
    assert not list(dump_config.out.parent.glob("*.h5*"))


@pytest.mark.parametrize("name", ["counter", "generator"])
@pytest.mark.parametrize("rest", ["", ",flip,mixup"])
@pytest.mark.parametrize("views", [1, 3])
def test_a_transform_with_a_state_of_its_own_is_refused(
    views: int, rest: str, name: str, dump_config: DumpConfig, transforms: Path
) -> None:
    with pytest.raises(
        DataError,
        match=r"sample \d+ of npz:tiny\.npz@train in view \d is different when it is loaded again: "
        r".* state of its own; draw only from",
    ):
        dump(replace(dump_config, views=views, augment=f"{transforms}:{name}{rest}"))
    assert not list(dump_config.out.parent.glob("*.h5*"))


@pytest.mark.parametrize("augment", ["mixup", "crop:0.5", "jitter:0.5"])
def test_whole_numbers_that_are_no_images_are_not_mixed(
    augment: str, dump_config: DumpConfig, tmp_path: Path
) -> None:
    images, labels = make_arrays()
    config = data_of(dump_config, tmp_path, x_train=100 * images.astype(np.int64), y_train=labels)
    teacher = tmp_path / "tokens.py"
    teacher.write_text(TEACHER.replace("x.flatten(1)", "x.float().flatten(1)"))
    config = replace(config, teacher=f"{teacher}:teacher", eval_data=None)
    assert dump(replace(config, out=tmp_path / "plain.h5")).complete
    with pytest.raises(SettingsError, match=rf"int64.*--augment {augment}"):
        dump(replace(config, augment=augment))


@pytest.mark.parametrize("augment", ["shift:100000000", f"cutout:{10**22}"])
def test_a_size_far_beyond_the_image_is_refused(augment: str, dump_config: DumpConfig) -> None:
    with pytest.raises(SettingsError, match=rf"{augment}.*expected"):
        dump(replace(dump_config, augment=augment))


@pytest.mark.parametrize("augment", [",", "flip,,shift:1", "flip,"])
def test_an_augmentation_with_an_empty_part_is_refused(
    augment: str, dump_config: DumpConfig
) -> None:
    # with "," alone, all views would be the same
    with pytest.raises(SettingsError, match=rf"in '{augment}' is unknown; expected shift"):
        dump(replace(dump_config, views=2, augment=augment))
