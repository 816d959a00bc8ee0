"""Random corruptions of finished caches: verify must find each one, and name the rows it affects.

Small caches of two views, one for each encoding, are damaged in one of seven ways, at a place drawn from
the preamble, the header, the rest of the user block, the HDF5 structure, and every array. The bytes that
changed determine what verify must name: exactly the blocks of rows to which these bytes, or the digests
that they are part of, belong. A file whose preamble, header or size changed must be refused. A corruption
that changes no byte is drawn again.
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

from softcache.cache import Header, allocate, open_cache, writer
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
BLOCK_BYTES, BATCH = 600, 4  # so that even a small cache has several blocks
WORD, BURST, PAGE = 8, 4096, 4096
REFUSED = "refused"  # when it is opened
VERDICTS = (REFUSED, "named", "misnamed", "missed")

TEACHER = f"""
import torch
from torch import nn

def teacher():
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear({SIDE * SIDE}, {CLASSES}))
"""

# what verify names: a part and, for a block, its view (None for labels and keys) and samples
Name = tuple[str, int | None, range | None]


@dataclass(frozen=True)
class Target:
    """A finished cache, with the part of it that each byte belongs to."""

    raw: bytes
    header: Header
    parts: Sequence[tuple[str, range]]  # parts to damage, and the bytes of each
    names: Sequence[Name]
    owner: npt.NDArray[np.int32]  # (bytes of the file,) indices into names


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
    print("\nall found, and named correctly")


def campaign(
    targets: Sequence[Target], path: Path, corruptions: int, seed: int
) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]], list[str]]:
    """Count verdicts by kind and by place.

    Returns:
        The counts by kind, the counts by place, and a line for each corruption that was missed or misnamed.
    """
    kinds: Counter[tuple[str, str]] = Counter()
    places: Counter[tuple[str, str]] = Counter()
    failures = []
    for number in range(corruptions):
        draw = random.Random(f"{seed} {number}")  # so that each corruption can be repeated alone
        target, kind = draw.choice(targets), draw.choice(KINDS)
        place, corrupt = corruption(kind, target, draw)
        verdict, named = judge(target, corrupt, path)
        kinds[kind, verdict] += 1
        places[place, verdict] += 1
        if verdict not in VERDICTS[:2]:
            failures.append(
                f"{number}: {kind} in {place} of {target.header.encoding.name}: {verdict}, named "
                f"{named}, expected {expected(target, corrupt)}"
            )
    return kinds, places, failures


def table(what: str, counts: Counter[tuple[str, str]]) -> str:
    """How often each kind, or each place, got each verdict."""
    keys = sorted({key for key, _ in counts})
    lines = [(key, *(counts[key, verdict] for verdict in VERDICTS)) for key in keys]
    lines.append(("all", *(sum(counts[key, verdict] for key in keys) for verdict in VERDICTS)))
    headers = (what, "corruptions", *VERDICTS)
    return tabulate([(key, sum(n), *n) for key, *n in lines], headers=headers, intfmt=",")


def small_caches(folder: Path, encodings: Sequence[str] = ENCODINGS) -> dict[str, Path]:
    """Paths of finished caches with several blocks, by encoding."""
    teacher, data = write_inputs(folder)
    paths = {}
    for number, encoding in enumerate(encodings):
        config = DumpConfig(
            teacher=teacher,
            data=data,
            temperature=4.0,
            out=folder / f"small-{number}.h5",
            views=VIEWS,
            augment=AUGMENT,
            encoding=encoding,
            batch_size=BATCH,
            device="cpu",
            overwrite=True,
        )
        small_blocks = mock.patch.object(allocate, "BLOCK_BYTES", BLOCK_BYTES)
        with small_blocks, contextlib.redirect_stdout(io.StringIO()):
            paths[encoding] = dump(config).path
    return paths


def write_inputs(folder: Path) -> tuple[str, str]:
    """Write a teacher and a data set of noise; returns their specifications."""
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
        raise SystemExit(f"{path}: byte {int(owner.argmin())} has no owner; fix owners()")
    return Target(raw, header, parts, names, owner)


def owners(header: Header, front: dict[str, range]) -> Iterator[tuple[Name, list[range]]]:
    """What verify must name, and the bytes whose change must make it do so."""
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
    """The byte ranges of the values of one block, one range per array."""
    samples = header.block_range(block)
    first = samples.start if view is None else view * header.samples + samples.start
    axis = "samples" if view is None else "rows"
    return [
        range(a.offset + first * a.row_bytes, a.offset + (first + len(samples)) * a.row_bytes)
        for a in header.arrays
        if a.axis == axis
    ]


def corruption(kind: str, target: Target, draw: random.Random) -> tuple[str, bytes]:
    """The name of a part that is damaged, and the bytes of the damaged file."""
    while True:
        place, inside = draw.choice(target.parts)
        corrupt = bytearray(target.raw)
        offset = draw.choice(inside)
        match kind:
            case "bit":
                corrupt[offset] ^= 1 << draw.randrange(8)
            case "word":
                offset -= offset % WORD
                corrupt[offset : offset + WORD] = draw.randbytes(WORD)
            case "burst":
                size = min(draw.randint(2, BURST), len(corrupt) - offset)
                corrupt[offset : offset + size] = draw.randbytes(size)
            case "swap":
                place = swap(corrupt, target, draw)
            case "page":
                offset -= offset % PAGE
                size = min(PAGE, len(corrupt) - offset)
                corrupt[offset : offset + size] = bytes(size)
            case "cut":
                del corrupt[offset:]
            case "append":
                place, size = "end of the file", draw.randint(1, 2 * PAGE)
                corrupt += draw.choice([draw.randbytes(size), bytes(size)])
        if corrupt != target.raw:
            return place, bytes(corrupt)


def swap(corrupt: bytearray, target: Target, draw: random.Random) -> str:
    """Exchange two blocks of an array, or two sectors anywhere in the file; returns the part's name."""
    header = target.header
    if draw.random() < 0.5:
        view = draw.choice([None, *range(header.views)])
        full_blocks = range(header.samples // header.block_rows)  # the last block can be shorter
        blocks = [block_places(header, view, block) for block in draw.sample(full_blocks, 2)]
        first, second = draw.choice(list(zip(*blocks, strict=True)))
        name = next(name for name, inside in target.parts if first.start in inside)
    else:
        name, inside = draw.choice(target.parts)
        offsets = [draw.choice(inside), draw.randrange(len(corrupt) - 512)]
        first, second = (
            range(offset - offset % 512, offset - offset % 512 + 512) for offset in offsets
        )
    first_bytes = corrupt[first.start : first.stop]
    second_bytes = corrupt[second.start : second.stop]
    corrupt[first.start : first.stop] = second_bytes
    corrupt[second.start : second.stop] = first_bytes
    return name


def expected(target: Target, corrupt: bytes) -> set[Name]:
    """What verify must name, given the bytes that changed."""
    refused: Name = (REFUSED, None, None)
    if len(corrupt) != len(target.raw):
        return {refused}
    changed = np.frombuffer(corrupt, np.uint8) != np.frombuffer(target.raw, np.uint8)
    names = {target.names[owner] for owner in np.unique(target.owner[changed])}
    return {refused} if refused in names else names


def judge(target: Target, corrupt: bytes, path: Path) -> tuple[str, set[Name]]:
    """The verdict, one of VERDICTS, and what verify named."""
    path.unlink(missing_ok=True)  # a file that is still mapped must not change
    path.write_bytes(corrupt)
    try:
        damage = find_damage(open_cache(path, unfinished=True))
    except FormatError:
        named: set[Name] = {(REFUSED, None, None)}
    else:
        named = {name for part in damage for name in names_of(part, target.header)}
    if not named:
        return "missed", named
    if named != expected(target, corrupt):
        return "misnamed", named
    return ("refused" if (REFUSED, None, None) in named else "named"), named


def names_of(part: Damage, header: Header) -> list[Name]:
    """The names of the damaged blocks; verify reports a run of missing blocks as one part."""
    if part.samples is None:
        return [(part.what, None, None)]
    block_rows = header.block_rows
    first, stop = part.samples.start // block_rows, -(-part.samples.stop // block_rows)
    return [("block", part.view, header.block_range(block)) for block in range(first, stop)]


def self_check(targets: Sequence[Target], path: Path) -> None:
    """Stop unless judge() notices a change that verify cannot see, and a wrong name."""
    for target in targets:
        corrupt = bytearray(target.raw)
        corrupt[block_places(target.header, 1, 0)[0].start] ^= 1
        damaged = {("block", 1, target.header.block_range(0))}
        if judge(target, bytes(corrupt), path) != ("named", damaged):
            raise SystemExit("a damaged block is not named; this benchmark shows nothing")
        path.write_bytes(corrupt)
        digest = open_cache(path).block_digest(1, 0).to_bytes(8, "little")
        offset = writer.digest_offset(target.header, 1, 0)
        corrupt[offset : offset + 8] = digest  # a forgery: digest and values changed together
        if judge(target, bytes(corrupt), path)[0] != "missed":
            raise SystemExit(
                "judge() does not notice a missed change; this benchmark shows nothing"
            )
        wrong = Damage("soft targets", 0, target.header.block_range(0))
        with mock.patch(f"{__name__}.find_damage", return_value=[wrong]):
            if judge(target, bytes(corrupt), path)[0] != "misnamed":
                raise SystemExit(
                    "judge() does not notice a wrong name; this benchmark shows nothing"
                )
        if judge(target, target.raw, path)[0] != "missed":
            raise SystemExit("verify finds damage in an intact file")
    path.unlink()


if __name__ == "__main__":
    main()
