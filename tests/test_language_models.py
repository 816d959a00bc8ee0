"""Language models from texts to students: what is in the cache, and what is trained from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from softcache.cache import Cache
from softcache.dump import prepare
from softcache.dump.config import DumpConfig
from softcache.dump.dry_run import dry_run
from softcache.dump.loop import dump
from softcache.errors import DataError, ModelError, SettingsError
from softcache.join.samples import open_samples
from softcache.train.loop import train
from softcache.train.options import make_train_config
from tests.cli.app_cases import softcache
from tests.configs import replace
from tests.tokens import END, make_language_model, make_tokenizer, write_texts

STUDENT = "hf:gpt2?pretrained=false&n_layer=1&n_head=2&n_embd=8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its training texts and test texts."""
    folder = tmp_path_factory.mktemp("language")
    make_language_model(folder / "teacher")
    write_texts(folder / "train.txt", 30)
    write_texts(folder / "test.txt", 10, seed=1)
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> DumpConfig:
    """A dump of every line as a document."""
    return DumpConfig(
        teacher=f"hf:{folder / 'teacher'}",
        data=f"text:{folder / 'train.txt'}?documents=lines",
        temperature=1.0,
        embed_inputs=True,
        out=folder / "cache.h5",
    )


@pytest.fixture(scope="module")
def cache(config: DumpConfig) -> Cache:
    """Its cache, dense."""
    return dump(config)


def expected_rows(folder: Path, text: str, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the teacher on one text alone (n, V), and the tokens that they are about (n,)."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0, :-1, :vocabulary]
    return torch.log_softmax(logits.float(), -1), ids[0, 1:]


def test_a_row_holds_what_the_teacher_says_of_the_next_token(folder: Path, cache: Cache) -> None:
    layout = cache.layout
    assert layout is not None
    assert cache.header.unit == "token"
    assert cache.header.classes == 300  # of 320 that the model has, the others are padding
    for sample, text in enumerate((folder / "train.txt").read_text().splitlines()):
        rows = layout.rows_of(np.array([sample]))
        log_probs, labels = expected_rows(folder, text, 300)
        assert np.array_equal(cache.labels[rows], labels.numpy())
        assert layout.positions_of(rows).tolist() == list(range(len(rows)))
        assert np.abs(cache.rows(0, rows) - log_probs.numpy()).max() < 0.02
        assert np.abs(np.exp(cache.rows(0, rows)) - log_probs.exp().numpy()).max() < 2e-3


@pytest.mark.parametrize("options", [{"batch_tokens": 70}, {"batch_size": 1}, {"batch_size": 7}])
def test_rows_do_not_depend_on_the_batches(
    config: DumpConfig, cache: Cache, tmp_path: Path, options: dict[str, int]
) -> None:
    other = dump(replace(config, out=tmp_path / "other.h5", **options))
    rows = np.arange(cache.header.row_count)
    assert np.abs(other.rows(0, rows) - cache.rows(0, rows)).max() < 0.02
    assert np.array_equal(other.keys, cache.keys)
    assert np.array_equal(other.labels, cache.labels)


def test_padding_of_the_vocabulary_changes_nothing(
    folder: Path, config: DumpConfig, cache: Cache, tmp_path: Path
) -> None:
    model = GPT2LMHeadModel.from_pretrained(folder / "teacher")
    make_tokenizer(tmp_path / "padded")
    original = model.lm_head.forward

    class Loud(torch.nn.Linear):
        """The head with logits of +9 for the padding."""

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = original(states).clone()
            logits[..., 300:] = 9.0
            return logits

    head = Loud(16, 320, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    code = tmp_path / "loud.py"
    code.write_text(
        "import tests.test_language_models as m\n\n\ndef teacher():\n    return m.LOUD\n"
    )
    global LOUD  # what the user's file returns
    LOUD = model
    other = dump(
        replace(
            config,
            teacher=f"{code}:teacher",
            data=f"{config.data}&tokenizer={folder / 'teacher'}",
            out=tmp_path / "other.h5",
        )
    )
    rows = np.arange(cache.header.row_count)
    assert np.array_equal(other.rows(0, rows), cache.rows(0, rows))


LOUD: torch.nn.Module | None = None


def test_long_documents_are_cut_and_each_token_is_predicted_once(
    folder: Path, config: DumpConfig, tmp_path: Path
) -> None:
    text = folder / "train.txt"
    spec = f"text:{text}?length=32&stride=20"
    cut = dump(replace(config, data=spec, out=tmp_path / "cut.h5"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    ids = tokenizer(text.read_text())["input_ids"]
    assert cut.layout is not None
    assert cut.labels.tolist() == ids[1:]  # every token but the first, once
    source = open_samples(cut, None)
    lengths = [(source.fetch([n])[0] >= 0).sum().item() for n in range(len(source))]
    assert max(lengths) == 32
    # those of the second sample come from its own start on, without what the first has predicted
    second = cut.layout.rows_of(np.array([1]))
    assert cut.layout.positions_of(second)[0] == 11


def test_a_text_that_begins_with_the_start_token_has_it_once(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, 0)]
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    from softcache.data.tokenizer import load_tokenizer

    plain, begun = load_tokenizer(str(tmp_path / "tokenizer")).encode(["a cat", f"{END}a cat"])
    assert plain[0] == 0
    assert plain.tolist() == begun.tolist()


CHAT = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on a mat"},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "it ran"},
]


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("assistant", "sat on a mat</s>\nit ran</s>\n"),
        ("completion", "it ran</s>\n"),
        (
            "all",
            "user>the cat</s>\n<assistant>sat on a mat</s>\n<user>and then</s>\n<assistant>it ran</s>\n",
        ),
    ],
)
def test_chats_have_rows_for_the_turns_that_count(
    tmp_path: Path, loss_on: str, expected: str
) -> None:
    make_language_model(tmp_path / "teacher", positions=128, chat=True)
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"messages": CHAT}) + "\n")
    cache = dump(
        DumpConfig(
            teacher=f"hf:{tmp_path / 'teacher'}",
            data=f"jsonl:{data}?messages=messages",
            loss_on=loss_on,
            temperature=1.0,
            out=tmp_path / "cache.h5",
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    assert tokenizer.decode(cache.labels.tolist()) == expected
    facts = cache.header.rows or {}
    assert facts["loss_on"] == loss_on
    assert len(facts["template"]) == 16


def test_students_are_trained_resumed_and_exported(
    folder: Path, config: DumpConfig, cache: Cache, tmp_path: Path
) -> None:
    test = f"text:{folder / 'test.txt'}?documents=lines&tokenizer={folder / 'teacher'}"
    settings = make_train_config(
        student=[STUDENT, f"{STUDENT}&n_inner=16"],
        cache=cache.path,
        eval_data=test,
        epochs=3,
        batch_tokens=128,
        baseline=True,
        learning_rate=0.01,
        out=tmp_path / "run",
    )
    students = train(settings)
    run = tmp_path / "run" / settings.names()[0]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in (
        "perplexity",
        "nats_per_byte",
        "ece",
        "teacher_kl",
        "teacher_agreement",
        "acceptance",
    ):
        assert all(np.isfinite(line[name]) for line in lines), name
    assert lines[-1]["teacher_kl"] < lines[0]["teacher_kl"]
    assert lines[-1]["total"] < lines[0]["total"]
    assert students[0].evaluation is not None
    compared = softcache("compare", str(run), "--eval-data", test)
    assert compared.exit_code == 0, compared.output
    assert "perplexity" in compared.stdout
    exported = softcache("export", str(run), "--hf")
    assert exported.exit_code == 0, exported.output
    model = AutoModelForCausalLM.from_pretrained(run / "student-hf")
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape == (1, 5)
    page = tmp_path / "report.html"
    report = softcache("report", str(cache.path), str(run), "--eval-data", test, "-o", str(page))
    assert report.exit_code == 0, report.output
    assert "perplexity" in page.read_text()


def test_a_stopped_run_goes_on_to_the_same_weights(cache: Cache, tmp_path: Path) -> None:
    from softcache.train.student import Student

    config = make_train_config(
        student=STUDENT, cache=cache.path, epochs=2, batch_tokens=128, out=tmp_path / "whole"
    )
    whole = train(config)[0]
    calls = 0
    original = Student.step

    def stopped(self: object, *arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        original(self, *arguments)  # type: ignore[arg-type]

    interrupted = make_train_config(
        student=STUDENT,
        cache=cache.path,
        epochs=2,
        batch_tokens=128,
        checkpoint_minutes=0,
        out=tmp_path / "stopped",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Student, "step", stopped)
        with pytest.raises(Exception, match="the same command continues"):
            train(interrupted)
    again = train(interrupted)[0]
    for name, tensor in whole.final_model.state_dict().items():
        assert torch.equal(tensor, again.final_model.state_dict()[name]), name


def test_another_tokenizer_is_refused_by_name(folder: Path, cache: Cache, tmp_path: Path) -> None:
    other = make_tokenizer(tmp_path / "other")
    other.add_tokens(["zebra"])
    other.save_pretrained(tmp_path / "other")
    spec = f"text:{folder / 'train.txt'}?documents=lines&tokenizer={tmp_path / 'other'}"
    config = make_train_config(student=STUDENT, cache=cache.path, data=spec, out=tmp_path / "run")
    with pytest.raises(DataError, match="by another tokenizer"):
        train(config)


def test_data_without_a_tokenizer_say_so(folder: Path, cache: Cache, tmp_path: Path) -> None:
    spec = f"text:{folder / 'train.txt'}?documents=lines"
    config = make_train_config(student=STUDENT, cache=cache.path, data=spec, out=tmp_path / "run")
    with pytest.raises(SettingsError, match=r"needs a tokenizer.*\?tokenizer="):
        train(config)


def test_a_model_of_another_kind_is_refused(cache: Cache, tmp_path: Path) -> None:
    config = make_train_config(student="mlp:8", cache=cache.path, out=tmp_path / "run")
    with pytest.raises(SettingsError, match="takes no tokens; expected hf:"):
        train(config)


def test_texts_longer_than_the_teacher_takes_say_so(
    folder: Path, config: DumpConfig, tmp_path: Path
) -> None:
    spec = f"text:{folder / 'train.txt'}?length=100"
    with pytest.raises(ModelError, match=r"length"):
        dump(replace(config, data=spec, out=tmp_path / "cache.h5"))


@pytest.mark.parametrize(("encoding", "is_told"), [("topk:3", True), ("topk:250", False)])
def test_a_head_without_much_of_the_probability_is_told(
    config: DumpConfig,
    tmp_path: Path,
    encoding: str,
    is_told: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = dump(replace(config, encoding=encoding, out=tmp_path / "cache.h5"))
    told = capsys.readouterr().err
    stored = np.exp(-(cache.header.summary or {})["fidelity"]["unstored"])
    assert (stored < 0.95) == is_told
    hint = f"the classes that topk stores have {stored:.0%} of the probability (geometric mean). Of"
    assert (hint in told) == is_told
    assert not (cache.header.summary or {}).get("warnings")


def test_tokens_of_many_bytes_are_pointed_out(
    config: DumpConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(config, out=tmp_path / "cache.h5")
    assert "Note:" not in dry_run(config)
    monkeypatch.setattr(prepare, "LARGE_TOKEN", 100)
    size = 2 * dump(config).header.classes
    advice = (
        f"a token takes {size:,} bytes; --encoding packed:36 takes 36, right on the average, but for "
        "temperature 1 alone"
    )
    assert capsys.readouterr().out.splitlines()[0] == advice
    assert dry_run(config).endswith(f"Nothing was written. Note: {advice}.")
    dump(replace(config, encoding="packed:36", out=tmp_path / "packed.h5"))
    assert "packed:36 takes" not in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["packed:20"])
def test_draws_say_nothing_of_how_close_a_student_is(
    folder: Path, config: DumpConfig, tmp_path: Path, encoding: str
) -> None:
    cache = dump(replace(config, encoding=encoding, out=tmp_path / "cache.h5"))
    test = f"text:{folder / 'test.txt'}?documents=lines&tokenizer={folder / 'teacher'}"
    options = make_train_config(
        student=STUDENT, cache=cache.path, eval_data=test, epochs=1, out=tmp_path / "run"
    )
    line = train(options)[0].history[-1]
    assert "perplexity" in line
    assert "teacher_kl" not in line
    compared = softcache(
        "compare", str(tmp_path / "run"), "--cache", str(cache.path), "--eval-data", test
    )
    assert compared.exit_code == 0, compared.output
    assert "nan" not in compared.stdout


@pytest.mark.parametrize(("encoding", "of"), [("dense", "soft targets"), ("packed:20", "draws")])
def test_a_report_shows_tokens_and_their_students(
    config: DumpConfig, tmp_path: Path, encoding: str, of: str
) -> None:
    write_texts(tmp_path / "many.txt", 130)  # two batches of gradients, if they were compared
    data = f"text:{tmp_path / 'many.txt'}?documents=lines"
    cache = dump(replace(config, data=data, encoding=encoding, out=tmp_path / "cache.h5"))
    train(make_train_config(student=STUDENT, cache=cache.path, epochs=1, out=tmp_path / "run"))
    page = tmp_path / "page.html"
    result = softcache("report", str(cache.path), str(tmp_path / "run"), "--out", str(page))
    assert result.exit_code == 0, result.output
    assert "its soft targets have a mean entropy" in page.read_text().replace(
        "the stored draws of ", ""
    )
    described = softcache("info", str(cache.path)).output
    assert f"nats, mean of the {'stored ' * (of == 'draws')}{of}" in described


@pytest.mark.parametrize("encoding", ["sampled:6", "packed:16"])
def test_views_without_augmentation_are_independent_draws(
    config: DumpConfig, tmp_path: Path, encoding: str
) -> None:
    cache = dump(replace(config, encoding=encoding, views=8, out=tmp_path / "cache.h5"))
    rows = np.arange(cache.header.row_count)
    views = np.stack([np.exp(cache.rows(view, rows)) for view in range(8)])
    exact = np.exp(dump(replace(config, out=tmp_path / "dense.h5")).rows(0, rows))
    assert len({view.tobytes() for view in views}) == 8
    single, mean = np.square(views[0] - exact).sum(), np.square(views.mean(0) - exact).sum()
    assert mean == pytest.approx(single / 8, rel=0.3)
    options = make_train_config(student=STUDENT, cache=cache.path, epochs=2, out=tmp_path / "run")
    assert np.isfinite(train(options)[0].history[-1]["soft"])


def test_views_of_other_encodings_would_be_the_same(config: DumpConfig) -> None:
    with pytest.raises(SettingsError, match="2 views without --augment would all be the same"):
        replace(config, encoding="topk:4", views=2)
