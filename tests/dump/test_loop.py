"""The dump: what it writes, and that no stop of any kind changes a byte of it."""

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

from softcache.cache import allocate as cache_allocate
from softcache.cache import open_cache
from softcache.cache import writer as cache_writer
from softcache.cache.reader import partial_path
from softcache.data.augment import Augmentation, parse_augment
from softcache.data.open import open_source
from softcache.dump.check_resume import SETTINGS
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.dump.prepare import draft_header, load_teachers
from softcache.errors import DataError, Interrupted, ModelError, SettingsError, SoftcacheError
from softcache.models.evaluate import data_digest
from softcache.util.callables import import_callable
from softcache.util.tensors import to_float
from tests.conftest import CLASSES, SAMPLES, make_arrays

Floats = npt.NDArray[np.float64]
StopAt = Callable[..., None]

BATCHES = 5  # of 64 samples and less

# a teacher that is told by the environment what to do in the middle of its work; a batch of one
# sample, on which the dump tries it, does not count
TEACHER = """
import builtins, os, time
from pathlib import Path

import torch
from torch import nn

CALLS = Path(__file__).with_name("calls")

class Teacher(nn.Module):
    def __init__(self, classes):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.weight = nn.Parameter(torch.randn(64, classes, generator=generator))

    def forward(self, x):
        if len(x) > 1:
            with CALLS.open("a") as file:
                file.write("x")
            if CALLS.stat().st_size == int(os.environ.get("TEACHER_AT", 0)):
                if "TEACHER_RAISES" in os.environ:
                    raise getattr(builtins, os.environ["TEACHER_RAISES"])("no more")
                time.sleep(60)
            time.sleep(float(os.environ.get("TEACHER_PAUSE", 0)))
        return x.flatten(1) @ self.weight

def teacher():
    return Teacher(5)

def wide():
    return Teacher(2048)
"""


@pytest.fixture
def teacher_file(tmp_path: Path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(TEACHER)
    return path


def batches_seen(folder: Path) -> int:
    """How many batches the teacher in `folder` has seen."""
    path = folder / "calls"
    return path.stat().st_size if path.exists() else 0


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StopAt:
    """Let the teacher raise at its n-th batch from now on; 0: never again."""

    def stop_at(batch: int, error: type[BaseException] = ValueError) -> None:
        (tmp_path / "calls").unlink(missing_ok=True)
        monkeypatch.setenv("TEACHER_AT", str(batch))
        monkeypatch.setenv("TEACHER_RAISES", error.__name__)

    return stop_at


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 7 rows, each committed when it is whole: they end where no batch does."""
    monkeypatch.setattr(cache_allocate, "block_rows", lambda *layout: 7)
    monkeypatch.setattr(cache_writer, "COMMIT_SECONDS", 0.0)


def begin(config: DumpConfig, stop_at: StopAt, batch: int = 3) -> Path:
    """A dump that the teacher broke off; the unfinished file."""
    stop_at(batch)
    with pytest.raises(ModelError, match="raised ValueError on samples"):
        dump(config)
    stop_at(0)
    return partial_path(config.out)


def whole(config: DumpConfig) -> DumpConfig:
    """The same dump into another file, which nothing stops."""
    return replace(config, out=config.out.with_name("whole.h5"))


def whole_bytes(config: DumpConfig) -> bytes:
    return dump(whole(config)).path.read_bytes()


def batches_of(config: DumpConfig, folder: Path) -> int:
    """How many batches the teacher in `folder` sees in a dump."""
    before = batches_seen(folder)
    dump(config)
    return batches_seen(folder) - before


def committed(path: Path) -> int:
    """Blocks of rows that an unfinished cache holds."""
    return int((open_cache(path, unfinished=True).arrays["digests"] != 0).sum())


def softened(config: DumpConfig, images: npt.NDArray[Any], temperature: float) -> Floats:
    """log softmax(z / T) of float images (B, 1, 8, 8) in float64, by hand."""
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
    # the comparison would notice another temperature, and rows of other samples
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
        seen = augmentation(images, None, view, np.arange(SAMPLES)).numpy()
        stored = cache.arrays["log_probs"][view].astype(np.float64)
        np.testing.assert_allclose(stored, softened(config, seen, 4.0), rtol=2**-10)
    # views differ, so that the comparison would notice one in another's place
    views = cache.arrays["log_probs"].astype(np.float64)
    assert not np.allclose(views[0], views[1], rtol=2**-10)
    assert not np.allclose(views[1], views[2], rtol=2**-10)


@pytest.mark.parametrize("augment", ["shift:2,flip", "shift:1,mixup"])
def test_shards_and_ranges_of_views_hold_what_the_whole_dump_has_there(
    augment: str, dump_config: DumpConfig, tmp_path: Path
) -> None:
    config = replace(dump_config, eval_data=None, augment=augment, seed=11)
    all_of_it = dump(replace(config, views=4, out=tmp_path / "all.h5"))
    for part, (first, end) in enumerate([(0, 100), (100, 200), (200, 300)]):
        out = tmp_path / f"{part}.h5"
        found = dump(replace(config, views=2, first_view=1, shard=(part, 3), out=out))
        header = found.header
        assert (header.first_view, header.views) == (1, 2)
        assert (header.first_sample, header.samples, header.data_samples) == (first, 100, SAMPLES)
        for name in ("keys", "labels"):
            np.testing.assert_array_equal(found.arrays[name], all_of_it.arrays[name][first:end])
        stored = found.arrays["log_probs"].astype(np.float64)
        whole = all_of_it.arrays["log_probs"].astype(np.float64)
        # in other company in its batch, a row may round otherwise
        np.testing.assert_allclose(stored, whole[1:3, first:end], rtol=2**-9, atol=2**-9)
        assert not np.allclose(stored, whole[:2, first:end], rtol=0.01)  # other views would show


@pytest.mark.parametrize(("samples", "shards"), [(300, 7), (300, 300), (5, 4), (1, 1)])
def test_shards_are_of_nearly_one_size_and_hold_every_sample_once(
    samples: int, shards: int, dump_config: DumpConfig, tmp_path: Path
) -> None:
    images, labels = make_arrays(samples)
    config = data_of(dump_config, tmp_path, x_train=images, y_train=labels)
    source = open_source(config.data)
    teacher = load_teachers(config, source, Augmentation(None, 0))
    held: list[int] = []
    sizes = set()
    for part in range(shards):
        header = draft_header(replace(config, shard=(part, shards)), source, teacher)
        held += range(header.first_sample, header.first_sample + header.samples)
        sizes.add(header.samples)
    assert held == list(range(samples))
    assert max(sizes) - min(sizes) <= 1


def test_a_dump_like_another_takes_its_encoding_and_what_it_was_fitted_to(
    dump_config: DumpConfig, tmp_path: Path
) -> None:
    config = replace(dump_config, eval_data=None)
    first = dump(replace(config, encoding="basis:4,2", shard=(0, 2), out=tmp_path / "first.h5"))
    config = replace(config, augment="shift:2")  # it would be fitted otherwise
    like = dump(replace(config, like=first.path, out=tmp_path / "like.h5"))
    fitted = dump(replace(config, encoding="basis:4,2", out=tmp_path / "fitted.h5"))
    assert like.header.encoding == first.header.encoding
    for name in ("mean", "directions", "direction_steps"):
        np.testing.assert_array_equal(like.arrays[name], first.arrays[name])
    assert not np.array_equal(like.arrays["mean"], fitted.arrays["mean"])
    assert like.header.samples == SAMPLES
    # its samples are its own
    assert like.header.summary is not None
    assert like.header.summary["fidelity"]["mean"] < 1e-3


def test_a_dump_goes_on_only_like_the_same(dump_config: DumpConfig, tmp_path: Path) -> None:
    config = replace(dump_config, eval_data=None, encoding="basis:4,2")
    one = dump(replace(config, shard=(0, 2), out=tmp_path / "one.h5"))
    two = dump(replace(config, augment="shift:2", out=tmp_path / "two.h5"))
    config = replace(config, shard=(1, 2))
    like = dump(replace(config, like=one.path))
    assert dump(replace(config, like=one.path)).content_id() == like.content_id()
    with pytest.raises(SettingsError, match=r"was begun with another encoding than .*two\.h5's; u"):
        dump(replace(config, like=two.path))
    like.path.rename(partial_path(like.path))
    with pytest.raises(SettingsError, match=r"was begun with another encoding than .*two\.h5's; u"):
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
    elsewhere = tmp_path / "other" / "place"
    elsewhere.mkdir(parents=True)
    (elsewhere / "models.py").write_text(TEACHER)
    other = replace(dump_config, teacher=f"{elsewhere}/models.py:teacher", out=elsewhere / "o.h5")
    assert dump(other).path.read_bytes() == dump(dump_config).path.read_bytes()
    # the comparison would notice a difference in what decides the values
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
    assert committed(partial) == view * whole_blocks + done * 64 // 7  # what was done is kept
    saved = batches_of(whole(config), tmp_path) - batches_of(config, tmp_path)
    assert saved == batch - 1 - (done > 0)  # the batch in which the last block began is seen again
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
        assert alive(), "the dump ended before its time"
        time.sleep(0.001)


def test_ctrl_c_stops_in_one_line_and_the_same_command_goes_on(
    data_file: Path, teacher_file: Path, tmp_path: Path
) -> None:
    # rows so wide that the first of two blocks is whole before the last of ten batches
    config = DumpConfig(
        teacher=f"{teacher_file}:wide",
        data=f"npz:{data_file}",
        temperature=4.0,
        out=tmp_path / "wide.h5",
        batch_size=32,
    )
    command = [sys.executable, "-m", "softcache", "dump", "--batch-size=32", "--temperature=4"]
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
        f"Error: stopped; {config.out}.partial keeps what was done: the same command goes on\n"
    )
    assert committed(partial_path(config.out)) == 1
    saved = batches_of(whole(config), tmp_path) - batches_of(config, tmp_path)
    assert saved == 256 // 32
    assert config.out.read_bytes() == whole_bytes(config)


def test_ctrl_c_is_told_as_such_to_callers(dump_config: DumpConfig, stop_at: StopAt) -> None:
    stop_at(3, KeyboardInterrupt)
    with pytest.raises(Interrupted, match=r"stopped; .*tiny\.h5\.partial keeps what was done"):
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
    # of the first sample, on which the teacher is tried, all rows are kept
    return image[:, : 8 - int(image[0, 0, 0]) % 3]

def text(image):
    return "an image"

calls = 0

def counter(image):
    global calls
    calls += 1
    return image // (1 + calls % 7)

own = random.Random(0)

def generator(image):
    return image // own.randint(1, 250)
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
            r"transforms\.py:ragged gives different shapes.*view 0.*must give all samples one",
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
        match=r"sample \d+ of npz:tiny\.npz@train in view \d comes out different the second time: "
        r".* state of its own; draw only from",
    ):
        dump(replace(dump_config, views=views, augment=f"{transforms}:{name}{rest}"))
    assert not list(dump_config.out.parent.glob("*.h5*"))


@pytest.mark.parametrize("augment", ["mixup", "crop:0.5", "jitter:0.5"])
def test_whole_numbers_that_are_no_images_are_not_mixed(
    augment: str, dump_config: DumpConfig, tmp_path: Path
) -> None:
    images, labels = make_arrays()
    config = data_of(dump_config, tmp_path, x_train=images.astype(np.int64), y_train=labels)
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
    # of "," alone, all views would be the same
    with pytest.raises(SettingsError, match=rf"in '{augment}' is unknown; expected shift"):
        dump(replace(dump_config, views=2, augment=augment))


# names of the file


def test_the_unfinished_file_has_another_name(dump_config: DumpConfig, stop_at: StopAt) -> None:
    folder = dump_config.out.parent / "out"
    config = replace(dump_config, out=folder / "tiny.h5", eval_data=None)
    begin(config, stop_at)
    assert [path.name for path in folder.iterdir()] == ["tiny.h5.partial"]
    dump(config)
    assert [path.name for path in folder.iterdir()] == ["tiny.h5"]


def test_folders_on_the_way_are_made(dump_config: DumpConfig, tmp_path: Path) -> None:
    config = replace(dump_config, out=tmp_path / "not" / "yet" / "there.h5")
    assert dump(config).path == config.out


def test_a_finished_cache_is_left_alone(
    dump_config: DumpConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump(dump_config)
    before, seen = dump_config.out.stat(), batches_seen(tmp_path)
    capsys.readouterr()
    assert dump(dump_config).path == dump_config.out
    after = dump_config.out.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert batches_seen(tmp_path) == seen
    assert capsys.readouterr().out == (
        f"{dump_config.out} is complete already; left alone (--overwrite makes it anew)\n"
    )


def test_overwrite_makes_a_finished_cache_anew(dump_config: DumpConfig) -> None:
    dump(dump_config)
    changed = replace(dump_config, temperature=2.0, overwrite=True)
    assert dump(changed).header.temperature == 2.0


def test_overwrite_begins_an_unfinished_cache_anew(
    dump_config: DumpConfig, stop_at: StopAt, tmp_path: Path
) -> None:
    config = replace(dump_config, eval_data=None)
    begin(config, stop_at)
    anew = replace(config, overwrite=True)
    assert batches_of(anew, tmp_path) == batches_of(whole(config), tmp_path)
    begin(replace(config, overwrite=True), stop_at)
    assert dump(replace(anew, temperature=2.0)).header.temperature == 2.0


def test_the_old_cache_stays_until_the_new_one_is_complete(
    dump_config: DumpConfig, stop_at: StopAt
) -> None:
    config = replace(dump_config, eval_data=None)
    before = dump(config).path.read_bytes()
    begin(replace(config, temperature=2.0, overwrite=True), stop_at)
    assert config.out.read_bytes() == before


@pytest.mark.usefixtures("small_blocks")
def test_a_stopped_overwrite_can_go_on(
    dump_config: DumpConfig, stop_at: StopAt, tmp_path: Path
) -> None:
    config = replace(dump_config, eval_data=None)
    dump(config)
    again = replace(config, temperature=2.0, overwrite=True)
    begin(again, stop_at, batch=BATCHES)
    saved = batches_of(whole(again), tmp_path) - batches_of(again, tmp_path)
    assert open_cache(config.out).header.temperature == 2.0
    assert saved == BATCHES - 2


def test_an_out_folder_that_cannot_be_made_is_told_with_advice(
    dump_config: DumpConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        SoftcacheError,
        match=r"^--out .*file/tiny\.h5: cannot make its folder \(.*\); give another --out$",
    ):
        dump(replace(dump_config, out=tmp_path / "file" / "tiny.h5"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_out_folder_without_permission_is_told(dump_config: DumpConfig, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    with pytest.raises(SoftcacheError, match="Permission denied; see to the disk and its permi"):
        dump(replace(dump_config, out=folder / "tiny.h5"))


def test_an_out_that_is_a_folder_is_refused_before_the_first_row(
    dump_config: DumpConfig, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(
        SettingsError, match=r"^--out .*folder is a folder; name a file in it, such as .*\.h5$"
    ):
        dump(replace(dump_config, out=folder, overwrite=True))
    assert batches_seen(tmp_path) == 0


# other settings


def renamed_data(config: DumpConfig, folder: Path) -> DumpConfig:
    (folder / "other.npz").write_bytes(Path(config.data.removeprefix("npz:")).read_bytes())
    return replace(config, data=f"npz:{folder}/other.npz")


def data_of(config: DumpConfig, folder: Path, **arrays: npt.NDArray[Any]) -> DumpConfig:
    """Other arrays in a file of the same name."""
    folder = folder / "changed"
    folder.mkdir()
    np.savez(folder / "tiny.npz", **arrays)  # type: ignore[arg-type]
    return replace(config, data=f"npz:{folder}/tiny.npz")


def shorter_data(config: DumpConfig, folder: Path) -> DumpConfig:
    images, labels = make_arrays()
    return data_of(config, folder, x_train=images[:-1], y_train=labels[:-1])


def teacher_of(config: DumpConfig, folder: Path, old: str, new: str) -> DumpConfig:
    """A teacher of the same name whose source differs."""
    folder = folder / "changed"
    folder.mkdir()
    (folder / "models.py").write_text(TEACHER.replace(old, new))
    return replace(config, teacher=f"{folder}/models.py:teacher")


# what changes, and how the refusal says it
CHANGES: dict[str, tuple[Callable[[DumpConfig, Path], DumpConfig], str]] = {
    "data": (renamed_data, "data 'npz:tiny.npz@train', now it is 'npz:other.npz@train'"),
    "data_samples": (shorter_data, "data_samples 300, now it is 299"),
    "first_sample": (
        lambda config, _: replace(config, shard=(1, 2)),
        "first_sample 0, now it is 150",
    ),
    "samples": (lambda config, _: replace(config, shard=(0, 2)), "samples 300, now it is 150"),
    "classes": (
        lambda config, folder: teacher_of(config, folder, "Teacher(5)", "Teacher(6)"),
        "classes 5, now it is 6",
    ),
    "teachers": (
        lambda config, folder: teacher_of(config, folder, "manual_seed(7)", "manual_seed(8)"),
        r"another teacher \(sha256 '\w{64}', now '\w{64}'\)",
    ),
    "temperature": (
        lambda config, _: replace(config, temperature=2.0),
        "temperature 4.0, now it is 2.0",
    ),
    "precision": (
        lambda config, _: replace(config, precision="bf16"),
        "precision 'fp32', now it is 'bf16'",
    ),
    "choice": (
        lambda config, _: replace(config, encoding="quantized"),
        "encoding 'dense', now it is 'quantized'",
    ),
    "first_view": (
        lambda config, _: replace(config, first_view=1),
        "first_view 0, now it is 1",
    ),
    # more of them are no mistake where the cache is finished
    "views": (lambda config, _: replace(config, views=1), "views 2, now it is 1"),
    "augment": (
        lambda config, _: replace(config, augment="flip"),
        "augment 'shift:1', now it is 'flip'",
    ),
    "seed": (lambda config, _: replace(config, seed=1), "seed 0, now it is 1"),
    "must_understand": (
        lambda config, _: replace(config, embed_inputs=True),
        "nothing embedded, now inputs",
    ),
}


def test_every_setting_has_a_change_to_be_refused() -> None:
    assert set(CHANGES) == set(SETTINGS)


@pytest.fixture(params=["unfinished", "finished"])
def begun(
    request: pytest.FixtureRequest, dump_config: DumpConfig, stop_at: StopAt
) -> tuple[DumpConfig, Path]:
    """Settings of two views, and the file that was begun or finished with them."""
    config = replace(dump_config, views=2, augment="shift:1", eval_data=None)
    if request.param == "unfinished":
        return config, begin(config, stop_at)
    return config, dump(config).path


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("setting", CHANGES)
def test_other_settings_are_refused_by_name_and_the_file_is_kept(
    setting: str, begun: tuple[DumpConfig, Path], tmp_path: Path
) -> None:
    config, path = begun
    before = path.read_bytes()
    change, message = CHANGES[setting]
    with pytest.raises(
        SettingsError,
        match=rf"{path.name} was begun with {message}; use the same, give another --out",
    ):
        dump(change(config, tmp_path))
    assert path.read_bytes() == before
    assert open_cache(dump(config).path).complete  # the settings it was begun with go on


def test_evaluation_data_that_would_not_be_recorded_are_refused(
    begun: tuple[DumpConfig, Path], data_file: Path
) -> None:
    with pytest.raises(SettingsError, match=r"begun with.*eval"):
        dump(replace(begun[0], eval_data=f"npz:{data_file}@test"))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("what", ["x_train", "y_train"])
def test_other_data_under_the_same_name_are_refused(
    what: str, begun: tuple[DumpConfig, Path], tmp_path: Path
) -> None:
    config, path = begun
    images, labels = make_arrays()
    arrays: dict[str, npt.NDArray[Any]] = {"x_train": images, "y_train": labels}
    arrays[what][10] = (arrays[what][10] + 1) % CLASSES
    before = path.read_bytes()
    with pytest.raises(
        SettingsError, match=r"begun with other data: sample 10 of npz:tiny\.npz@train differs; use"
    ):
        dump(data_of(config, tmp_path, **arrays))
    assert path.read_bytes() == before


# bad data and bad settings


@pytest.mark.parametrize("label", [CLASSES, -2])
def test_a_label_out_of_range_is_named(label: int, dump_config: DumpConfig, tmp_path: Path) -> None:
    images, labels = make_arrays()
    labels[200] = label
    with pytest.raises(
        DataError, match=rf"sample 200 has label {label}; expected 0 to 4, or -1 for none"
    ):
        dump(data_of(dump_config, tmp_path, x_train=images, y_train=labels, x=images, y=labels))


def test_a_label_out_of_range_keeps_what_was_done(
    dump_config: DumpConfig, small_blocks: None, tmp_path: Path
) -> None:
    images, labels = make_arrays()
    labels[200] = 9
    config = replace(dump_config, eval_data=None)
    with pytest.raises(DataError, match="sample 200 has label 9"):
        dump(data_of(config, tmp_path, x_train=images, y_train=labels))
    assert committed(partial_path(config.out)) == 192 // 7


def test_a_label_out_of_range_in_the_evaluation_data_is_named(
    dump_config: DumpConfig, tmp_path: Path
) -> None:
    images, labels = make_arrays()
    labels[20] = 9
    changed = data_of(dump_config, tmp_path, x_train=images, y_train=labels)
    with pytest.raises(DataError, match="sample 20 has label 9; expected 0 to 4"):
        dump(replace(dump_config, eval_data=changed.data))


def test_evaluation_data_without_labels_are_refused(
    dump_config: DumpConfig, tmp_path: Path
) -> None:
    images, _ = make_arrays()
    changed = data_of(dump_config, tmp_path, x_train=images)
    with pytest.raises(DataError, match="sample 0 has no label; errors need labels"):
        dump(replace(dump_config, eval_data=changed.data))


def test_data_without_labels_are_dumped(dump_config: DumpConfig, tmp_path: Path) -> None:
    images, _ = make_arrays()
    cache = dump(data_of(dump_config, tmp_path, x_train=images))
    assert (cache.labels == -1).all()
    assert cache.header.summary is not None
    assert cache.header.summary["agreement"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; expected a number above 0"),
        ({"temperature": -1.0}, "temperature is -1.0; expected a number above 0"),
        ({"temperature": float("nan")}, "temperature is nan; expected a number above 0"),
        ({"temperature": float("inf")}, "temperature is inf; expected a number above 0"),
        ({"views": 0}, "views is 0; expected 1 or more"),
        ({"seed": -1}, "seed is -1; expected a number from 0 to"),
        ({"batch_size": -1}, "batch-size is -1; expected 0 or more"),
        ({"workers": -1}, "workers is -1; expected 0 or more"),
        ({"precision": "fp8"}, "precision is fp8; expected one of fp32, tf32, bf16, fp16"),
        ({"views": 2}, "2 views without --augment would all be the same; add it, or ask for one"),
        ({"first_view": 3}, "1 views without --augment would all be the same; add it, or ask for"),
        ({"first_view": -1}, "--views begins at -1; expected at least 0"),
        ({"shard": (2, 2)}, "shard is 2/2; expected I/N with I from 0 to N - 1"),
        ({"shard": (-1, 2)}, "shard is -1/2; expected I/N with I from 0 to N - 1"),
        ({"shard": (0, 0)}, "shard is 0/0; expected I/N with I from 0 to N - 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    changes: dict[str, Any], message: str, dump_config: DumpConfig
) -> None:
    with pytest.raises(SettingsError, match=message):
        replace(dump_config, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"augment": "swirl"},
            "augmentation 'swirl' in 'swirl' is unknown; expected shift:PIXELS",
        ),
        ({"encoding": "zip"}, "encoding 'zip' is unknown; expected dense"),
        (
            {"device": "abacus"},
            "device abacus: torch cannot use it here .*; use --device auto or cpu",
        ),
        ({"classes": 7}, r"returns shape \(1, 5\) for samples 0 to 0; expected .*\(1, 7\)"),
        ({"data": "npz:nowhere.npz"}, r"npz:nowhere\.npz: no such file"),
        ({"shard": (0, 301)}, "301 shards of 300 samples; expected at most one for each"),
        ({"like": Path("nowhere.h5")}, r"nowhere\.h5: No such file or directory; expected a cache"),
        (
            {"teacher": "nowhere.py:teacher"},
            r"no such file: nowhere\.py; expected FILE\.py:CALLABLE",
        ),
        ({"weights": Path("nowhere.pt")}, r"weights nowhere\.pt: no such file"),
        (
            {"temperature": 1e7},
            "^--temperature is 10000000.0; expected",
        ),
        (
            {"seed": 1 << 63},
            "^--seed is 9223372036854775808; expected",
        ),
        (
            {"classes": -1},
            "classes is -1; expected",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_a_file_is_made(
    changes: dict[str, Any], message: str, dump_config: DumpConfig
) -> None:
    with pytest.raises(SoftcacheError, match=message):
        dump(replace(dump_config, **changes))
    assert not list(dump_config.out.parent.glob("*.h5*"))
