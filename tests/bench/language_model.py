"""A small language model of the source code of Python's standard library, to be distilled.

    python -m tests.bench.language_model work

makes a tokenizer of 4,096 tokens, a training text, a test text (every tenth file) and a teacher. What follows
are two commands, which this program prints.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

VOCABULARY, LENGTH = 4096, 256
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings"}
TEACHER = f"hf:gpt2?pretrained=false&n_layer=4&n_head=4&n_embd=192&n_positions={LENGTH}"
STUDENT = f"hf:gpt2?pretrained=false&n_layer=2&n_head=2&n_embd=64&n_positions={LENGTH}"


def main() -> None:
    """Make the data and the teacher, as far as they are not there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=6.0, help="of training text")
    parser.add_argument("--epochs", type=int, default=2, help="of the teacher")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer").exists():
        write_texts(folder, int(options.megabytes * 1e6))
        make_tokenizer(folder)
    if not (folder / "teacher").exists():
        train_teacher(folder, options.epochs)
    print("\n".join(" ".join(map(str, command)) for command in commands(folder)))


def write_texts(folder: Path, size: int) -> None:
    """A document per file of the standard library, in train.jsonl and test.jsonl."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        file
        for file in sorted(root.rglob("*.py"))
        if not LEFT_OUT & set(file.relative_to(root).parts)
    ]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    for name, chosen, most in (
        ("train.jsonl", [text for n, text in enumerate(texts) if n % 10], size),
        ("test.jsonl", texts[::10], size // 20),
    ):
        written = 0
        with (folder / name).open("w") as out:
            for text in chosen:
                if written + len(text) <= most and text.strip():
                    out.write(json.dumps({"text": text}) + "\n")
                    written += len(text)


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of the training text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (folder / "train.jsonl").read_text().splitlines()
    inner.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=end, eos_token=end, pad_token=end
    )
    tokenizer.save_pretrained(folder / "tokenizer")


def data(folder: Path, name: str) -> str:
    """The specification of one of the two texts."""
    return f"jsonl:{folder / name}?text=text&length={LENGTH}&tokenizer={folder / 'tokenizer'}"


def train_teacher(folder: Path, epochs: int) -> None:
    """Train the teacher on the text alone, and save it as transformers does."""
    run = folder / "teacher-run"
    spec = f"{TEACHER}&tokenizer={folder / 'tokenizer'}"
    settings = ["--epochs", epochs, "--batch-tokens", 4096, "--lr", 2e-3, "--out", run]
    texts = ["--data", data(folder, "train.jsonl"), "--eval-data", data(folder, "test.jsonl")]
    softcache("train", "--student", spec, *texts, *settings, "--max-grad-norm", 1)
    softcache("export", run, "--hf")
    (run / "student-hf").rename(folder / "teacher")


def commands(folder: Path) -> list[list[object]]:
    """The two commands: the teacher's soft targets, and a student of them with its baseline."""
    cache, test = folder / "cache.h5", f"'{data(folder, 'test.jsonl')}'"
    dump = ["--data", f"'{data(folder, 'train.jsonl')}'", "--eval-data", test, "--temperature", 1]
    train = ["--student", f"'{STUDENT}'", "--eval-data", test, "--baseline", "--epochs", 2]
    train += ["--batch-tokens", 4096, "--lr", 2e-3, "--max-grad-norm", 1]
    teacher = [
        "--teacher",
        f"hf:{folder / 'teacher'}",
        "--encoding",
        "basis:64,8",
        "--embed-inputs",
    ]
    return [
        ["softcache", "dump", *teacher, *dump, "--out", cache],
        ["softcache", "train", cache, *train, "--out", folder / "student"],
    ]


def softcache(*arguments: object) -> None:
    """Run a command of softcache."""
    command = [sys.executable, "-m", "softcache", *map(str, arguments)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
