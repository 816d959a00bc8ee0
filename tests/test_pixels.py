"""Images with a class for each pixel, from the dump to the comparison of students."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from softcache.cache import Cache, open_cache
from softcache.data.augment import parse_augment
from softcache.data.loader import augmented, fetch_batch, make_request
from softcache.data.masks import augmented_labels
from softcache.data.open import open_source
from softcache.data.rows import MaskSource
from softcache.data.source import UNLABELLED
from softcache.errors import SettingsError
from softcache.join.joined_data import hard_label_data
from softcache.join.match import join
from softcache.targets.decode import to_dense
from softcache.types import StoredTargets
from tests.cli.app_cases import softcache
from tests.pixels import MODELS, make_arrays, write_folders, write_npz, write_task
from tests.train.loop_cases import metrics, same_weights, stop_at

NAMES = ("dark", "bright", "other")
VIEWS = ["flip", "shift:3", "crop:.5", "flip,shift:2,jitter:0.1", "cutout:4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models.py and pixels.npz."""
    folder = tmp_path_factory.mktemp("pixels")
    (folder / "models.py").write_text(MODELS)
    write_npz(folder)
    return folder


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    """Two views of the images, flipped and shifted."""
    return dumped(folder, "views.h5", "--augment", "flip,shift:2", "--views", "2")


def dumped(folder: Path, name: str, *more: str) -> Cache:
    """A cache of the teacher of pixels."""
    result = softcache(*dump_arguments(folder, name), *more)
    assert result.exit_code == 0, result.output
    return open_cache(folder / name)


def dump_arguments(folder: Path, name: str, teacher: str = "teacher", data: str = "") -> list[str]:
    return [
        "dump", "--teacher", f"{folder}/models.py:{teacher}", "--data",
        data or f"npz:{folder}/pixels.npz", "--temperature", "1", "--out", str(folder / name),
    ]  # fmt: skip


@pytest.mark.parametrize("augment", VIEWS)
def test_labels_and_soft_targets_of_a_view_agree(
    folder: Path, tmp_path: Path, augment: str
) -> None:
    # the teacher sees a pixel alone, so its top class is the label wherever the pixel is not blended
    data = f"npz:{folder}/pixels.npz"
    arguments = dump_arguments(folder, "x.h5")
    arguments[-1] = str(tmp_path / "x.h5")
    assert softcache(*arguments, "--augment", augment, "--views", "3").exit_code == 0
    cache = open_cache(tmp_path / "x.h5")
    part = join(
        open_source(data), cache, augment=None, temperatures=[1.0], device=torch.device("cpu")
    )
    labelled = moved = 0
    for epoch in range(3):
        request = part.request(np.arange(len(part)), epoch)
        batch = part.training_batch(
            fetch_batch(part.source, request, part.augmentation), epoch, torch.device("cpu")
        )
        targets = batch.targets[1.0]
        assert isinstance(targets, StoredTargets)
        assert isinstance(batch.labels, torch.Tensor)
        top = to_dense(targets.decoded()).argmax(-1)
        pixels = batch.inputs.flatten()
        clear = (batch.labels >= 0) & ((pixels < 0.2) | (pixels > 0.8))
        if "cutout" in augment:  # what is blanked keeps its label
            clear &= pixels > 0.8
        assert torch.equal(top[clear], batch.labels[clear])
        labelled += int(clear.sum())
        moved += int((batch.labels != torch.from_numpy(part.source.fetch(range(24))[1])).sum())
    assert labelled > 24 * 144
    assert (moved > 0) == (augment != "cutout:4")


def test_labels_that_do_not_move_would_be_noticed(folder: Path, cache: Cache) -> None:
    # the test above can fail: without the move, labels and targets differ
    source = open_source(f"npz:{folder}/pixels.npz")
    rows = cache.rows(0, np.arange(cache.header.row_count)).argmax(-1)
    labels = source.fetch(range(24))[1]
    assert (rows != labels)[labels >= 0].mean() > 0.2


def test_a_pixel_from_outside_has_no_label() -> None:
    source = MaskSource("m", np.ones((4, 1, 6, 6), np.float32), np.ones((4, 6, 6), np.int64))
    augmentation = parse_augment("shift:2", seed=0, total=4)
    ids = np.arange(4)
    batch = fetch_batch(source, make_request(augmentation, ids.tolist(), 1, ids), augmentation)
    labels = augmented_labels(batch, augmentation, 1, ids)
    inputs = augmented(batch, augmentation, 1, ids, torch.device("cpu")).flatten()
    assert set(labels.tolist()) == {UNLABELLED, 1}
    assert torch.equal(labels == 1, inputs == 1)


def test_folders_are_the_arrays(folder: Path, cache: Cache, tmp_path: Path) -> None:
    # the same pixels, classes and keys, so that a cache of the one is a cache of the other
    data = write_folders(tmp_path, *make_arrays())
    source, arrays = open_source(data), open_source(f"npz:{folder}/pixels.npz")
    mine, theirs = source.fetch([3, 0]), arrays.fetch([3, 0])
    assert torch.equal(mine[0], theirs[0])
    assert np.array_equal(mine[1], theirs[1])
    result = softcache("train", cache.path, *student(folder, tmp_path), "--data", data)
    assert result.exit_code == 0, result.output


def test_each_labelled_pixel_counts_once(folder: Path) -> None:
    cache = dumped(folder, "counted.h5", "--eval-data", f"npz:{folder}/pixels.npz@test")
    evaluation = cache.header.evaluation or {}
    assert evaluation["samples"] == 8 * 143
    assert evaluation["errors"] == 0
    assert evaluation["mean_iou"] == 1
    assert cache.header.row_count == 24 * 144  # ignored pixels have soft targets
    assert int((cache.labels < 0).sum()) == 24
    assert (cache.header.summary or {})["agreement"] == 1


def test_labels_of_augmented_views_are_not_compared(cache: Cache) -> None:
    # the labels of a file are those of the data, and the rows of a view are about pixels that moved
    assert (cache.header.summary or {})["agreement"] is None
    assert "warnings" not in (cache.header.summary or {})


def test_smaller_outputs_are_resized(folder: Path) -> None:
    result = softcache(*dump_arguments(folder, "smaller.h5", "smaller"))
    assert result.exit_code == 0, result.output
    rows = open_cache(folder / "smaller.h5").rows(0, np.arange(24 * 144)).argmax(-1)
    labels = open_source(f"npz:{folder}/pixels.npz").fetch(range(24))[1]
    assert 0.6 < (rows == labels)[labels >= 0].mean() < 1


def student(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        "--student", f"{folder}/models.py:student", "--out", str(out / "run"), "--epochs", "2",
        "--batch-size", "8", "--lr", "0.05", *more,
    ]  # fmt: skip


def test_the_whole_way(folder: Path, cache: Cache, tmp_path: Path) -> None:
    data, test = f"npz:{folder}/pixels.npz", f"npz:{folder}/pixels.npz@test"
    arguments = student(folder, tmp_path, "--data", data, "--eval-data", test)
    result = softcache("train", cache.path, *arguments, "--baseline", "--workers", "2")
    assert result.exit_code == 0, result.output
    assert "mIoU" in result.output
    last = metrics(tmp_path / "run")[-1]
    assert last["samples"] == 8 * 143
    assert 0 < last["mean_iou"] <= 1
    assert last["teacher_kl"] >= 0
    own = ["--student", f"{folder}/models.py:student"]
    both = [tmp_path / "run", tmp_path / "run" / "baseline"]
    result = softcache(
        "compare", *both, "--eval-data", test, "--cache", cache.path, "--data", data, *own
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.count("ECE") == 1
    assert result.stdout.count("KL to teacher") == 1
    assert "mIoU" in result.stdout
    assert "error by class" in result.stdout
    page = tmp_path / "report.html"
    reported: list[str | Path] = [
        tmp_path / "run",
        cache.path,
        "--data",
        data,
        "--eval-data",
        test,
        *own,
        "-o",
        page,
    ]
    assert softcache("report", *reported).exit_code == 0
    assert "mIoU" in page.read_text()
    result = softcache("export", tmp_path / "run", "--pt2", *own)
    assert result.exit_code == 0, result.output
    result = softcache(
        "verify", cache.path, "--teacher", f"{folder}/models.py:teacher", "--data", data
    )
    assert result.exit_code == 0, result.output


def test_several_students_are_those_of_runs_of_their_own(
    folder: Path, cache: Cache, tmp_path: Path
) -> None:
    own = ["--student", f"{folder}/models.py:student", "--data", f"npz:{folder}/pixels.npz"]
    shape = ["--batch-size", "8", "--epochs", "1"]
    assert softcache("train", cache.path, *own, *shape, "--out", tmp_path / "alone").exit_code == 0
    grid = ["--grid", "seed=0,1", "--out", str(tmp_path / "both")]
    assert softcache("train", cache.path, *own, *shape, *grid).exit_code == 0
    assert same_weights(tmp_path / "alone", tmp_path / "both" / "seed=0")


def test_a_run_that_goes_on_is_one_that_never_stopped(
    folder: Path, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--student", f"{folder}/models.py:student", "--batch-size", "8", "--epochs", "2"]
    arguments += ["--data", f"npz:{folder}/pixels.npz"]
    assert softcache("train", cache.path, *arguments, "--out", tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        result = softcache("train", cache.path, *arguments, "--out", tmp_path / "run")
    assert result.exit_code == 130, result.output
    result = softcache("train", cache.path, *arguments, "--out", tmp_path / "run")
    assert "resuming" in result.output
    assert same_weights(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("augment", ["mixup", "flip,mixup", "models.py:same"])
def test_what_cannot_be_replayed_on_masks_is_refused(folder: Path, augment: str) -> None:
    own = f"{folder}/{augment}" if ".py" in augment else augment
    result = softcache(*dump_arguments(folder, "no.h5"), "--augment", own)
    assert result.exit_code != 0
    what = "an augmentation of your own" if ".py" in augment else "mixup"
    assert f"{what} cannot be replayed on the masks of npz:pixels.npz@train" in result.output
    source = open_source(f"npz:{folder}/pixels.npz")
    with pytest.raises(SettingsError, match="cannot be replayed on the masks"):
        hard_label_data(source, own, 0, 3)


def test_images_without_masks_may_be_mixed_but_not_trained_with_masks(
    folder: Path, tmp_path: Path
) -> None:
    images, masks = make_arrays()
    np.savez(tmp_path / "bare.npz", x_train=images)
    np.savez(tmp_path / "labelled.npz", x_train=images, y_train=masks)
    arguments = dump_arguments(folder, "mixed.h5", data=f"npz:{tmp_path}/bare.npz")
    result = softcache(*arguments, "--augment", "mixup", "--views", "2")
    assert result.exit_code == 0, result.output
    train = ["train", str(folder / "mixed.h5"), *student(folder, tmp_path)]
    result = softcache(*train, "--data", f"npz:{tmp_path}/bare.npz")
    assert result.exit_code == 0, result.output
    result = softcache(*train, "--data", f"npz:{tmp_path}/labelled.npz", "--overwrite")
    assert "mixup cannot be replayed on the masks of npz:labelled.npz@train" in result.output


def test_a_cache_without_masks_can_be_trained_with_them(folder: Path, tmp_path: Path) -> None:
    images, _ = make_arrays()
    np.savez(tmp_path / "bare.npz", x_train=images)
    arguments = dump_arguments(folder, "bare.h5", data=f"npz:{tmp_path}/bare.npz")
    assert softcache(*arguments, "--augment", "flip").exit_code == 0
    train = ["train", str(folder / "bare.h5"), *student(folder, tmp_path, "--alpha", "0.5")]
    result = softcache(*train, "--data", f"npz:{folder}/pixels.npz")
    assert result.exit_code == 0, result.output
    assert metrics(tmp_path / "run")[-1]["hard"] > 0


def test_a_teacher_of_whole_images_is_refused(folder: Path) -> None:
    result = softcache(*dump_arguments(folder, "no.h5", "one_row"))
    assert (
        "returns shape (1, 3) for one sample, and the data has a row for each pixel"
        in result.output
    )
    assert not (folder / "no.h5").exists()


def test_a_class_that_the_teacher_lacks_is_refused(folder: Path, tmp_path: Path) -> None:
    images, masks = make_arrays()
    masks[5, 3, 3] = 3
    np.savez(tmp_path / "d.npz", x_train=images, y_train=masks)
    result = softcache(*dump_arguments(folder, "no.h5", data=f"npz:{tmp_path}/d.npz"))
    assert "sample 5" in result.output
    assert "has label 3; expected 0 to 2, or -1 for none" in result.output


def test_masks_do_not_join_a_cache_of_whole_images(folder: Path, tmp_path: Path) -> None:
    images, _ = make_arrays()
    np.savez(tmp_path / "d.npz", x_train=images, y_train=np.arange(24) % 3)
    arguments = dump_arguments(folder, "whole.h5", "one_row", f"npz:{tmp_path}/d.npz")
    assert softcache(*arguments).exit_code == 0
    train = ["train", str(folder / "whole.h5"), "--data", f"npz:{folder}/pixels.npz"]
    result = softcache(*train, *student(folder, tmp_path))
    assert "has a row for each pixel, and" in result.output
    assert "one for each sample; give the data that the cache was made from" in result.output


def test_images_of_another_size_are_refused(folder: Path, cache: Cache, tmp_path: Path) -> None:
    images, masks = make_arrays(size=9)
    np.savez(tmp_path / "d.npz", x_train=images, y_train=masks)
    train: list[str | Path] = [
        "train",
        cache.path,
        "--data",
        f"npz:{tmp_path}/d.npz",
        *student(folder, tmp_path),
    ]
    result = softcache(*train)
    assert "none of the 24 samples" in result.output or "is not in" in result.output
    assert result.exit_code != 0


def test_labels_that_differ_are_named_by_pixel(folder: Path, cache: Cache, tmp_path: Path) -> None:
    images, masks = make_arrays()
    masks[2, 0, 5] ^= 1
    np.savez(tmp_path / "d.npz", x_train=images, y_train=masks)
    train: list[str | Path] = [
        "train",
        cache.path,
        "--data",
        f"npz:{tmp_path}/d.npz",
        *student(folder, tmp_path),
    ]
    assert "sample 2 of npz:d.npz@train has label" in softcache(*train).output
    assert "at pixel 5, but" in softcache(*train).output


def test_a_run_says_that_its_rows_are_pixels(folder: Path, cache: Cache, tmp_path: Path) -> None:
    data = f"npz:{folder}/pixels.npz"
    assert softcache("train", cache.path, *student(folder, tmp_path), "--data", data).exit_code == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["unit"] == "pixel"


def test_a_student_of_digits_is_better_than_its_baseline(tmp_path: Path) -> None:
    # MNIST, pixel by pixel; the teacher was trained on more images than the student gets
    data = write_task(tmp_path, 200, 1200, 4, test=100)
    teacher = ["--teacher", f"{tmp_path}/models.py:digits_teacher", "--temperature", "1"]
    path = tmp_path / "digits.h5"
    views = ["--augment", "shift:2", "--views", "4", "--eval-data", f"{data}@test"]
    assert softcache("dump", *teacher, "--data", data, *views, "--out", path).exit_code == 0
    student = ["--student", f"{tmp_path}/models.py:digits_student", "--lr", "0.01"]
    shape = ["--epochs", "15", "--batch-size", "8", "--out", str(tmp_path / "run"), "--baseline"]
    both = ["--data", data, "--eval-data", f"{data}@test"]
    result = softcache("train", path, *student, *shape, *both)
    assert result.exit_code == 0, result.output
    distilled = metrics(tmp_path / "run")[-1]["mean_iou"]
    assert distilled > metrics(tmp_path / "run" / "baseline")[-1]["mean_iou"]


# models of transformers
@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained SegFormer with its image processor."""
    folder = tmp_path_factory.mktemp("segformer")
    torch.manual_seed(0)
    config = SegformerConfig(
        num_channels=1,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[1, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 1],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        initializer_range=0.5,
        id2label=dict(enumerate(NAMES)),
        label2id={name: number for number, name in enumerate(NAMES)},
    )
    SegformerForSemanticSegmentation(config).eval().save_pretrained(folder)
    write_processor(folder)
    return folder


def write_processor(folder: Path, **changes: object) -> None:
    settings = {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5],
        "image_std": [0.5],
        "do_reduce_labels": False,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | changes))


def test_a_segmenter_of_transformers_teaches_and_learns(
    folder: Path, segmenter: Path, tmp_path: Path
) -> None:
    data = f"npz:{folder}/pixels.npz?classes=dark,bright"
    out = ["--data", data, "--temperature", "1", "--out", str(tmp_path / "s.h5")]
    result = softcache("dump", "--teacher", f"hf:{segmenter}", *out)
    assert result.exit_code == 0, result.output
    cache = open_cache(tmp_path / "s.h5")
    assert tuple(cache.class_names) == NAMES
    # outputs of half the size, which are resized as the library's own post-processing does
    model = SegformerForSemanticSegmentation.from_pretrained(segmenter).eval()
    images = torch.from_numpy(make_arrays()[0][:2, None]) / 255
    with torch.inference_mode():
        logits = model((images - 0.5) / 0.5).logits
    assert logits.shape[-1] == 6
    logits = torch.nn.functional.interpolate(logits, (12, 12), mode="bilinear")
    expected = logits.log_softmax(1).permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    assert np.abs(cache.rows(0, np.arange(2 * 144)) - expected).max() < 0.02
    run = ["--student", f"hf:{segmenter}?pretrained=false&decoder_hidden_size=8", "--epochs", "1"]
    result = softcache("train", cache.path, *run, "--data", data, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    own = ["--student", run[1]]
    assert softcache("export", tmp_path / "run", "--hf", *own).exit_code == 0
    exported = SegformerForSemanticSegmentation.from_pretrained(tmp_path / "run" / "student-hf")
    assert tuple(exported.config.id2label.values()) == NAMES


def segmenter_options(folder: Path, tmp_path: Path) -> list[str]:
    out = ["--temperature", "1", "--out", str(tmp_path / "s.h5")]
    return ["--data", f"npz:{folder}/pixels.npz", *out]


def test_a_segmenter_that_crops_its_images_is_refused(
    folder: Path, segmenter: Path, tmp_path: Path
) -> None:
    shutil.copytree(segmenter, tmp_path / "crops")
    crop = {"do_center_crop": True, "crop_size": {"height": 8, "width": 8}}
    write_processor(tmp_path / "crops", image_processor_type="CLIPImageProcessor", **crop)
    out = segmenter_options(folder, tmp_path)
    result = softcache("dump", "--teacher", f"hf:{tmp_path / 'crops'}", *out)
    assert "crops the centre of its images, so it says nothing of the other pixels" in result.output


def test_a_segmenter_without_background_says_how_masks_are_numbered(
    folder: Path, segmenter: Path, tmp_path: Path
) -> None:
    shutil.copytree(segmenter, tmp_path / "reduced")
    write_processor(tmp_path / "reduced", do_reduce_labels=True)
    out = segmenter_options(folder, tmp_path)
    result = softcache("dump", "--teacher", f"hf:{tmp_path / 'reduced'}", *out)
    assert result.exit_code == 0, result.output
    assert (
        "masks are to hold its own numbers of classes, and 255 where it has none" in result.output
    )
