"""Documents of a cache as items, padded or packed into blocks: the soft targets stay the same."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import softcache
from softcache.errors import DataError, SettingsError
from softcache.token_data import PADDING_OF
from tests.token_cases import TEXTS, batch_loss, dump_tokens, gpt2, llama, spec_of

NAMES = ("input_ids", "row_labels", "cache_rows")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with topk.h5, corpus.txt and model."""
    folder = tmp_path_factory.mktemp("tokens")
    dump_tokens(folder)
    return folder


@pytest.fixture(scope="module")
def cache(folder: Path) -> softcache.SoftCache:
    return softcache.open(folder / "topk.h5")


@pytest.fixture(scope="module")
def data(cache: softcache.SoftCache) -> softcache.SoftLabelDataset:
    """The documents that are in the cache."""
    return softcache.SoftLabelDataset(None, cache)


class Dicts(Dataset[dict[str, Any]]):
    """Documents as trainers take them."""

    def __init__(self, items: list[dict[str, Any]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def documents(data: softcache.SoftLabelDataset) -> list[dict[str, Any]]:
    return [{"input_ids": data[n]["input_ids"].tolist()} for n in range(len(data))]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


# items


def test_an_item_says_which_token_and_which_row_each_position_predicts(
    data: softcache.SoftLabelDataset, cache: softcache.SoftCache
) -> None:
    layout = cache.cache.layout
    assert layout is not None
    assert (len(data), data.unit) == (TEXTS, "token")
    for number in (0, 7, TEXTS - 1):
        item = data[number]
        assert tuple(item) == NAMES
        assert {values.dtype for values in item.values()} == {torch.int64}
        assert item["row_labels"].tolist() == [*item["input_ids"][1:].tolist(), -100]
        rows = range(layout.offsets[number], layout.offsets[number + 1])
        assert item["cache_rows"].tolist() == [*rows, -1]
        assert (cache.cache.labels[rows] == item["row_labels"][:-1].numpy()).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_padded_to_its_longest_document(
    data: softcache.SoftLabelDataset, workers: int
) -> None:
    loader = DataLoader(data, 7, collate_fn=softcache.collate_tokens, num_workers=workers)
    number = 0
    for batch in loader:
        longest = int(batch["attention_mask"].sum(1).max())
        assert {tuple(values.shape) for values in batch.values()} == {
            (len(batch["input_ids"]), longest)
        }
        for row in range(len(batch["input_ids"])):
            item, length = data[number], int(batch["attention_mask"][row].sum())
            for name, filler in PADDING_OF.items():
                assert torch.equal(batch[name][row, :length], item[name])
                assert (batch[name][row, length:] == filler).all()
            number += 1
    assert number == len(data)


def test_what_is_sent_to_a_worker_is_small_and_the_same_there(
    data: softcache.SoftLabelDataset, cache: softcache.SoftCache
) -> None:
    sent = pickle.dumps(data)
    assert len(sent) < cache.cache.arrays["inputs"].nbytes
    again = pickle.loads(sent)
    assert all(same(data[n], again[n]) for n in (0, 3, TEXTS - 1))
    blocks = softcache.PackedTokens(data, 64)
    assert same(blocks[1], pickle.loads(pickle.dumps(blocks))[1])
    rows = data[0]["cache_rows"]
    there = pickle.loads(pickle.dumps(cache)).row_targets(rows)
    assert torch.equal(softcache.to_dense(cache.row_targets(rows)), softcache.to_dense(there))


@pytest.mark.parametrize("kind", ["spec", "Dataset", "list", "tensors"])
def test_documents_may_come_from_anywhere(
    kind: str, data: softcache.SoftLabelDataset, cache: softcache.SoftCache, folder: Path
) -> None:
    found: Any = documents(data)
    if kind == "spec":
        found = spec_of(folder)
    elif kind == "Dataset":
        found = Dicts(found)
    elif kind == "tensors":
        found = [
            {
                "input_ids": data[n]["input_ids"],
                "attention_mask": torch.ones(len(data[n]["input_ids"])),
            }
            for n in range(TEXTS)
        ]
    other = softcache.SoftLabelDataset(found, cache)
    assert all(same(data[n], other[n]) for n in range(TEXTS))


def test_some_of_the_documents_in_another_order_keep_their_rows(
    data: softcache.SoftLabelDataset, cache: softcache.SoftCache
) -> None:
    order = np.random.default_rng(0).permutation(TEXTS)[:15]
    every = documents(data)
    part = softcache.SoftLabelDataset(Dicts([every[n] for n in order]), cache)
    assert len(part) == 15
    assert all(same(part[at], data[int(n)]) for at, n in enumerate(order))
    assert part.token_lengths().tolist() == [len(every[n]["input_ids"]) for n in order]


def test_documents_or_labels_that_the_cache_does_not_know_are_named(
    data: softcache.SoftLabelDataset, cache: softcache.SoftCache
) -> None:
    every = documents(data)
    changed = [*every[:3], {"input_ids": [5, 6, 7]}]
    with pytest.raises(DataError, match=r"sample 3 of Dicts is not in .*topk\.h5"):
        softcache.SoftLabelDataset(Dicts(changed), cache)
    masked = [{**every[0], "labels": [-100, -100, *every[0]["input_ids"][2:]]}, *every[1:]]
    with pytest.raises(
        DataError, match=r"sample 0 of Dicts has \d+ tokens that count, and \d+ in .*topk"
    ):
        softcache.SoftLabelDataset(Dicts(masked), cache)


def test_a_sampler_and_epochs_give_the_same_items(data: softcache.SoftLabelDataset) -> None:
    sampler = softcache.ViewSampler(data, seed=3)
    loader = DataLoader(data, 8, sampler=sampler, collate_fn=softcache.collate_tokens)
    rows = [torch.cat([b["cache_rows"][b["cache_rows"] >= 0] for b in loader]) for _ in range(2)]
    assert not torch.equal(*rows)
    assert torch.equal(*(r.sort().values for r in rows))
    data.set_epoch(4)
    assert same(data[5], data[0, 5])


PIXELS = """
import numpy as np, torch
def data():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 255, (6, 1, 4, 5), dtype=np.uint8)
    masks = draw.integers(0, 3, (6, 4, 5)); masks[:, 0, 0] = 255
    return [(torch.from_numpy(i), m) for i, m in zip(images, masks)]
def teacher():
    torch.manual_seed(0)
    return torch.nn.Conv2d(1, 3, 1)
"""


def test_pixels_have_the_rows_of_the_view_of_their_epoch(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(PIXELS)
    code = tmp_path / "code.py"
    cache = softcache.dump(
        teacher=f"{code}:teacher", data=f"{code}:data", out=tmp_path / "pixels.h5",
        temperature=1.0, views=2, augment="shift:1", classes=3,
    )  # fmt: skip
    data = softcache.SoftLabelDataset(f"{code}:data", cache, rotate=False)
    torch.manual_seed(0)
    teacher = torch.nn.Conv2d(1, 3, 1)
    for epoch in (0, 1):
        batch = torch.utils.data.default_collate(data.__getitems__([(epoch, n) for n in (4, 1)]))
        assert {n: tuple(v.shape) for n, v in batch.items()} == {
            "inputs": (2, 1, 4, 5), "row_labels": (2, 20), "cache_rows": (2, 20)
        }  # fmt: skip
        assert batch["cache_rows"][0].tolist() == [epoch * 120 + 80 + n for n in range(20)]
        assert (batch["row_labels"] >= -100).all()
        assert set(batch["row_labels"].unique().tolist()) == {-100, 0, 1, 2}
        logits = teacher(batch["inputs"]).flatten(2).mT  # (B, P, C)
        stored = softcache.to_dense(cache.row_targets(batch["cache_rows"])).view(2, 20, 3)
        torch.testing.assert_close(stored, logits.log_softmax(-1), atol=2e-3, rtol=2e-3)
    with pytest.raises(SettingsError, match="are no tokens, which packing needs"):
        softcache.PackedTokens(data, 8)
    with pytest.raises(SettingsError, match="an item has inputs, row_labels, cache_rows; expected"):
        softcache.collate_tokens([data[0]])


def test_items_that_a_trainer_has_taken_keys_from_are_refused() -> None:
    ids = {"input_ids": torch.tensor([1, 2])}
    with pytest.raises(SettingsError, match=r"has input_ids; .*remove_unused_columns=False"):
        softcache.collate_tokens([ids])
    with pytest.raises(
        SettingsError, match="an item has tuple; expected one of a SoftLabelDataset"
    ):
        softcache.collate_tokens([(1, 2)])  # type: ignore[list-item]


# blocks


@pytest.mark.parametrize("length", [2, 10, 64, 512, 2048])
def test_every_row_is_in_one_block_once(
    length: int, data: softcache.SoftLabelDataset, cache: softcache.SoftCache
) -> None:
    blocks = softcache.PackedTokens(data, length)
    batch = softcache.collate_tokens([blocks[n] for n in range(len(blocks))])
    rows = batch["cache_rows"]
    assert rows[rows >= 0].sort().values.tolist() == list(range(cache.header.row_count))
    labels = cache.cache.labels[rows[rows >= 0].numpy()]
    assert (batch["row_labels"][rows >= 0].numpy() == labels).all()
    assert (batch["row_labels"][rows < 0] == -100).all()
    assert batch["attention_mask"].shape == (len(blocks), 1, length, length)
    tokens = int(data.token_lengths().sum())
    assert len(blocks) * length < 1.15 * tokens + length  # hardly any padding


def test_a_token_sees_those_before_it_in_its_own_document(data: softcache.SoftLabelDataset) -> None:
    blocks = softcache.PackedTokens(data, 70)
    hidden = softcache.PackedTokens(data, 70, mask_dtype=torch.bool)
    for number in range(len(blocks)):
        block, positions = blocks[number], blocks[number]["position_ids"]
        start = torch.arange(70) - positions
        sees = (start[:, None] <= torch.arange(70)) & torch.ones(70, 70).tril().bool()
        assert torch.equal(hidden[number]["attention_mask"][0], sees)
        assert torch.equal(block["attention_mask"][0] == 0, sees)
        assert (block["attention_mask"][0][~sees] == torch.finfo(torch.float32).min).all()


def test_blocks_of_nothing_are_refused(data: softcache.SoftLabelDataset) -> None:
    with pytest.raises(SettingsError, match="blocks of 1 tokens; expected 2 or more"):
        softcache.PackedTokens(data, 1)


def losses_by_document(
    cache: softcache.SoftCache,
    model: nn.Module,
    batches: list[dict[str, Tensor]],
) -> Tensor:
    """The loss of each document, (documents,)."""
    layout = cache.cache.layout
    assert layout is not None
    losses = torch.full((layout.samples,), torch.nan)
    for batch in batches:
        given = {n: v for n, v in batch.items() if n not in ("row_labels", "cache_rows")}
        with torch.no_grad():
            logits = model(**given, use_cache=False).logits
        rows = batch["cache_rows"]
        owners = np.where(rows >= 0, layout.samples_of(rows.clamp(min=0).numpy()), -1)
        for document in set(owners.flat) - {-1}:
            mine = torch.from_numpy(owners == document)
            own = {**batch, "cache_rows": rows.where(mine, -1)}
            losses[document] = batch_loss(cache, logits, own)
    return losses


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_packed_document_has_the_loss_of_a_padded_one(
    make: Callable[[str], nn.Module],
    attention: str,
    data: softcache.SoftLabelDataset,
    cache: softcache.SoftCache,
) -> None:
    model = make(attention).eval()
    loader = DataLoader(data, 16, collate_fn=softcache.collate_tokens)
    padded = losses_by_document(cache, model, list(loader))
    for length in (64, 512):
        batches = list(DataLoader(softcache.PackedTokens(data, length), 4))
        packed = losses_by_document(cache, model, batches)
        torch.testing.assert_close(packed, padded, atol=1e-4, rtol=0)
    # the check fails if the mask or the positions are left out
    for name in ("attention_mask", "position_ids"):
        for batch in batches:
            batch[name] = {
                "attention_mask": torch.ones_like(batch["input_ids"]),
                "position_ids": torch.arange(length).expand(len(batch["input_ids"]), -1) % 64,
            }[name]
        assert (losses_by_document(cache, model, batches) - padded).abs().max() > 1e-3
        batches = list(DataLoader(softcache.PackedTokens(data, length), 4))


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_packed_document_has_the_logits_that_it_has_alone(
    make: Callable[[str], nn.Module], data: softcache.SoftLabelDataset
) -> None:
    model, blocks, seen = make("sdpa").eval(), softcache.PackedTokens(data, 128), 0
    for number, parts in enumerate(blocks.blocks):
        block = {name: values[None] for name, values in blocks[number].items()}
        given = {name: block[name] for name in ("input_ids", "attention_mask", "position_ids")}
        with torch.no_grad():
            packed, at = model(**given, use_cache=False).logits[0], 0
            for item, first, end in parts.tolist():
                ids = data[item]["input_ids"][None, first:end]
                alone = model(ids, use_cache=False).logits[0]
                torch.testing.assert_close(packed[at : at + end - first], alone, atol=1e-4, rtol=0)
                at, seen = at + end - first, seen + (len(parts) > 1)
    assert seen > TEXTS / 2  # most documents share their block


def test_eager_attention_needs_numbers_and_position_ids_alone_are_enough(
    data: softcache.SoftLabelDataset, cache: softcache.SoftCache
) -> None:
    model = llama("eager").eval()
    padded = losses_by_document(
        cache, model, list(DataLoader(data, 16, collate_fn=softcache.collate_tokens))
    )
    as_bool = softcache.PackedTokens(data, 64, mask_dtype=torch.bool)
    leaking = losses_by_document(cache, model, list(DataLoader(as_bool, 4)))
    assert (leaking - padded).abs().max() > 1e-3  # why the mask is not of this type by default
    batches = [dict(batch) for batch in DataLoader(softcache.PackedTokens(data, 64), 4)]
    for batch in batches:
        del batch["attention_mask"]
    torch.testing.assert_close(losses_by_document(cache, model, batches), padded, atol=1e-4, rtol=0)
