"""A dump of samples with many rows writes the same bytes however it is divided, stopped or shared out."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softcache.cache import Cache, open_cache
from softcache.cache import writer as cache_writer
from softcache.cache.reader import partial_path
from softcache.data.open import open_source
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.dump.rows import sample_batches
from softcache.errors import DataError, Interrupted, SettingsError
from softcache.util.callables import import_callable
from tests.commands import softcache
from tests.dump.test_processes import environment
from tests.token_caches import (
    LONGEST,
    frame_config,
    small_blocks,
    token_cache,
    token_config,
    write_inputs,
)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DumpConfig:
    """A dump of documents in small blocks, which are committed at once."""
    small_blocks(monkeypatch)
    monkeypatch.setattr(cache_writer, "COMMIT_SECONDS", 0.0)
    return token_config(tmp_path)


def documents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ids.jsonl").read_text().splitlines()]


# what is written
def test_a_row_is_what_the_teacher_says_where_the_next_token_counts(
    config: DumpConfig, tmp_path: Path
) -> None:
    cache, teacher = dump(config), import_callable(config.teachers[0], what="teacher")()
    stored, row = cache.rows(0, np.arange(cache.header.row_count)), 0
    for document in documents(tmp_path):
        ids = document["input_ids"]
        counts = document.get("loss_mask", [True] * len(ids))
        with torch.inference_mode():
            expected = teacher(torch.tensor([ids])).log_softmax(-1)[0].numpy()
        for position in range(len(ids) - 1):
            if counts[position + 1]:
                np.testing.assert_allclose(stored[row], expected[position], atol=6e-3, rtol=2e-3)
                assert cache.labels[row] == ids[position + 1]
                row += 1
    assert row == cache.header.row_count


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_tokens": 1},
        {"batch_tokens": 70},
        {"batch_size": 1},
        {"batch_size": 7},
        {"workers": 2},
    ],
    ids=str,
)
def test_batches_do_not_show(config: DumpConfig, changes: dict[str, Any]) -> None:
    assert dump(replace(config, **changes)).path.read_bytes() == token_cache()


def test_each_document_is_in_one_batch_of_few_tokens_and_little_padding(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    source = open_source(f"ids:{tmp_path / 'ids.jsonl'}")
    lengths = [len(document["input_ids"]) for document in documents(tmp_path)]
    for limit in (1, 64, 100, 10_000):
        windows = sample_batches(source, range(3, 37), 256, limit)
        batches = [batch.tolist() for window in windows for batch in window]
        assert sorted(sample for batch in batches for sample in batch) == list(range(3, 37))
        for batch in batches:
            longest = max(lengths[sample] for sample in batch)
            assert len(batch) == 1 or len(batch) * longest <= limit
        for window in windows:
            samples = sorted(sample for batch in window for sample in batch)
            assert samples == list(range(samples[0], samples[-1] + 1)), (
                "windows are adjacent samples"
            )


def test_what_a_token_costs_beyond_its_row(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    draw = np.random.default_rng(0)
    lengths = draw.integers(150, 250, 60)
    lines = [json.dumps({"input_ids": draw.integers(0, 24, n).tolist()}) for n in lengths]
    (tmp_path / "ids.jsonl").write_text("\n".join(lines))
    header = dump(token_config(tmp_path, embed_inputs=False)).header
    constant = ("class_names", "fingerprinted", "fingerprints")  # for any number of tokens
    arrays = [a for a in header.arrays if a.axis != "rows" and a.name not in constant]
    assert {a.name for a in arrays} == {
        "labels", "keys", "offsets", "run_rows", "run_positions", "digests", "sample_digests",
    }  # fmt: skip
    assert 4 < sum(a.nbytes for a in arrays) / header.row_count < 4.25


# stops
class Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("writes", [1, 2, 9, 17, 30])
def test_a_stopped_dump_goes_on(
    config: DumpConfig, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, batch_tokens=2 * LONGEST)
    write, counter = cache_writer.Writer.write, count(1)

    def stopping(self: cache_writer.Writer, *arguments: Any) -> None:
        if next(counter) == writes:
            raise Stop
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer.Writer, "write", stopping)
        with pytest.raises(Interrupted, match="stopped; the finished rows are kept in"):
            dump(config)
    assert partial_path(config.out).exists()
    assert dump(config).path.read_bytes() == token_cache()


KILLED = """
import os, random, signal, sys
from pathlib import Path
import pytest
from softcache.cache import open_cache
from softcache.cache import writer
from softcache.cache.reader import partial_path
from softcache.dump.loop import dump
from tests.token_caches import frame_config, small_blocks, token_config

folder = Path(sys.argv[1])
small_blocks(pytest.MonkeyPatch())
writer.COMMIT_BYTES = 500
draw, kills = random.Random(int(sys.argv[2])), 0

def committed(config):
    try:
        cache = open_cache(partial_path(config.out), unfinished=True)
    except Exception:
        return 0
    return 2 * cache.header.views * cache.header.blocks - cache.missing_blocks()

def child(config, calls):
    for name in ("pwrite", "fdatasync", "fsync"):
        def watched(*arguments, real=getattr(os, name)):
            nonlocal calls
            calls -= 1
            if calls == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)
        setattr(os, name, watched)
    sys.stdout = open(os.devnull, "w")
    dump(config)
    os._exit(0)

for config in (token_config(folder, batch_tokens=60), frame_config(folder, out=folder / "frames.h5")):
    for _ in range(100):
        kept, calls = committed(config), draw.randint(1, 30)
        process = os.fork()
        if not process:
            child(config, calls)
        status = os.waitpid(process, 0)[1]
        if not status:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        assert committed(config) >= kept
        kills += 1
print("kills", kills)
"""


def test_kills_at_random_points_lose_nothing(config: DumpConfig, tmp_path: Path) -> None:
    (tmp_path / "killed").mkdir()
    write_inputs(tmp_path / "killed")
    result = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "killed", "1"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split("kills ")[1]) >= 5
    assert (tmp_path / "killed" / "whole.h5").read_bytes() == token_cache()
    frames = dump(frame_config(tmp_path, out=tmp_path / "frames.h5"))
    assert (tmp_path / "killed" / "frames.h5").read_bytes() == frames.path.read_bytes()


def test_other_documents_do_not_go_on(
    config: DumpConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(self: cache_writer.Writer, *arguments: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer.Writer, "write", stopping)
        with pytest.raises(Interrupted, match="stopped"):
            dump(config)
    lines = documents(tmp_path)
    for change, message in (
        (
            lambda ids: [*ids[:-1], (ids[-1] + 1) % 24],
            "was started with other data: sample 3 of ids",
        ),
        (lambda ids: ids[:-1], r"was started with count \d+ of its tokens, now it is \d+"),
    ):
        changed = [dict(line) for line in lines]
        changed[3]["input_ids"] = change(lines[3]["input_ids"])
        changed[3]["loss_mask"] = lines[3]["loss_mask"][: len(changed[3]["input_ids"])]
        changed[3]["loss_mask"][1] ^= "count" in message
        (tmp_path / "ids.jsonl").write_text("\n".join(map(json.dumps, changed)))
        with pytest.raises(SettingsError, match=message):
            dump(config)


def test_documents_that_change_during_the_dump_are_noticed(
    config: DumpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from softcache.data.rows import TokenSource

    fetch = TokenSource.fetch
    with monkeypatch.context() as patch:
        seen = count()

        def changing(self: TokenSource, indices: Any) -> Any:  # noqa: ANN401
            inputs, labels = fetch(self, indices)
            if next(seen) > 4:
                inputs[0, 0] = (inputs[0, 0] + 1) % 24
            return inputs, labels

        patch.setattr(TokenSource, "fetch", changing)
        with pytest.raises(DataError, match=r"sample \d+ is another one than when the dump began"):
            dump(config)
    assert dump(config).path.read_bytes() == token_cache()


# parts
def test_a_shard_has_the_rows_of_the_whole(config: DumpConfig, tmp_path: Path) -> None:
    whole = dump(config)
    for number in range(3):
        shard = dump(replace(config, shard=(number, 3), out=tmp_path / f"{number}.h5"))
        first = shard.header.first_sample
        assert whole.layout is not None
        start = int(whole.layout.offsets[first])
        rows = slice(start, start + shard.header.row_count)
        np.testing.assert_array_equal(shard.arrays["log_probs"], whole.arrays["log_probs"][:, rows])


def test_a_shard_without_rows_is_refused(config: DumpConfig, tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2]}\n{"input_ids": [3]}\n')
    with pytest.raises(SettingsError, match=r"samples 1 to 1 of ids:\S+ have no tokens; use fewer"):
        dump(replace(config, shard=(1, 2)))


def test_views_are_added_to_a_finished_cache(config: DumpConfig, tmp_path: Path) -> None:
    frames = frame_config(tmp_path, views=1, out=tmp_path / "frames.h5")
    dump(frames)
    longer = dump(replace(frames, views=3))
    at_once = dump(replace(frames, views=3, out=tmp_path / "at-once.h5"))
    assert longer.path.read_bytes() == at_once.path.read_bytes()


def test_frames_cannot_be_embedded(config: DumpConfig, tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match="has a row for each frame, and only tokens can be stored"
    ):
        dump(frame_config(tmp_path, embed_inputs=True))


def test_several_labels_of_a_token_are_refused(config: DumpConfig) -> None:
    with pytest.raises(
        SettingsError, match=r"--targets sigmoid: each token of ids:.* has one class"
    ):
        dump(replace(config, targets="sigmoid"))


# processes
def test_several_processes_write_the_file_that_one_writes(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    lines = documents(tmp_path) * 150  # 1024 rows are the smallest block
    (tmp_path / "ids.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = "--teacher models.py:teacher --data ids:ids.jsonl --batch-tokens 1000 --temperature 1"
    more = "--embed-inputs --encoding sampled:4 --device cpu --out"
    for processes, out in ((1, "one.h5"), (2, "two.h5")):
        arguments = ["dump", *options.split(), *more.split(), out]
        result = softcache(arguments, tmp_path, processes=processes, threads=1)
        assert result.returncode == 0, result.stderr
    one, two = (open_cache(tmp_path / name) for name in ("one.h5", "two.h5"))
    assert blocks_within_samples(one)
    assert one.header.blocks > 16
    assert one.path.read_bytes() == two.path.read_bytes()


def blocks_within_samples(cache: Cache) -> bool:
    """Whether a block begins in the middle of a sample."""
    assert cache.layout is not None
    starts = np.arange(1, cache.header.blocks) * cache.header.block_rows
    return bool((~np.isin(starts, cache.layout.offsets)).any())
