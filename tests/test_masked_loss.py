"""The loss of tokens, words, frames and pixels: a mask says which positions count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import softcache
from softcache.errors import SettingsError
from softcache.losses import Loss, distillation_loss
from softcache.types import StoredTargets
from tests.token_cases import dump_tokens

CLASSES, ROWS = 7, 6
MASK = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 1, 1, 0]]).bool()


def logits_of(
    shape: tuple[int, ...] = (2, 5, CLASSES), dtype: torch.dtype = torch.float32
) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return values.to(dtype).requires_grad_(True)


def labels_of() -> Tensor:
    return torch.where(MASK, torch.arange(10).view(2, 5) % CLASSES, -100)


def targets_of(rows: int = ROWS, classes: int = CLASSES) -> Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(2)).log_softmax(-1)


def masked(logits: Tensor, targets: Tensor | None = None, alpha: float = 0.9) -> Loss:
    targets = targets_of() if targets is None else targets
    return distillation_loss(
        logits, targets, labels_of(), mask=MASK, temperature=2.0, alpha=alpha, label_smoothing=0.1
    )


def reference(logits: Tensor, alpha: float = 0.9) -> Tensor:
    """The same from functions of torch, in float64."""
    rows, labels, targets = logits[MASK].double(), labels_of()[MASK], targets_of().double()
    soft = torch.nn.functional.kl_div(
        (rows / 2).log_softmax(-1), targets, log_target=True, reduction="batchmean"
    )
    hard = torch.nn.functional.cross_entropy(rows, labels, label_smoothing=0.1)
    return alpha * 4 * soft + (1 - alpha) * hard


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_loss_and_its_gradient_are_those_of_the_rows_of_the_mask(alpha: float) -> None:
    logits = logits_of()
    total = masked(logits, alpha=alpha).total
    torch.testing.assert_close(total.double(), reference(logits, alpha), atol=1e-5, rtol=1e-5)
    (expected,) = torch.autograd.grad(reference(logits, alpha), logits)
    torch.autograd.backward(total * 3)
    torch.testing.assert_close(logits.grad, 3 * expected, atol=1e-6, rtol=1e-4)
    assert not expected[~MASK].any()


def test_a_mask_of_nothing_is_a_loss_of_0_from_which_gradients_flow() -> None:
    logits, nothing = logits_of(), torch.zeros_like(MASK)
    for alpha in (0.0, 0.5, 1.0):
        loss = distillation_loss(
            logits, targets_of(0), labels_of(), mask=nothing, temperature=2.0, alpha=alpha
        )
        assert [part.item() for part in loss] == [0.0, 0.0, 0.0]
        torch.autograd.backward(loss.total)
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_have_a_loss_in_float32(dtype: torch.dtype) -> None:
    logits = logits_of(dtype=dtype)
    total = masked(logits).total
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), reference(logits), atol=1e-5, rtol=1e-5)
    torch.autograd.backward(total)
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    assert masked(logits_of(dtype=torch.float64)).total.dtype == torch.float64


def test_small_gradients_of_float16_survive_if_the_loss_is_scaled() -> None:
    rows = 20_000  # of each, the gradient is below the smallest number of float16
    logits = torch.zeros(1, rows, 4, dtype=torch.float16, requires_grad=True)
    targets = torch.tensor([[0.252, 0.248, 0.25, 0.25]]).log().expand(rows, -1)
    mask, labels = torch.ones(1, rows).bool(), torch.zeros(1, rows, dtype=torch.int64)
    loss = distillation_loss(logits, targets, labels, mask=mask, temperature=1.0, alpha=1.0)
    torch.autograd.backward(loss.total * 2**16)
    assert logits.grad is not None
    torch.testing.assert_close(
        logits.grad[0, 0, :2].float() * rows / 2**16,
        torch.tensor([-0.002, 0.002]),
        rtol=0.02,
        atol=0,
    )


def test_a_second_backward_pass_is_refused_not_wrong() -> None:
    logits = logits_of()
    total = masked(logits).total
    torch.autograd.backward(total, retain_graph=True)
    with pytest.raises(SettingsError, match="a second backward pass through the same loss"):
        torch.autograd.backward(total)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_the_loss_is_the_same_without_gradients(off: Callable[[], torch.no_grad]) -> None:
    expected = masked(logits_of())
    with off():
        found = masked(logits_of().detach() * 1)
    assert not found.total.requires_grad
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.detach())


def test_a_padded_vocabulary_is_to_be_cut() -> None:
    wide = logits_of((2, 5, CLASSES + 3))
    with pytest.raises(
        SettingsError,
        match=r"If the last 3 logits pad a vocabulary of 7, cut them: logits\[\.\.\., :7\]",
    ):
        masked(wide)
    assert masked(wide[..., :CLASSES]).total.isfinite()


@pytest.mark.parametrize(
    ("logits", "targets", "labels", "mask", "message"),
    [
        ((2, 5, 7), (5, 7), (2, 5), (2, 5), r"targets have shape \(5, 7\) and logits \(6, 7\).* 6 positions"),
        ((2, 5, 7), (6, 8), (2, 5), (2, 5), r"targets have shape \(6, 8\) and logits \(6, 7\)"),
        ((2, 4, 7), (6, 7), (2, 5), (2, 5), r"logits have shape \(2, 4, 7\), labels \(2, 5\) and the mask"),
        ((2, 5, 7), (6, 7), (2, 4), (2, 5), r"labels \(2, 4\) and the mask \(2, 5\); expected \(B, P, C\)"),
        ((2, 5, 7), (6, 7), (10,), (2, 5), r"labels \(10,\) and the mask \(2, 5\)"),
        ((2, 5, 7), (6, 7), (2, 5), None, r"logits have shape \(2, 5, 7\); .* give mask=cache_rows >= 0"),
        ((10, 7), (10, 7), (2, 5), None, r"labels have shape \(2, 5\) and logits \(10, 7\)"),
        ((7,), None, (1,), None, r"logits have shape \(7,\); expected \(samples, classes\)"),
    ],
)  # fmt: skip
def test_other_shapes_are_named(
    logits: tuple[int, ...],
    targets: tuple[int, int] | None,
    labels: tuple[int, ...],
    mask: tuple[int, int] | None,
    message: str,
) -> None:
    with pytest.raises(SettingsError, match=message):
        distillation_loss(
            torch.zeros(logits),
            None if targets is None else targets_of(*targets),
            torch.zeros(labels, dtype=torch.int64),
            mask=None if mask is None else MASK,
            temperature=1.0,
            alpha=0.5,
        )


# the soft targets of a cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> softcache.SoftCache:
    return softcache.open(dump_tokens(tmp_path_factory.mktemp("rows"), "dense"))


def test_targets_of_rows_are_those_of_the_rows_in_order(cache: softcache.SoftCache) -> None:
    rows = torch.tensor([[5, -1, 3], [-1, 9, 5]])
    targets = cache.row_targets(rows)
    assert isinstance(targets, StoredTargets)
    assert targets.shape == (4, cache.classes)
    every = cache.targets([5, 3, 9, 5])
    assert isinstance(every, Tensor)
    torch.testing.assert_close(softcache.to_dense(targets), every)
    assert cache.row_targets(rows.clamp(max=-1)).shape == (0, cache.classes)
    assert cache.row_targets(rows.int()).shape == (4, cache.classes)


def test_another_temperature_or_device_changes_the_targets_each_time(
    cache: softcache.SoftCache,
) -> None:
    rows = torch.tensor([4, 8])
    for temperature in (1.0, 3.0, 1.0, None):
        found = softcache.to_dense(cache.row_targets(rows, temperature=temperature))
        expected = cache.targets([4, 8], temperature=temperature)
        torch.testing.assert_close(found, expected)
    for device in ("cpu", "meta", torch.device("cpu"), None, "meta"):
        stored = cache.row_targets(rows, device=device).stored
        wanted = torch.device(device or "cpu")
        assert {tensor.device for tensor in stored.values()} == {wanted}


def test_targets_in_chunks_are_those_at_once(
    cache: softcache.SoftCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.arange(60).view(2, 30)
    logits, labels = logits_of((2, 30, cache.classes)), torch.zeros(2, 30, dtype=torch.int64)
    losses = []
    for values in (1 << 23, 7 * cache.classes):
        monkeypatch.setattr("softcache.chunked_loss.CHUNK_VALUES", values)
        for targets in (cache.row_targets(rows), softcache.to_dense(cache.row_targets(rows))):
            loss = distillation_loss(
                logits, targets, labels, mask=rows >= 0, temperature=1.0, alpha=0.5
            )
            losses.append(
                torch.cat([torch.autograd.grad(loss.total, logits)[0].flatten(), loss.total[None]])
            )
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0])
    flat = distillation_loss(
        logits.flatten(0, 1), cache.row_targets(rows), labels.flatten(), temperature=1.0, alpha=0.5
    )
    torch.testing.assert_close(flat.total, losses[0][-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "how", "message"),
    [
        (torch.tensor([10**6]), {}, r"row 1000000 of .*dense\.h5; expected 0 to \d+"),
        (torch.tensor([0.0]), {}, r"cache_rows are torch\.float32; expected whole numbers"),
        (torch.tensor([True]), {}, r"cache_rows are torch\.bool; expected whole numbers"),
        (torch.tensor([0]), {"temperature": 0}, r"temperature is 0\.0; expected a number above 0"),
    ],
)
def test_rows_that_cannot_be_had_are_named(
    rows: Tensor, how: dict[str, float], message: str, cache: softcache.SoftCache
) -> None:
    with pytest.raises(SettingsError, match=message):
        cache.row_targets(rows, temperature=how.get("temperature"))
