"""`softcache verify --teacher`: random rows are computed again and compared with the stored ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from softcache.cache import Cache, open_cache
from softcache.cache.header import PREAMBLE, preamble
from softcache.cache.reader import partial_path
from softcache.cli.app import main
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import DataError, FormatError, ModelError, SettingsError
from softcache.files.recheck import recheck_rows
from tests.conftest import SAMPLES, Run

Recheck = Callable[..., str]


@pytest.fixture
def recheck(teacher_file: Path, data_file: Path) -> Recheck:
    """Recheck a cache, by default with the teacher and the data of the tiny cache."""

    def recheck(cache: Cache, **options: Any) -> str:
        defaults: dict[str, Any] = {
            "teacher": [f"{teacher_file}:teacher"],
            "weights": [],
            "data": f"npz:{data_file}",
            "rows": 256,
            "device": "cpu",
        }
        return recheck_rows(cache.path, **defaults | options)

    return recheck


@pytest.fixture
def other_teacher(teacher_file: Path, tmp_path: Path) -> str:
    """The same architecture with other weights."""
    path = tmp_path / "other.py"
    path.write_text(teacher_file.read_text().replace("manual_seed(7)", "manual_seed(8)"))
    return f"{path}:teacher"


def mean_kl(line: str) -> float:
    """The mean KL in a line of fidelity_line()."""
    return float(line.split(" mean ")[1].split(",")[0])


def save_data(folder: Path, data_file: Path, **changes: Any) -> str:
    """The training split of the tiny data with other arrays."""
    arrays = np.load(data_file)
    train = {"x_train": arrays["x_train"], "y_train": arrays["y_train"]} | changes
    path = folder / "changed.npz"
    np.savez(path, **train)
    return f"npz:{path}"


ENCODINGS = ["dense", "quantized", "topk:2", "basis:4,2", "sampled:3"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_teacher_that_made_a_cache_is_recognised(
    encoding: str, dump_config: DumpConfig, recheck: Recheck
) -> None:
    cache = dump(replace(dump_config, eval_data=None, encoding=encoding))
    line = recheck(cache)
    assert line.startswith("fidelity: KL(")
    assert "nats on 256 rows; mean at T=4 " in line
    assert " on 7 rows" in recheck(cache, rows=7)
    assert f" on {SAMPLES} rows" in recheck(cache, rows=10**9)


REFUSED = (
    r"tiny\.h5 is not from this teacher: \d+\.\d% of the probability differs from its rows when they are "
    r"encoded again; fidelity: KL.* on 256 rows; .*\. Check teacher, weights and data against softcache info$"
)


@pytest.mark.parametrize(
    "encoding",
    ["dense", "quantized", "topk:2", "basis:4,2", "sampled:3"],
)
def test_another_teacher_is_refused(
    encoding: str, dump_config: DumpConfig, recheck: Recheck, other_teacher: str
) -> None:
    cache = dump(replace(dump_config, eval_data=None, encoding=encoding))
    with pytest.raises(DataError, match=REFUSED):
        recheck(cache, teacher=[other_teacher])


@pytest.mark.parametrize(
    "encoding",
    [
        "dense",
        "quantized",
        "basis:4,2",
        "topk:2",
        "sampled:3",
    ],
)
def test_a_teacher_trained_a_little_further_is_refused(
    encoding: str, dump_config: DumpConfig, recheck: Recheck, teacher_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "further.py"
    path.write_text(
        teacher_file.read_text().replace("generator=generator)", "generator=generator) * 1.3")
    )
    cache = dump(replace(dump_config, eval_data=None, encoding=encoding))
    with pytest.raises(DataError, match=REFUSED):
        recheck(cache, teacher=[f"{path}:teacher"])


def test_forged_rows_are_noticed_even_without_checking_digests(
    dump_config: DumpConfig, recheck: Recheck
) -> None:
    cache = dump(replace(dump_config, eval_data=None))
    array = cache.header.array("log_probs")
    raw = bytearray(cache.path.read_bytes())
    rows = slice(array.offset, array.offset + array.nbytes)
    stored = np.frombuffer(raw[rows], array.dtype).reshape(SAMPLES, -1)
    raw[rows] = stored[:, ::-1].tobytes()
    cache.path.write_bytes(raw)
    with pytest.raises(DataError, match="is not from this teacher"):
        recheck(cache)


def test_augmented_views_are_replayed(dump_config: DumpConfig, recheck: Recheck) -> None:
    config = replace(dump_config, eval_data=None, views=3, augment="shift:2,flip", seed=11)
    assert "mean at T=4" in recheck(dump(config))


@pytest.mark.parametrize("augment", ["crop:0.5,jitter:0.3,cutout:3", "shift:1,mixup"])
def test_views_of_any_kind_are_replayed(
    augment: str, dump_config: DumpConfig, recheck: Recheck
) -> None:
    config = replace(dump_config, eval_data=None, views=3, augment=augment, seed=11)
    assert mean_kl(recheck(dump(config))) < 1e-5


def test_the_users_own_augmentation_must_be_given_again(
    dump_config: DumpConfig, recheck: Recheck, tmp_path: Path
) -> None:
    code = tmp_path / "views.py"
    code.write_text("def negative(image):\n    return 255 - image\n")
    spec = f"{code}:negative,flip"
    cache = dump(replace(dump_config, eval_data=None, augment=spec))
    assert "mean at T=4" in recheck(cache, augment=spec)
    with pytest.raises(
        SettingsError, match=r"augmented by views\.py:negative,flip; give all of this"
    ):
        recheck(cache)
    with pytest.raises(SettingsError, match=r"--augment flip is not the cache's own \(views\.py"):
        recheck(cache, augment="flip")
    code.write_text("def negative(image):\n    return 254 - image // 2\n")
    with pytest.raises(DataError, match=r"in view 0 is not what the teacher of .* saw"):
        recheck(cache, augment=spec)


@pytest.mark.parametrize("augment", [None, "shift:1,mixup"])
def test_a_shard_is_compared_with_its_part_of_the_whole_data(
    augment: str | None, dump_config: DumpConfig, recheck: Recheck
) -> None:
    config = replace(dump_config, eval_data=None, augment=augment, shard=(1, 3), seed=11)
    line = recheck(dump(config))
    assert " on 100 rows" in line
    assert mean_kl(line) < 1e-5


def test_a_shard_is_not_compared_with_its_samples_alone(
    dump_config: DumpConfig, recheck: Recheck, data_file: Path, tmp_path: Path
) -> None:
    shard = dump(replace(dump_config, eval_data=None, shard=(1, 3)))
    arrays = np.load(data_file)
    samples = {name: arrays[name][100:200] for name in ("x_train", "y_train")}
    with pytest.raises(
        DataError, match=r"tiny\.h5 is a shard of 300 samples, .* has 100; give the whole data set"
    ):
        recheck(shard, data=save_data(tmp_path, data_file, **samples))


def test_a_cache_of_low_precision_is_compared_at_that_precision(
    dump_config: DumpConfig, recheck: Recheck
) -> None:
    line = recheck(dump(replace(dump_config, eval_data=None, precision="bf16")))
    assert mean_kl(line) < 1e-6


# several teachers


def test_several_teachers_are_averaged_with_the_weights_of_the_cache(
    dump_config: DumpConfig, recheck: Recheck, other_teacher: str
) -> None:
    teachers = [str(dump_config.teacher), other_teacher]
    config = replace(dump_config, eval_data=None, teacher=teachers, teacher_weight=[3, 1])
    cache = dump(config)
    assert "mean at T=4" in recheck(cache, teacher=teachers)
    with pytest.raises(DataError, match="is not from this teacher"):
        recheck(cache, teacher=teachers[::-1])


def test_one_teacher_of_two_is_refused(
    dump_config: DumpConfig, recheck: Recheck, other_teacher: str
) -> None:
    config = replace(dump_config, eval_data=None, teacher=[str(dump_config.teacher), other_teacher])
    cache = dump(config)
    with pytest.raises(
        SettingsError,
        match=r"^1 --teacher for a cache with 2 \(models\.py:teacher, other\.py:teacher\); give all of",
    ):
        recheck(cache)


# teachers, data and caches that do not fit


def test_teacher_and_data_go_together(cache: Cache, recheck: Recheck) -> None:
    with pytest.raises(SettingsError, match="--teacher and --data go together"):
        recheck(cache, teacher=[])
    with pytest.raises(SettingsError, match="--teacher and --data go together"):
        recheck(cache, data=None)


def test_other_data_are_refused(
    cache: Cache, recheck: Recheck, data_file: Path, tmp_path: Path
) -> None:
    images = np.load(data_file)["x_train"].copy()
    images[17] += 1
    data = save_data(tmp_path, data_file, x_train=images)
    with pytest.raises(
        DataError, match=r"sample 17 of npz:changed\.npz@train is not in .*tiny\.h5"
    ):
        recheck(cache, data=data)


def test_cut_data_are_refused(
    cache: Cache, recheck: Recheck, data_file: Path, tmp_path: Path
) -> None:
    arrays = np.load(data_file)
    cut = {name: arrays[name][:250] for name in ("x_train", "y_train")}
    with pytest.raises(
        DataError, match=r"changed\.npz@train has 250 of the 300 samples of .*; all are needed here"
    ):
        recheck(cache, data=save_data(tmp_path, data_file, **cut))


def test_data_in_another_order_are_refused(
    cache: Cache, recheck: Recheck, data_file: Path, tmp_path: Path
) -> None:
    arrays = np.load(data_file)
    reversed_data = {name: arrays[name][::-1] for name in ("x_train", "y_train")}
    with pytest.raises(
        DataError, match=r"changed\.npz is in another order than .*tiny\.h5; give it in the order"
    ):
        recheck(cache, data=save_data(tmp_path, data_file, **reversed_data))


def test_a_teacher_of_other_classes_is_refused(
    cache: Cache, recheck: Recheck, teacher_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "wide.py"
    path.write_text(teacher_file.read_text().replace("Linear(64, 5)", "Linear(64, 6)"))
    with pytest.raises(ModelError, match=r"returns shape \(1, 6\) .*expected .*\(1, 5\)"):
        recheck(cache, teacher=[f"{path}:teacher"])


def test_weights_for_each_teacher_or_none(cache: Cache, recheck: Recheck, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="2 --weights for 1 --teacher; expected one for each"):
        recheck(cache, weights=[tmp_path / "a", tmp_path / "b"])


def test_an_unfinished_cache_is_refused(cache: Cache, recheck: Recheck) -> None:
    cache.path.rename(partial_path(cache.path))
    with pytest.raises(FormatError, match="its dump has not completed"):
        recheck(cache)


def forge(cache: Cache, **changes: object) -> Cache:
    """The same file with another header, as an attacker could write it."""
    text = json.dumps(json.loads(cache.header_bytes) | changes).encode("ascii")
    room = cache.header.user_block // 2 - PREAMBLE.size
    with cache.path.open("r+b") as file:
        file.write(preamble(PREAMBLE.size, text) + text.ljust(room, b"\0"))
    return open_cache(cache.path)


def test_a_header_written_again_as_it_was_is_good(cache: Cache, recheck: Recheck) -> None:
    # so that the headers below are refused because of their values
    assert "mean at T=4" in recheck(forge(cache))


@pytest.mark.parametrize(
    "changes",
    [
        {"teachers": [{"name": "t", "parameters": 1, "weight": "much"}]},
        {"teachers": [{"name": "t", "parameters": 1, "weight": None}]},
        {"teachers": [{"name": "t", "parameters": 1, "weight": -1}]},
        {"summary": {"entropy": 1.0, "agreement": 0.5, "rows": 9, "fidelity": [1]}},
        {"summary": {"entropy": 1.0, "agreement": 0.5, "rows": 9, "fidelity": {"mean": "0"}}},
    ],
    ids=["weight of text", "weight null", "weight below 0", "fidelity a list", "mean of text"],
)
def test_a_forged_header_is_refused(
    changes: dict[str, Any], cache: Cache, recheck: Recheck
) -> None:
    with pytest.raises(
        FormatError, match=r"tiny\.h5: (teachers is|summary has fidelity) .*; expected"
    ):
        recheck(forge(cache, **changes))


# on the command line


def test_the_command_accepts_the_right_teacher(
    cache: Cache, teacher_file: Path, data_file: Path
) -> None:
    teacher, data = f"{teacher_file}:teacher", f"npz:{data_file}"
    arguments = ["verify", str(cache.path), "--teacher", teacher, "--data", data, "--rows", "50"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    intact, line = result.stdout.splitlines()
    assert intact == f"{cache.path}: intact, content id {cache.content_id()}"
    assert line.startswith("fidelity: KL(teacher ‖ stored) mean ")
    assert " on 50 rows; " in line


def test_the_command_refuses_another_teacher_in_one_line(
    cache: Cache, run: Run, data_file: Path, other_teacher: str
) -> None:
    result = run("verify", cache.path, "--teacher", other_teacher, "--data", f"npz:{data_file}")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(
        f"Error: {cache.path} is not from this teacher: "
    )
    assert "Traceback" not in result.stderr
