"""Log-probabilities of a real classifier with 6,625 classes: a text recogniser that reads noisy lines.

The PyPI package rapidocr-onnxruntime ships the recogniser of PP-OCRv4, which returns the probabilities of
all characters and of a blank at each of 40 positions along a line of text. Here it reads lines of random
characters, rendered with Pillow in random fonts, sizes and shades, with blur and noise. Its outputs are
saved, line after line, as float32 log-probabilities (n, C) at T = 1.

    pip install onnxruntime pillow && pip install --no-deps rapidocr-onnxruntime

Most classes are Chinese characters: pass --fonts that have them, such as wqy-zenhei.ttc.
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
HEIGHT, WIDTH = 48, 320  # size of a line, on which the recogniser was trained
LETTERS = (5, 14)  # fewest and most letters in a line
CJK = ("\u4e00", "\u9fff")  # first and last Chinese character
SHARE_CJK = 0.8  # share of Chinese lines, if any font has the characters
ABSENT = "\U0010ffff"  # no font has this character, so its shape is that of missing characters
TINY = 1e-38  # smallest probability, so that its logarithm is finite in float32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="NPY", help="file for the rows")
    parser.add_argument(
        "--fonts",
        nargs="+",
        default=["/usr/share/fonts/**/*.tt[fc]"],
        metavar="GLOB",
        help="TrueType fonts [default: %(default)s]",
    )
    parser.add_argument("--lines", type=int, default=420, help="lines of text, 40 rows each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = recognise(options.fonts, options.lines, options.seed)
    np.save(options.out, rows)
    top = float(np.exp(rows.max(-1)).mean())
    print(f"{options.out}: {len(rows):,} rows of {rows.shape[1]:,} classes, mean top-1 {top:.2f}")


def recognise(fonts: list[str], lines: int, seed: int) -> npt.NDArray[np.float32]:
    """The recogniser's log-probabilities for random lines, (rows, classes)."""
    runtime = import_needed("onnxruntime")
    session_options = runtime.SessionOptions()
    session_options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(model_file()), session_options)
    letters = session.get_modelmeta().custom_metadata_map["character"].splitlines()
    draw, noise = random.Random(seed), np.random.default_rng(seed)
    pools = {font: drawable(font, letters) for font in font_files(fonts)}
    chinese = {font: [c for c in pool if CJK[0] <= c <= CJK[1]] for font, pool in pools.items()}
    latin = {font: [c for c in pool if c.isascii()] for font, pool in pools.items()}
    has_chinese = [font for font, pool in chinese.items() if len(pool) >= LETTERS[1]]
    has_latin = [font for font, pool in latin.items() if len(pool) >= LETTERS[1]]
    if not has_latin:
        raise SystemExit(f"none of {len(pools)} fonts has Latin letters; give others with --fonts")
    outputs = []
    for _ in range(lines):
        is_chinese = bool(has_chinese) and draw.random() < SHARE_CJK
        font = draw.choice(has_chinese if is_chinese else has_latin)
        pool = (chinese if is_chinese else latin)[font]
        text = "".join(draw.choice(pool) for _ in range(draw.randint(*LETTERS)))
        image = render(text, font, draw, noise)[None, None].repeat(3, 1)  # (1, 3, H, W)
        outputs.append(session.run(None, {session.get_inputs()[0].name: image})[0][0])
    rows: npt.NDArray[np.float32] = np.log(np.maximum(np.concatenate(outputs), TINY))
    return rows.astype(np.float32)


def model_file() -> Path:
    """The file of the recogniser, found without importing its package, which needs OpenCV."""
    package = importlib.util.find_spec(PACKAGE)
    folders = (package.submodule_search_locations if package else None) or []
    files = [file for folder in folders for file in sorted(Path(folder).glob(MODEL))]
    if not files:
        raise SystemExit(
            f"{PACKAGE}/{MODEL} is not installed; pip install --no-deps rapidocr-onnxruntime"
        )
    return files[0]


def font_files(patterns: list[str]) -> list[str]:
    # Path.glob does not accept absolute patterns
    matches = (glob.glob(pattern, recursive=True) for pattern in patterns)  # noqa: PTH207
    files = sorted({file for paths in matches for file in paths})
    if not files:
        raise SystemExit(f"no files match {' '.join(patterns)}; give TrueType fonts with --fonts")
    return files


def drawable(font: str, letters: list[str]) -> list[str]:
    """The letters that a font has."""
    face = import_needed("PIL.ImageFont").truetype(font, 24)

    def shape(letter: str) -> bytes:
        return bytes(face.getmask(letter))

    absent = shape(ABSENT)
    return [c for c in letters if len(c) == 1 and not c.isspace() and shape(c) != absent]


def render(
    text: str, font: str, draw: random.Random, noise: np.random.Generator
) -> npt.NDArray[np.float32]:
    """A line of text as input for the recogniser, (HEIGHT, WIDTH) in [-1, 1]."""
    pillow = {name: import_needed(f"PIL.{name}") for name in ("Image", "ImageDraw", "ImageFont")}
    face = pillow["ImageFont"].truetype(font, draw.randint(20, 34))
    image = pillow["Image"].new("L", (WIDTH, HEIGHT), draw.randint(180, 255))
    position, shade = (draw.randint(0, 12), draw.randint(2, 8)), draw.randint(0, 120)
    pillow["ImageDraw"].Draw(image).text(position, text, fill=shade, font=face)
    image = image.filter(import_needed("PIL.ImageFilter").GaussianBlur(1.6 * draw.random()))
    pixels = np.asarray(image, np.float32)
    pixels = pixels + noise.normal(0, 40 * draw.random(), pixels.shape).astype(np.float32)
    scaled: npt.NDArray[np.float32] = np.clip(pixels, 0, 255) / np.float32(127.5) - 1
    return scaled


def import_needed(module: str) -> ModuleType:
    """Import a module that softcache itself does not need."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"this needs {module.partition('.')[0]}; pip install onnxruntime pillow"
        ) from error


if __name__ == "__main__":
    main()
