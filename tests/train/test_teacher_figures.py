"""How close a student is to its teacher, on some rows of a cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from softcache.dump.loop import dump
from softcache.models.evaluate_rows import row_model
from softcache.results.compare import open_joined
from softcache.train import teacher_figures as module
from softcache.util.callables import import_callable
from tests.token_caches import token_config, write_inputs


def test_documents_without_rows_are_not_what_a_student_is_compared_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_inputs(tmp_path)
    lines = [{"input_ids": [1]}, {"input_ids": [2, 3, 4, 5]}, {"input_ids": [4, 5, 6]}]
    (tmp_path / "ids.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(module, "ROWS", 1)  # fewer than a document has
    config = token_config(tmp_path)
    part = open_joined(dump(config).path, None)
    teacher = import_callable(config.teachers[0], what="teacher")().eval()
    figures = module.teacher_figures(
        row_model(teacher, part.classes), part, config.temperature or 1.0, torch.device("cpu")
    )
    assert figures["teacher_kl"] == pytest.approx(0, abs=1e-3)
    assert figures["teacher_agreement"] == 1
    assert figures["acceptance"] == pytest.approx(1, abs=1e-2)
