"""The command line: every bad input is reported in one line on stderr, and nothing is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from softcache.cache import open_cache
from softcache.cache.reader import partial_path
from softcache.dump import prepare as dump_prepare
from softcache.errors import ModelError
from softcache.train import prepare as train_prepare
from tests.cli.app_cases import Arguments, Workspace, softcache, without_verdicts

Make = Callable[[Workspace], Arguments]


# name of the case -> the command line, the exit code, the message
BAD_INPUTS: dict[str, tuple[Make, int, str]] = {
    "no such cache to train from": (
        lambda w: w.train(cache="nowhere.h5"),
        1,
        r"nowhere\.h5: No such file or directory; expected a cache made by softcache dump",
    ),
    "no such cache to show": (
        lambda w: ["info", "nowhere.h5"],
        1,
        r"nowhere\.h5: No such file or directory; expected a cache made by softcache dump",
    ),
    "no such cache to verify": (
        lambda w: ["verify", "nowhere.h5"],
        1,
        r"nowhere\.h5: No such file or directory; expected a cache made by softcache dump",
    ),
    "no such data": (
        lambda w: w.dump("teacher", "--data", "npz:nowhere.npz"),
        1,
        r"npz:nowhere\.npz: no such file",
    ),
    "no such model file": (
        lambda w: w.dump("nowhere.py:teacher"),
        2,
        r"no such file: nowhere\.py; expected FILE\.py:CALLABLE",
    ),
    "no such weights": (
        lambda w: w.dump("teacher", "--weights", "nowhere.safetensors"),
        1,
        r"weights nowhere\.safetensors: no such file",
    ),
    "a folder for a cache": (
        lambda w: w.train(cache=w.folder),
        1,
        r".*/workspace: this is a folder, not a file; give a cache made by softcache dump",
    ),
    "an empty file for a cache": (
        lambda w: w.train(cache=w.file("empty", b"")),
        1,
        r".*/empty: the file is empty, not a cache.*",
    ),
    "text for a cache": (
        lambda w: ["info", w.file("notes.txt", b"soft targets, soon")],
        1,
        r".*/notes\.txt: a file that begins with 736f667420746172, not a cache; make one with .*",
    ),
    "data for a cache": (
        lambda w: w.train(cache=w.data.removeprefix("npz:")),
        1,
        r".*/tiny\.npz: a zip archive \(npz, pt or pt2\), not a cache; make one with softcache dump",
    ),
    "a foreign HDF5 file": (
        lambda w: ["info", w.hdf5()],
        1,
        r".*/foreign\.h5: an HDF5 file, but not a softcache cache; make one with softcache dump",
    ),
    "a cut cache": (
        lambda w: w.train(cache=w.file("cut.h5", w.cache.path.read_bytes()[:-1])),
        1,
        r".*/cut\.h5: the file has [\d,]+ bytes, its header says [\d,]+; .* copy it again",
    ),
    "a cache with trailing bytes": (
        lambda w: ["verify", w.file("long.h5", w.cache.path.read_bytes() + b"!")],
        1,
        r".*/long\.h5: the file has [\d,]+ bytes, its header says [\d,]+; .* copy it again",
    ),
    "a damaged cache": (
        lambda w: w.train(cache=w.file("bad.h5", w.cache.path.read_bytes()[:-1] + b"\7")),
        1,
        r".*/bad\.h5 is damaged: .*",
    ),
    "another cache than expected": (
        lambda w: ["verify", w.cache.path, "--expect", "abc"],
        1,
        r".*/tiny\.h5 is intact, but it is another cache: .* is [0-9a-f]{64}, expected abc; check .*",
    ),
    "a cache of other data": (
        lambda w: w.train("--data", w.arrays("other")),
        1,
        r"sample 0 of npz:tiny\.npz@train is not in .*/tiny\.h5, .* or dump a cache of these",
    ),
    "a student of too few classes": (
        lambda w: w.train("--student", f"{w.folder}/models.py:narrow"),
        1,
        r"student returned 3 outputs for 5 classes; expected one for each class of the cache or .*",
    ),
    "other classes than the cache's": (
        lambda w: w.train("--classes", "7"),
        2,
        r"--classes is 7, but .*/tiny\.h5 has 5 classes; leave it out",
    ),
    "other classes than the teacher's": (
        lambda w: w.dump("teacher", "--classes", "7"),
        1,
        r"teacher .*:teacher returns shape \(1, 5\) for samples 0 to 0; expected .* \(1, 7\)",
    ),
    "a teacher that returns NaN": (
        lambda w: w.dump("nan"),
        1,
        r"teacher .*:nan returns nan for sample 0, class 0; expected finite logits.*",
    ),
    "a teacher that returns a tuple": (
        lambda w: w.dump("pair", "--classes", "5"),
        1,
        r"teacher .*:pair returns tuple for samples 0 to 0; expected .* \(1, 5\): wrap it .*",
    ),
    "a teacher of too few classes": (
        lambda w: w.dump("narrow"),
        1,
        r"npz:tiny\.npz@train: sample \d+ has label [34]; expected 0 to 2, or -1 for none",
    ),
    "a teacher that raises in the middle of the dump": (
        lambda w: w.dump("raises"),
        1,
        r"teacher .*:raises raised ValueError on samples 0 to 255, inputs .* of .*: no more",
    ),
    "weights that do not fit": (
        lambda w: w.dump("teacher", "--weights", w.weights()),
        1,
        r"weights .*/weights\.pt do not fit the model: linear\.bias is missing; bias is not in the "
        r"model; linear\.weight is \(5, 63\) in the file, \(5, 64\) in the model; .*; use the "
        r"specification of the model .*",
    ),
    "weights that are no weights": (
        lambda w: w.dump("teacher", "--weights", w.file("w.safetensors", b"nothing")),
        1,
        r"weights .*/w\.safetensors cannot be read: .*",
    ),
    "an untrained teacher": (
        lambda w: w.dump("mlp:16"),
        2,
        r"teacher mlp:16 would be untrained; name its weights file with --weights",
    ),
    "an unknown teacher": (
        lambda w: ["dump", "--teacher", "abc", *w.dump()[3:]],
        2,
        r"model 'abc' is not a model specification; expected mlp:SIZES, .*",
    ),
    "an unknown student": (
        lambda w: w.train("--student", "abc"),
        2,
        r"model 'abc' is not a model specification; expected mlp:SIZES, .*",
    ),
    "an unknown kind of data": (
        lambda w: w.dump("teacher", "--data", "sql:file"),
        2,
        r"data 'sql:file' is of unknown kind 'sql'; expected idx:DIR, .*",
    ),
    "no kind of data": (
        lambda w: w.train("--data", "data"),
        2,
        r"data 'data' is not a data specification; expected idx:DIR, .*",
    ),
    "an unknown encoding": (
        lambda w: w.dump("teacher", "--encoding", "zip"),
        2,
        r"encoding 'zip' is unknown; expected dense.*",
    ),
    "an unknown augmentation": (
        lambda w: w.dump("teacher", "--augment", "swirl"),
        2,
        r"augmentation 'swirl' in 'swirl' is unknown; expected shift:PIXELS.*",
    ),
    "a temperature of 0 for the cache": (
        lambda w: w.dump("teacher", "--temperature", "0"),
        2,
        r"--temperature is 0\.0; expected a number above 0, up to 1,000,000",
    ),
    "a negative temperature for the student": (
        lambda w: w.train("--temperature", "-4"),
        2,
        r"--temperature is -4\.0; expected a number above 0, up to 1,000,000",
    ),
    "alpha above 1": (
        lambda w: w.train("--alpha", "1.5"),
        2,
        r"--alpha is 1\.5; expected a number from 0 to 1",
    ),
    "alpha below 0": (
        lambda w: w.train("--alpha", "-0.5"),
        2,
        r"--alpha is -0\.5; expected a number from 0 to 1",
    ),
    "a label out of range": (
        lambda w: w.dump("teacher", "--data", w.arrays("label")),
        1,
        r"npz:tiny\.npz@train: sample 200 has label 9; expected 0 to 4, or -1 for none",
    ),
    "a cache that was made with other settings": (
        lambda w: w.dump("teacher", "--temperature", "2", "--out", w.cache.path),
        2,
        r".*/tiny\.h5 was started with another teacher .*; use the same, give another --out, or .*",
    ),
    "a folder of a run that cannot be made": (
        lambda w: w.train("--out", w.folder / "models.py" / "run"),
        2,
        r"cannot write in .*/models\.py/run: .*/models\.py is a file; give another --out",
    ),
    "a device that is not there": (
        lambda w: w.dump("teacher", "--device", "abacus"),
        2,
        r"device abacus: torch cannot use it here .*; use --device auto or cpu",
    ),
    "another augmentation than the cache's": (
        lambda w: w.train("--augment", "flip"),
        2,
        r"--augment flip is not the cache's own \(none\): .*; leave it out, or add it on top "
        "with --extra-augment",
    ),
    "more data than caches": (
        lambda w: w.train("--data", w.data, "--data", w.data),
        2,
        r"2 --data for 1 CACHE; expected one for each, in the same order, or one for all",
    ),
    "fewer data than caches, and more than one": (
        lambda w: w.train(*[w.cache.path] * 2, "--data", w.data, "--data", w.data),
        2,
        r"2 --data for 3 CACHE; expected one for each, in the same order, or one for all",
    ),
    "several data without a cache": (
        lambda w: ["train", *w.train("--data", w.data, "--data", w.data)[2:]],
        2,
        r"2 --data for 0 CACHE; expected one for each, in the same order, or one for all",
    ),
    "several caches of which one is not there": (
        lambda w: w.train("nowhere.h5"),
        1,
        r"nowhere\.h5: No such file or directory; expected a cache made by softcache dump",
    ),
    "more shards than samples": (
        lambda w: w.dump("teacher", "--shard", "0/301"),
        2,
        r"301 shards of 300 samples; expected at most one shard per sample",
    ),
    "several views without augmentation": (
        lambda w: w.dump("teacher", "--views", "2:4"),
        2,
        r"2 views without --augment would all be the same; add it, or ask for one view .*",
    ),
    "no such cache to encode like": (
        lambda w: w.dump("teacher", "--like", "nowhere.h5"),
        1,
        r"nowhere\.h5: No such file or directory; expected a cache made by softcache dump",
    ),
    "a cache of another temperature to encode like": (
        lambda w: w.dump("teacher", "--like", w.cache.path, "--temperature", "2"),
        2,
        r"--like .*/tiny\.h5 has temperature 4\.0; this dump has 2\.0",
    ),
    "one cache to merge": (
        lambda w: ["merge", w.cache.path, "--out", w.folder / "new.h5"],
        2,
        r"1 cache to merge; give two or more",
    ),
    "a cache to merge with itself": (
        lambda w: ["merge", w.cache.path, w.cache.path, "--out", w.folder / "new.h5"],
        2,
        r".*/tiny\.h5 has views 0 to 0, .*/tiny\.h5 has 0 to 0: these overlap; the parts must .*",
    ),
    "a cache's folder that cannot be made": (
        lambda w: w.dump("teacher", "--out", w.folder / "models.py" / "new.h5"),
        2,
        r"--out .*/models\.py/new\.h5: cannot create its folder \(.*\); give another --out",
    ),
}


def check_refusal(make: Make, exit_code: int, message: str, workspace: Workspace) -> None:
    arguments = make(workspace)
    before = workspace.cache.path.read_bytes()
    result = softcache(*arguments)
    assert re.fullmatch(rf"Error: {message}\n", result.stderr), result.stderr
    assert result.exit_code == exit_code
    assert isinstance(result.exception, SystemExit)  # no traceback
    # what fails in the first step comes after the temperature was chosen
    assert [
        line for line in result.stdout.splitlines() if not line.startswith("temperature ")
    ] == []
    assert workspace.cache.path.read_bytes() == before
    assert not (workspace.folder / "new.h5").exists()
    assert not (workspace.folder / "run" / "student.safetensors").exists()


@pytest.mark.parametrize("what", BAD_INPUTS)
def test_a_bad_input_is_one_line_and_nothing_is_lost(what: str, workspace: Workspace) -> None:
    check_refusal(*BAD_INPUTS[what], workspace)


def test_the_same_command_lines_without_a_fault_go_through(workspace: Workspace) -> None:
    for arguments in (workspace.dump(), workspace.train(), ["info", workspace.cache.path]):
        result = softcache(*arguments)
        assert (result.exit_code, without_verdicts(result.stderr)) == (0, "")


def test_extra_augmentation_is_allowed_by_its_own_option(workspace: Workspace) -> None:
    result = softcache(*workspace.train("--extra-augment", "flip,shift:1"))
    assert (result.exit_code, without_verdicts(result.stderr)) == (0, "")


def test_an_unfinished_cache_is_shown_and_not_used(workspace: Workspace) -> None:
    softcache(*workspace.dump("raises"))
    unfinished = partial_path(workspace.folder / "new.h5")
    assert "unfinished, 0.0% of the blocks" in softcache("info", unfinished).stdout
    assert json.loads(softcache("info", unfinished, "--json").stdout)["complete"] is False
    result = softcache(*workspace.train(cache=unfinished))
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {unfinished} is unfinished, and training needs at least its first view complete; run "
        "the same softcache dump again to continue\n"
    )


def test_an_unfinished_cache_is_not_called_damaged(workspace: Workspace) -> None:
    softcache(*workspace.dump("raises"))
    result = softcache("verify", partial_path(workspace.folder / "new.h5"))
    assert re.search(r"unfinished.*softcache dump", result.stderr)
    assert not re.search("damaged|repair", result.stderr)


@pytest.mark.parametrize("command", ["info", "verify", "train"])
def test_a_cache_that_has_not_completed_is_told_by_its_final_name(
    command: str, workspace: Workspace
) -> None:
    softcache(*workspace.dump("raises"))
    final = workspace.folder / "new.h5"
    result = softcache(*(workspace.train(cache=final) if command == "train" else [command, final]))
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {final}: its dump has not completed (new.h5.partial exists); run the same dump "
        "again, or train from new.h5.partial if its first view is complete\n"
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
                f"'{views}': expected a number of views, 1 or more, or a ra",
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
def test_views_are_a_number_or_a_range(
    views: str, header: tuple[int, int], workspace: Workspace
) -> None:
    result = softcache(*workspace.dump("teacher", "--augment", "flip", "--views", views))
    assert (result.exit_code, without_verdicts(result.stderr)) == (0, "")
    written = open_cache(workspace.folder / "new.h5").header
    assert (written.first_view, written.views) == header


def test_shards_are_numbered_from_zero_and_hold_all_samples_together(workspace: Workspace) -> None:
    sample_ranges = []
    for shard in ("0/3", "1/3", "2/3"):
        out = workspace.folder / f"{shard[0]}.h5"
        result = softcache(*workspace.dump("teacher", "--shard", shard, "--out", out))
        assert (result.exit_code, without_verdicts(result.stderr)) == (0, "")
        header = open_cache(out).header
        sample_ranges.append(header.sample_range)
        assert header.data_samples == 300
    sample_ids = [sample_id for sample_range in sample_ranges for sample_id in sample_range]
    assert sample_ids == list(range(300))


def test_shards_are_merged_and_train_together(workspace: Workspace, teacher_file: Path) -> None:
    shards = [workspace.folder / f"{number}.h5" for number in (0, 1)]
    for shard in shards:
        options: Arguments = ["--shard", f"{shard.stem}/2", "--like", workspace.cache.path]
        options = [*options, "--out", shard]
        softcache(*workspace.dump(f"{teacher_file}:teacher", *options))
    result = softcache("merge", *shards, "--out", workspace.folder / "new.h5")
    assert (result.exit_code, without_verdicts(result.stderr)) == (0, "")
    merged = open_cache(workspace.folder / "new.h5")
    assert result.stdout == (
        f"{merged.path}: 300 samples x 1 view(s), {merged.header.file_bytes:,} bytes; "
        f"content id {merged.content_id()}\n"
    )
    result = softcache(*workspace.train(shards[1], cache=shards[0]))
    assert (result.exit_code, without_verdicts(result.stderr)) == (0, "")
    facts = json.loads((workspace.folder / "run" / "config.json").read_text())
    assert facts["content_ids"] == [open_cache(shard).content_id() for shard in shards]
    assert facts["settings"]["cache"] == ["0.h5", "1.h5"]


def test_a_traceback_is_shown_if_it_is_asked_for(workspace: Workspace) -> None:
    assert isinstance(softcache("--traceback", *workspace.dump("nan")).exception, ModelError)


@pytest.mark.parametrize("command", ["dump", "train"])
def test_ctrl_c_before_the_first_row_or_step_is_one_line_too(
    command: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dump_prepare if command == "dump" else train_prepare, "open_source", stop)
    result = softcache(*(workspace.dump() if command == "dump" else workspace.train()))
    assert result.exit_code == 130
    assert re.fullmatch(r"Error: stopped.*\n", result.stderr)
