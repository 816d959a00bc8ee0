"""Inputs of the fuzzer: intact files of every kind, and how each of them is changed."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.torch import load

from softcache.cache import Cache, Header, allocate, open_cache
from softcache.cache.arrays import Array
from softcache.cache.header import PREAMBLE, preamble
from softcache.cache.reader import digest_of, shared_digest
from softcache.errors import FormatError
from softcache.train import checkpoint
from softcache.train.checkpoint import NAME as CHECKPOINT
from softcache.train.run_folder import UNFINISHED_METRICS, WEIGHTS
from softcache.train.student import Student
from tests.bench.hostile import evil, mutate_bytes, mutate_text, to_text, values_in

CACHE = "cache.h5"  # the name of every changed cache
SAMPLES, SIDE, CLASSES, VIEWS, BATCH = 132, 4, 12, 2, 64
ROWS = 30  # of a block, so that there are several
COLUMNS = 3  # of the table
ENCODINGS = {
    "dense": "dense", "quantized": "quantized", "topk": "topk:4", "basis": "basis:8,4",
    "sampled": "sampled:16", "auto": "auto", "bernoulli": "bernoulli",
}  # fmt: skip  # by the name of the seed; only auto records its choice
TOLERANCE = 0.1  # of the log of a row's sum: float16 alone is off by less than a hundredth

TEACHERS = f"""
import torch
from torch import nn

def make(inputs, classes):
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))

def images():
    return make({SIDE * SIDE}, {CLASSES})

def rows():
    return make({COLUMNS}, {CLASSES})
"""

# what a file could name in the hope that it is imported; {folder} holds evil.py, and Python finds fuzz_evil
CODE = (
    "evil.py:make", "{folder}/evil.py:make", "fuzz_evil:make", "os:abort", "evil.py:make?normalize=imagenet",
    "evil.pt2", "subprocess:call", "numpy:zeros",
)  # fmt: skip
ARCHITECTURES = (
    "mlp:", "mlp:4", "mlp:5", "mlp:0", "mlp:-1", "mlp:4,4", "mlp:1000000000", "mlp:99999999999999999999",
    "mlp:" + ",".join(["1"] * 5000), "mlp:4?normalize=imagenet", "mlp:4?mean=1e400&std=1", "cnn:4",
    "cnn:999999", "cnn:4x99", "resnet:20,16", "resnet:1000000,16", "resnet:8,1000000", "timm:resnet18",
    "x", ":", "mlp",
)  # fmt: skip
MARKUP = (
    "<script>alert(1)</script>", "</style><img src=x onerror=alert(1)>", "$", "$x", "$\\frac{", "$$", "\\$",
    "| a | b |\n|---|", "[x](javascript:alert(1))", "{{ 7 * 7 }}", "{% x %}", "%s%n", "`", "_^{", " ", "",
    "\x1b[31mred", "\x1b]0;title\x07", "\r\nError: x", "\x00", "\x7f", "\x9b31m", "\u202eabc", "\ud800",
    "\u2028x", "é" * 40, "😀", "../../x", "x" * 3000,
)  # fmt: skip
NAMES = (
    *(text.encode("utf-8", "surrogatepass") for text in MARKUP), b"\xff\xfe", b"\xc3", b"\xed\xa0\x80",
    b"a\x00b", b"\xf0\x9f\x98", b"0", b"class 1",
)  # fmt: skip
FLOATS = (
    np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 65504.0, -65504.0, 6e-8, 1e-45, 3e38, -3e38, 1e30, -1e30,
    88.0, -200.0, 5.0, 0.5,
)  # fmt: skip
COUNTS: tuple[object, ...] = (
    0, 1, -1, 2, 3, 7, 10**6, 1 << 31, 1 << 62, 1 << 63, 1 << 64, 10**30, 10**400, 0.5, 1e308, float("nan"),
    float("inf"), True, None, "", "3", [], [1], {},
)  # fmt: skip
DTYPES = (
    "F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "I16", "U64", "C64", "X",
)  # fmt: skip
# types whose numbers are changed
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "|u1"}
# names for tensors of checkpoints
TENSORS = (
    "x", "", "0.x", "9.model.x", "0.optimizer.x.y", "0.optimizer.99.step", "0.random.9", "0.losses",
    "\x1b[31m", "<b>" * 50,
)  # fmt: skip
# fields of the header that do not decide where values are
PROVENANCE = (
    "data", "choice", "teachers", "evaluation", "software", "summary", "summary", "augment", "precision",
    "temperature", "seed",
)  # fmt: skip

Call = Callable[[Sequence[str]], int]  # runs a command and returns its exit code
Command = tuple[str, ...]


@dataclass(frozen=True)
class CacheSeed:
    """An intact cache.

    Attributes:
        other: a cache of further views, with which it can be merged.
        data: the specification of its samples; None if they are embedded.
        run: a run folder of a student that was trained from it.
    """

    path: Path
    raw: bytes
    header: Header
    other: Path
    data: str | None
    run: Path


@dataclass(frozen=True)
class RunSeed:
    """A finished run with its baseline; `files` by relative path."""

    files: Mapping[str, bytes]
    path: Path
    cache: Path
    eval_data: str


@dataclass(frozen=True)
class CheckpointSeed:
    """A run that was interrupted; `arguments` continue it, but for --out."""

    files: Mapping[str, bytes]
    arguments: Command


@dataclass(frozen=True)
class Seeds:
    """Intact files of every kind."""

    caches: Sequence[CacheSeed]
    runs: Sequence[RunSeed]
    checkpoints: Sequence[CheckpointSeed]


@dataclass(frozen=True)
class Input:
    """Files to attack with, by relative path, and the commands that read them.

    Attributes:
        kind: one of KINDS.
        change: what was changed, in a few words.
        wrong: why the rows of the cache must be refused; None if they need not be.
    """

    kind: str
    change: str
    files: Mapping[str, bytes]
    commands: Sequence[Command]
    wrong: str | None = None


# intact files


def make_seeds(folder: Path, call: Call, names: Sequence[str] = tuple(ENCODINGS)) -> Seeds:
    """Write intact files of every kind into `folder`, with caches of the encodings `names`."""
    data = write_data(folder)

    def run(*arguments: str | Path) -> None:
        if call([*map(str, arguments)]):
            raise SystemExit(f"softcache {arguments[0]} fails; fix this benchmark")

    parts = {
        (name, embedded): dump_parts(folder, run, data["images"], name, embedded=embedded)
        for name in names
        for embedded in (False, True)
    }
    table = folder / "table.h5"
    run(*dump(folder, "rows", data["rows"], table), "--embed-inputs")
    images = parts[names[0], True][0]
    runs = []
    for samples, cache in (("images", images), ("rows", table)):
        path = folder / f"{samples}-run"
        run(*train(cache), "--baseline", "--eval-data", data[samples], "--out", path)
        runs.append(RunSeed(read_files(path), path, cache, data[samples]))
    caches = [
        cache_seed(path, other, None if embedded else data["images"], runs[0].path)
        for (_, embedded), (path, other) in parts.items()
    ]
    caches.append(cache_seed(table, table, None, runs[1].path))  # a table has no views to merge
    evaluated = ("--eval-data", data["images"])
    settings: list[Command] = [
        (),
        ("--baseline", "--ema", "0.9", *evaluated),
        ("--optimizer", "sgd", "--patience", "1", "--grid", "alpha=0.5,1", *evaluated),
    ]
    checkpoints = [
        interrupted(folder / f"interrupted-{number}", call, (*train(images), *options))
        for number, options in enumerate(settings)
    ]
    return Seeds(caches, runs, checkpoints)


def write_data(folder: Path) -> dict[str, str]:
    """Write teachers, images and a table of noise; returns the specifications of the data."""
    numbers = np.random.default_rng(0)
    names = [*(f"class {number}" for number in range(CLASSES - 1)), "the last class " * 3]
    labels = np.array(names)[np.arange(SAMPLES) % CLASSES]
    images = numbers.integers(0, 256, (SAMPLES, 1, SIDE, SIDE), dtype=np.uint8)
    np.savez(folder / "images.npz", x=images, y=labels)
    lines = [
        f"{first:.3f},{second:.3f},{word},{label}"
        for (first, second), word, label in zip(
            numbers.random((SAMPLES, 2)), numbers.choice([*"xyz"], SAMPLES), labels, strict=True
        )
    ]
    (folder / "table.csv").write_text("\n".join(["first,second,word,label", *lines]) + "\n")
    (folder / "teachers.py").write_text(TEACHERS)
    return {"images": f"npz:{folder / 'images.npz'}", "rows": f"csv:{folder / 'table.csv'}"}


def dump(folder: Path, samples: str, data: str, out: Path) -> Command:
    """A dump of the teacher of `samples`."""
    return (
        "dump", "--teacher", f"{folder / 'teachers.py'}:{samples}", "--data", data, "--eval-data", data,
        "--temperature", "4", "--device", "cpu", "--out", str(out),
    )  # fmt: skip


def dump_parts(
    folder: Path, run: Callable[..., None], data: str, name: str, *, embedded: bool
) -> tuple[Path, Path]:
    """Two caches of one encoding, of the first and of further views."""
    paths = []
    for part in (0, 1):
        paths.append(folder / f"{name}-{'embedded' if embedded else 'plain'}-{part}.h5")
        views = f"{VIEWS * part}:{VIEWS * (part + 1)}"
        options: tuple[str, ...] = (
            "--encoding",
            ENCODINGS[name],
            "--views",
            views,
            "--augment",
            "shift:1",
        )
        options += ("--targets", "sigmoid") if name == "bernoulli" else ()
        inputs = ("--embed-inputs",) if embedded else ()
        with mock.patch.object(allocate, "block_rows", return_value=ROWS):
            run(*dump(folder, "images", data, paths[-1]), *options, *inputs)
    return paths[0], paths[1]


def cache_seed(path: Path, other: Path, data: str | None, run: Path) -> CacheSeed:
    return CacheSeed(path, path.read_bytes(), open_cache(path).header, other, data, run)


def train(cache: Path) -> Command:
    """A short run of a tiny student, without --out."""
    return (
        "train", str(cache), "--student", "mlp:4", "--epochs", "2", "--batch-size", str(BATCH),
        "--device", "cpu", "--checkpoint-minutes", "0",
    )  # fmt: skip


def interrupted(folder: Path, call: Call, arguments: Command) -> CheckpointSeed:
    """Stop a run in its second epoch, after a checkpoint within it."""
    step, steps = Student.step, iter(range(1_000))
    # several students take each step
    students = 2 if "--baseline" in arguments or "--grid" in arguments else 1

    def stopping(self: Student, *values: Any) -> None:
        if next(steps) == students * (SAMPLES // BATCH + 2):
            raise KeyboardInterrupt
        step(self, *values)

    with mock.patch.object(Student, "step", stopping):
        code = call([*arguments, "--out", str(folder)])
    if code != 130 or not (folder / CHECKPOINT).exists():
        raise SystemExit("no checkpoint was written; fix this benchmark")
    return CheckpointSeed(read_files(folder), arguments)


def read_files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# changed files


def make_input(seeds: Seeds, draw: random.Random, folder: Path, evil_folder: Path) -> Input:
    """A changed file, to be written into `folder`."""
    kind = draw.choices([*KINDS], [weight for weight, _ in KINDS.values()])[0]
    return KINDS[kind][1](kind, seeds, draw, folder, str(evil_folder))


def cache_input(kind: str, seeds: Seeds, draw: random.Random, folder: Path, code: str) -> Input:
    """A cache in which values or fields are changed, with every digest mended."""
    needed = {"ids": "ids", "inputs": "inputs"}.get(kind)
    fitting = [
        s for s in seeds.caches if needed is None or needed in {a.name for a in s.header.arrays}
    ]
    seed = draw.choice(fitting)
    raw, fields = bytearray(seed.raw), json.loads(seed.header.to_bytes())
    arrays = {array.name: array_in(raw, array) for array in seed.header.arrays}
    if kind == "header":
        change = change_fields(fields, draw, code)
    else:
        change = CHANGES[kind](arrays, seed.header, draw)
    mend(arrays, seed.header)
    fields["shared_digest"] = shared_digest(arrays, seed.header)
    content = with_header(raw, to_text(fields, draw), seed.header.user_block)
    wrong = None if kind == "header" else wrong_rows(seed.header, arrays)
    commands = cache_commands(kind, seed, folder, draw)
    return Input(kind, f"{seed.path.stem}: {change}", {CACHE: content}, commands, wrong)


def array_in(raw: bytearray, array: Array) -> npt.NDArray[Any]:
    """An array of a file, whose changes change the file."""
    count = array.nbytes // np.dtype(array.dtype).itemsize
    return np.frombuffer(raw, array.dtype, count, array.offset).reshape(array.shape)


def mend(arrays: Mapping[str, npt.NDArray[Any]], header: Header) -> None:
    """Write the digests that match the values."""
    for block in range(header.blocks):
        part = header.block_range(block)
        rows = slice(part.start, part.stop)
        samples = [arrays[a.name][rows] for a in header.arrays if a.axis == "samples"]
        arrays["sample_digests"][block] = digest_of(iter(samples))
        for view in range(header.views):
            values = [arrays[a.name][view, rows] for a in header.arrays if a.axis == "rows"]
            arrays["digests"][view, block] = digest_of(iter(values))


def with_header(raw: bytearray, text: bytes, user_block: int) -> bytes:
    """The file with another header; one that is too long for its place ends after it."""
    front = preamble(PREAMBLE.size, text) + text
    return (
        front + bytes(max(0, user_block - len(front))) + bytes(raw[max(user_block, len(front)) :])
    )


def places(array: npt.NDArray[Any], draw: random.Random) -> tuple[Any, ...]:
    """An index of one value, of a row, of a column, or of all values."""
    one = tuple(draw.randrange(size) for size in array.shape)
    whole = (slice(None),) * array.ndim
    return draw.choice([one, one, one[:-1], (*whole[:-1], *one[-1:]), whole])


def change_values(
    arrays: Mapping[str, npt.NDArray[Any]], header: Header, draw: random.Random
) -> str:
    """Change numbers that decide the soft targets, or the fingerprints."""
    names = [a.name for a in header.arrays if a.dtype in ("<f2", "<f4", "|u1", "|i1")]
    name = draw.choice([name for name in names if name != "inputs"])
    array, place = arrays[name], places(arrays[name], draw)
    with np.errstate(all="ignore"):
        if array.dtype.kind in "iu":
            number = draw.randrange(256)
            array[place] = np.array(number, np.uint8).view(array.dtype)
            return f"{name}{shown(place)} = {number}"
        value, how = draw.choice(FLOATS), draw.choice(["=", "=", "+=", "*="])
        old = np.array(array[place])
        new = {"=": value + 0 * old, "+=": old + value, "*=": old * value}[how]
        array[place] = value if how == "=" else new
    return f"{name}{shown(place)} {how} {value}"


def change_ids(arrays: Mapping[str, npt.NDArray[Any]], header: Header, draw: random.Random) -> str:
    ids = arrays["ids"]
    row: tuple[Any, ...] = tuple(draw.randrange(size) for size in ids.shape[:-1])
    everywhere: tuple[Any, ...] = (slice(None),) * (ids.ndim - 1)
    place = draw.choice([row, row, everywhere])
    column = draw.randrange(ids.shape[-1])
    if draw.random() < 0.5:
        other = draw.randrange(ids.shape[-1])
        ids[(*place, column)] = ids[(*place, other)]
        return f"ids{shown((*place, column))} = those of column {other}"
    number = draw.choice([0, header.classes - 1, header.classes, header.classes + 1, 65_535])
    ids[(*place, column)] = number
    return f"ids{shown((*place, column))} = {number}"


def change_labels(
    arrays: Mapping[str, npt.NDArray[Any]], header: Header, draw: random.Random
) -> str:
    classes = header.classes
    edges = [-1, -2, -100, 0, classes - 1, classes, classes + 1, 1 << 31, (1 << 63) - 1, -(1 << 63)]
    place, number = places(arrays["labels"], draw), draw.choice(edges)
    arrays["labels"][place] = number
    return f"labels{shown(place)} = {number}"


def change_keys(arrays: Mapping[str, npt.NDArray[Any]], header: Header, draw: random.Random) -> str:
    """Exchange keys, or change the rows that have fingerprints."""
    keys = arrays["keys"]
    first, second = draw.sample(range(len(keys)), 2)
    match draw.randrange(5):
        case 0 | 1:
            keys[[first, second]] = keys[[second, first]]
            return f"keys {first} and {second} exchanged"
        case 2:
            keys[first] = keys[second]
            return f"key {first} = key {second}"
        case 3:
            keys[:] = draw.choice([0, (1 << 64) - 1])
            return f"keys = {keys[0]}"
    rows = arrays["fingerprinted"]
    place = draw.randrange(len(rows))
    rows[place] = draw.choice([-1, 0, header.samples, 1 << 62, -(1 << 63), int(rows[-1])])
    return f"fingerprinted[{place}] = {rows[place]}"


def change_names(
    arrays: Mapping[str, npt.NDArray[Any]], header: Header, draw: random.Random
) -> str:
    names = arrays["class_names"]
    chosen = [draw.choice(NAMES)[: names.dtype.itemsize] for _ in range(draw.choice([1, 1, 3]))]
    place = draw.choice([*range(len(names)), slice(None)])
    names[place] = chosen[0]
    for name in chosen[1:]:
        names[draw.randrange(len(names))] = name
    return f"class_names[{place}] = {chosen}"


def change_inputs(
    arrays: Mapping[str, npt.NDArray[Any]], header: Header, draw: random.Random
) -> str:
    inputs = arrays["inputs"]
    place = places(inputs, draw)
    value = draw.choice(FLOATS) if inputs.dtype.kind == "f" else draw.randrange(128)
    with np.errstate(all="ignore"):
        inputs[place] = value
    return f"inputs{shown(place)} = {value}"


CHANGES: dict[str, Callable[[Mapping[str, npt.NDArray[Any]], Header, random.Random], str]] = {
    "values": change_values, "ids": change_ids, "labels": change_labels, "keys": change_keys,
    "names": change_names, "inputs": change_inputs,
}  # fmt: skip


def shown(place: Sequence[Any]) -> str:
    """An index as it is written in numpy."""
    return f"[{', '.join(':' if isinstance(index, slice) else str(index) for index in place) or '...'}]"


def wrong_rows(header: Header, arrays: Mapping[str, npt.NDArray[Any]]) -> str | None:
    """Why the stored values are no distributions of labelled rows; None if they are."""
    labels, ids = arrays["labels"], arrays.get("ids")
    if labels.min() < -1 or labels.max() >= (1 if header.multi_label else header.classes):
        return "labels out of range"
    if ids is not None and int(ids.max()) >= header.classes:
        return "class ids out of range"
    if ids is not None and header.encoding.name != "sampled":
        ordered = np.sort(ids.astype(np.int64), -1)
        if (np.diff(ordered, axis=-1) == 0).any():
            return "class ids repeated in a row"
    of_encoding = {spec.name for spec in header.encoding.arrays(header.classes)}
    for name in sorted(of_encoding):
        if arrays[name].dtype.kind == "f" and not np.isfinite(arrays[name]).all():
            return f"{name} not finite"
    with np.errstate(all="ignore"):
        if header.encoding.name == "dense":
            sums = np.log(np.exp(arrays["log_probs"].astype(np.float64)).sum(-1))
            if not (np.abs(sums) < TOLERANCE).all():
                return "rows do not sum to 1"
        cache = Cache(Path(CACHE), header, b"", arrays)
        for view in range(header.views):
            try:
                rows = cache.rows(view, np.arange(header.samples))
            except FormatError:
                return "decoded rows are no distributions"
            probabilities = np.exp(rows.astype(np.float64))
            if header.encoding.name != "sampled" and not np.isfinite(rows).all():
                return "decoded rows not finite"
            if header.multi_label:
                continue
            if not (np.abs(probabilities.sum(-1) - 1) < TOLERANCE).all():
                return "decoded rows do not sum to 1"
    return None


def change_fields(fields: dict[str, Any], draw: random.Random, code: str) -> str:
    """Change values of the header that are only shown, or that decide how rows are used."""
    changes = []
    for _ in range(draw.choice([1, 1, 2])):
        name = draw.choice(PROVENANCE)
        changes.append(change_json(fields, name, draw, code))
    return "; ".join(changes)


def change_json(fields: dict[str, Any], name: str, draw: random.Random, code: str) -> str:
    """Change the field `name`, or a value inside it; an earlier change may have removed it."""
    if name not in fields:
        return f"no {name}"
    value = fields[name]
    nested = [*values_in(value)] if isinstance(value, dict | list) else []
    container, key = draw.choice([(fields, name), *nested, *nested])
    old = container[key]
    new = replacement(copy.deepcopy(old), draw, code)  # which may contain it
    where = name if container is fields else f"{name}…{key}"
    match draw.randrange(12):
        case 0:
            del container[key]
            return f"{where} removed"
        case 1 if isinstance(container, dict):
            other = replacement("", draw, code)
            container[str(other)[:100]] = container.pop(key)
            return f"{where} renamed {other!r:.60}"
        case 2 if isinstance(old, list) and old:
            container[key] = old * draw.choice([2, 50])
            return f"{where} repeated"
        case 3 if isinstance(old, dict):
            old[draw.choice([*old, "x", "alpha", "weights", "selected", "candidates", "at"])] = new
            return f"{where} has {new!r:.60}"
    container[key] = new
    return f"{where} = {new!r:.60}"


def replacement(old: object, draw: random.Random, code: str) -> object:
    """Another value: markup, code, a count, or anything that hostile headers have."""
    spec = draw.choice(CODE).replace("{folder}", code)
    likely: list[object] = [draw.choice(MARKUP), draw.choice(MARKUP), draw.choice(COUNTS), spec]
    if isinstance(old, str):
        return draw.choice(
            [draw.choice(MARKUP), old + draw.choice(MARKUP), *likely, evil(old, draw)]
        )
    if isinstance(old, int | float):
        return draw.choice([draw.choice(COUNTS), -old, *likely, evil(old, draw)])
    return draw.choice([*likely, evil(old, draw), evil(old, draw)])


def cache_commands(kind: str, seed: CacheSeed, folder: Path, draw: random.Random) -> list[Command]:
    """Every command that reads a cache; the last one may rename it."""
    cache, data = str(folder / CACHE), () if seed.data is None else ("--data", seed.data)
    sampled = seed.header.encoding.name == "sampled"
    other = (
        () if sampled or draw.random() < 0.5 else ("--temperature", draw.choice(["2", "0.5", "20"]))
    )
    logs = draw.choice([(), ("--log-probabilities",)])
    rows = str(folder / draw.choice(["rows.npy"] * 8 + ["rows.parquet"]))
    out = ("--out", str(folder / "run"))
    settings = draw.choice(
        [(), (), ("--baseline",), ("--loss", "js"), ("--alpha", "0.5"), ("--labels", "cache")]
    )
    commands: list[Command] = [
        ("info", cache),
        ("info", cache, "--json"),
        ("verify", cache),
        ("export-labels", cache, "-o", rows, *other, *logs),
        ("merge", cache, str(seed.other), "-o", str(folder / "merged.h5")),
        ("compare", str(seed.run), "--cache", cache, *data),
        (*train(Path(cache)), *data, *out, *other, *settings),
    ]
    # drawing takes longer than all other commands together
    if draw.random() < (0.04 if kind in ("names", "header") else 0.01):
        places = draw.choice([(cache,), (cache, str(seed.run))])
        commands.append(("report", *places, *data, "-o", str(folder / "page.html")))
    return [*commands, ("repair", cache)]


# changed runs


def run_input(kind: str, seeds: Seeds, draw: random.Random, folder: Path, code: str) -> Input:
    """A finished run with another config.json, metrics.jsonl or student.safetensors."""
    seed = draw.choice(seeds.runs)
    place = draw.choice(["", "", "", "baseline/"])
    name = place + {"config": "config.json", "metrics": "metrics.jsonl", "weights": WEIGHTS}[kind]
    old = seed.files[name]
    match kind:
        case "config":
            new, change = change_config(old, draw, code)
        case "metrics":
            new, change = change_metrics(old, draw, code)
        case _:
            new, change = change_tensors(old, draw)
    files = {f"run/{path}": content for path, content in seed.files.items()} | {f"run/{name}": new}
    if draw.random() < 0.01:
        del files[f"run/{name}"]
    return Input(
        kind, f"{seed.path.name}/{name}: {change}", files, run_commands(seed, folder, draw, name)
    )


def run_commands(seed: RunSeed, folder: Path, draw: random.Random, name: str) -> list[Command]:
    run, page = str(folder / "run"), ("-o", str(folder / "page.html"))
    evaluated = draw.choice([(), ("--eval-data", seed.eval_data)])
    compared = draw.choice([(), (), ("--cache", str(seed.cache))])
    also = draw.choice([(), (), (str(seed.path),)])
    commands: list[Command] = [("compare", run, *also, *evaluated, *compared)]
    if name.startswith("baseline/"):
        commands[0] = ("compare", f"{run}/baseline", *also, *evaluated, *compared)
    if draw.random() < 0.05:
        commands.append(("report", run, *also, *evaluated, *page))
    if draw.random() < 0.01:
        commands.append(("report", str(seed.cache), run, *evaluated, *page))
    if draw.random() < 0.05:
        commands.append(("export", run, draw.choice(["--pt2"] * 9 + ["--onnx"])))
    if name.endswith(WEIGHTS):
        start = ("--init", f"{run}/{name}", "--out", str(folder / "again"))
        commands.append((*train(seed.cache), *start))
    return commands


def change_config(old: bytes, draw: random.Random, code: str) -> tuple[bytes, str]:
    if draw.random() < 0.15:
        return mutate_text(old, draw), "text of the JSON"
    facts = json.loads(old)
    settings = facts["settings"]
    match draw.randrange(8):
        case 0 | 1:
            spec = draw.choice([*draw.choice([CODE, ARCHITECTURES, MARKUP])])
            settings["student"] = spec.replace("{folder}", code)
            return to_text(facts, draw), f"student = {settings['student']!r:.60}"
        case 2:
            name = draw.choice(
                ["input_shape", "input_shape", "classes", "input_dtype", "class_names", "columns"]
            )
            facts[name] = special(name, draw)
            return to_text(facts, draw), f"{name} = {facts[name]!r:.60}"
    changes = []
    for _ in range(draw.choice([1, 1, 2, 4])):
        changes.append(change_json(facts, draw.choice([*facts, "settings"]), draw, code))
    return to_text(facts, draw), "; ".join(changes)


def special(name: str, draw: random.Random) -> object:
    """A value of the right type that does not fit the rest, or is huge."""
    edges = (0, 1, -1, 2, 3, 4, 16, 10**6, 1 << 31, 1 << 62, 10**30)
    sizes = [draw.choice(edges) for _ in range(draw.randrange(6))]
    text = draw.choice(MARKUP)
    values: dict[str, list[object]] = {
        "input_shape": [sizes, sizes, [1, 1 << 15, 1 << 15], [1] * 5000, [1 << 40]],
        "classes": [*edges, CLASSES - 1, CLASSES + 1, 10**9, 1.5, "12", True],
        "input_dtype": [
            "int64", "float64", "float16", "uint8", "bool", "complex64", "x", "Tensor", "load", "nn",
            "__name__", "hub", "",
        ],
        "class_names": [
            [], ["a"], ["a"] * CLASSES, [1, 2], [None] * CLASSES, "abc", {"a": 1}, [text] * CLASSES,
            ["x"] * 100_000,
        ],
        "columns": [
            ["first", "second", "word"], [1], [{}], [{"name": 1}], "abc", {"name": "x"},
            [{"name": text}] * 3, [{"name": "x", "words": "abc", "mean": "x"}] * 3,
        ],
    }  # fmt: skip
    return draw.choice(values[name])


def change_metrics(old: bytes, draw: random.Random, code: str) -> tuple[bytes, str]:
    lines = [json.loads(line) for line in old.splitlines()]
    match draw.randrange(8):
        case 0:
            return mutate_text(old, draw), "text of the lines"
        case 1:
            return b"".join(
                draw.sample([*old.splitlines(keepends=True)] * 2, draw.randrange(3))
            ), "lines taken"
        case 2:
            count = draw.choice([10, 1000, 5000])
            return old * count, f"{count} times as many lines"
        case 3:
            other = draw.choice(
                [b"[]\n", b"1\n", b"null\n", b"{}\n", b'"x"\n', b"\n", b"\xff\n", b"NaN\n"]
            )
            return draw.choice([other, old + other, other + old]), f"a line {other!r}"
    changes = []
    for _ in range(draw.choice([1, 1, 3])):
        line = draw.choice(lines)
        if line:
            changes.append(change_json(line, draw.choice([*line]), draw, code))
    return b"\n".join(to_text(line, draw) for line in lines) + b"\n", "; ".join(changes)


# changed tensors


def unpack(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def pack(text: bytes, data: bytes) -> bytes:
    """A safetensors file, with its header padded as that of the library."""
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def change_tensors(old: bytes, draw: random.Random, *, like: str = "") -> tuple[bytes, str]:
    """Change values, dtypes, shapes or names of tensors, or the file that holds them.

    Args:
        like: text that the names of most changed tensors contain.
    """
    if draw.random() < 0.15:
        return mutate_bytes(old, draw, from_start=draw.random() < 0.5), "bytes"
    header, data = unpack(old)
    if draw.random() < 0.1:
        text = mutate_text(json.dumps(header).encode(), draw)
        return pack(text, data), "text of the tensors' header"
    changed, changes = bytearray(data), []
    for _ in range(draw.choice([1, 1, 1, 3])):
        names = [name for name in header if name != "__metadata__"]
        names = [name for name in names if like in name] or names
        if names:
            changes.append(change_tensor(header, changed, draw.choice(names), draw))
    return pack(json.dumps(compact(header, changed)).encode(), bytes(changed)), "; ".join(changes)


def change_tensor(header: dict[str, Any], data: bytearray, name: str, draw: random.Random) -> str:
    """Change one tensor, or exchange it with another."""
    entry = header[name]
    start, stop = entry["data_offsets"]
    match draw.randrange(10):
        case 0 | 1 | 2:
            dtype = np.dtype(NUMPY.get(entry["dtype"], "|u1"))
            if (
                len(data[start:stop]) % dtype.itemsize
            ):  # an earlier change has named another type or place
                dtype = np.dtype("|u1")
            numbers = np.frombuffer(bytes(data[start:stop]), dtype).copy()
            value = draw.choice(FLOATS) if dtype.kind == "f" else draw.randrange(128)
            with np.errstate(all="ignore"):
                numbers[draw.choice([slice(None), slice(0, 1)])] = value
            data[start:stop] = numbers.tobytes()
            return f"{name} = {value}"
        case 3:
            entry["dtype"] = draw.choice(DTYPES)
            if entry["dtype"] in NUMPY and draw.random() < 0.8:  # the same bytes, as other numbers
                entry["shape"] = [(stop - start) // np.dtype(NUMPY[entry["dtype"]]).itemsize]
            return f"{name} is {entry['dtype']}"
        case 4:
            flat = [int(np.prod(entry["shape"], dtype=np.int64))]
            turned = entry["shape"][::-1]
            entry["shape"] = draw.choice([flat, [1, *turned], [], [0], [1 << 40], turned])
            return f"{name} has shape {entry['shape']}"
        case 5:
            del header[name]
            return f"{name} removed"
        case 6:
            other = draw.choice([f"{name}x", *TENSORS])
            header[other] = header.pop(name) if draw.random() < 0.5 else dict(entry)
            return f"{name} also or now called {other!r}"
        case 7:
            size = draw.choice([0, 4, 8, 4096, 1 << 20])
            shape = draw.choice([[size // 4], [size // 4, 1], [1, size // 4]])
            offsets = [len(data), len(data) + size]
            data += bytes(size)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
            return f"{name} has {size} bytes of zeros"
        case 8:
            outside = [[0, 0], [stop, start], [start, stop + 8], [0, 1 << 62], [-1, 4]]
            entry["data_offsets"] = draw.choice(outside)
            return f"{name} at {entry['data_offsets']}"
    other = draw.choice([key for key in header if key != "__metadata__"])
    header[name], header[other] = header[other], header[name]
    return f"{name} exchanged with {other}"


def compact(header: dict[str, Any], data: bytearray) -> dict[str, Any]:
    """The header with the tensors' bytes one after the other, as the library wants them, if they exist."""
    parts, result = [], {}
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            result[name] = entry
            continue
        start, stop = entry["data_offsets"]
        if not 0 <= start <= stop <= len(data):
            return header
        part = bytes(data[start:stop])
        result[name] = entry | {"data_offsets": [end, end + len(part)]}
        parts.append(part)
        end += len(part)
    data[:] = b"".join(parts)
    return result


# changed checkpoints


def checkpoint_input(
    kind: str, seeds: Seeds, draw: random.Random, folder: Path, code: str
) -> Input:
    """An interrupted run with another checkpoint."""
    seed = draw.choice(seeds.checkpoints)
    old = seed.files[CHECKPOINT]
    match kind:
        case "state":
            new, change = change_state(old, draw, code)
        case "tensors":
            like = draw.choice(["", "random", "optimizer", "model", "losses", "average", "best"])
            new, change = change_tensors(old, draw, like=like)
        case _:
            new, change = mutate_bytes(old, draw, from_start=draw.random() < 0.5), "bytes"
    if kind != "bytes" and draw.random() < 0.8:
        new = mend_checkpoint(new, listed=kind == "tensors" and draw.random() < 0.8)
    files = {f"run/{name}": content for name, content in seed.files.items()}
    if draw.random() < 0.05:
        files.pop(f"run/{UNFINISHED_METRICS}", None)
    files[f"run/{CHECKPOINT}"] = new
    arguments = (*seed.arguments, "--out", str(folder / "run"))
    overwrite = ("--overwrite",) if draw.random() < 0.05 else ()
    return Input(kind, f"checkpoint: {change}", files, [(*arguments, *overwrite)])


def change_state(old: bytes, draw: random.Random, code: str) -> tuple[bytes, str]:
    """Change the JSON that a checkpoint holds besides its tensors."""
    header, data = unpack(old)
    metadata = header["__metadata__"]
    if draw.random() < 0.05:
        metadata.pop(draw.choice([*metadata]))
        return pack(json.dumps(header).encode(), data), "an entry of the metadata removed"
    state = json.loads(metadata[checkpoint.STATE])
    if draw.random() < 0.1:
        text = mutate_text(json.dumps(state).encode(), draw).decode("utf-8", "replace")
        metadata[checkpoint.STATE] = text
        return pack(json.dumps(header).encode(), data), "text of the state"
    # changed settings are refused before anything else is read
    names = [name for name in state if name != "settings"] if draw.random() < 0.9 else ["settings"]
    changes = []
    for _ in range(draw.choice([1, 1, 2])):
        name = draw.choice(names)
        if draw.random() < 0.5 and isinstance(state.get(name), int):
            near = state[name] + draw.choice([-3, -2, -1, 1, 2, 3])
            state[name] = draw.choice([near, draw.choice(COUNTS)])
            changes.append(f"{name} = {state[name]!r:.60}")
        else:
            changes.append(change_json(state, name, draw, code))
    metadata[checkpoint.STATE] = to_text(state, draw).decode("utf-8", "surrogatepass")
    return pack(json.dumps(header).encode(), data), "; ".join(changes)


def mend_checkpoint(raw: bytes, *, listed: bool) -> bytes:
    """The checkpoint with a digest that matches; unchanged if its tensors cannot be read.

    Args:
        listed: whether its state is to list the tensors that it has.
    """
    try:
        header, data = unpack(raw)
        metadata, tensors = header["__metadata__"], load(raw)
        if listed:
            state = json.loads(metadata[checkpoint.STATE]) | {"tensors": sorted(tensors)}
            metadata[checkpoint.STATE] = json.dumps(state)
        metadata[checkpoint.DIGEST] = checkpoint.digest_of(metadata[checkpoint.STATE], tensors)
    except (SafetensorError, LookupError, RuntimeError, TypeError, ValueError, struct.error):
        return raw
    return pack(json.dumps(header).encode(), data)


Maker = Callable[[str, Seeds, random.Random, Path, str], Input]
# relative frequencies, and what makes an input
KINDS: dict[str, tuple[int, Maker]] = {
    "values": (5, cache_input), "ids": (2, cache_input), "labels": (2, cache_input),
    "keys": (2, cache_input), "names": (3, cache_input), "inputs": (1, cache_input),
    "header": (5, cache_input), "config": (5, run_input), "metrics": (3, run_input),
    "weights": (3, run_input), "state": (4, checkpoint_input), "tensors": (4, checkpoint_input),
    "bytes": (1, checkpoint_input),
}  # fmt: skip
