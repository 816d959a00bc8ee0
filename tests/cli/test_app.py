"""The command line: every bad input is one line on stderr, and nothing slow is imported for nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from softcache.cache import open_cache
from softcache.cache.reader import partial_path
from softcache.dump import loop as dump_loop
from softcache.errors import ModelError
from softcache.train import loop as train_loop
from tests.cli.app_cases import Arguments, Place, softcache

Make = Callable[[Place], Arguments]


# what is wrong: the command line, the exit code, the message
BAD_INPUTS: dict[str, tuple[Make, int, str]] = {
    "no such cache to train from": (
        lambda p: p.train(cache="nowhere.h5"),
        1,
        r"nowhere\.h5: No such file or directory; expected a cache as softcache dump makes it",
    ),
    "no such cache to look at": (
        lambda p: ["info", "nowhere.h5"],
        1,
        r"nowhere\.h5: No such file or directory; expected a cache as softcache dump makes it",
    ),
    "no such cache to verify": (
        lambda p: ["verify", "nowhere.h5"],
        1,
        r"nowhere\.h5: No such file or directory; expected a cache as softcache dump makes it",
    ),
    "no such data": (
        lambda p: p.dump("teacher", "--data", "npz:nowhere.npz"),
        1,
        r"npz:nowhere\.npz: no such file",
    ),
    "no such model file": (
        lambda p: p.dump("nowhere.py:teacher"),
        2,
        r"no such file: nowhere\.py; expected FILE\.py:CALLABLE",
    ),
    "no such weights": (
        lambda p: p.dump("teacher", "--weights", "nowhere.safetensors"),
        1,
        r"weights nowhere\.safetensors: no such file",
    ),
    "a folder for a cache": (
        lambda p: p.train(cache=p.folder),
        1,
        r".*/place: this is a folder, not a file; name a cache that softcache dump made",
    ),
    "an empty file for a cache": (
        lambda p: p.train(cache=p.file("empty", b"")),
        1,
        r".*/empty: the file is empty, not a cache.*",
    ),
    "text for a cache": (
        lambda p: ["info", p.file("notes.txt", b"soft targets, soon")],
        1,
        r".*/notes\.txt: a file that begins with 736f667420746172, not a cache; make one with .*",
    ),
    "data for a cache": (
        lambda p: p.train(cache=p.data.removeprefix("npz:")),
        1,
        r".*/tiny\.npz: a zip archive \(npz, pt or pt2\), not a cache; make one with softcache dump",
    ),
    "a foreign HDF5 file": (
        lambda p: ["info", p.hdf5()],
        1,
        r".*/foreign\.h5: an HDF5 file, but not a softcache cache; make one with softcache dump",
    ),
    "a cut cache": (
        lambda p: p.train(cache=p.file("cut.h5", p.cache.path.read_bytes()[:-1])),
        1,
        r".*/cut\.h5: the file has [\d,]+ bytes, its header says [\d,]+; .* copy it again",
    ),
    "a cache with more behind it": (
        lambda p: ["verify", p.file("long.h5", p.cache.path.read_bytes() + b"!")],
        1,
        r".*/long\.h5: the file has [\d,]+ bytes, its header says [\d,]+; .* copy it again",
    ),
    "a damaged cache": (
        lambda p: p.train(cache=p.file("bad.h5", p.cache.path.read_bytes()[:-1] + b"\7")),
        1,
        r".*/bad\.h5 is damaged: .*",
    ),
    "another cache than expected": (
        lambda p: ["verify", p.cache.path, "--expect", "abc"],
        1,
        r".*/tiny\.h5 is intact, but it is another cache: .* is [0-9a-f]{64}, expected abc",
    ),
    "a cache of other data": (
        lambda p: p.train("--data", p.arrays("other")),
        1,
        r"sample 0 of npz:tiny\.npz@train is not in .*/tiny\.h5, .* or dump a cache of these",
    ),
    "a cache of more data": (
        lambda p: p.train("--data", p.arrays("cut")),
        1,
        r"npz:tiny\.npz@train has 299 samples, .*/tiny\.h5 was made from 300 of .*; give the data .*",
    ),
    "a student of too few classes": (
        lambda p: p.train("--student", f"{p.folder}/models.py:narrow"),
        1,
        r"student gives 3 outputs for 5 classes; it needs one for each class of the cache, .*",
    ),
    "other classes than the cache's": (
        lambda p: p.train("--classes", "7"),
        2,
        r"--classes is 7, but .*/tiny\.h5 has 5 classes; leave it out",
    ),
    "other classes than the teacher's": (
        lambda p: p.dump("teacher", "--classes", "7"),
        1,
        r"teacher .*:teacher returns shape \(1, 5\) for samples 0 to 0; expected .* \(1, 7\)",
    ),
    "a teacher that returns NaN": (
        lambda p: p.dump("nan"),
        1,
        r"teacher .*:nan returns nan for sample 0, class 0; expected finite logits.*",
    ),
    "a teacher that returns a tuple": (
        lambda p: p.dump("pair", "--classes", "5"),
        1,
        r"teacher .*:pair returns tuple for samples 0 to 0; expected .* \(1, 5\): wrap it .*",
    ),
    "a teacher of too few classes": (
        lambda p: p.dump("narrow"),
        1,
        r"npz:tiny\.npz@train: sample \d+ has label [34]; expected 0 to 2, or -1 for none",
    ),
    "a teacher that raises in mid-dump": (
        lambda p: p.dump("raises"),
        1,
        r"teacher .*:raises raised ValueError on samples 0 to 255, inputs .* of .*: no more",
    ),
    "weights that do not fit": (
        lambda p: p.dump("teacher", "--weights", p.weights()),
        1,
        r"weights .*/weights\.pt do not fit the model: linear\.bias is missing; bias is not in the "
        r"model; linear\.weight is \(5, 63\) in the file, \(5, 64\) in the model; check .*",
    ),
    "weights that are no weights": (
        lambda p: p.dump("teacher", "--weights", p.file("w.safetensors", b"nothing")),
        1,
        r"weights .*/w\.safetensors cannot be read: .*",
    ),
    "an untrained teacher": (
        lambda p: p.dump("mlp:16"),
        2,
        r"teacher mlp:16 would be untrained; name its --weights",
    ),
    "an unknown teacher": (
        lambda p: ["dump", "--teacher", "abc", *p.dump()[3:]],
        2,
        r"model 'abc' is not a model specification; expected mlp:SIZES, .*",
    ),
    "an unknown student": (
        lambda p: p.train("--student", "abc"),
        2,
        r"model 'abc' is not a model specification; expected mlp:SIZES, .*",
    ),
    "an unknown kind of data": (
        lambda p: p.dump("teacher", "--data", "sql:file"),
        2,
        r"data 'sql:file' is of unknown kind 'sql'; expected idx:DIR, .*",
    ),
    "no kind of data": (
        lambda p: p.train("--data", "data"),
        2,
        r"data 'data' is not a data specification; expected idx:DIR, .*",
    ),
    "an unknown encoding": (
        lambda p: p.dump("teacher", "--encoding", "zip"),
        2,
        r"encoding 'zip' is unknown; expected dense.*",
    ),
    "an unknown augmentation": (
        lambda p: p.dump("teacher", "--augment", "swirl"),
        2,
        r"augmentation 'swirl' in 'swirl' is unknown; expected shift:PIXELS.*",
    ),
    "a temperature of 0 for the cache": (
        lambda p: p.dump("teacher", "--temperature", "0"),
        2,
        r"--temperature is 0\.0; expected a number above 0, up to 1,000,000",
    ),
    "a negative temperature for the student": (
        lambda p: p.train("--temperature", "-4"),
        2,
        r"--temperature is -4\.0; expected a number above 0, up to 1,000,000",
    ),
    "alpha above 1": (
        lambda p: p.train("--alpha", "1.5"),
        2,
        r"--alpha is 1\.5; expected a number from 0 to 1",
    ),
    "alpha below 0": (
        lambda p: p.train("--alpha", "-0.5"),
        2,
        r"--alpha is -0\.5; expected a number from 0 to 1",
    ),
    "a label out of range": (
        lambda p: p.dump("teacher", "--data", p.arrays("label")),
        1,
        r"npz:tiny\.npz@train: sample 200 has label 9; expected 0 to 4, or -1 for none",
    ),
    "a cache that was made with other settings": (
        lambda p: p.dump("teacher", "--temperature", "2", "--out", p.cache.path),
        2,
        r".*/tiny\.h5 was begun with another teacher .*; use the same, give another --out, or .*",
    ),
    "a folder of a run that cannot be made": (
        lambda p: p.train("--out", p.folder / "models.py" / "run"),
        2,
        r"cannot write in .*/models\.py/run: .*/models\.py is a file; give another --out",
    ),
    "a device that is not there": (
        lambda p: p.dump("teacher", "--device", "abacus"),
        2,
        r"device abacus: torch cannot use it here .*; use --device auto or cpu",
    ),
    "another augmentation than the cache's": (
        lambda p: p.train("--augment", "flip"),
        2,
        r"--augment flip is not the cache's own \(none\): .*; leave it out, or add it on top by "
        "--extra-augment if you mean to",
    ),
    "more data than caches": (
        lambda p: p.train("--data", p.data, "--data", p.data),
        2,
        r"2 --data for 1 CACHE; expected one for each, in the same order, or one for all",
    ),
    "fewer data than caches, and more than one": (
        lambda p: p.train(*[p.cache.path] * 2, "--data", p.data, "--data", p.data),
        2,
        r"2 --data for 3 CACHE; expected one for each, in the same order, or one for all",
    ),
    "several data without a cache": (
        lambda p: ["train", *p.train("--data", p.data, "--data", p.data)[2:]],
        2,
        r"2 --data for 0 CACHE; expected one for each, in the same order, or one for all",
    ),
    "several caches of which one is not there": (
        lambda p: p.train("nowhere.h5"),
        1,
        r"nowhere\.h5: No such file or directory; expected a cache as softcache dump makes it",
    ),
    "more shards than samples": (
        lambda p: p.dump("teacher", "--shard", "0/301"),
        2,
        r"301 shards of 300 samples; expected at most one for each",
    ),
    "several views without augmentation": (
        lambda p: p.dump("teacher", "--views", "2:4"),
        2,
        r"2 views without --augment would all be the same; add it, or ask for one view",
    ),
    "no such cache to encode like": (
        lambda p: p.dump("teacher", "--like", "nowhere.h5"),
        1,
        r"nowhere\.h5: No such file or directory; expected a cache as softcache dump makes it",
    ),
    "a cache of another temperature to encode like": (
        lambda p: p.dump("teacher", "--like", p.cache.path, "--temperature", "2"),
        2,
        r"--like .*/tiny\.h5 has temperature 4\.0; this dump has 2\.0",
    ),
    "one cache to merge": (
        lambda p: ["merge", p.cache.path, "--out", p.folder / "new.h5"],
        2,
        r"1 cache to merge; give two or more",
    ),
    "a cache to merge with itself": (
        lambda p: ["merge", p.cache.path, p.cache.path, "--out", p.folder / "new.h5"],
        2,
        r".*/tiny\.h5 has views 0 to 0, .*/tiny\.h5 has 0 to 0: these overlap; the parts must .*",
    ),
    "a cache's folder that cannot be made": (
        lambda p: p.dump("teacher", "--out", p.folder / "models.py" / "new.h5"),
        2,
        r"--out .*/models\.py/new\.h5: cannot make its folder \(.*\); give another --out",
    ),
}


def check_refusal(make: Make, exit_code: int, message: str, place: Place) -> None:
    arguments = make(place)
    before = place.cache.path.read_bytes()
    result = softcache(*arguments)
    assert re.fullmatch(rf"Error: {message}\n", result.stderr), result.stderr
    assert result.exit_code == exit_code
    assert isinstance(result.exception, SystemExit)  # no traceback
    assert result.stdout == ""
    assert place.cache.path.read_bytes() == before
    assert not (place.folder / "new.h5").exists()
    assert not (place.folder / "run" / "student.safetensors").exists()


@pytest.mark.parametrize("what", BAD_INPUTS)
def test_a_bad_input_is_one_line_and_nothing_is_lost(what: str, place: Place) -> None:
    check_refusal(*BAD_INPUTS[what], place)


def test_the_same_command_lines_without_a_fault_go_through(place: Place) -> None:
    for arguments in (place.dump(), place.train(), ["info", place.cache.path]):
        result = softcache(*arguments)
        assert (result.exit_code, result.stderr) == (0, "")


def test_extra_augmentation_is_allowed_by_its_own_option(place: Place) -> None:
    result = softcache(*place.train("--extra-augment", "flip,shift:1"))
    assert (result.exit_code, result.stderr) == (0, "")


def test_an_unfinished_cache_is_shown_and_not_used(place: Place) -> None:
    softcache(*place.dump("raises"))
    unfinished = partial_path(place.folder / "new.h5")
    assert "unfinished, 0.0% of the blocks" in softcache("info", unfinished).stdout
    assert json.loads(softcache("info", unfinished, "--json").stdout)["complete"] is False
    result = softcache(*place.train(cache=unfinished))
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {unfinished} is unfinished, and not one of its views is complete, which training "
        "needs; run the same softcache dump again to go on\n"
    )


def test_an_unfinished_cache_is_not_called_damaged(place: Place) -> None:
    softcache(*place.dump("raises"))
    result = softcache("verify", partial_path(place.folder / "new.h5"))
    assert re.search(r"unfinished.*softcache dump", result.stderr)
    assert not re.search("damaged|repair", result.stderr)


@pytest.mark.parametrize("command", ["info", "verify", "train"])
def test_a_cache_that_has_not_completed_is_told_by_its_final_name(
    command: str, place: Place
) -> None:
    softcache(*place.dump("raises"))
    final = place.folder / "new.h5"
    result = softcache(*(place.train(cache=final) if command == "train" else [command, final]))
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {final}: its dump has not completed (new.h5.partial is there); run the same dump "
        "again, or train from new.h5.partial if a view of it is complete\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dump"], "Missing option '--teacher'"),
        (["train", "cache.h5"], "Missing option '-o' / '--out'"),
        (["info"], r"Missing argument 'CACHE\|URL'"),
        (["dump", "--temperature", "warm"], "'warm' is not a valid float"),
        (["train", "--schedule", "steps"], "'steps' is not one of 'cosine', 'constant'"),
        (["train", "--epoch", "3"], "No such option '?--epoch'?"),
        (["distil"], "No such command 'distil'"),
        (["merge", "--out", "a.h5"], "Missing argument 'CACHES"),
        (["merge", "a.h5", "b.h5"], "Missing option '-o' / '--out'"),
        *(
            (
                ["dump", "--views", views],
                f"'{views}': expected a number of views from 1 up, or a ra",
            )
            for views in ("0", "-1", "8:8", "9:8", "0:0", ":4", "4:", "1:2:3", "many", "1.5", "")
        ),
        *(
            (["dump", "--shard", shard], f"'{shard}': expected i/n with i from 0 to n - 1, such as")
            for shard in ("1", "2/2", "0/0", "-1/2", "0/-2", "1/2/3", "a/b", "/2", "0/", "")
        ),
    ],
)
def test_a_usage_error_is_clicks_own(arguments: list[str], message: str) -> None:
    result = softcache(*arguments)
    assert result.exit_code == 2
    assert re.search(rf"^Error: .*{message}", result.stderr, re.MULTILINE), result.stderr
    assert result.stderr.startswith("Usage: ")
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("views", "header"), [("3", (0, 3)), ("0:3", (0, 3)), ("8:9", (8, 1)), ("8:10", (8, 2))]
)
def test_views_are_a_number_or_a_range(views: str, header: tuple[int, int], place: Place) -> None:
    result = softcache(*place.dump("teacher", "--augment", "flip", "--views", views))
    assert (result.exit_code, result.stderr) == (0, "")
    found = open_cache(place.folder / "new.h5").header
    assert (found.first_view, found.views) == header


def test_shards_are_numbered_from_zero_and_hold_all_samples_together(place: Place) -> None:
    parts = []
    for shard in ("0/3", "1/3", "2/3"):
        out = place.folder / f"{shard[0]}.h5"
        result = softcache(*place.dump("teacher", "--shard", shard, "--out", out))
        assert (result.exit_code, result.stderr) == (0, "")
        header = open_cache(out).header
        parts.append(range(header.first_sample, header.first_sample + header.samples))
        assert header.data_samples == 300
    assert [sample for part in parts for sample in part] == list(range(300))


def test_shards_are_merged_and_train_together(place: Place, teacher_file: Path) -> None:
    parts = [place.folder / f"{part}.h5" for part in "01"]
    for part in parts:
        options: Arguments = ["--shard", f"{part.stem}/2", "--like", place.cache.path]
        options = [*options, "--out", part]
        softcache(*place.dump(f"{teacher_file}:teacher", *options))
    result = softcache("merge", *parts, "--out", place.folder / "new.h5")
    assert (result.exit_code, result.stderr) == (0, "")
    merged = open_cache(place.folder / "new.h5")
    assert result.stdout == (
        f"{merged.path}: 300 samples x 1 view(s), {merged.header.file_bytes:,} bytes; "
        f"content id {merged.content_id()}\n"
    )
    result = softcache(*place.train(parts[1], cache=parts[0]))
    assert (result.exit_code, result.stderr) == (0, "")
    facts = json.loads((place.folder / "run" / "config.json").read_text())
    assert facts["content_ids"] == [open_cache(part).content_id() for part in parts]
    assert facts["settings"]["cache"] == ["0.h5", "1.h5"]


def test_a_traceback_is_shown_if_it_is_asked_for(place: Place) -> None:
    assert isinstance(softcache("--traceback", *place.dump("nan")).exception, ModelError)


@pytest.mark.parametrize("command", ["dump", "train"])
def test_ctrl_c_before_the_first_row_or_step_is_one_line_too(
    command: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dump_loop if command == "dump" else train_loop, "open_source", stop)
    result = softcache(*(place.dump() if command == "dump" else place.train()))
    assert result.exit_code == 130
    assert re.fullmatch(r"Error: stopped.*\n", result.stderr)
