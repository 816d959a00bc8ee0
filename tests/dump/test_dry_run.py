"""The estimate of what a dump would cost."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from softcache.dump.config import DumpConfig
from softcache.dump.dry_run import dry_run
from softcache.dump.loop import dump
from softcache.errors import SettingsError


def bytes_reported(text: str) -> int:
    return int(re.findall(r"about ([\d,]+) bytes", text)[0].replace(",", ""))


@pytest.mark.parametrize(
    "encoding",
    [
        "auto",
        "basis:2,1",
        "dense",
        "quantized",
        "topk:2",
        "sampled:3",
    ],
)
def test_a_dry_run_tells_size_time_and_candidates_and_writes_nothing(
    encoding: str, dump_config: DumpConfig, tmp_path: Path
) -> None:
    config = replace(dump_config, eval_data=None, encoding=encoding, out=tmp_path / "new" / "a.h5")
    before = sorted(tmp_path.iterdir())
    text = dry_run(config)
    assert sorted(tmp_path.iterdir()) == before
    rows = [line for line in text.splitlines() if line.startswith("*")]
    assert len(rows) == 1
    assert re.search(
        r"^300 samples x 1 view\(s\) as \S+: about [\d,]+ bytes; about \d+ s at [\d,]+ rows/s here\. "
        r"Nothing was written\.$",
        text,
        re.MULTILINE,
    )
    header = dump(config).header
    stored = sum(a.nbytes for a in header.arrays if a.axis in ("rows", "samples", "shared"))
    assert bytes_reported(text) == pytest.approx(stored, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"shard": (1, 3)}, "100 samples (shard 1 of 3 of 300) x 1"),
        ({"views": 4, "augment": "flip"}, "300 samples x 4"),
        (
            {"views": 4, "first_view": 9, "augment": "flip", "shard": (0, 2)},
            "150 samples (shard 0 of 2 of 300) x 4",
        ),
    ],
)
def test_the_size_is_that_of_the_part_that_is_asked_for(
    changes: dict[str, Any], part: str, dump_config: DumpConfig
) -> None:
    config = replace(dump_config, eval_data=None, **changes)
    text = dry_run(config)
    assert f"\n{part} view(s) as dense: " in text
    header = dump(config).header
    stored = sum(a.nbytes for a in header.arrays if a.axis in ("rows", "samples"))
    assert bytes_reported(text) == stored


def test_what_could_not_be_dumped_is_refused(dump_config: DumpConfig) -> None:
    with pytest.raises(SettingsError, match="encoding 'zip' is unknown; expected dense"):
        dry_run(replace(dump_config, encoding="zip"))
    with pytest.raises(SettingsError, match="no encoding keeps KL within 1e-12 at T = 4, 1, 2, 8"):
        dry_run(replace(dump_config, encoding="auto", max_kl=1e-12))
