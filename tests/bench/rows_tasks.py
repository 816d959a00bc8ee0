"""Students of pixels, words and frames against students of labels alone: three tasks, several seeds.

python -m tests.bench.rows_tasks [pixels|words|frames ...]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import torch

from tests import frames, pixels, words
from tests.bench import machine, work_folder
from tests.bench.pool import shown
from tests.cli.app_cases import softcache
from tests.train.loop_cases import metrics

Figures = dict[str, list[float]]


def run(*arguments: str | Path) -> None:
    """Run a command; stop if it fails."""
    result = softcache(*arguments)
    if result.exit_code:
        raise SystemExit(result.output)


def pairs(cache: Path, data: str, test: str, student: str, seeds: int, *more: str) -> Path:
    """Train a student and its hard-label baseline with each seed, and return the folder of all runs."""
    out = cache.parent / "runs"
    for seed in range(seeds):
        arguments = ["--student", student, "--data", data, "--eval-data", test, "--seed", str(seed)]
        run("train", cache, *arguments, "--baseline", "--out", str(out / str(seed)), *more)
    return out


def figures_of(out: Path, seeds: int, name: str) -> Figures:
    """A score at the end of each run, in percent."""
    folders = {"distilled": "", "hard labels": "baseline"}
    return {
        who: [100 * metrics(out / str(seed) / folder)[-1][name] for seed in range(seeds)]
        for who, folder in folders.items()
    }


def accuracy_of(figures: Figures, out: Path, seeds: int) -> Figures:
    """The figures with the accuracies of rows."""
    for who, folder in (("distilled", ""), ("hard labels", "baseline")):
        lines = [metrics(out / str(seed) / folder)[-1] for seed in range(seeds)]
        figures[f"{who}, accuracy"] = [
            100 * (1 - line["errors"] / line["samples"]) for line in lines
        ]
    return figures


def of_pixels(folder: Path, seeds: int) -> Figures:
    """MNIST's digits, pixel by pixel: mean intersection over union, in percent."""
    data = pixels.write_task(folder, 500, 6000, 4, test=1000)
    cache, models = folder / "cache.h5", folder / "models.py"
    teacher = ["--teacher", f"{models}:digits_teacher", "--temperature", "1", "--out", str(cache)]
    views = ["--augment", "shift:2", "--views", "8"]
    run("dump", *teacher, "--data", data, "--eval-data", f"{data}@test", *views)
    more = ["--epochs", "30", "--batch-size", "16", "--lr", "0.01"]
    out = pairs(cache, data, f"{data}@test", f"{models}:digits_student", seeds, *more)
    return accuracy_of(figures_of(out, seeds, "mean_iou"), out, seeds)


def of_words(folder: Path, seeds: int) -> Figures:
    """Names, places and dates, of which a fifth of the tags is wrong: balanced accuracy, in percent."""
    train = words.sentences(1500, wrong=0.2)
    tagged = words.write_sentences(folder / "teacher.jsonl", train)
    data = words.write_sentences(folder / "student.jsonl", train[:150])
    test = words.write_sentences(folder / "test.jsonl", words.sentences(500, seed=1))
    words.make_tagger(folder / "tagger", tagged, epochs=6)
    cache, tokenizer = folder / "cache.h5", f"&tokenizer={folder / 'tagger'}"
    teacher = ["--teacher", f"hf:{folder / 'tagger'}", "--temperature", "1", "--out", str(cache)]
    run("dump", *teacher, "--data", data, "--eval-data", test)
    student = (
        f"hf:bert?pretrained=false&hidden_size=16&num_hidden_layers=1&num_attention_heads=2&"
        f"intermediate_size=32&tokenizer={folder / 'tagger'}"
    )
    more = ["--epochs", "40", "--batch-size", "32", "--lr", "0.003"]
    out = pairs(cache, data + tokenizer, test + tokenizer, student, seeds, *more)
    return accuracy_of(figures_of(out, seeds, "balanced_accuracy"), out, seeds)


def of_frames(folder: Path, seeds: int) -> Figures:
    """Spoken symbols: insertions, deletions and substitutions, in percent; the baseline trains with CTC."""
    data = frames.write_task(folder, 150, 1500, 12)
    cache, models = folder / "cache.h5", folder / "models.py"
    teacher = ["--teacher", f"{models}:teacher", "--temperature", "1", "--out", str(cache)]
    run("dump", *teacher, "--data", data)
    x, y = frames.spoken(1500)
    test = frames.spoken(500, seed=7)
    module = frames.load_models(models)
    figures: Figures = {"distilled": [], "CTC on the transcripts": []}
    for seed in range(seeds):
        out = folder / "runs" / str(seed)
        more = ["--epochs", "60", "--batch-size", "32", "--lr", "0.005", "--seed", str(seed)]
        student = ["--student", f"{models}:student", "--data", data, "--out", str(out)]
        run("train", cache, *student, *more)
        distilled = frames.student_of(out, models)
        torch.manual_seed(seed)
        alone = module.student()
        frames.train_recogniser(alone, x[:150], y[:150], 60, seed)
        for who, model in (("distilled", distilled), ("CTC on the transcripts", alone)):
            figures[who].append(100 * frames.symbol_errors(model, *test))
    figures["teacher"] = [100 * frames.symbol_errors(module.teacher(), *test)]
    return figures


TASKS: dict[str, Callable[[Path, int], Figures]] = {
    "pixels": of_pixels,
    "words": of_words,
    "frames": of_frames,
}


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.argument("tasks", nargs=-1, type=click.Choice(list(TASKS)))
@click.option("--seeds", default=3, show_default=True, help="Runs of each student.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep all files here.")
def main(tasks: tuple[str, ...], seeds: int, folder: Path | None) -> None:
    with work_folder(folder) as work:
        for name in tasks or TASKS:
            (work / name).mkdir(exist_ok=True)
            print(f"{name}: {TASKS[name].__doc__}")
            for who, values in TASKS[name](work / name, seeds).items():
                every = ", ".join(f"{value:.1f}" for value in values)
                print(f"  {who}: {shown(values)} ({every})", flush=True)
    print(machine())


if __name__ == "__main__":
    main()
