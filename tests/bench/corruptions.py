"""Random corruptions of finished caches: verify must find each, and name the rows that it hit.

Small caches of two views, one of each encoding, are damaged in one of seven ways, at a place drawn
from the preamble, the header, the rest of the user block, what libhdf5 wrote, and every array. What
must be named follows from the bytes that changed: the block of rows they belong to, or the one whose
digest they are, no more and no less. A file whose preamble, header or size changed must be refused.
A corruption that changes no byte is drawn again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
from tabulate import tabulate

from softcache.cache import Header, open_cache, writer
from softcache.cache.header import PREAMBLE, parse_preamble
from softcache.cache.reader import gaps
from softcache.cache.verify import Damage, find_damage
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import FormatError
from tests.bench import machine, work_folder

ENCODINGS = ("dense", "quantized", "topk:6", "basis:8,4", "sampled:16")
KINDS = ("bit", "word", "burst", "swap", "page", "cut", "append")
SAMPLES, SIDE, CLASSES, VIEWS, AUGMENT = 60, 4, 40, 2, "shift:1"
BLOCK_BYTES = 600  # several blocks in so small a cache
WORD, BURST, PAGE = 8, 4096, 4096
REFUSED = "refused"  # as it is opened
VERDICTS = (REFUSED, "named", "misnamed", "missed")

TEACHER = f"""
import torch
from torch import nn

def teacher():
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear({SIDE * SIDE}, {CLASSES}))
"""

# what verify names: the part and, of a block, view and samples (view None: labels and keys)
Name = tuple[str, int | None, range | None]


@dataclass(frozen=True)
class Target:
    """A finished cache, and which part of it each byte belongs to."""

    raw: bytes
    header: Header
    parts: Sequence[tuple[str, range]]  # whence places are drawn, each with its bytes
    names: Sequence[Name]
    owner: npt.NDArray[np.int32]  # of each byte, a place in names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--corruptions", type=int, default=20_000)
    parser.add_argument("--encodings", nargs="+", default=ENCODINGS, help="as in softcache dump")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where caches go [default: a temporary folder]")
    options = parser.parse_args()
    with work_folder(options.folder) as folder:
        targets = [load(path) for path in small_caches(folder, options.encodings).values()]
        self_check(targets, folder / "checked.h5")
        kinds, places, failures = campaign(
            targets, folder / "corrupt.h5", options.corruptions, options.seed
        )
    sizes = [len(target.raw) for target in targets]
    print(
        f"{options.corruptions:,} corruptions, seed {options.seed}, of {len(targets)} caches of "
        f"{min(sizes):,} to {max(sizes):,} bytes; {machine()}"
    )
    for what, counts in (("kind", kinds), ("place", places)):
        print()
        print(table(what, counts))
    if failures:
        raise SystemExit("\n".join(["\nmissed or misnamed:", *failures[:20]]))
    print("\nall found, and named rightly")


def campaign(
    targets: Sequence[Target], path: Path, corruptions: int, seed: int
) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]], list[str]]:
    """Verdicts counted by kind and by place, and a line for each corruption that got through."""
    kinds: Counter[tuple[str, str]] = Counter()
    places: Counter[tuple[str, str]] = Counter()
    failures = []
    for number in range(corruptions):
        draw = random.Random(f"{seed} {number}")  # so that each can be made again by itself
        target, kind = draw.choice(targets), draw.choice(KINDS)
        place, corrupt = corruption(kind, target, draw)
        verdict, found = judge(target, corrupt, path)
        kinds[kind, verdict] += 1
        places[place, verdict] += 1
        if verdict not in VERDICTS[:2]:
            failures.append(
                f"{number}: {kind} in {place} of {target.header.encoding.name}: {verdict}, found "
                f"{found}, expected {expected(target, corrupt)}"
            )
    return kinds, places, failures


def table(what: str, counts: Counter[tuple[str, str]]) -> str:
    """How many of each kind, or at each place, came to each verdict."""
    keys = sorted({key for key, _ in counts})
    lines = [(key, *(counts[key, verdict] for verdict in VERDICTS)) for key in keys]
    lines.append(("all", *(sum(counts[key, verdict] for key in keys) for verdict in VERDICTS)))
    headers = (what, "corruptions", *VERDICTS)
    return tabulate([(key, sum(n), *n) for key, *n in lines], headers=headers, intfmt=",")


def small_caches(folder: Path, encodings: Sequence[str] = ENCODINGS) -> dict[str, Path]:
    """A finished cache of each encoding, in several blocks."""
    teacher, data = write_inputs(folder)
    made = {}
    for number, encoding in enumerate(encodings):
        config = DumpConfig(
            teacher=teacher,
            data=data,
            temperature=4.0,
            out=folder / f"small-{number}.h5",
            views=VIEWS,
            augment=AUGMENT,
            encoding=encoding,
            device="cpu",
            overwrite=True,
        )
        few = mock.patch.object(writer, "BLOCK_BYTES", BLOCK_BYTES)
        with few, contextlib.redirect_stdout(io.StringIO()):
            made[encoding] = dump(config).path
    return made


def write_inputs(folder: Path) -> tuple[str, str]:
    """A teacher and a data set of noise, as the command line names them."""
    numbers = np.random.default_rng(0)
    images = numbers.integers(0, 256, (SAMPLES, 1, SIDE, SIDE), dtype=np.uint8)
    np.savez(folder / "small.npz", x=images, y=numbers.integers(0, CLASSES, SAMPLES))
    (folder / "small.py").write_text(TEACHER)
    return f"{folder / 'small.py'}:teacher", f"npz:{folder / 'small.npz'}"


def load(path: Path) -> Target:
    header, raw = open_cache(path).header, path.read_bytes()
    offset, length, _ = parse_preamble(raw, len(raw))
    parts = [
        ("preamble", range(PREAMBLE.size)),
        ("header", range(offset, offset + length)),
        ("rest of the user block", range(offset + length, header.user_block)),
        *((f"array {a.name}", range(a.offset, a.offset + a.nbytes)) for a in header.arrays),
        *(("HDF5 structure", range(*gap)) for gap in gaps(header)),
    ]
    names: list[Name] = []
    owner = np.full(len(raw), -1, np.int32)
    for name, places in owners(header, dict(parts[:3])):
        for place in places:
            owner[place.start : place.stop] = len(names)
        names.append(name)
    if owner.min() < 0:
        raise SystemExit(f"{path}: byte {int(owner.argmin())} belongs to nothing; mend owners()")
    return Target(raw, header, parts, names, owner)


def owners(header: Header, front: dict[str, range]) -> Iterator[tuple[Name, list[range]]]:
    """What verify is to name if one of these bytes changes."""
    yield (REFUSED, None, None), [front["preamble"], front["header"]]
    yield ("the user block behind the header", None, None), [front["rest of the user block"]]
    yield ("the HDF5 structure", None, None), [range(*gap) for gap in gaps(header)]
    shared = [a for a in header.arrays if a.axis == "shared"]
    yield (
        ("the arrays shared by all rows", None, None),
        [range(a.offset, a.offset + a.nbytes) for a in shared],
    )
    for view in (None, *range(header.views)):
        for block in range(header.blocks):
            samples = header.block_range(block)
            places = block_places(header, view, block)
            digest = writer.digest_offset(header, view, block)
            yield ("block", view, samples), [*places, range(digest, digest + 8)]


def block_places(header: Header, view: int | None, block: int) -> list[range]:
    """Where the values of one block lie, one range for each array."""
    samples = header.block_range(block)
    first = samples.start if view is None else view * header.samples + samples.start
    axis = "samples" if view is None else "rows"
    return [
        range(a.offset + first * a.row_bytes, a.offset + (first + len(samples)) * a.row_bytes)
        for a in header.arrays
        if a.axis == axis
    ]


def corruption(kind: str, target: Target, draw: random.Random) -> tuple[str, bytes]:
    """A place, and the bytes of the file damaged there."""
    while True:
        place, inside = draw.choice(target.parts)
        corrupt = bytearray(target.raw)
        at = draw.choice(inside)
        match kind:
            case "bit":
                corrupt[at] ^= 1 << draw.randrange(8)
            case "word":
                at -= at % WORD
                corrupt[at : at + WORD] = draw.randbytes(WORD)
            case "burst":
                size = min(draw.randint(2, BURST), len(corrupt) - at)
                corrupt[at : at + size] = draw.randbytes(size)
            case "swap":
                place = swap(corrupt, target, draw)
            case "page":
                at -= at % PAGE
                size = min(PAGE, len(corrupt) - at)
                corrupt[at : at + size] = bytes(size)
            case "cut":
                del corrupt[at:]
            case "append":
                place, size = "end of the file", draw.randint(1, 2 * PAGE)
                corrupt += draw.choice([draw.randbytes(size), bytes(size)])
        if corrupt != target.raw:
            return place, bytes(corrupt)


def swap(corrupt: bytearray, target: Target, draw: random.Random) -> str:
    """Exchange two blocks of an array, or two sectors from anywhere in the file."""
    header = target.header
    if draw.random() < 0.5:
        view = draw.choice([None, *range(header.views)])
        full = range(header.samples // header.block_rows)  # the last block may be short
        blocks = [block_places(header, view, block) for block in draw.sample(full, 2)]
        one, other = draw.choice(list(zip(*blocks, strict=True)))
        name = next(name for name, inside in target.parts if one.start in inside)
    else:
        name, inside = draw.choice(target.parts)
        sectors = [draw.choice(inside), draw.randrange(len(corrupt) - 512)]
        one, other = (range(at - at % 512, at - at % 512 + 512) for at in sectors)
    first, second = corrupt[one.start : one.stop], corrupt[other.start : other.stop]
    corrupt[one.start : one.stop], corrupt[other.start : other.stop] = second, first
    return name


def expected(target: Target, corrupt: bytes) -> set[Name]:
    """What must be named, from the bytes that changed."""
    refused: Name = (REFUSED, None, None)
    if len(corrupt) != len(target.raw):
        return {refused}
    changed = np.frombuffer(corrupt, np.uint8) != np.frombuffer(target.raw, np.uint8)
    names = {target.names[owner] for owner in np.unique(target.owner[changed])}
    return {refused} if refused in names else names


def judge(target: Target, corrupt: bytes, path: Path) -> tuple[str, set[Name]]:
    """Whether it was refused, named, misnamed or missed, and what was found."""
    path.unlink(missing_ok=True)  # never change a file that may still be mapped
    path.write_bytes(corrupt)
    try:
        damage = find_damage(open_cache(path, unfinished=True))
    except FormatError:
        found: set[Name] = {(REFUSED, None, None)}
    else:
        found = {name for part in damage for name in names_of(part, target.header)}
    if not found:
        return "missed", found
    if found != expected(target, corrupt):
        return "misnamed", found
    return ("refused" if (REFUSED, None, None) in found else "named"), found


def names_of(part: Damage, header: Header) -> list[Name]:
    """A run of missing blocks is named as one; here each block has its own name."""
    if part.samples is None:
        return [(part.what, None, None)]
    per_block = header.block_rows
    first, last = part.samples.start // per_block, -(-part.samples.stop // per_block)
    return [("block", part.view, header.block_range(block)) for block in range(first, last)]


def self_check(targets: Sequence[Target], path: Path) -> None:
    """Stop unless judge() notices a change that verify cannot see, and one that it names wrongly."""
    for target in targets:
        corrupt = bytearray(target.raw)
        corrupt[block_places(target.header, 1, 0)[0].start] ^= 1
        wanted = {("block", 1, target.header.block_range(0))}
        if judge(target, bytes(corrupt), path) != ("named", wanted):
            raise SystemExit("a damaged block is not named; this campaign shows nothing")
        path.write_bytes(corrupt)
        digest = open_cache(path).block_digest(1, 0).to_bytes(8, "little")
        at = writer.digest_offset(target.header, 1, 0)
        corrupt[at : at + 8] = digest  # a forgery: digest and values changed together
        if judge(target, bytes(corrupt), path)[0] != "missed":
            raise SystemExit("judge() does not notice what is missed; this campaign shows nothing")
        lie = Damage("soft targets", 0, target.header.block_range(0))
        with mock.patch(f"{__name__}.verify", return_value=[lie]):
            if judge(target, bytes(corrupt), path)[0] != "misnamed":
                raise SystemExit(
                    "judge() does not notice a wrong name; this campaign shows nothing"
                )
        if judge(target, target.raw, path)[0] != "missed":
            raise SystemExit("verify finds damage in a sound file")
    path.unlink()


if __name__ == "__main__":
    main()
