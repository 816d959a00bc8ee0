"""Ensembles of teachers, and every encoding through an interrupted dump and a student's training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from softcache.cache import Cache, open_cache
from softcache.cache import allocate as cache_allocate
from softcache.cache import writer as cache_writer
from softcache.cache.reader import partial_path
from softcache.cache.verify import check_damage
from softcache.cli.app import main
from softcache.data.open import open_source
from softcache.dump.config import DumpConfig
from softcache.dump.fidelity import BATCH
from softcache.dump.loop import dump
from softcache.dump.select_encoding import FIT_VIEWS, needs_rows
from softcache.errors import ModelError, SettingsError
from softcache.models.builtin import mlp
from softcache.teachers.ensemble import Ensemble, make_ensemble
from softcache.teachers.load import load_teacher
from softcache.teachers.teacher import Teacher
from softcache.train.loop import train
from softcache.train.options import make_train_config
from softcache.util.callables import import_callable
from softcache.util.tensors import to_float
from tests.configs import replace
from tests.conftest import SAMPLES, make_arrays

Rows = npt.NDArray[np.float64]
StopAt = Callable[[int], None]

CPU = torch.device("cpu")
CLASSES = 20

# the environment sets the batch at which teacher `one` raises; batches of one sample, such as the
# trial before a dump, do not count
TEACHERS = f"""
import os
from pathlib import Path

import torch
from torch import nn

CALLS = Path(__file__).with_name("calls")

class Teacher(nn.Module):
    def __init__(self, seed, counts=True, classes={CLASSES}):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(64, classes, generator=generator))
        self.counts = counts

    def forward(self, x):
        if self.counts and len(x) > 1:
            with CALLS.open("a") as file:
                file.write("x")
            if CALLS.stat().st_size == int(os.environ.get("TEACHER_AT", 0)):
                raise ValueError("no more")
        return x.flatten(1) @ self.weight

def one():
    return Teacher(1)

def two():
    return Teacher(2, counts=False)

def three():
    return Teacher(3, counts=False)

def wide():
    return Teacher(4, counts=False, classes={CLASSES + 1})
"""


@pytest.fixture
def teachers_file(tmp_path: Path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(TEACHERS)
    return path


@pytest.fixture
def config(dump_config: DumpConfig, teachers_file: Path) -> DumpConfig:
    """A dump of teacher `one` with 2 views of 300 samples, in batches of 64."""
    return replace(
        dump_config,
        teacher=f"{teachers_file}:one",
        eval_data=None,
        views=2,
        augment="shift:1",
        device="cpu",
    )


@pytest.fixture
def specs(teachers_file: Path) -> list[str]:
    return [f"{teachers_file}:{name}" for name in ("one", "two", "three")]


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StopAt:
    """Make teacher `one` raise at its n-th batch, counted from the call; 0 for never."""

    def stop_at(batch: int) -> None:
        (tmp_path / "calls").unlink(missing_ok=True)
        monkeypatch.setenv("TEACHER_AT", str(batch))

    return stop_at


def log_softmax(logits: Rows) -> Rows:
    shifted = logits - logits.max(-1, keepdims=True)
    normalized: Rows = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalized


def averaged(logits: Sequence[Rows], weights: Sequence[float], temperature: float) -> Rows:
    """log of the weighted mean of softmax(z / T), in float64."""
    shares = np.array(weights, np.float64) / sum(weights)
    probs = [
        share * np.exp(log_softmax(z / temperature))
        for z, share in zip(logits, shares, strict=True)
    ]
    return np.asarray(np.log(np.sum(probs, 0)))


# several teachers as one


class Fixed(nn.Module):
    """A teacher with fixed logits (N, C), one row for each of the N samples in order."""

    def __init__(self, logits: Rows) -> None:
        super().__init__()
        self.logits: torch.Tensor
        self.register_buffer("logits", torch.from_numpy(logits).float())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(inputs)]


def fixed(logits: Rows, name: str = "fixed") -> Teacher:
    provenance = {"name": name, "parameters": logits.size}
    return Teacher(name, Fixed(logits).eval(), logits.shape[1], CPU, "fp32", provenance)


def ensemble_log_probs(ensemble: Ensemble, rows: int, temperature: float) -> Rows:
    log_probs = ensemble.log_probs(torch.zeros(rows, 1), temperature)
    assert log_probs.dtype == torch.float32
    return log_probs.double().numpy()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 1 << 32),
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=4),
    spread=st.sampled_from([0.0, 1.0, 10.0]),
    temperature=st.sampled_from([1.0, 4.0]),
)
def test_an_ensemble_says_the_weighted_mean_of_softened_probabilities(
    seed: int, weights: list[float], spread: float, temperature: float
) -> None:
    random = np.random.default_rng(seed)
    logits = [random.standard_normal((5, 7)) * spread for _ in weights]
    ensemble = make_ensemble([fixed(z) for z in logits], weights)
    log_probs = ensemble_log_probs(ensemble, 5, temperature)
    np.testing.assert_allclose(log_probs, averaged(logits, weights, temperature), atol=1e-4)
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1, atol=1e-5)


def test_it_is_neither_the_mean_of_logits_nor_softened_after_the_mean() -> None:
    logits = [np.array([[9.0, 0.0, 0.0]]), np.array([[0.0, 5.0, 0.0]])]
    log_probs = ensemble_log_probs(make_ensemble([fixed(z) for z in logits], ()), 1, 4.0)
    mean_of_logits = log_softmax((logits[0] + logits[1]) / 8)
    softened_after = log_softmax(averaged(logits, [1, 1], 1.0) / 4)
    for wrong in (mean_of_logits, softened_after):
        assert np.abs(log_probs - wrong).max() > 0.1


def test_teachers_that_are_certain_and_disagree_share_the_mass() -> None:
    logits = [np.array([[1e4, 0.0, 0.0]]), np.array([[0.0, 1e4, 0.0]])]
    log_probs = ensemble_log_probs(make_ensemble([fixed(z) for z in logits], (3, 1)), 1, 1.0)
    np.testing.assert_allclose(np.exp(log_probs), [[0.75, 0.25, 0]], atol=1e-6)
    assert np.isfinite(log_probs).all()


def test_one_teacher_is_itself_whatever_its_weight() -> None:
    logits = np.random.default_rng(0).standard_normal((5, 7)) * 5
    alone = torch.log_softmax(torch.from_numpy(logits).float() / 4, -1).double().numpy()
    for weights in ((), (0.3,), (50,)):
        ensemble = make_ensemble([fixed(logits)], weights)
        np.testing.assert_array_equal(ensemble_log_probs(ensemble, 5, 4.0), alone)


def test_weights_are_shares_and_equal_without_any() -> None:
    teachers = [fixed(np.zeros((1, 3)), name) for name in "abc"]
    assert make_ensemble(teachers, ()).weights == pytest.approx((1 / 3,) * 3)
    ensemble = make_ensemble(teachers, (1, 2, 5))
    assert ensemble.weights == (0.125, 0.25, 0.625)
    assert [(t["name"], t["weight"]) for t in ensemble.provenance] == [
        ("a", 0.125),
        ("b", 0.25),
        ("c", 0.625),
    ]


@pytest.mark.parametrize(
    "weights",
    [
        (1,),
        (1, 1, 1),
        (1, 0),
        (-1, 2),
        (math.nan, 1),
        (1, math.nan),
        (1, math.inf),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights: tuple[float, ...]) -> None:
    teachers = [fixed(np.zeros((1, 3)), name) for name in "ab"]
    with pytest.raises(
        SettingsError,
        match=rf"^{len(weights)} teacher weights \[.*\] for 2 teachers; expected a positive weight for each",
    ):
        make_ensemble(teachers, weights)


def test_teachers_of_different_classes_are_refused_by_name() -> None:
    teachers = [fixed(np.zeros((1, classes)), f"of_{classes}") for classes in (3, 3, 4)]
    with pytest.raises(
        ModelError,
        match=r"classes: of_3 3, of_3 3, of_4 4; average only teachers of the same task$",
    ):
        make_ensemble(teachers, ())
    make_ensemble(teachers[:2], ())


def test_teachers_of_one_architecture_and_different_classes_are_refused(tmp_path: Path) -> None:
    loaded = []
    for classes in (3, 4):
        save_file(mlp((1, 8, 8), (16,), classes).state_dict(), tmp_path / f"{classes}.safetensors")
        loaded.append(
            load_teacher(
                "mlp:16",
                tmp_path / f"{classes}.safetensors",
                sample=torch.zeros(1, 1, 8, 8),
                classes=None,
                device=CPU,
                precision="fp32",
            )
        )
    with pytest.raises(ModelError, match="different numbers of classes"):
        make_ensemble(loaded, ())


def test_each_teacher_is_checked() -> None:
    ensemble = make_ensemble([fixed(np.zeros((2, 3)), "good"), fixed(np.zeros((2, 3)), "bad")], ())
    bad = ensemble.teachers[1].model
    assert isinstance(bad, Fixed)
    bad.logits[1, 2] = math.nan
    with pytest.raises(
        ModelError, match="teacher bad returns nan for sample 18, class 2; expected"
    ):
        ensemble.log_probs(torch.zeros(2, 1), 4.0, np.array([17, 18]))


def test_a_teacher_that_says_its_own_weights_has_no_gradient() -> None:
    # such as a teacher that looks its logits up; numpy refuses tensors with a gradient
    teacher = fixed(np.zeros((2, 3)))
    teacher.model.logits = nn.Parameter(torch.zeros(2, 3))
    assert not make_ensemble([teacher], ()).log_probs(torch.zeros(2, 1), 4.0).requires_grad


# several teachers in a dump


def weight_of(spec: str) -> Rows:
    """The weight matrix (inputs, classes) of a teacher in TEACHERS, in float64."""
    model = import_callable(spec, what="teacher")()
    weight: Rows = model.weight.detach().double().numpy()
    return weight


def test_a_dump_of_several_teachers_holds_their_average(
    config: DumpConfig, specs: list[str]
) -> None:
    weights = (1.0, 2.0, 5.0)
    cache = dump(replace(config, teacher=specs, teacher_weight=weights, views=1, augment=None))
    inputs = to_float(open_source(config.data).fetch(range(SAMPLES))[0]).double().flatten(1).numpy()
    logits = [inputs @ weight_of(spec) for spec in specs]
    for temperature in (4.0, 1.0):
        stored = cache.rows(0, np.arange(SAMPLES), temperature).astype(np.float64)
        if temperature == cache.header.temperature:
            exact = averaged(logits, weights, temperature)
        else:  # re-tempering applies to the average at T, not to each teacher
            exact = log_softmax(averaged(logits, weights, 4.0) * 4)
        assert (np.exp(exact) * (exact - stored)).sum(-1).max() < 1e-5
    equal = averaged(logits, (1, 1, 1), 4.0)
    stored = cache.rows(0, np.arange(SAMPLES)).astype(np.float64)
    assert (np.exp(equal) * (equal - stored)).sum(-1).max() > 1e-3


def test_the_header_names_every_teacher_and_its_share(config: DumpConfig, specs: list[str]) -> None:
    header = dump(replace(config, teacher=specs, teacher_weight=(1, 1, 2))).header
    assert [teacher["name"] for teacher in header.teachers] == [
        "models.py:one",
        "models.py:two",
        "models.py:three",
    ]
    assert [teacher["weight"] for teacher in header.teachers] == [0.25, 0.25, 0.5]
    assert len({teacher["sha256"] for teacher in header.teachers}) == 3
    assert {teacher["parameters"] for teacher in header.teachers} == {64 * CLASSES}


def test_the_errors_recorded_are_those_of_all_together(
    config: DumpConfig, specs: list[str], data_file: Path
) -> None:
    eval_data = f"npz:{data_file}@test"
    header = dump(replace(config, teacher=specs, eval_data=eval_data)).header
    images, labels = make_arrays(100, seed=1)
    inputs = images.reshape(100, -1) / 255
    logits = [inputs @ weight_of(spec) for spec in specs]
    wrong = int((averaged(logits, (1, 1, 1), 1.0).argmax(-1) != labels).sum())
    assert header.evaluation is not None
    assert header.evaluation["errors"] == wrong


def test_a_dump_goes_on_with_the_same_teachers_and_weights_alone(
    config: DumpConfig, specs: list[str], stop_at: StopAt
) -> None:
    config = replace(config, teacher=specs[:2], teacher_weight=(3, 1))
    stop_at(4)
    with pytest.raises(ModelError, match="raised ValueError on samples"):
        dump(config)
    stop_at(0)
    for other, message in (
        ({"teacher": specs[1::-1]}, r"another teacher \(name 'models.py:one', now 'models.py:two'"),
        ({"teacher_weight": (1, 1)}, r"another teacher \(weight 0\.75, now 0\.5"),
        (
            {"teacher": specs, "teacher_weight": ()},
            r"was started with 2 teacher\(s\), now 3; use the same",
        ),
        ({"teacher": specs[0], "teacher_weight": ()}, r"was started with 2 teacher\(s\), now 1; "),
    ):
        with pytest.raises(SettingsError, match=message):
            dump(replace(config, **other))
    assert partial_path(config.out).exists()
    # only the shares matter: weights in the same proportions are the same
    resumed = dump(replace(config, teacher_weight=(0.75, 0.25))).path.read_bytes()
    assert resumed == dump(replace(config, out=config.out.with_name("whole.h5"))).path.read_bytes()


def test_a_dump_of_teachers_of_different_classes_is_refused(
    config: DumpConfig, specs: list[str], teachers_file: Path
) -> None:
    with pytest.raises(
        ModelError, match=r"classes: .*models\.py:one 20, .*models\.py:wide 21; average only"
    ):
        dump(replace(config, teacher=[specs[0], f"{teachers_file}:wide"]))
    with pytest.raises(ModelError, match=r"wide returns shape \(1, 21\) .* expected .*\(1, 20\)"):
        dump(replace(config, teacher=[specs[0], f"{teachers_file}:wide"], classes=CLASSES))
    assert not partial_path(config.out).exists()


def test_weights_files_go_with_the_teachers_in_order(config: DumpConfig, tmp_path: Path) -> None:
    files = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    for seed, file in enumerate(files):
        torch.manual_seed(seed)
        save_file(mlp((1, 8, 8), (16,), CLASSES).state_dict(), file)
    config = replace(config, teacher=["mlp:16", "mlp:16"])
    header = dump(replace(config, weights=files)).header
    assert [t["weights"] for t in header.teachers] == ["1.safetensors", "2.safetensors"]
    assert header.teachers[0]["sha256"] != header.teachers[1]["sha256"]
    with pytest.raises(SettingsError, match="1 --weights for 2 --teacher; expected one for each"):
        replace(config, weights=files[:1])
    with pytest.raises(
        SettingsError,
        match="teacher mlp:16 would be untrained; name its weights file with --weights",
    ):
        dump(replace(config, out=tmp_path / "other.h5"))


def test_the_command_takes_several_teachers(
    specs: list[str], data_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.h5"
    arguments = ["dump", "--data", f"npz:{data_file}", "--out", str(out), "--device", "cpu"]
    for spec, weight in zip(specs[:2], ("3", "1"), strict=True):
        arguments += ["--teacher", spec, "--teacher-weight", weight]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert [t["weight"] for t in open_cache(out).header.teachers] == [0.75, 0.25]


# every encoding, from the teacher to the student

ENCODINGS = ["dense", "quantized", "topk:8", "basis:10,4", "sampled:12", "auto"]


@pytest.fixture(params=ENCODINGS)
def encoded(request: pytest.FixtureRequest, config: DumpConfig) -> DumpConfig:
    return replace(config, encoding=request.param)


def test_a_dump_stopped_again_and_again_ends_in_the_same_bytes(
    encoded: DumpConfig, stop_at: StopAt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # blocks of 3 to 30 rows, not aligned with batches, each committed as soon as it is complete
    monkeypatch.setattr(cache_allocate, "BLOCK_BYTES", 700)
    monkeypatch.setattr(cache_writer, "COMMIT_SECONDS", 0.0)
    whole = dump(replace(encoded, out=tmp_path / "whole.h5")).path.read_bytes()
    committed = []  # blocks after each stop
    # before its first row, the dump runs every sample in each view that the encoding is fitted to
    fit_batches = FIT_VIEWS * -(-SAMPLES // BATCH) if needs_rows(encoded.encoding) else 0
    # stops during the fit and the fidelity check, too
    for batch in (2, fit_batches + 7, 6):
        stop_at(batch)
        with pytest.raises(ModelError, match="raised ValueError on samples"):
            dump(encoded)
        assert not encoded.out.exists()
        partial = partial_path(encoded.out)
        committed.append(
            int((open_cache(partial, unfinished=True).arrays["digests"] != 0).sum())
            if partial.exists()
            else 0
        )
    stop_at(0)
    assert committed == sorted(committed)
    assert committed[0] < committed[-1]
    assert dump(encoded).path.read_bytes() == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_another_dump_gives_the_same_bytes(
    workers: int, config: DumpConfig, tmp_path: Path
) -> None:
    for encoding in ("basis:10,4", "sampled:12"):
        config = replace(config, encoding=encoding)
        first = dump(replace(config, out=tmp_path / f"{encoding}1.h5"))
        torch.manual_seed(5)  # the dump must not depend on the global generator
        second = dump(replace(config, out=tmp_path / f"{encoding}2.h5", workers=workers))
        assert second.path.read_bytes() == first.path.read_bytes()


def test_draws_change_with_the_seed_of_the_cache(config: DumpConfig, tmp_path: Path) -> None:
    config = replace(config, encoding="sampled:12", augment=None, views=1)
    ids = [
        dump(replace(config, seed=seed, out=tmp_path / f"{seed}.h5")).arrays["ids"]
        for seed in (0, 1)
    ]
    assert (ids[0] != ids[1]).any(-1).mean() > 0.5


def test_another_batch_size_stores_the_same_targets_but_for_rounding(
    encoded: DumpConfig, tmp_path: Path
) -> None:
    cache = dump(encoded)
    other = dump(replace(encoded, batch_size=77, out=tmp_path / "other.h5"))
    for view in range(2):
        rows = [np.exp(c.rows(view, np.arange(SAMPLES))) for c in (cache, other)]
        # rounding may change a draw or a quantization step that falls on a boundary
        same = np.abs(rows[0] - rows[1]).max(-1) < 1e-3
        assert same.mean() > 0.99


def student(cache: Cache, config: DumpConfig, folder: Path, **options: object) -> list[float]:
    """Train a student; its mean KL from the targets in each epoch."""
    run = make_train_config(
        student="mlp:8",
        data=config.data,
        out=folder,
        cache=cache.path,
        epochs=2,
        batch_size=64,
        device="cpu",
        **options,  # type: ignore[arg-type]
    )
    train(run)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["soft"] for line in lines]


def test_a_student_learns_from_every_encoding(encoded: DumpConfig, tmp_path: Path) -> None:
    cache = dump(encoded)
    check_damage(open_cache(cache.path))
    losses = student(cache, encoded, tmp_path / "run", learning_rate=0.02)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[1] < losses[0]
    assert (tmp_path / "run" / "student.safetensors").exists()


@pytest.mark.parametrize("temperature", [4.0, 1.0])
@pytest.mark.parametrize(
    ("encoding", "tolerance"), [("quantized", 0.002), ("topk:18", 0.005), ("basis:19,4", 0.002)]
)
def test_the_loss_is_that_of_the_dense_cache(
    encoding: str, tolerance: float, temperature: float, config: DumpConfig, tmp_path: Path
) -> None:
    # the weights of the student hardly change, so its loss depends on the targets alone
    losses = [
        student(
            dump(replace(config, encoding=name, out=tmp_path / f"{number}.h5")),
            config,
            tmp_path / f"run{number}",
            learning_rate=1e-12,
            temperature=temperature,
        )
        for number, name in enumerate(("dense", encoding))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    # a temperature that differs by 1 % fails the same check
    other = student(
        open_cache(tmp_path / "0.h5"),
        config,
        tmp_path / "other",
        learning_rate=1e-12,
        temperature=temperature * 1.01,
    )
    assert losses[1] != pytest.approx(other, rel=tolerance)


def test_draws_have_the_entropy_of_the_targets_less_and_the_same_gradient(
    config: DumpConfig, tmp_path: Path
) -> None:
    # KL(draws ‖ student) exceeds KL(teacher ‖ student) by the entropy that the draws lack
    dense, sampled = (
        dump(replace(config, encoding=name, out=tmp_path / f"{name}.h5"))
        for name in ("dense", "sampled:12")
    )
    losses, entropies = [], []
    for cache in (dense, sampled):
        out = tmp_path / f"{cache.path.stem}.run"
        run = student(cache, config, out, learning_rate=1e-12, temperature=4.0)
        losses.append(float(np.mean(run)))
        assert cache.header.summary is not None
        entropies.append(cache.header.summary["entropy"])
    assert entropies[0] - entropies[1] > 0.05
    assert losses[1] - losses[0] == pytest.approx(entropies[0] - entropies[1], rel=0.1)


def test_a_sampled_cache_is_refused_at_another_temperature(
    config: DumpConfig, tmp_path: Path
) -> None:
    cache = dump(replace(config, encoding="sampled:12"))
    with pytest.raises(
        SettingsError, match=r"temperature 2 of a sampled cache made at 4: draws cannot be re-temp"
    ):
        student(cache, config, tmp_path / "run", temperature=2.0)
    assert not (tmp_path / "run").exists()
