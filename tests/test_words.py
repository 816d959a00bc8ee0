"""Token classification: words with a label each, from the dump to the comparison of students."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForTokenClassification

from softcache.cache import Cache, open_cache
from softcache.data.open import open_source
from softcache.data.rows import TokenSource, layout_of_source, unit_of
from softcache.data.user_dataset import dataset_source
from softcache.errors import DataError, SettingsError
from tests.cli.app_cases import softcache
from tests.train.loop_cases import metrics
from tests.words import TAGS, make_tagger, sentences, write_sentences

STUDENT = (
    "hf:bert?pretrained=false&hidden_size=16&num_hidden_layers=1&num_attention_heads=2"
    "&intermediate_size=32&tokenizer={}"
)
OWN = """
from torch import nn

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(200, 16), nn.Linear(16, 4)
        self.mix = nn.Conv1d(16, 16, 5, 1, 2)
    def forward(self, ids):
        return self.out(self.mix(self.embed(ids).transpose(1, 2)).relu().transpose(1, 2))

class Short(Own):
    def forward(self, ids):
        return super().forward(ids)[:, :-1]

def student():
    return Own()

def short():
    return Short()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained tagger, 40 sentences and models.py."""
    folder = tmp_path_factory.mktemp("words")
    make_tagger(folder / "tagger")
    write_sentences(folder / "train.jsonl", sentences(40))
    (folder / "models.py").write_text(OWN)
    return folder


def data_of(folder: Path, name: str = "train", options: str = "") -> str:
    return (
        f"jsonl:{folder / name}.jsonl?words=words&tags=tags&tokenizer={folder / 'tagger'}{options}"
    )


@pytest.fixture(scope="module")
def cache(folder: Path) -> Cache:
    """A cache of the untrained tagger, with its sentences."""
    arguments = ["--teacher", f"hf:{folder / 'tagger'}", "--data", data_of(folder)]
    out = ["--temperature", "1", "--out", str(folder / "words.h5"), "--embed-inputs"]
    result = softcache("dump", *arguments, *out)
    assert result.exit_code == 0, result.output
    return open_cache(folder / "words.h5")


def test_a_label_is_that_of_the_first_sub_word(folder: Path, tmp_path: Path) -> None:
    write_sentences(tmp_path / "s.jsonl", [(["anbeco", "met", "d"], ["PER", "O", "LOC"])])
    source = open_source(data_of(folder).replace(str(folder / "train"), str(tmp_path / "s")))
    assert isinstance(source, TokenSource)
    assert source.class_names == ("LOC", "O", "PER")  # sorted, until a teacher has another order
    # [CLS] an ##be ##co met d [SEP]
    assert source.lengths.tolist() == [7]
    assert source.layout.positions_of(np.arange(3)).tolist() == [1, 4, 5]
    assert source.fetch([0])[1].tolist() == [2, 1, 0]
    assert unit_of(source) == "word"


def test_a_long_sentence_is_cut(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = open_source(data_of(folder, options="&length=6"))
    assert isinstance(source, TokenSource)
    assert int(source.lengths.max()) == 6
    layout = layout_of_source(open_source(data_of(folder)))
    assert layout is not None
    assert 0 < source.layout.rows < layout.rows
    assert (
        f"{layout.rows - source.layout.rows:,} words are left out, beyond 6"
        in capsys.readouterr().out
    )


def test_labels_are_numbered_as_the_teacher_does(folder: Path, cache: Cache) -> None:
    assert tuple(cache.class_names) == TAGS
    wanted = [TAGS.index(tag) for _, tags in sentences(40) for tag in tags]
    assert cache.labels.tolist() == wanted


def test_rows_are_those_of_the_model(folder: Path, cache: Cache) -> None:
    model = BertForTokenClassification.from_pretrained(folder / "tagger").eval()
    source = open_source(data_of(folder))
    inputs, _ = source.fetch([7])
    with torch.inference_mode():
        expected = model(inputs).logits[0].log_softmax(-1)
    assert cache.layout is not None
    rows = cache.layout.rows_of(np.array([7]))
    positions = cache.layout.positions_of(rows)
    assert np.abs(cache.rows(0, rows) - expected[positions].numpy()).max() < 0.01


def test_the_whole_way(folder: Path, cache: Cache, tmp_path: Path) -> None:
    data, student = data_of(folder), STUDENT.format(folder / "tagger")
    arguments = ["--student", student, "--eval-data", data, "--epochs", "2", "--batch-size", "16"]
    run = tmp_path / "run"
    result = softcache(
        "train", cache.path, *arguments, "--out", run, "--baseline", "--workers", "2"
    )
    assert result.exit_code == 0, result.output
    last = metrics(run)[-1]
    assert last["samples"] == cache.header.row_count
    assert {"ece", "teacher_kl", "teacher_agreement", "balanced_accuracy"} <= set(last)
    # with the data given, the run is the same as from the sentences in the cache
    same = softcache("train", cache.path, *arguments, "--out", tmp_path / "same", "--data", data)
    assert same.exit_code == 0, same.output
    assert metrics(tmp_path / "same")[-1]["total"] == pytest.approx(last["total"], rel=1e-5)
    own = ["--data", data, "--student", student]
    own += ["--eval-data", data]
    result = softcache("compare", run, run / "baseline", "--cache", cache.path, *own)
    assert result.exit_code == 0, result.output
    assert all(tag in result.stdout for tag in ("error by class", *TAGS))
    page = tmp_path / "report.html"
    assert softcache("report", run, cache.path, *own, "-o", page).exit_code == 0
    assert "KL to teacher" in page.read_text()
    teacher = ["--teacher", f"hf:{folder / 'tagger'}", "--data", data]
    assert softcache("verify", cache.path, *teacher).exit_code == 0
    assert softcache("export", run, "--hf", "--student", student).exit_code == 0
    exported = BertForTokenClassification.from_pretrained(run / "student-hf")
    assert tuple(exported.config.id2label.values()) == TAGS
    assert exported.config.vocab_size < 200  # that of the tokenizer
    assert (run / "student-hf" / "tokenizer.json").exists()


def test_a_student_of_ones_own(folder: Path, cache: Cache, tmp_path: Path) -> None:
    arguments = ["--student", f"{folder}/models.py:student", "--epochs", "2", "--alpha", "0.5"]
    result = softcache("train", cache.path, *arguments, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert {"soft", "hard", "teacher_kl"} <= set(metrics(tmp_path / "run")[-1])


def test_a_student_of_other_positions_is_refused(
    folder: Path, cache: Cache, tmp_path: Path
) -> None:
    arguments: list[str | Path] = [
        "--student",
        f"{folder}/models.py:short",
        "--out",
        tmp_path / "run",
    ]
    result = softcache("train", cache.path, *arguments)
    assert "expected as many, or they would be about other places" in result.output


def test_a_student_learns_more_from_soft_targets_than_from_wrong_tags(tmp_path: Path) -> None:
    # a fifth of the tags is wrong, and the teacher has seen more of them than the student
    train = sentences(300, wrong=0.2)
    tagged = write_sentences(tmp_path / "all.jsonl", train)
    make_tagger(tmp_path / "tagger", tagged, epochs=5)
    write_sentences(tmp_path / "train.jsonl", train[:60])
    write_sentences(tmp_path / "test.jsonl", sentences(100, seed=1))
    data, test = data_of(tmp_path), data_of(tmp_path, "test")
    teacher = ["--teacher", f"hf:{tmp_path / 'tagger'}", "--temperature", "1"]
    path = tmp_path / "words.h5"
    result = softcache("dump", *teacher, "--data", data, "--eval-data", test, "--out", path)
    assert result.exit_code == 0, result.output
    evaluation = open_cache(path).header.evaluation or {}
    assert evaluation["errors"] < 0.1 * evaluation["samples"]
    student = [
        "--student",
        STUDENT.format(tmp_path / "tagger"),
        "--lr",
        "0.005",
        "--eval-data",
        test,
    ]
    run = ["--data", data, "--out", str(tmp_path / "run"), "--epochs", "20", "--batch-size", "16"]
    assert softcache("train", path, *student, *run, "--baseline").exit_code == 0
    distilled = metrics(tmp_path / "run")[-1]["errors"]
    assert distilled < metrics(tmp_path / "run" / "baseline")[-1]["errors"]
    assert distilled < 0.1 * evaluation["samples"]


# Datasets of dicts and tables
def items() -> list[dict[str, Any]]:
    """Token ids with labels, as trainers of transformers take them, padded."""
    return [
        {"input_ids": [2, 5, 9, 3], "labels": [-100, 1, 0, -100]},
        {
            "input_ids": [2, 7, 3, 0],
            "labels": [-100, 2, -100, -100],
            "attention_mask": [1, 1, 1, 0],
        },
    ]


def test_a_dataset_of_token_ids_with_labels() -> None:
    source = dataset_source("d", items())
    assert isinstance(source, TokenSource)
    assert unit_of(source) == "word"
    assert source.lengths.tolist() == [4, 3]
    assert source.layout.positions_of(np.arange(3)).tolist() == [1, 2, 1]
    assert source.fetch([0, 1])[1].tolist() == [1, 0, 2]


def test_a_dataset_whose_labels_are_not_one_for_each_token_is_told() -> None:
    wrong = [*items(), {"input_ids": [2, 3, 4], "labels": [1, 2]}]
    with pytest.raises(DataError, match="sample 2 has 3 input_ids and 2 of loss_mask or labels"):
        dataset_source("d", wrong)
    with pytest.raises(DataError, match="no token has a label; expected one at the first token"):
        dataset_source(
            "d",
            [
                {"input_ids": [1, 2], "labels": [7, 7], "attention_mask": [0, 0]},
                {"input_ids": [1, 2], "labels": [-100, -100], "attention_mask": [1, 1]},
            ],
        )


def test_a_table_with_named_tags(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = sentences(5)
    features = datasets.Features(
        {
            "words": datasets.Sequence(datasets.Value("string")),
            "tags": datasets.Sequence(datasets.ClassLabel(names=list(TAGS))),
        }
    )
    columns = {"words": [words for words, _ in made], "tags": [tags for _, tags in made]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "table")
    options = f"?words=words&tags=tags&tokenizer={folder / 'tagger'}"
    source = open_source(f"hfds:{tmp_path / 'table'}{options}")
    assert source.class_names == TAGS
    assert source.fetch(range(5))[1].tolist() == [TAGS.index(t) for _, tags in made for t in tags]


# what is wrong
def longer(record: dict[str, Any]) -> None:
    record["tags"].append("O")


def untagged(record: dict[str, Any]) -> None:
    del record["tags"]


def mixed(record: dict[str, Any]) -> None:
    record["tags"][0] = 3


def plain(record: dict[str, Any]) -> None:
    record["words"] = " ".join(record["words"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (longer, r"sample 2 has \d+ words and \d+ tags; expected one tag for each word"),
        (untagged, "sample 2 has no tags; it has words"),
        (mixed, "tags are of several types; expected words, or numbers of classes"),
        (plain, "sample 2 has a text for words; expected a list of words"),
    ],
)
def test_sentences_that_do_not_fit_are_told(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    change(records[2])
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = data_of(folder).replace(str(folder / "train"), str(tmp_path / "s"))
    with pytest.raises(DataError, match=message):
        open_source(data)


def test_words_need_tags_and_a_tokenizer(folder: Path) -> None:
    with pytest.raises(
        SettingsError, match="has words; expected text=, messages=, or words= and tags="
    ):
        open_source(f"jsonl:{folder / 'train'}.jsonl?words=words")
    with pytest.raises(SettingsError, match="needs a tokenizer, and no hf: model brings one"):
        open_source(f"jsonl:{folder / 'train'}.jsonl?words=words&tags=tags")


def test_a_tag_that_the_teacher_lacks_is_refused(folder: Path, tmp_path: Path) -> None:
    write_sentences(tmp_path / "s.jsonl", [(["anbe", "met"], ["PER", "TIME"])])
    data = data_of(folder).replace(str(folder / "train"), str(tmp_path / "s"))
    arguments = ["--teacher", f"hf:{folder / 'tagger'}", "--data", data, "--temperature", "1"]
    result = softcache("dump", *arguments, "--out", tmp_path / "x.h5")
    assert "'TIME' of the former are not among the latter" in result.output


def test_numbers_of_tags_out_of_range_are_refused(folder: Path, tmp_path: Path) -> None:
    line = {"words": ["anbe", "met"], "tags": [0, 4]}
    (tmp_path / "s.jsonl").write_text(json.dumps(line))
    data = data_of(folder).replace(str(folder / "train"), str(tmp_path / "s"))
    arguments = ["--teacher", f"hf:{folder / 'tagger'}", "--data", data, "--temperature", "1"]
    result = softcache("dump", *arguments, "--out", tmp_path / "x.h5")
    assert "has label 4; expected 0 to 3" in result.output


def test_sentences_cut_elsewhere_do_not_join(folder: Path, cache: Cache, tmp_path: Path) -> None:
    data = data_of(folder, options="&length=6")
    arguments = ["--student", f"{folder}/models.py:student", "--out", str(tmp_path / "run")]
    result = softcache("train", cache.path, *arguments, "--data", data)
    assert result.exit_code != 0
    assert "is not in" in result.output
