"""FORMAT.md rule by rule, continued: samples with many rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from softcache.cache import Cache, open_cache
from softcache.cache.verify import find_damage
from softcache.data.embedded import source_of_cache
from softcache.data.keys import keys_of
from softcache.data.open import open_source
from softcache.dump.loop import dump
from softcache.errors import FormatError
from softcache.files.verify import verify_cache
from softcache.train.loop import train
from softcache.train.options import make_train_config
from tests.cache.header_cases import (
    GONE,
    Place,
    header_of,
    refused,
    tiny_cache,
    with_fields,
    with_values,
)
from tests.token_caches import (
    DOCUMENTS,
    LONGEST,
    VOCABULARY,
    forged,
    small_blocks,
    token_cache,
    token_config,
    write_inputs,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A finished cache of documents."""
    path = tmp_path / "tokens.h5"
    path.write_bytes(token_cache())
    return path


# the header
@pytest.mark.must("F12", "F14")
def test_the_feature_has_its_version_and_its_field(path: Path) -> None:
    header = open_cache(path).header
    assert header.version == (1, 3)
    assert header.must_understand == ("inputs", "rows")
    rows = header.rows or {}
    assert rows["count"] == len(open_cache(path).labels)
    assert (rows["unit"], header.positions) == ("token", ())
    assert rows["tokens"] == len(open_cache(path).arrays["inputs"])
    assert rows["tokens"] > rows["count"]


@pytest.mark.must("F14")
def test_the_field_and_the_feature_come_together(path: Path) -> None:
    fields = header_of(token_cache())
    without = fields | {"must_understand": ["inputs"]}
    refused(with_fields(token_cache(), without), path.parent, "unknown fields: 'rows'")
    del without["rows"]
    refused(
        with_fields(token_cache(), without), path.parent, "array inputs is .*; expected <i4|arrays"
    )
    refused(with_values(token_cache(), {("rows",): GONE}), path.parent, "the header lacks rows$")
    one_row: dict[Place, Any] = {("rows",): {"count": 30, "unit": "token"}}
    refused(with_values(tiny_cache(), one_row), path.parent, "unknown fields: 'rows'")
    newer = with_values(tiny_cache(), one_row | {("version",): [1, 4]})
    path.write_bytes(
        newer
    )  # an unknown field of a newer version is ignored, even if it has this name
    assert open_cache(path).header.rows is None
    assert find_damage(open_cache(path)) == []


@pytest.mark.must("F14")
def test_neither_positions_nor_sets_of_labels_go_with_it(path: Path) -> None:
    raw = with_values(token_cache(), {("positions",): [2]})
    refused(raw, path.parent, "positions is 2; expected a whole number from 1 to 0")
    sets: dict[Place, Any] = {("must_understand",): ["inputs", "rows", "label_sets"]}
    refused(with_values(token_cache(), sets), path.parent, "expected label_sets there with")
    both = sets | {("encoding",): {"name": "bernoulli"}}
    message = "must_understand has both label_sets and rows; expected one of them at most"
    refused(with_values(token_cache(), both), path.parent, message)


# arrays
@pytest.mark.must("F26")
def test_the_arrays_of_samples_with_many_rows(path: Path) -> None:
    fields = header_of(token_cache())
    count, tokens = fields["rows"]["count"], fields["rows"]["tokens"]
    runs = len(open_cache(path).arrays["run_rows"])
    blocks = -(-count // fields["block_rows"])
    assert {a["name"]: (a["dtype"], a["shape"], a["axis"]) for a in fields["arrays"]} == {
        "log_probs": ("<f2", [1, count, VOCABULARY], "rows"),
        "labels": ("<i4", [count], "labels"),
        "keys": ("<u8", [DOCUMENTS], "shared"),
        "offsets": ("<i8", [DOCUMENTS + 1], "shared"),
        "run_rows": ("<i8", [runs], "shared"),
        "run_positions": ("<i8", [runs], "shared"),
        "inputs": ("<i4", [tokens], "shared"),
        "input_offsets": ("<i8", [DOCUMENTS + 1], "shared"),
        "class_names": ("|S2", [VOCABULARY], "shared"),
        "fingerprinted": ("<i8", [8], "shared"),
        "fingerprints": ("<f4", [1, 8, 8], "shared"),
        "digests": ("<u8", [1, blocks], "commits"),
        "sample_digests": ("<u8", [blocks], "commits"),
    }


@pytest.mark.must("F26")
@pytest.mark.parametrize(
    "name", ["labels", "keys", "offsets", "run_rows", "run_positions", "inputs", "input_offsets"]
)
def test_each_of_them_is_there_as_it_should_be(path: Path, name: str) -> None:
    fields = header_of(token_cache())
    index = next(i for i, array in enumerate(fields["arrays"]) if array["name"] == name)
    others = [*fields["arrays"][:index], *fields["arrays"][index + 1 :]]
    missing = with_fields(token_cache(), fields | {"arrays": others})
    refused(missing, path.parent, f"missing here: {name}|array inputs is missing; expected numbers")
    shape = fields["arrays"][index]["shape"]
    for part, value in (
        ("dtype", "<u4"),
        ("axis", "samples"),
        ("shape", [shape[0], 1]),
        ("shape", [shape[0] - 1]),
        ("shape", [shape[0] + 1]),
        ("shape", []),
    ):
        if name == "inputs" and part == "shape" and value not in ([], [shape[0], 1]):
            continue  # any number of tokens is right for the header: F28 compares it with the offsets
        raw = with_values(token_cache(), {("arrays", index, part): value})
        # the shape of run_rows determines that of run_positions
        named = "run_(rows|positions)" if name.startswith("run_") else name
        refused(raw, path.parent, rf"array {named} is .*; expected ")


@pytest.mark.must("F26")
def test_rows_are_those_of_the_documents(path: Path) -> None:
    cache, layout = open_cache(path), open_cache(path).layout
    assert layout is not None
    tokens, starts = cache.arrays["inputs"], cache.arrays["input_offsets"]
    rows = np.arange(layout.rows)
    about = starts[layout.samples_of(rows)] + layout.positions_of(rows) + 1
    np.testing.assert_array_equal(cache.labels, tokens[about], "the row at i is about token i + 1")


@pytest.mark.must("F30")
def test_a_block_may_lie_within_a_sample(path: Path) -> None:
    cache, layout = open_cache(path), open_cache(path).layout
    assert layout is not None
    first, stop = layout.offsets[3:5].tolist()
    assert stop - first == int(layout.counts(np.array([3]))[0])
    assert -(-stop // cache.header.block_rows) - first // cache.header.block_rows >= 3
    header, raw = cache.header, path.read_bytes()
    for block in range(header.blocks):
        rows = header.block_range(block)
        for names, digests in ((["log_probs"], "digests"), (["labels"], "sample_digests")):
            digest = xxhash.xxh3_64()
            for array in (header.array(name) for name in names):
                at = array.offset + rows.start * array.row_bytes
                digest.update(raw[at : at + len(rows) * array.row_bytes])
            stored = cache.arrays[digests].reshape(-1)[block]
            assert int(stored) == digest.intdigest()


def used(cache: Cache) -> None:
    """Read a cache in every way."""
    source = source_of_cache(cache)
    source.fetch(range(len(source)))


@pytest.mark.must("F27")
@pytest.mark.parametrize(
    ("name", "at", "value", "what"),
    [
        ("offsets", 0, 1, "offsets that do not lead"),
        ("offsets", 5, 1 << 62, "offsets that do not lead"),
        ("offsets", 5, -1, "offsets that do not lead"),
        ("offsets", -1, 1 << 40, "offsets that do not lead"),
        ("offsets", 1, None, "samples that begin within a run"),
        ("run_rows", 0, 3, "runs of positions that do not begin in order"),
        ("run_rows", 1, 1 << 62, "runs of positions that do not begin in order"),
        ("run_rows", -1, 1 << 62, "runs of positions that do not begin in order"),
        ("run_positions", 0, -1, "positions that are out of range"),
        ("run_positions", 0, 1 << 62, "positions that are out of range"),
        ("run_positions", 4, 0, "positions that are not in order"),
    ],
)
def test_a_forged_layout_is_refused_wherever_it_is_used(
    path: Path, name: str, at: int, value: int | None, what: str
) -> None:
    def change(values: np.ndarray) -> None:
        values[at] = values[at] - 2 if value is None else value

    cache = forged(path, {name: change})
    assert [str(part)[: len(what)] for part in find_damage(cache)] == [what]
    for use in (used, lambda cache: cache.layout):
        with pytest.raises(
            FormatError, match=rf"tokens.h5 has {what}.*: the file is damaged or forged"
        ):
            use(cache)
    with pytest.raises(FormatError, match=rf"is damaged: {what}.*; get it again"):
        verify_cache(path)


# embedded tokens
@pytest.mark.must("F28")
@pytest.mark.parametrize(
    ("name", "at", "value", "what"),
    [
        ("input_offsets", 0, 1, "offsets of its tokens that do not lead"),
        ("input_offsets", 3, 1 << 62, "offsets of its tokens that do not lead"),
        ("input_offsets", 3, -4, "offsets of its tokens that do not lead"),
        ("input_offsets", -1, 1 << 40, "offsets of its tokens that do not lead"),
        ("input_offsets", 4, None, "rows that stand behind the last token"),
        ("inputs", 5, -1, "tokens with a number below 0"),
        ("inputs", 5, -(1 << 31), "tokens with a number below 0"),
    ],
)
def test_forged_tokens_are_refused_wherever_they_are_used(
    path: Path, name: str, at: int, value: int | None, what: str
) -> None:
    def change(values: np.ndarray) -> None:
        values[at] = values[at - 1] + 1 if value is None else value

    cache = forged(path, {name: change})
    assert [str(part)[: len(what)] for part in find_damage(cache)] == [what]
    with pytest.raises(
        FormatError, match=rf"tokens.h5 has {what}.*: the file is damaged or forged"
    ):
        used(cache)
    run = make_train_config(
        cache=path, student="mlp:4", epochs=1, out=path.parent / "run", device="cpu"
    )
    with pytest.raises(
        FormatError, match=rf"tokens.h5 has {what}.*: the file is damaged or forged"
    ):
        train(run)


def test_a_cache_that_is_forged_without_a_change_is_intact(path: Path) -> None:
    assert find_damage(forged(path, {"inputs": lambda values: None})) == []
    assert path.read_bytes() == token_cache()


@pytest.mark.must("F28")
def test_embedded_tokens_are_the_documents(path: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    own, source = source_of_cache(open_cache(path)), open_source(f"ids:{tmp_path / 'ids.jsonl'}")
    assert len(own) == len(source) == DOCUMENTS
    for mine, other in zip(
        own.fetch(range(DOCUMENTS)), source.fetch(range(DOCUMENTS)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))


@pytest.mark.must("F29")
def test_the_key_of_a_document_is_that_of_its_tokens_alone(path: Path, tmp_path: Path) -> None:
    cache = open_cache(path)
    tokens, starts = cache.arrays["inputs"], cache.arrays["input_offsets"]
    seed = xxhash.xxh3_64_intdigest(b"<u4 tokens")
    for number, key in enumerate(cache.keys.tolist()):
        ids = tokens[starts[number] : starts[number + 1]]
        assert key == xxhash.xxh3_64_intdigest(ids.astype("<u4").tobytes(), seed)
    source = source_of_cache(cache)
    for batch in ([0], [0, 3], range(DOCUMENTS)):  # padded to other lengths
        inputs = source.fetch(list(batch))[0]
        np.testing.assert_array_equal(keys_of(inputs, source), cache.keys[list(batch)])


# draws of `sampled`
@pytest.mark.must("F49")
def test_draws_depend_on_neither_batches_nor_shards_nor_other_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)

    def ids(name: str, **changes: Any) -> np.ndarray:
        config = token_config(
            tmp_path, encoding="sampled:6", out=tmp_path / f"{name}.h5", **changes
        )
        cache = dump(config)
        assert find_damage(cache) == []
        return np.array(cache.arrays["ids"][0])

    whole = ids("whole")
    others: dict[str, dict[str, Any]] = {
        "tokens": {"batch_tokens": LONGEST},
        "samples": {"batch_size": 3},
        "one": {"batch_size": 1},
        "not embedded": {"embed_inputs": False},
    }
    for name, changes in others.items():
        np.testing.assert_array_equal(ids(name, **changes), whole)
    shards = [ids(f"shard{i}", shard=(i, 3)) for i in range(3)]
    np.testing.assert_array_equal(np.concatenate(shards), whole)
    assert not np.array_equal(ids("other", seed=1), whole)
    subset = ids("subset", data=f"ids:{tmp_path / 'ids.jsonl'}?samples=20")
    np.testing.assert_array_equal(subset, whole[: len(subset)])


@pytest.mark.must("F49")
def test_two_rows_of_a_sample_have_draws_of_their_own(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [5, 5, 5, 5, 5, 5, 5, 5, 5, 5]}\n' * 2)
    cache = dump(token_config(tmp_path, encoding="sampled:6"))
    rows = cache.arrays["ids"][0].reshape(2, 9, 6)
    same_logits = rows[:, 1:]  # of tokens with the same token before them
    assert len(np.unique(same_logits.reshape(-1, 6), axis=0)) > 8
