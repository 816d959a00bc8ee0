"""What `train --tune` costs and gains: each task of gains.py, with its medium budget, over several seeds.

For each seed, the same student is trained with the defaults and with --tune, in turns. The ratio of their
times is that of the whole commands; test errors have no part in the choice.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from tabulate import tabulate

import softcache
from tests.bench import machine, ratios, spread, work_folder
from tests.bench.gains import TASKS, run_task
from tests.bench.pool import mean_and_error

CHOSEN = ("temperature", "alpha", "loss", "learning_rate")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=["mnist", "digits", "table", "sources"])
    parser.add_argument("--mnist", default="data/mnist")
    parser.add_argument("--cifar", default="", help="data with splits train and test")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--budget", type=int, default=1, help="0 short, 1 medium, 2 long")
    parser.add_argument("--settings", type=int, default=16, help="that --tune tries")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    options.labels, options.budgets, options.sizes = [1.0], [], []  # only data, teacher and cache
    lines, examples = [], []
    with work_folder(options.folder) as folder:
        for name in options.tasks:
            run_task(name, options, folder / name, [])
            runs: dict[str, list[tuple[float, int]]] = {"default": [], "tuned": []}
            for seed in range(options.seeds):
                for kind, measured in runs.items():
                    measured.append(run(name, folder / name, seed, options, tuned=kind == "tuned"))
            settings = json.loads((folder / name / "tune" / "config.json").read_text())["settings"]
            examples.append([name, *(settings[key] for key in CHOSEN)])
            seconds = {kind: [one[0] for one in measured] for kind, measured in runs.items()}
            errors = {kind: [one[1] for one in measured] for kind, measured in runs.items()}
            gains = [a - b for a, b in zip(errors["default"], errors["tuned"], strict=True)]
            lines.append(
                [
                    name,
                    *spread(ratios(seconds["tuned"], seconds["default"])),
                    *("{:.0f} ± {:.0f}".format(*mean_and_error(errors[kind])) for kind in runs),
                    "{:.0f} ± {:.0f}".format(*mean_and_error(gains)),
                ]
            )
    headers = ["task", "time, median", "min", "max", "errors", "tuned", "fewer"]
    print(f"\n{options.settings} settings, {options.seeds} seeds; {machine()}\n")
    print(tabulate(lines, headers=headers, disable_numparse=True))
    print(f"\nchosen with the last seed:\n{tabulate(examples, headers=['task', *CHOSEN])}")


def run(
    name: str, folder: Path, seed: int, options: argparse.Namespace, *, tuned: bool
) -> tuple[float, int]:
    """The seconds of one training, and its test errors."""
    task, out = TASKS[name], folder / "tune"
    start = time.perf_counter()
    softcache.train(
        folder / "labels-1.h5", student=task.students[0], data=f"npz:{folder / 'labels-1.npz'}",
        eval_data=f"npz:{folder / 'data.npz'}@test", epochs=task.budgets[options.budget], seed=seed,
        tune=options.settings if tuned else None, out=out, overwrite=True, device="cpu",
    )  # fmt: skip
    seconds = time.perf_counter() - start
    return seconds, int(json.loads((out / "config.json").read_text())["errors"])


if __name__ == "__main__":
    main()
