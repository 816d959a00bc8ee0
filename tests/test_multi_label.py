"""Any number of labels per sample, from the dump to the report: `--targets sigmoid`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softcache.api import SoftLabelDataset
from softcache.cache import Cache, header, open_cache
from softcache.cache.merge import merge
from softcache.data.open import open_source
from softcache.divergences import bernoulli
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import DataError, FormatError, Interrupted, ModelError, SettingsError
from softcache.files.pull import pull
from softcache.files.verify import verify_cache
from softcache.losses import distillation_loss
from softcache.models.scores import score_cells, score_names
from softcache.train.loop import train
from softcache.train.options import make_train_config
from softcache.train.student import Student
from softcache.types import LabelSets
from tests.cache.header_cases import with_values
from tests.cli.app_cases import softcache
from tests.servers import http_server
from tests.train.loop_cases import metrics, same_weights

CLASSES, SAMPLES = 11, 240  # sets of 11 classes take two bytes, with bits to spare
MODELS = """
import torch
from torch import nn

class Teacher(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.weight = torch.randn(36, 11, generator=torch.Generator().manual_seed(0))
    def forward(self, x):
        z = (x.flatten(1) - 0.5) @ self.weight
        return {"logits": z, "sigmoid": z.sigmoid(), "other": -z, "single": z[:, :1]}[self.kind]

def logits(): return Teacher("logits")
def sigmoid(): return Teacher("sigmoid")
def other(): return Teacher("other")
def single(): return Teacher("single")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images whose labels are what the teacher says, in data.npz, and models.py."""
    (tmp_path / "models.py").write_text(MODELS)
    random = np.random.default_rng(0)
    weight = torch.randn(36, CLASSES, generator=torch.Generator().manual_seed(0)).numpy()
    images = random.integers(0, 256, (SAMPLES + 100, 1, 6, 6)).astype(np.uint8)
    labels = ((images.reshape(-1, 36) / 255 - 0.5) @ weight > 0).astype(np.int64)
    np.savez(
        tmp_path / "data.npz", x_train=images[:SAMPLES], y_train=labels[:SAMPLES],
        x_test=images[SAMPLES:], y_test=labels[SAMPLES:],
    )  # fmt: skip
    return tmp_path


def config_of(folder: Path, **changes: Any) -> DumpConfig:
    options: dict[str, Any] = {
        "teacher": f"{folder}/models.py:logits", "data": f"npz:{folder}/data.npz", "targets": "sigmoid",
        "out": folder / "cache.h5", "device": "cpu", "temperature": 2.0,
    }  # fmt: skip
    return DumpConfig(**options | changes)


def trained(folder: Path, cache: Cache | None, **changes: Any) -> list[Student]:
    options: dict[str, Any] = {
        "student": "mlp:32", "data": f"npz:{folder}/data.npz", "eval_data": f"npz:{folder}/data.npz@test",
        "cache": cache.path if cache else None, "out": folder / "run", "epochs": 3, "device": "cpu",
        "overwrite": True, "learning_rate": 1e-2,
    }  # fmt: skip
    return train(make_train_config(**options | changes))


def teacher_odds(folder: Path, temperature: float) -> np.ndarray:
    images = np.load(folder / "data.npz")["x_train"].reshape(SAMPLES, 36) / 255
    weight = torch.randn(36, CLASSES, generator=torch.Generator().manual_seed(0)).numpy()
    odds: np.ndarray = (images - 0.5) @ weight / temperature
    return odds


# the file
def test_older_readers_are_told_what_they_lack(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = dump(config_of(folder))
    assert cache.header.version == (1, 2)
    assert cache.header.must_understand == ("label_sets",)
    monkeypatch.setattr(header, "FEATURES", {"inputs": (1, 1)})
    with pytest.raises(
        FormatError, match=r"needs features .* not know: 'label_sets'; update softcache"
    ):
        open_cache(cache.path)


@pytest.mark.must("F48")
@pytest.mark.parametrize(("targets", "features"), [("sigmoid", []), ("softmax", ["label_sets"])])
def test_the_feature_is_listed_with_this_encoding_alone(
    folder: Path, targets: str, features: list[str]
) -> None:
    arrays = np.load(folder / "data.npz")
    np.savez(folder / "one.npz", x=arrays["x_train"], y=arrays["y_train"].argmax(1))
    cache = dump(config_of(folder, targets=targets, data=f"npz:{folder}/one.npz"))
    cache.path.write_bytes(with_values(cache.path.read_bytes(), {("must_understand",): features}))
    with pytest.raises(
        FormatError, match="expected label_sets there with bernoulli, and with nothing"
    ):
        open_cache(cache.path)


def test_a_dump_of_the_other_kind_is_not_resumed(folder: Path) -> None:
    arrays = np.load(folder / "data.npz")
    np.savez(folder / "one.npz", x=arrays["x_train"], y=arrays["y_train"].argmax(1))
    dump(config_of(folder, data=f"npz:{folder}/one.npz"))
    with pytest.raises(SettingsError, match="started with encoding 'bernoulli', now it is 'dense'"):
        dump(config_of(folder, data=f"npz:{folder}/one.npz", targets="softmax"))


@pytest.mark.must("F48")
def test_log_odds_are_stored_and_retempered(folder: Path) -> None:
    cache = dump(config_of(folder))
    assert cache.header.encoding.name == "bernoulli"
    for temperature in (0.5, 1.0, 2.0, 4.0):
        rows = cache.rows(0, np.arange(SAMPLES), temperature)
        np.testing.assert_allclose(rows, teacher_odds(folder, temperature), rtol=2e-3, atol=2e-3)
    labels = np.load(folder / "data.npz")["y_train"]
    assert (cache.label_sets(np.arange(SAMPLES)) == labels).all()
    assert set(cache.labels.tolist()) == {0}
    summary = cache.header.summary or {}
    assert summary["agreement"] == 1.0
    p = 1 / (1 + np.exp(-teacher_odds(folder, 2.0)))
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()
    assert summary["entropy"] == pytest.approx(entropy, rel=1e-3)
    assert summary["fidelity"]["worst"] < 1e-4
    assert verify_cache(cache.path)


def test_probabilities_of_a_sigmoid_are_taken_if_they_are_declared(folder: Path) -> None:
    exact = dump(config_of(folder))
    config = config_of(
        folder, teacher=f"{folder}/models.py:sigmoid", teacher_output="probabilities",
        out=folder / "sigmoid.h5",
    )  # fmt: skip
    rows = dump(config).rows(0, np.arange(SAMPLES))
    np.testing.assert_allclose(rows, exact.rows(0, np.arange(SAMPLES)), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": "sigmoid"}, ModelError, "probabilities, not logits; add --teacher-output prob"),
        ({"teacher": "sigmoid", "targets": "softmax"}, DataError, "add --targets sigmoid"),
        ({"targets": "softmax"}, DataError, "samples have any number of labels, a 0 or 1 for each"),
        ({"teacher_output": "probabilities"}, ModelError, "which is no probability; say what"),
        ({"teacher": "single"}, ModelError, "at least 2 classes"),
        ({"encoding": "topk:3"}, SettingsError, "with --encoding topk:3: log-odds of several"),
        ({"encoding": "auto"}, SettingsError, "with --encoding auto: log-odds of several"),
        ({"targets": "softmax", "encoding": "bernoulli"}, SettingsError, "leave --encoding out"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(
    folder: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    if "teacher" in changes:
        changes = changes | {"teacher": f"{folder}/models.py:{changes['teacher']}"}
    with pytest.raises(error, match=message):
        dump(config_of(folder, **changes))
    assert not (folder / "cache.h5").exists()


def test_a_teacher_that_says_the_opposite_is_noticed(folder: Path) -> None:
    cache = dump(config_of(folder, teacher=f"{folder}/models.py:other"))
    (warning,) = (cache.header.summary or {})["warnings"]
    assert "the teacher, of whether a class applies, agrees with 0.0% of the labels" in warning


def test_teachers_are_averaged_class_by_class(folder: Path) -> None:
    teachers = [f"{folder}/models.py:{name}" for name in ("logits", "other")]
    cache = dump(config_of(folder, teacher=teachers, teacher_weight=[3, 1], temperature=1.0))
    p = 1 / (1 + np.exp(-teacher_odds(folder, 1.0)))
    rows = 1 / (1 + np.exp(-cache.rows(0, np.arange(SAMPLES)).astype(np.float64)))
    np.testing.assert_allclose(rows, 0.75 * p + 0.25 * (1 - p), atol=1e-3)


def test_shards_merge_and_a_resumed_dump_is_the_same(folder: Path) -> None:
    whole = dump(config_of(folder, embed_inputs=True))
    shards = [
        dump(config_of(folder, shard=(n, 2), out=folder / f"{n}.h5", embed_inputs=True))
        for n in range(2)
    ]
    merge(shards, folder / "merged.h5")
    merged = open_cache(folder / "merged.h5")
    for name in ("log_odds", "label_sets", "labels", "keys", "inputs"):
        assert (merged.arrays[name] == whole.arrays[name]).all()
    students = [
        trained(folder, cache, data=None, out=folder / f"run-{number}")[0]
        for number, cache in enumerate((whole, merged))
    ]
    assert same_weights(students[0].folder, students[1].folder)


# training
def test_the_loss_is_the_kl_of_each_class(folder: Path) -> None:
    random = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 6, CLASSES, generator=random)
    p, q = (teacher / 2).sigmoid(), (logits / 2).sigmoid()
    kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1)
    torch.testing.assert_close(bernoulli(logits / 2, teacher / 2), kl)
    assert bernoulli(teacher, teacher).abs().max() < 1e-5
    applies = (teacher > 0).float()
    known = torch.tensor([True, True, False, True, True, True])
    loss, same = (
        distillation_loss(logits, teacher / 2, labels, temperature=2.0, alpha=0.7, loss="bernoulli")
        for labels in (LabelSets(applies, known), applies.masked_fill(~known[:, None], -1))
    )
    assert loss == same  # as a SoftLabelDataset gives them
    hard = torch.nn.functional.binary_cross_entropy_with_logits(logits, applies, reduction="none")
    hard = hard.sum(-1)[known].mean()
    torch.testing.assert_close(loss.soft, kl.mean())
    torch.testing.assert_close(loss.hard, hard)
    torch.testing.assert_close(loss.total, 0.7 * 4 * kl.mean() + 0.3 * hard)


def test_a_student_learns_the_sets_and_its_scores_are_recorded(folder: Path) -> None:
    cache = dump(config_of(folder, eval_data=f"npz:{folder}/data.npz@test"))
    distilled, hard = trained(folder, cache, epochs=60, baseline=True)
    line = metrics(distilled.folder)[-1]
    assert line["micro_f1"] > 0.85
    assert line["mean_average_precision"] > 0.9
    assert metrics(hard.folder)[-1]["micro_f1"] > 0.8
    facts = json.loads((distilled.folder / "config.json").read_text())
    assert facts["multi_label"] is True
    assert facts["macro_f1"] == line["macro_f1"]
    assert (cache.header.evaluation or {})["micro_f1"] == 1.0


def test_views_and_mixup_mix_the_sets(folder: Path) -> None:
    cache = dump(config_of(folder, views=2, augment="shift:1,mixup"))
    student = trained(folder, cache, alpha=0.5)[0]
    assert np.isfinite([line["total"] for line in metrics(student.folder)]).all()


def test_unlabelled_samples_have_only_soft_targets(folder: Path) -> None:
    arrays = dict(np.load(folder / "data.npz"))
    arrays["y_train"] = arrays["y_train"].copy()
    arrays["y_train"][20:] = -1
    np.savez(folder / "data.npz", **arrays)
    cache = dump(config_of(folder))
    assert (cache.labels[:] >= 0).sum() == 20
    trained(folder, cache, alpha=0.5)


def test_a_stopped_run_continues(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = dump(config_of(folder))
    trained(folder, cache, out=folder / "whole")
    finish = Student.finish_epoch

    def stopping(student: Student, epoch: int, *arguments: Any) -> None:
        finish(student, epoch, *arguments)
        if epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Student, "finish_epoch", stopping)
    with pytest.raises(Interrupted, match="stopped"):
        trained(folder, cache, out=folder / "stopped")
    monkeypatch.setattr(Student, "finish_epoch", finish)
    trained(folder, cache, out=folder / "stopped", overwrite=False)
    assert same_weights(folder / "whole", folder / "stopped")
    assert metrics(folder / "whole") == metrics(folder / "stopped")


def test_other_labels_are_refused_and_named(folder: Path) -> None:
    cache = dump(config_of(folder))
    arrays = dict(np.load(folder / "data.npz"))
    arrays["y_train"] = arrays["y_train"].copy()
    arrays["y_train"][7, 10] ^= 1
    np.savez(folder / "data.npz", **arrays)
    with pytest.raises(DataError, match=r"sample 7 of .* has other labels than in .*\(1 samples"):
        trained(folder, cache)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": "balanced"}, "--sampling balanced needs one label per sample"),
        ({"class_weights": "balanced"}, "--class-weights needs one label per sample"),
        ({"loss": "js"}, "--loss needs one label per sample"),
        ({"tune": 4}, "--tune needs one label per sample"),
        ({"labels": "cache"}, "--labels cache: .* has any number of labels"),
    ],
)
def test_settings_for_one_label_are_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    cache = dump(config_of(folder))
    with pytest.raises(SettingsError, match=message):
        trained(folder, cache, **changes)


def test_kinds_of_caches_are_not_mixed(folder: Path) -> None:
    cache = dump(config_of(folder))
    arrays = np.load(folder / "data.npz")
    np.savez(folder / "one.npz", x_train=arrays["x_train"], y_train=arrays["y_train"].argmax(1))
    one = dump(
        config_of(folder, targets="softmax", data=f"npz:{folder}/one.npz", out=folder / "one.h5")
    )
    with pytest.raises(SettingsError, match="some caches have one label per sample and some any"):
        train(
            make_train_config(
                student="mlp:4", cache=[cache.path, one.path], out=folder / "both",
                data=[f"npz:{folder}/data.npz", f"npz:{folder}/one.npz"],
            )
        )  # fmt: skip
    with pytest.raises(SettingsError, match="loss bernoulli needs a CACHE of --targets sigmoid"):
        trained(folder, one, data=f"npz:{folder}/one.npz", eval_data=None, loss="bernoulli")
    with pytest.raises(DataError, match="samples have any number of labels"):
        trained(folder, one, data=f"npz:{folder}/one.npz")  # the evaluation data are the sets


def test_one_label_each_is_a_set_of_one(folder: Path) -> None:
    arrays = np.load(folder / "data.npz")
    labels = arrays["y_train"].argmax(1)
    np.savez(folder / "one.npz", x_train=arrays["x_train"], y_train=labels)
    cache = dump(config_of(folder, data=f"npz:{folder}/one.npz"))
    sets = cache.label_sets(np.arange(SAMPLES))
    assert (sets.argmax(1) == labels).all()
    assert (sets.sum(1) == 1).all()
    trained(folder, cache, data=f"npz:{folder}/one.npz", eval_data=f"npz:{folder}/one.npz")


def test_labels_alone_train_a_teacher_of_sets(folder: Path) -> None:
    student = trained(folder, None, classes=CLASSES, epochs=60)[0]
    assert metrics(student.folder)[-1]["micro_f1"] > 0.8


# what people look at
def test_compare_report_info_and_export_show_it(folder: Path) -> None:
    test = f"npz:{folder}/data.npz@test"
    cache = dump(config_of(folder, eval_data=test))
    student = trained(folder, cache)[0]
    data = f"npz:{folder}/data.npz"
    run = str(student.folder)
    compared = softcache(
        "compare", run, "--eval-data", test, "--cache", str(cache.path), "--data", data
    )
    assert compared.exit_code == 0
    assert "mAP" in compared.stdout
    assert student.evaluation is not None
    scores = student.evaluation.scores
    assert scores is not None
    cells = score_cells(scores, score_names([scores]))
    assert all(cell in compared.stdout for cell in cells)
    page = folder / "report.html"
    arguments = [str(cache.path), run, "--data", data, "--eval-data", test, "-o", str(page)]
    assert softcache("report", *arguments).exit_code == 0
    text = page.read_text()
    assert "Classes that the teacher finds hardest" in text
    assert all(cell in text for cell in cells)
    info = softcache("info", str(cache.path)).stdout
    assert "100.00% of all classes of all samples apply as labelled" in info
    verified = softcache(
        "verify", str(cache.path), "--teacher", f"{folder}/models.py:logits", "--data", data
    )
    assert verified.exit_code == 0
    out = folder / "p.npy"
    assert softcache("export-labels", str(cache.path), "-o", str(out)).exit_code == 0
    p = 1 / (1 + np.exp(-teacher_odds(folder, 2.0)))
    np.testing.assert_allclose(np.load(out), p, atol=1e-3)
    assert open_source(data).fetch([0])[1].shape == (1, CLASSES)


def test_the_python_dataset_gives_sets_and_log_odds(folder: Path) -> None:
    cache = dump(config_of(folder))
    dataset = SoftLabelDataset(f"npz:{folder}/data.npz", cache.path, temperature=1.0)
    inputs, applies, log_odds = dataset[3]
    assert inputs.shape == (1, 6, 6)
    assert applies.tolist() == np.load(folder / "data.npz")["y_train"][3].tolist()
    np.testing.assert_allclose(log_odds, teacher_odds(folder, 1.0)[3], rtol=2e-3, atol=2e-3)


def test_a_part_is_pulled_and_damage_is_repaired(folder: Path) -> None:
    cache = dump(config_of(folder))
    with http_server(folder) as server:
        part = pull(f"{server.url}/cache.h5", folder / "part.h5", samples=(50, 60))
    rows = np.arange(60)
    assert (part.label_sets(rows) == cache.label_sets(50 + rows)).all()
    assert (part.rows(0, rows) == cache.rows(0, 50 + rows)).all()
    raw = bytearray(cache.path.read_bytes())
    raw[cache.header.array("label_sets").offset + 3] ^= 0x80
    cache.path.write_bytes(raw)
    assert softcache("verify", str(cache.path)).exit_code != 0
    assert softcache("repair", str(cache.path)).exit_code == 0
    again = dump(config_of(folder))
    labels = np.load(folder / "data.npz")["y_train"]
    assert (again.label_sets(np.arange(SAMPLES)) == labels).all()
