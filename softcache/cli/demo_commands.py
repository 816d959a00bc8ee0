"""The command lines of the demo: dump, inspect and train on the project's own data."""

from __future__ import annotations

from pathlib import Path

from softcache.errors import SettingsError

TEACHER = "cnn:32x2,64x2,128x2"

STUDENT = "cnn:8,16x2,32x2"

TEMPERATURE = 4

EPOCHS = 5

FEW_LABELS = 600

FEW_EPOCHS = 50


def demo_commands(data: Path, out: Path, seed: int) -> list[list[str]]:
    """The arguments of `softcache dump`, `info`, `train`, and `train` on a few labels alone, in this order.

    The students of the cache need no labels, so the last one shows what a hundredth of them would be worth.

    Args:
        data: the folder with `mnist/` and `teacher.safetensors`.
        out: the folder for the cache and the run.
        seed: the seed of the student, also in the name of its run folder.

    Raises:
        SettingsError: the teacher's weights are missing.
    """
    weights = data / "teacher.safetensors"
    if not weights.is_file():
        raise SettingsError(
            f"{weights} does not exist; run the demo in a clone of the project, or name its data folder "
            "with --data-dir"
        )
    cache = str(out / "mnist.h5")
    train_data = f"idx:{data / 'mnist'}"
    data_options = ["--data", train_data, "--eval-data", f"{train_data}@test"]
    dump = ["dump", *f"--teacher {TEACHER} --temperature {TEMPERATURE}".split()]
    train = ["train", cache, *f"--student {STUDENT} --epochs {EPOCHS} --seed {seed}".split()]
    run = str(out / f"student-{seed}")
    return [
        [*dump, "--weights", str(weights), *data_options, "--out", cache],
        ["info", cache],
        [*train, *data_options, "--baseline", "--out", run, "--overwrite"],
        [
            *f"train --student {STUDENT} --epochs {FEW_EPOCHS} --seed {seed}".split(),
            *["--data", f"{train_data}?shuffle=0&samples={FEW_LABELS}", *data_options[2:]],
            *["--out", str(out / f"few-labels-{seed}"), "--overwrite"],
        ],
    ]
