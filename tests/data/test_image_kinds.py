"""Images that are turned, deep, transparent or of other modes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageOps

from softcache.data.images import Pixels, as_array, decided, parse_pixels, read_image
from softcache.data.keys import sample_keys
from softcache.data.layout import on_white
from softcache.data.notes import inform_once
from softcache.data.open import open_source
from softcache.errors import DataError, SettingsError

RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 255, (3, 4, 3), dtype=np.uint8)
ORIENTATION = 0x0112


@pytest.fixture(autouse=True)
def _say_again() -> Iterator[None]:
    """Every test is told what other tests were told."""
    inform_once.cache_clear()
    yield
    inform_once.cache_clear()


def save(path: Path, pixels: npt.NDArray[Any] | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    image.save(path, **options)
    return path


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


# orientation
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_the_orientation_is_applied_as_pillow_does(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    lossless = {"lossless": True} if suffix == ".webp" else {}
    path = save(tmp_path / f"a{suffix}", COLOURS, exif=exif(orientation), **lossless)
    with Image.open(path) as image:
        upright = np.array(ImageOps.exif_transpose(image))
    assert np.array_equal(read_image(path, Pixels()), upright.transpose(2, 0, 1))
    changed = not np.array_equal(upright, COLOURS)
    assert changed == (orientation > 1)


def test_the_size_acts_on_the_upright_image(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", COLOURS, exif=exif(6))
    upright = Image.fromarray(np.rot90(COLOURS, -1))
    for size in ("2x3", "2"):
        pixels = parse_pixels({"size": size}, "x")
        assert np.array_equal(read_image(path, pixels), as_array(upright, pixels))


def test_a_folder_and_a_hugging_face_data_set_give_the_same_keys(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    paths = [
        save(tmp_path / "f" / "a" / f"{orientation}.jpg", COLOURS, exif=exif(orientation))
        for orientation in (1, 3)
    ]
    transparent = np.dstack([COLOURS, np.full((3, 4), 100, np.uint8)])
    paths.append(save(tmp_path / "f" / "a" / "4.png", transparent))
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": [str(path) for path in paths]}, features)
    table.save_to_disk(str(tmp_path / "hub"))
    keys = [
        sample_keys(open_source(spec).fetch(range(3))[0]).tolist()
        for spec in (f"folder:{tmp_path / 'f'}", f"hfds:{tmp_path / 'hub'}")
    ]
    assert keys[0] == keys[1]


def test_damaged_exif_data_leaves_an_image_readable(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", COLOURS, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert np.array_equal(read_image(path, Pixels()), COLOURS.transpose(2, 0, 1))


# depth
@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(("mode", "channels"), [(None, 1), ("L", 1), ("RGB", 3)])
def test_sixteen_bit_grey_keeps_its_values_in_every_mode(
    tmp_path: Path, suffix: str, mode: str | None, channels: int
) -> None:
    values = np.array([[0, 255, 256, 65535]], np.uint16)
    array = read_image(save(tmp_path / f"a{suffix}", values), Pixels(mode=mode))
    assert array.dtype == np.uint16
    assert array.tolist() == [values.tolist()] * channels


def test_sixteen_bits_in_the_other_byte_order_are_read(tmp_path: Path) -> None:
    big_endian = Image.new("I;16B", (2, 1), 258)
    array = as_array(big_endian, Pixels())
    assert array.dtype.isnative
    assert torch.from_numpy(array).tolist() == [[[258, 258]]]


def test_a_pgm_of_sixteen_bits_is_scaled_to_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    raw = b"P5 3 1 65535\n" + np.array([0, 100, 65535], ">u2").tobytes()
    (tmp_path / "a" / "a.pgm").write_bytes(raw)
    for spec in ("", "?depth=32"):  # the format says how deep it is
        inputs = open_source(f"folder:{tmp_path}{spec}").fetch([0])[0]
        assert inputs.dtype == torch.float32
        assert inputs[0, 0, 0].tolist() == pytest.approx([0, 100 / 65535, 1], rel=1e-6)


@pytest.mark.parametrize(("bright", "largest"), [(65535, 65535), (70_000, 2**31 - 1)])
def test_the_whole_folder_decides_on_the_depth_of_integers(
    tmp_path: Path, bright: int, largest: int
) -> None:
    dark = np.array([[0, 1000]], np.int32)
    save(tmp_path / "a" / "0.tif", dark)
    save(tmp_path / "b" / "1.tif", np.array([[0, bright]], np.int32))
    inputs = open_source(f"folder:{tmp_path}").fetch([0, 1])[0]
    assert inputs.dtype == torch.float32
    assert inputs.flatten().tolist() == pytest.approx(
        [0, 1000 / largest, 0, bright / largest], rel=1e-6
    )


def test_a_whole_data_set_decides_on_the_depth_as_a_folder_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("softcache.data.images.DEPTH_SAMPLES", 2)  # the first and the third
    paths = [
        save(tmp_path / "f" / "a" / f"{number}.tif", np.array([[0, value]], np.int32))
        for number, value in enumerate((1000, 10, 70_000))
    ]
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_dict({"image": [*map(str, paths)]}, features)
    table.save_to_disk(str(tmp_path / "hub"))
    folder = open_source(f"folder:{tmp_path / 'f'}").fetch([0, 1, 2])[0]
    hub = open_source(f"hfds:{tmp_path / 'hub'}").fetch([0, 1, 2])[0]
    assert folder[:, 0, 0, 1].tolist() == pytest.approx(
        [value / (2**31 - 1) for value in (1000, 10, 70_000)], rel=1e-6
    )
    assert sample_keys(hub).tolist() == sample_keys(folder).tolist()
    gap = datasets.Dataset.from_dict({"image": [str(paths[0]), None, str(paths[2])]}, features)
    gap.save_to_disk(str(tmp_path / "gap"))
    monkeypatch.undo()  # all three are sampled now, and the missing one is passed over
    assert torch.equal(open_source(f"hfds:{tmp_path / 'gap'}").fetch([0, 2])[0], hub[[0, 2]])


def test_the_depth_can_be_stated(tmp_path: Path) -> None:
    save(tmp_path / "a" / "0.tif", np.array([[70_000]], np.int32))
    stated = open_source(f"folder:{tmp_path}?depth=32").fetch([0])[0]
    assert torch.equal(stated, open_source(f"folder:{tmp_path}").fetch([0])[0])
    with pytest.raises(
        SettingsError, match=r"0\.tif: an image with values up to 70000, .*depth=32"
    ):
        open_source(f"folder:{tmp_path}?depth=16").fetch([0])
    with pytest.raises(SettingsError, match="depth '8'; expected 16 or 32"):
        open_source(f"folder:{tmp_path}?depth=8")


def test_one_deep_image_decides_and_no_more_are_read() -> None:
    images = iter([Image.fromarray(np.array([[v]], np.int32)) for v in (5, 99_999, 7)])
    assert decided(Pixels(), images).depth == 32
    assert len(list(images)) == 1
    assert decided(Pixels(), [Image.new("RGB", (1, 1))]).depth is None
    assert decided(Pixels(depth=16), []).depth == 16


def test_signed_sixteen_bits_keep_their_sign(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[-5, 65535]], np.int32))
    assert as_array(image, Pixels())[0, 0].tolist() == pytest.approx([-5 / 65535, 1], rel=1e-6)


@pytest.mark.parametrize("mode", [None, "RGB"])
def test_floats_keep_their_values(tmp_path: Path, mode: str | None) -> None:
    values = np.array([[-0.5, 0.25, 3e7]], np.float32)
    array = read_image(save(tmp_path / "a.tif", values), Pixels(mode=mode))
    assert array.dtype == np.float32
    assert array.tolist() == [values.tolist()] * (3 if mode else 1)


def test_deep_images_are_turned_and_resized(tmp_path: Path) -> None:
    values = np.full((4, 6), 40_000, np.int32)
    path = save(tmp_path / "a.tif", values, exif=exif(6))
    assert read_image(path, Pixels()).shape == (1, 6, 4)
    resized = read_image(path, parse_pixels({"size": "3x2"}, "x"))
    assert resized.shape == (1, 3, 2)
    assert np.allclose(resized, 40_000 / 65535)


def write_tiff(path: Path, bits: tuple[int, ...], sample_format: int, raw: bytes) -> Path:
    """A TIFF of one pixel, with samples of the given bits."""
    entries = [(256, 4, 1, 1), (257, 4, 1, 1), (259, 3, 1, 1), (262, 3, 1, 2 if bits[1:] else 1)]
    entries += [(277, 3, 1, len(bits)), (278, 4, 1, 1), (279, 4, 1, len(raw))]
    after = 8 + 2 + 12 * (len(entries) + 3) + 4
    packed = struct.pack(f"<{len(bits)}H", *bits)
    entries.append((258, 3, len(bits), after if bits[1:] else bits[0]))
    entries += [(273, 4, 1, after + len(packed)), (339, 3, 1, sample_format)]
    table = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    header = b"II*\0" + struct.pack("<IH", 8, len(entries))
    path.write_bytes(header + table + bytes(4) + packed + raw)
    return path


def test_a_tiff_of_unsigned_values_beyond_pillow_is_refused(tmp_path: Path) -> None:
    raw = struct.pack("<I", 5)
    assert read_image(write_tiff(tmp_path / "a.tif", (32,), 1, raw), Pixels())[0, 0, 0] > 0
    path = write_tiff(tmp_path / "b.tif", (32,), 1, struct.pack("<I", 3_000_000_000))
    with pytest.raises(DataError, match=r"b\.tif .*unsigned values above 2147483647, which Pillow"):
        read_image(path, Pixels())


def test_a_tiff_that_pillow_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "rgb.tif", (16, 16, 16), 1, bytes(6))
    with pytest.raises(
        DataError, match=r"rgb\.tif .*3 channels of 16 bits, of which .* hold 8; save"
    ):
        read_image(path, Pixels())
    path = write_tiff(tmp_path / "double.tif", (64,), 3, bytes(8))
    with pytest.raises(DataError, match=r"double\.tif .*Pillow cannot hold, such as 64-bit floats"):
        read_image(path, Pixels())


def png_of_sixteen_bits(path: Path) -> Path:
    """One pixel of RGB, 16 bits a channel."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    raw = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    raw += chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">3H", 256, 512, 65535)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + raw + chunk(b"IEND", b""))
    return path


def test_a_colour_png_of_sixteen_bits_keeps_its_upper_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    array = read_image(png_of_sixteen_bits(tmp_path / "a.png"), Pixels())
    assert array.flatten().tolist() == [1, 2, 255]
    assert (
        "colour PNGs of 16 bits per channel are read with their upper 8" in capsys.readouterr().out
    )


# transparency and other modes
def half_transparent(mode: str) -> Image.Image:
    """Three pixels of value 10, with alpha 0, 51 and 255."""
    rgba = np.full((1, 3, 4), 10, np.uint8)
    rgba[0, :, 3] = [0, 51, 255]
    return Image.fromarray(rgba).convert(mode)


def palette(alpha: bytes) -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([10] * 9)
    image.putdata([0, 1, 2])
    image.info["transparency"] = alpha
    return image


@pytest.mark.parametrize(
    "image",
    [half_transparent("RGBA"), half_transparent("LA"), palette(b"\0\x33\xff")],
    ids=["RGBA", "LA", "P"],
)
def test_transparent_pixels_are_composited_on_white_and_said_once(
    image: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        array = as_array(image, Pixels())
    channels = 1 if image.mode == "LA" else 3
    assert array.tolist() == [[[255, 206, 10]]] * channels  # 206 = 10 · 0.2 + 255 · 0.8
    assert as_array(image, Pixels(mode="L")).tolist() == [[[255, 206, 10]]]
    assert capsys.readouterr().out.count("transparent pixels, which become white") == 1


def test_a_transparent_colour_becomes_white() -> None:
    colour, grey = Image.new("RGB", (1, 1), (1, 2, 3)), Image.new("L", (1, 1), 7)
    assert as_array(colour, Pixels())[:, 0, 0].tolist() == [1, 2, 3]
    colour.info["transparency"], grey.info["transparency"] = (1, 2, 3), 7
    assert as_array(colour, Pixels())[:, 0, 0].tolist() == [255, 255, 255]
    assert as_array(grey, Pixels()).tolist() == [[[255]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_opaque_images_keep_their_pixels_and_nothing_is_said(
    mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Image.fromarray(COLOURS).convert("P" if mode in ("P", "PA") else mode).convert(mode)
    if mode == "P":
        image.info["transparency"] = b"\xff" * 256
    expected = np.array(image.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(as_array(image, Pixels()), expected[:1] if mode == "LA" else expected)
    assert "transparent" not in capsys.readouterr().out


def test_compositing_keeps_opaque_values_of_every_type() -> None:
    for white, dtype in (
        (255, np.uint8),
        (65535, np.uint16),
        (1.0, np.float32),
        (255.0, np.float32),
    ):
        rgba = np.linspace(0, white, 4 * 50).reshape(50, 4).astype(dtype)
        rgba[:, 3] = white
        assert np.array_equal(on_white(rgba, white), rgba[:, :3])
        rgba[:, 3] = 0
        assert (on_white(rgba, white) == white).all()
    assert on_white(np.array([101, 101, 101, 128], np.uint8), 255).tolist() == [178] * 3  # of 177.7


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "P"])
def test_other_modes_become_rgb_and_this_is_said_once(
    mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Image.fromarray(COLOURS).convert(mode)
    for _ in range(2):
        array = as_array(image, Pixels())
    assert np.array_equal(array, np.array(image.convert("RGB")).transpose(2, 0, 1))
    assert capsys.readouterr().out.count(f"images of mode {mode} are converted to RGB") == 1


def test_black_and_white_images_are_grey(capsys: pytest.CaptureFixture[str]) -> None:
    image = Image.fromarray(COLOURS).convert("1")
    array = as_array(image, Pixels())
    assert np.array_equal(array, np.array(image.convert("L"))[None])
    assert set(np.unique(array)) <= {0, 255}
    assert capsys.readouterr().out == ""


def test_float_images_beyond_one_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    as_array(Image.fromarray(np.full((2, 2), 1.2, np.float32)), Pixels())
    assert capsys.readouterr().out == ""
    array = as_array(Image.fromarray(np.full((2, 2), 250.5, np.float32)), Pixels())
    assert array.tolist() == [[[250.5] * 2] * 2]
    assert (
        "float images keep their values, which go beyond 1 (up to 250.5 in"
        in capsys.readouterr().out
    )


def test_plain_images_are_converted_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    as_array(Image.fromarray(COLOURS), Pixels())
    as_array(Image.fromarray(COLOURS[..., 0]), Pixels())
    as_array(Image.fromarray(COLOURS).convert("P"), Pixels(mode="RGB"))  # asked for
    assert capsys.readouterr().out == ""


def test_a_mode_that_cannot_be_converted_is_refused() -> None:
    with pytest.raises(DataError, match=r"its mode is LAB: .*; save it as RGB"):
        as_array(Image.new("LAB", (2, 2)), Pixels(mode="L"))


def test_images_of_different_depths_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a" / "0.png", np.zeros((2, 2), np.uint8))
    save(tmp_path / "a" / "1.png", np.zeros((2, 2), np.uint16))
    with pytest.raises(
        DataError, match=r"a/1\.png in .* has uint16 pixels, a/0\.png has uint8; all"
    ):
        open_source(f"folder:{tmp_path}").fetch([0, 1])
