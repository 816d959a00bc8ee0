"""Log-probabilities of a real classifier of 6,625 classes: a text recogniser that reads noisy lines.

The PyPI package rapidocr-onnxruntime ships PP-OCRv4's recogniser, whose last layer gives, at each of
40 places along a line of text, probabilities of all characters and of a blank. Here it reads lines
of random characters, rendered with Pillow in random fonts, sizes, shades, blur and noise, and what
it says is saved as float32 log-probabilities (n, C) at T = 1, line after line.

    pip install onnxruntime pillow && pip install --no-deps rapidocr-onnxruntime

The characters of most classes are Chinese: give --fonts that have them, such as wqy-zenhei.ttc.
"""

from __future__ import annotations

import argparse
import glob
import importlib
import importlib.util
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

PACKAGE = "rapidocr_onnxruntime"
MODEL = "models/*_rec_infer.onnx"
HEIGHT, WIDTH = 48, 320  # of a line, as the recogniser was trained
LETTERS = (5, 14)
CJK = ("\u4e00", "\u9fff")
SHARE_CJK = 0.8  # of the lines, if any font has these characters
ABSENT = "\U0010ffff"  # no font has it: drawn as what stands for missing characters
TINY = 1e-38  # a probability whose logarithm is finite in float32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="NPY", help="where the rows go")
    parser.add_argument(
        "--fonts",
        nargs="+",
        default=["/usr/share/fonts/**/*.tt[fc]"],
        metavar="GLOB",
        help="TrueType fonts [default: %(default)s]",
    )
    parser.add_argument("--lines", type=int, default=420, help="40 rows each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = recognise(options.fonts, options.lines, options.seed)
    np.save(options.out, rows)
    top = float(np.exp(rows.max(-1)).mean())
    print(f"{options.out}: {len(rows):,} rows of {rows.shape[1]:,} classes, mean top-1 {top:.2f}")


def recognise(fonts: list[str], lines: int, seed: int) -> npt.NDArray[np.float32]:
    """What the recogniser says of random lines, (rows, classes)."""
    runtime = needed("onnxruntime")
    threads = runtime.SessionOptions()
    threads.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(model_file()), threads)
    letters = session.get_modelmeta().custom_metadata_map["character"].splitlines()
    draw, noise = random.Random(seed), np.random.default_rng(seed)
    pools = {font: drawable(font, letters) for font in font_files(fonts)}
    chinese = {font: [c for c in pool if CJK[0] <= c <= CJK[1]] for font, pool in pools.items()}
    latin = {font: [c for c in pool if c.isascii()] for font, pool in pools.items()}
    has_chinese = [font for font, pool in chinese.items() if len(pool) >= LETTERS[1]]
    has_latin = [font for font, pool in latin.items() if len(pool) >= LETTERS[1]]
    if not has_latin:
        raise SystemExit(f"none of {len(pools)} fonts has Latin letters; give others with --fonts")
    found = []
    for _ in range(lines):
        wants_chinese = bool(has_chinese) and draw.random() < SHARE_CJK
        font = draw.choice(has_chinese if wants_chinese else has_latin)
        pool = (chinese if wants_chinese else latin)[font]
        text = "".join(draw.choice(pool) for _ in range(draw.randint(*LETTERS)))
        image = render(text, font, draw, noise)[None, None].repeat(3, 1)  # (1, 3, H, W)
        found.append(session.run(None, {session.get_inputs()[0].name: image})[0][0])
    rows: npt.NDArray[np.float32] = np.log(np.maximum(np.concatenate(found), TINY))
    return rows.astype(np.float32)


def model_file() -> Path:
    """The recogniser, found without importing its package, which would want OpenCV."""
    package = importlib.util.find_spec(PACKAGE)
    folders = (package.submodule_search_locations if package else None) or []
    files = [file for folder in folders for file in sorted(Path(folder).glob(MODEL))]
    if not files:
        raise SystemExit(
            f"no {PACKAGE}/{MODEL} is installed; pip install --no-deps rapidocr-onnxruntime"
        )
    return files[0]


def font_files(patterns: list[str]) -> list[str]:
    # not Path.glob, which takes no absolute patterns
    found = (glob.glob(pattern, recursive=True) for pattern in patterns)  # noqa: PTH207
    files = sorted({file for one in found for file in one})
    if not files:
        raise SystemExit(f"no fonts match {' '.join(patterns)}; give TrueType files with --fonts")
    return files


def drawable(font: str, letters: list[str]) -> list[str]:
    """Those of the letters that a font has."""
    face = needed("PIL.ImageFont").truetype(font, 24)

    def shape(letter: str) -> bytes:
        return bytes(face.getmask(letter))

    absent = shape(ABSENT)
    return [c for c in letters if len(c) == 1 and not c.isspace() and shape(c) != absent]


def render(
    text: str, font: str, draw: random.Random, noise: np.random.Generator
) -> npt.NDArray[np.float32]:
    """A line of text as the recogniser takes it, (HEIGHT, WIDTH) from -1 to 1."""
    pillow = {name: needed(f"PIL.{name}") for name in ("Image", "ImageDraw", "ImageFont")}
    face = pillow["ImageFont"].truetype(font, draw.randint(20, 34))
    image = pillow["Image"].new("L", (WIDTH, HEIGHT), draw.randint(180, 255))
    place, shade = (draw.randint(0, 12), draw.randint(2, 8)), draw.randint(0, 120)
    pillow["ImageDraw"].Draw(image).text(place, text, fill=shade, font=face)
    image = image.filter(needed("PIL.ImageFilter").GaussianBlur(1.6 * draw.random()))
    pixels = np.asarray(image, np.float32)
    pixels = pixels + noise.normal(0, 40 * draw.random(), pixels.shape).astype(np.float32)
    scaled: npt.NDArray[np.float32] = np.clip(pixels, 0, 255) / np.float32(127.5) - 1
    return scaled


def needed(module: str) -> ModuleType:
    """A module that softcache itself does not need."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"this needs {module.partition('.')[0]}; pip install onnxruntime pillow"
        ) from error


if __name__ == "__main__":
    main()
