"""What is measured on the rows of a cache, against the same by numpy on all of them at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from softcache.cache import Cache
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.results import knowledge
from softcache.results.knowledge import measure_knowledge, measure_views, similarity_order
from tests.configs import replace

LIMIT = 1_000_000  # kB of memory


def probabilities(cache: Cache, view: int = 0, temperature: float | None = None) -> np.ndarray:
    """All rows of a view, (N, C) float64."""
    rows = cache.rows(view, np.arange(cache.header.samples), temperature)
    return np.asarray(np.exp(rows.astype(np.float64)))


def entropy(p: np.ndarray) -> np.ndarray:
    """Entropy of each row, in nats."""
    return np.asarray(-(p * np.log(np.maximum(p, 1e-300))).sum(-1))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows at a time."""
    monkeypatch.setattr(knowledge, "CHUNK_VALUES", 7 * 5)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("encoding", ["dense", "quantized", "topk:2", "basis:4,2", "sampled:9"])
def test_rows_in_chunks_are_those_of_the_file(encoding: str, dump_config: DumpConfig) -> None:
    cache = dump(replace(dump_config, encoding=encoding))
    measured, p = measure_knowledge(cache), probabilities(cache)
    assert list(measured.cache_rows) == list(range(300))
    np.testing.assert_allclose(measured.entropy, entropy(p), atol=1e-4)
    np.testing.assert_allclose(measured.top, p.max(-1), atol=1e-4)
    np.testing.assert_allclose(measured.leading_probabilities, -np.sort(-p)[:, :2], atol=1e-4)
    sampled = encoding == "sampled:9"
    assert (measured.top_at_one is None) == sampled
    assert bool(measured.calibrations) == (not sampled)
    if measured.top_at_one is not None:
        at_one = probabilities(cache, temperature=1.0)
        np.testing.assert_allclose(measured.top_at_one, at_one.max(-1), atol=1e-3)


@pytest.mark.usefixtures("small_chunks")
def test_likeness_is_the_mean_of_the_rows_of_each_class(cache: Cache) -> None:
    likeness, p = measure_knowledge(cache).likeness, probabilities(cache)
    means = np.stack([p[cache.labels == label].mean(0) for label in range(5)])
    np.testing.assert_allclose(likeness.means, means, atol=1e-5)
    assert likeness.all_classes
    off = means * (1 - np.eye(5))
    first = likeness.pairs[0]
    assert [first.own, first.other] == [int(i) for i in np.unravel_index(off.argmax(), off.shape)]
    assert [pair.probability for pair in likeness.pairs] == pytest.approx(
        np.sort(off.ravel())[::-1][:10]
    )
    assert all(pair.own != pair.other for pair in likeness.pairs)


def test_many_classes_show_those_of_the_most_similar_pairs(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = measure_knowledge(cache).likeness
    monkeypatch.setattr(knowledge, "MAP_CLASSES", 2)
    few = measure_knowledge(cache).likeness
    assert not few.all_classes
    assert set(few.classes) == {full.pairs[0].own, full.pairs[0].other}
    assert few.pairs == full.pairs
    own, other = few.classes
    assert few.means[0, 1] == pytest.approx(full.means[own, other])


def test_agreement_is_of_labelled_rows(cache: Cache) -> None:
    labels = np.array(cache.labels)
    labels[::2] = -1
    part = replace(cache, arrays=dict(cache.arrays) | {"labels": labels})
    right = probabilities(cache).argmax(-1) == cache.labels
    assert measure_knowledge(cache).agreement == pytest.approx(right.mean())
    measured = measure_knowledge(part)
    assert measured.agreement == pytest.approx(right[1::2].mean())
    assert all(c.samples.sum() == 150 for c in measured.calibrations.values())
    bare = replace(cache, arrays=dict(cache.arrays) | {"labels": np.full_like(labels, -1)})
    measured = measure_knowledge(bare)
    assert measured.agreement is None
    assert not measured.calibrations


def test_a_best_fit_at_the_end_of_the_range_is_left_out(cache: Cache) -> None:
    """Where every label is the top class, ever lower temperatures make them likelier."""
    labels = probabilities(cache).argmax(-1)
    right = replace(cache, arrays=dict(cache.arrays) | {"labels": labels.copy()})
    assert list(measure_knowledge(right).calibrations) == ["T = 1", "T = 4, as stored"]
    labels[::10] = (labels[::10] + 1) % 5
    part = replace(cache, arrays=dict(cache.arrays) | {"labels": labels})
    names = list(measure_knowledge(part).calibrations)
    assert len(names) == 3
    assert names[1].endswith(", the best fit")


def test_mixed_samples_have_no_label_to_agree_with(dump_config: DumpConfig) -> None:
    measured = measure_knowledge(dump(replace(dump_config, augment="mixup")))
    assert measured.agreement is None
    assert not measured.calibrations


# views


@pytest.mark.usefixtures("small_chunks")
def test_views_are_compared_with_their_mean(dump_config: DumpConfig) -> None:
    cache = dump(replace(dump_config, views=4, augment="shift:2"))
    views = measure_views(cache)
    assert views is not None
    assert views.all_views
    assert views.samples == 300
    p = np.stack([probabilities(cache, view) for view in range(4)])  # (V, N, C)
    for count in range(1, 5):
        part = p[:count]
        mean = part.mean(0)
        kl = (part * (np.log(part) - np.log(mean))).sum(-1).mean()
        assert views.divergence[count - 1] == pytest.approx(kl, abs=1e-5)
        tops = part.argmax(-1)
        assert views.changed[count - 1] == pytest.approx((tops != tops[0]).any(0).mean())
    assert views.divergence[0] < 1e-6 < views.divergence[1]


def test_one_view_has_nothing_to_compare(cache: Cache) -> None:
    assert measure_views(cache) is None


def test_of_many_views_the_first_are_compared(
    dump_config: DumpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = dump(replace(dump_config, views=3, augment="shift:2"))
    monkeypatch.setattr(knowledge, "VIEWS", 2)
    views = measure_views(cache)
    assert views is not None
    assert not views.all_views
    assert len(views.divergence) == 2


# order


def test_similar_classes_come_next_to_each_other() -> None:
    random = np.random.default_rng(0)
    group = random.permutation(np.repeat(np.arange(6), 5))
    means = np.where(group[:, None] == group, 0.02, 0.001) * random.uniform(0.8, 1.2, (30, 30))
    ordered = group[similarity_order(means)]
    assert (np.diff(ordered) != 0).sum() == 5  # from each group to the next
    assert (np.diff(group) != 0).sum() > 5
    assert sorted(similarity_order(means)) == list(range(30))


# memory


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 13,000 classes."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "m.py").write_text(
        "import torch\nfrom torch import nn\n\ndef wide():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 13_000))\n"
    )
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (1600, 1, 8, 8), dtype=np.uint8)
    np.savez(folder / "d.npz", x=images, y=random.integers(0, 13_000, 1600))
    config = DumpConfig(
        teacher=f"{folder / 'm.py'}:wide", data=f"npz:{folder / 'd.npz'}", temperature=4.0,
        out=folder / "wide.h5",
    )  # fmt: skip
    return dump(config).path


@pytest.mark.parametrize(("chunk", "fits"), [(knowledge.CHUNK_VALUES, True), (1 << 40, False)])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_with_thirteen_thousand_classes(
    chunk: int, fits: bool, wide: Path, tmp_path: Path
) -> None:
    """All rows at once need more than the limit, so the limit is one that can be broken."""
    program = (
        "from pathlib import Path\nfrom softcache.results import knowledge, report\n"
        f"knowledge.CHUNK_VALUES = {chunk}\n"
        f"report.report([Path({str(wide)!r})], Path({str(tmp_path / 'r.html')!r}))\n"
        # unlike ru_maxrss, this does not count the process that started this one
        "status = Path('/proc/self/status').read_text()\n"
        "print(status.split('VmHWM:')[1].split()[0])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert (int(result.stdout) < LIMIT) == fits
