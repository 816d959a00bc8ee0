"""Random corruptions of a cache of documents: nothing crashes, and verify finds each change.

Small caches of documents with embedded tokens are changed at places drawn from the whole file and from every
array:

    bits, bytes, page, cut, append   as disks and copies do: the file must be refused, or verify must report
                                     it, unless what it says is the same
    forged                           values of an array are changed and every digest is mended: the file must
                                     be refused, or reported, or every row and sample must be readable
    header                           the same with values of the header

A change that verify does not report, though the file says something else, and any error but FormatError
count as failures.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tabulate import tabulate

from softcache.cache import Cache, open_cache
from softcache.cache.verify import find_damage
from softcache.data.embedded import source_of_cache
from softcache.dump.loop import dump
from softcache.errors import FormatError
from tests.bench import machine, work_folder
from tests.cache.header_cases import header_of, with_fields
from tests.cache.test_header_arrays import mutated_fields
from tests.token_caches import forged, small_blocks, token_config

ENCODINGS = ("dense", "topk:4", "sampled:6", "basis:6,2")
DAMAGE = ("bits", "bytes", "page", "cut", "append")
KINDS = (*DAMAGE, "forged", "header")
VERDICTS = ("refused", "reported", "same", "possible", "FAILED")
NUMBERS = (-1, 0, 1, 2, 7, 255, 1 << 31, (1 << 31) - 1, 1 << 40, 1 << 62, (1 << 63) - 1, -(1 << 63))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--corruptions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where caches go [default: a temporary folder]")
    options = parser.parse_args()
    with work_folder(options.folder) as folder:
        targets = caches(folder)
        self_check(targets[0], folder / "checked.h5")
        counts, failures = campaign(
            targets, folder / "corrupt.h5", options.corruptions, options.seed
        )
    print(
        f"{options.corruptions:,} corruptions, seed {options.seed}, of {len(targets)} caches of documents; "
        f"{machine()}\n"
    )
    lines = [(kind, *(counts[kind, verdict] for verdict in VERDICTS)) for kind in KINDS]
    print(tabulate(lines, headers=("kind", *VERDICTS), intfmt=","))
    if failures:
        raise SystemExit("\n".join(["\nfailures:", *failures[:20]]))
    print("\nno failure")


def caches(folder: Path) -> list[bytes]:
    """The bytes of finished caches of documents in small blocks, one for each encoding."""
    files = []
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch)
        for encoding in ENCODINGS:
            config = token_config(folder, encoding=encoding, overwrite=True)
            files.append(dump(replace(config, out=folder / "document.h5")).path.read_bytes())
    return files


def campaign(
    targets: Sequence[bytes], path: Path, corruptions: int, seed: int
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Count verdicts by kind of corruption, and describe each failure in a line."""
    counts: Counter[tuple[str, str]] = Counter()
    failures = []
    for number in range(corruptions):
        draw = random.Random(f"{seed} {number}")  # so that each corruption can be repeated alone
        raw, kind = draw.choice(targets), draw.choice(KINDS)
        try:
            corrupt(kind, raw, path, draw)
            verdict = judge(kind, raw, path)
        except Exception as error:  # whatever it is: that is what the campaign looks for
            verdict = "FAILED"
            failures.append(f"{number}: {kind}: {type(error).__name__}: {str(error)[:300]}")
        counts[kind, verdict] += 1
    return counts, failures


def corrupt(kind: str, raw: bytes, path: Path, draw: random.Random) -> None:
    """Write a corrupted copy of a cache."""
    path.unlink(missing_ok=True)  # a file that is still mapped must not change
    if kind == "forged":
        path.write_bytes(raw)
        names = [a["name"] for a in header_of(raw)["arrays"] if "digests" not in a["name"]]
        forged(path, {draw.choice(names): lambda values: change_values(values, draw)})
    elif kind == "header":
        fields = mutated_fields(np.random.default_rng(draw.getrandbits(32)), header_of(raw))
        text = json.dumps(fields)
        path.write_bytes(with_fields(raw, fields) if len(text) < fields_room(raw) else raw)
    else:
        path.write_bytes(damaged(kind, raw, draw))


def fields_room(raw: bytes) -> int:
    """Bytes that a header can have."""
    return int(header_of(raw)["user_block"]) // 2


def change_values(values: npt.NDArray[Any], draw: random.Random) -> None:
    """Change up to three values of an array in place, to extreme ones or by a little."""
    flat = values.reshape(-1)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(flat))
        if flat.dtype.kind == "S":
            flat[place] = bytes(draw.randrange(256) for _ in range(flat.dtype.itemsize))
        elif flat.dtype.kind == "f":
            flat[place] = draw.choice(
                [np.nan, np.inf, -np.inf, 0, 1, -1, 1e4, float(flat[place]) / 2]
            )
        else:
            limits = np.iinfo(flat.dtype)
            number = draw.choice([*NUMBERS, int(flat[place]) + draw.choice([-2, -1, 1, 2])])
            flat[place] = min(max(number, int(limits.min)), int(limits.max))


def damaged(kind: str, raw: bytes, draw: random.Random) -> bytes:
    """A copy with bytes changed, cut off or added; half of the changes are in an array, whatever its size."""
    copy = bytearray(raw)
    arrays = header_of(raw)["arrays"]
    start, stop = 0, len(raw)
    if draw.random() < 0.5:
        array = draw.choice(arrays)
        start = array["offset"]
        stop = start + np.dtype(array["dtype"]).itemsize * int(np.prod(array["shape"]))
    at = draw.randrange(start, stop)
    if kind == "bits":
        for _ in range(draw.randint(1, 8)):
            copy[draw.randrange(start, stop)] ^= 1 << draw.randrange(8)
    elif kind == "bytes":
        size = draw.randint(1, 64)
        copy[at : at + size] = draw.randbytes(min(size, len(copy) - at))
    elif kind == "page":
        page = slice(at - at % 512, min(at - at % 512 + 512, len(copy)))
        copy[page] = bytes(len(copy[page]))
    elif kind == "cut":
        del copy[at:]
    else:
        copy += draw.randbytes(draw.randint(1, 600))
    return bytes(copy)


def judge(kind: str, raw: bytes, path: Path) -> str:
    """One of VERDICTS.

    Raises:
        AssertionError: verify reports nothing, though the file says something else, or cannot be read.
        Exception: whatever the reader raises but FormatError.
    """
    try:
        cache = open_cache(path, unfinished=True)
    except FormatError:
        return "refused"
    damage = find_damage(cache)
    error = use(cache)
    if damage:
        return "reported"
    if path.read_bytes() == raw:
        return "same"
    assert error is None, f"verify reports nothing, and reading fails: {error}"
    assert kind not in DAMAGE, "verify reports nothing"
    return "possible"


def use(cache: Cache) -> str | None:
    """Read everything that a cache holds; the message of a FormatError, if one is raised."""
    try:
        cache.rows(0, np.arange(cache.header.row_count))
        cache.content_id()
        assert len(cache.class_names) == cache.header.classes
        if cache.header.embeds_inputs:
            source = source_of_cache(cache)
            inputs, labels = source.fetch(range(len(source)))
            assert len(inputs) == cache.header.samples
            assert len(labels) == cache.header.row_count
    except FormatError as error:
        return str(error)
    return None


def self_check(raw: bytes, path: Path) -> None:
    """Stop unless judge() notices a change that verify does not report."""
    path.write_bytes(raw)
    if judge("bits", raw, path) != "same":
        raise SystemExit("verify finds damage in an intact file; this benchmark shows nothing")
    forged(path, {"labels": lambda values: values.put(3, 1 + values[3] % 2)})
    try:
        judge("bits", raw, path)
    except AssertionError:
        return
    raise SystemExit("judge() does not notice a missed change; this benchmark shows nothing")


if __name__ == "__main__":
    main()
