"""Complete workflows with Hugging Face models and data sets, through the command line alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from softcache.cache import open_cache
from softcache.cli.app import main
from tests.hub import BREEDS, VIT, save_pets, save_reviews, save_tokenizer


def softcache(*arguments: str | Path) -> str:
    """Run a command that must succeed; returns what it prints."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def error_rate(run: Path) -> float:
    """Share of the evaluation data that the student in a run folder gets wrong."""
    facts = json.loads((run / "config.json").read_text())
    return float(facts["errors"] / facts["samples"])


def assert_no_folder(folder: Path, *outputs: Path) -> None:
    """Check that no output file, or file in an output folder, mentions the path of `folder`."""
    for output in outputs:
        for file in [output] if output.is_file() else output.rglob("*"):
            assert not file.is_file() or str(folder).encode() not in file.read_bytes(), file


def test_a_vit_teaches_a_smaller_one_of_random_weights_about_pets(tmp_path: Path) -> None:
    """Unit 3 of Hugging Face's computer vision course on a small scale: T = 5, lambda = 0.9.

    The teacher, the student and the images all have different sizes.
    """
    pets = save_pets(tmp_path / "pets")
    data = ["--data", f"hfds:{pets}?size=32", "--eval-data", f"hfds:{pets}?size=32@test"]
    common = ["--batch-size", "16", "--lr", "2e-3"]
    softcache(
        "train", "--student", VIT.format(48, 32), *data, *common, "--epochs", "14",
        "--out", tmp_path / "teacher",
    )  # fmt: skip
    assert error_rate(tmp_path / "teacher") < 0.2
    softcache("export", tmp_path / "teacher", "--hf")
    cache = tmp_path / "pets.h5"
    softcache(
        "dump", "--teacher", f"hf:{tmp_path / 'teacher' / 'student-hf'}", *data, "--temperature", "5",
        "--views", "2", "--augment", "shift:2", "--out", cache,
    )  # fmt: skip
    header = open_cache(cache).header
    assert header.teachers[0]["name"] == "hf:student-hf"
    assert header.evaluation is not None
    assert header.evaluation["errors"] / header.evaluation["samples"] == error_rate(
        tmp_path / "teacher"
    )
    softcache(
        "train", cache, "--student", VIT.format(24, 24), *data, *common, "--epochs", "14",
        "--alpha", "0.9", "--out", tmp_path / "small",
    )  # fmt: skip
    assert error_rate(tmp_path / "small") < 0.3, f"chance is {1 - 1 / len(BREEDS):.2f}"
    assert "small" in softcache("compare", tmp_path / "small", "--cache", cache, *data)
    softcache("export", tmp_path / "small", "--pt2", "--hf")
    card = (tmp_path / "small" / "README.md").read_text()
    assert "--student 'hf:vit?" in card
    assert_no_folder(tmp_path, cache, tmp_path / "small")


def test_teacher_and_student_of_texts_have_tokenizers_of_their_own(tmp_path: Path) -> None:
    reviews = save_reviews(tmp_path / "reviews")
    pairs = save_tokenizer(tmp_path / "pairs", "pairs")
    words = save_tokenizer(tmp_path / "words", "words")
    data = ["--data", f"hfds:{reviews}", "--eval-data", f"hfds:{reviews}@test"]
    common = ["--batch-size", "16", "--epochs", "6"]
    large = (
        "hf:bert?pretrained=false&hidden_size=32&num_hidden_layers=1&num_attention_heads=2"
        f"&intermediate_size=32&vocab_size=60&max_position_embeddings=64&tokenizer={pairs}"
    )
    softcache("train", "--student", large, *data, *common, "--out", tmp_path / "teacher")
    assert error_rate(tmp_path / "teacher") < 0.2
    softcache("export", tmp_path / "teacher", "--hf", "--student", large)
    cache = tmp_path / "reviews.h5"
    softcache(
        "dump", "--teacher", f"hf:{tmp_path / 'teacher' / 'student-hf'}", *data,
        "--temperature", "2", "--embed-inputs", "--out", cache,
    )  # fmt: skip
    student = (
        "hf:distilbert?pretrained=false&dim=16&hidden_dim=32&n_layers=1&n_heads=2&vocab_size=60"
        f"&max_position_embeddings=64&tokenizer={words}"
    )
    # the texts are in the cache, so --data is not needed
    softcache(
        "train", cache, "--student", student, *data[2:], *common, "--ema", "0.9", "--temperature", "2",
        "--out", tmp_path / "small",
    )  # fmt: skip
    assert error_rate(tmp_path / "small") < 0.2
    assert_no_folder(tmp_path, cache, tmp_path / "small")
    table = softcache("compare", tmp_path / "small", "--student", student, "--cache", cache)
    assert "small" in table
    assert "student-hf" in softcache("export", tmp_path / "small", "--hf", "--student", student)
    refused = CliRunner().invoke(
        main, ["export", str(tmp_path / "small"), "--onnx", "--student", student]
    )
    assert refused.exit_code == 2
    assert "ONNX and pt2 do not include its tokenizer; use --hf" in refused.output


@pytest.mark.parametrize("command", ["train", "dump"])
def test_evaluation_data_that_lack_a_class_are_mapped_by_name(tmp_path: Path, command: str) -> None:
    for split, words in (("train", "abcabc"), ("test", "acac")):
        rows = "\n".join(f"{number},{word}" for number, word in enumerate(words))
        (tmp_path / f"{split}.csv").write_text(f"x,label\n{rows}\n")
    (tmp_path / "teacher.py").write_text(
        "import numpy as np\ndef teacher():\n    return lambda x: np.ones((len(x), 3))\n"
    )
    models: dict[str, list[str | Path]] = {
        "train": ["--student", "mlp:4", "--out", tmp_path / "run"],
        "dump": ["--teacher", f"{tmp_path / 'teacher.py'}:teacher", "--out", tmp_path / "c.h5"],
    }
    model = models[command]
    data = f"csv:{tmp_path / 'train.csv'}"
    arguments = [command, *model, "--data", data, "--eval-data", f"csv:{tmp_path / 'test.csv'}"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "has 2 of the 3 classes of csv:train.csv; its labels are mapped" in result.output
