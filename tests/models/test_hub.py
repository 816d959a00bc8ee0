"""Models from transformers and timm: weights, preprocessing, tokenizers, public names."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from softcache.data.open import open_source
from softcache.data.text import encode
from softcache.dump.config import DumpConfig
from softcache.dump.loop import dump
from softcache.errors import ModelError, SettingsError
from softcache.models.build import build
from softcache.models.hf import save_hub
from softcache.models.hub import HubModel
from softcache.models.preprocess import Preprocess
from softcache.models.spec import KINDS, parse_model
from softcache.models.weights import load_weights
from tests.hub import BREEDS, VIT, save_pets, save_tokenizer, save_vit

BERT = (
    "hf:bert?pretrained=false&hidden_size=16&num_hidden_layers=1&num_attention_heads=2"
    "&intermediate_size=16&vocab_size=60&max_position_embeddings=32"
)


def build_hub(text: str, classes: int | None) -> Any:  # noqa: ANN401  # a HubModel
    """Build a library's model; `classes` is None for a teacher, which keeps its own."""
    spec = parse_model(text)
    return KINDS[spec.kind].load()(spec, (), classes)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("models") / "vit")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("models") / "words", "words")


def images(size: int = 20) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_a_teacher_gives_the_logits_of_its_library(vit: Path) -> None:
    from transformers import ViTForImageClassification, ViTImageProcessor

    pixels = (images(20) * 255).byte()
    reference = ViTForImageClassification.from_pretrained(str(vit)).eval()
    processor = ViTImageProcessor.from_pretrained(str(vit))
    arrays = [image.permute(1, 2, 0).numpy() for image in pixels]
    with torch.no_grad():
        expected = reference(**processor(arrays, return_tensors="pt")).logits
        logits = build_hub(f"hf:{vit}", None).eval()(pixels / 255)
    torch.testing.assert_close(logits, expected, atol=0.02, rtol=0)


def test_a_student_has_the_classes_of_the_data_and_random_weights() -> None:
    torch.manual_seed(1)
    model = build(VIT.format(16, 8), input_shape=(3, 20, 20), classes=7)
    assert model(images()).shape == (2, 7)
    torch.manual_seed(2)
    other = build(VIT.format(16, 8), input_shape=(3, 20, 20), classes=7)
    assert not torch.equal(model(images()), other(images()))


def test_a_student_with_its_own_weights_gets_a_new_last_layer(vit: Path) -> None:
    model = build(f"hf:{vit}", input_shape=(3, 20, 20), classes=7)
    assert model(images()).shape == (2, 7)
    saved, loaded = load_file(vit / "model.safetensors"), model.state_dict()
    name = "vit.embeddings.cls_token"
    torch.testing.assert_close(loaded[name], saved[name])


def test_a_folder_without_processor_is_a_student_but_no_teacher(tmp_path: Path) -> None:
    folder = save_vit(tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(
        ModelError, match=r"no preprocessor_config\.json, .*\?processor=ID_OR_FOLDER"
    ):
        build_hub(f"hf:{folder}", None)
    assert build_hub(f"hf:{folder}", 4)(images()).shape == (2, 4)
    elsewhere = save_vit(tmp_path / "other")
    model = build_hub(f"hf:{folder}?processor={elsewhere}", None)
    assert isinstance(model.prepare, Preprocess)
    assert model.prepare.steps.resize == (16, 16)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("hf:", SettingsError, "does not say which model; expected hf:ID_OR_FOLDER"),
        (
            "hf:vit",
            SettingsError,
            r"vit is a model type and has no weights; add \?pretrained=false",
        ),
        ("hf:vit?pretrained=no", SettingsError, "expected pretrained=true or pretrained=false"),
        ("hf:vit?pretrained=false&depth=3", SettingsError, "configuration has no field 'depth'"),
        (
            "hf:vit?pretrained=false&hidden_size=7",
            ModelError,
            r"cannot be built \(ZeroDivisionError",
        ),
        (
            "hf:t5?pretrained=false&d_model=8&d_kv=4&d_ff=8&num_layers=1",
            ModelError,
            r"no tokenizer \(a model type has no files\)",
        ),
        (
            "hf:clap?pretrained=false",
            ModelError,
            "is clap, bare; expected an image or text classifier",
        ),
        (BERT, ModelError, r"no tokenizer \(.*\); name one with \?tokenizer=ID_OR_FOLDER"),
    ],
)
def test_what_cannot_be_built_is_told(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_hub(spec, 3)


def test_a_teacher_must_have_all_its_weights(tmp_path: Path) -> None:
    folder = save_vit(tmp_path / "vit")
    weights = load_file(folder / "model.safetensors")
    body = {name: value for name, value in weights.items() if not name.startswith("classifier")}
    save_file(body, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"has no weights for classifier\.bias, classifier\.weight; a"
    ):
        build_hub(f"hf:{folder}", None)
    assert build_hub(f"hf:{folder}", 3)(images()).shape == (2, 3)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        SettingsError, match=r"the folder has no weights; add \?pretrained=false for"
    ):
        build_hub(f"hf:{folder}", 3)
    assert build_hub(f"hf:{folder}?pretrained=false", 3)(images()).shape == (2, 3)


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match=r"hf:no/such cannot be built \(\w+: .*no folder no/such here"
    ):
        build_hub("hf:no/such", None)


def test_weights_have_the_names_of_the_library(vit: Path, tmp_path: Path) -> None:
    from transformers import ViTForImageClassification

    model = build_hub(f"hf:{vit}", None)
    saved = ViTForImageClassification.from_pretrained(str(vit)).state_dict()
    assert set(model.state_dict()) == set(saved)
    changed = {name: value + 1 for name, value in saved.items()}
    save_file(changed, tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    torch.testing.assert_close(model.state_dict()["classifier.bias"], changed["classifier.bias"])
    wrapped = nn.ModuleDict({"inner": model})  # like a model that averages weights
    wrapped.load_state_dict(wrapped.state_dict())
    assert "inner.classifier.bias" in wrapped.state_dict()


# texts


def test_texts_become_logits_by_way_of_the_tokenizer(words: Path) -> None:
    torch.manual_seed(0)
    model = build_hub(f"{BERT}&tokenizer={words}", 2).eval()
    both = model(encode(["The film was great", "The book was dull ☕"], 30))
    assert both.shape == (2, 2)
    alone = model(encode(["The film was great"], 24))  # with less padding
    torch.testing.assert_close(alone, both[:1], atol=1e-5, rtol=1e-4)


def test_random_weights_have_the_vocabulary_of_their_tokenizer(
    words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bert = BERT.replace("&vocab_size=60", "")
    config = build_hub(f"{bert}&tokenizer={words}", 2).model.config
    assert config.vocab_size == len(
        json.loads((words / "tokenizer.json").read_text())["model"]["vocab"]
    )
    assert build_hub(f"{BERT}&tokenizer={words}", 2).model.config.vocab_size == 60
    roberta = bert.replace("hf:bert", "hf:roberta")
    model = build_hub(f"{roberta}&tokenizer={words}", 2)
    assert model.model.config.pad_token_id == model.prepare.tokenizer.pad_token_id == 0
    assert model(encode(["The film was great", "film"], 30)).shape == (2, 2)
    # a folder without tokenizer= keeps the vocabulary of its configuration, and so do its weights
    folder = tmp_path / "bert"
    save_hub(build_hub(f"{BERT}&tokenizer={words}", 2), folder)
    assert build_hub(f"hf:{folder}?pretrained=false", 2).model.config.vocab_size == 60
    assert build_hub(f"hf:{folder}?tokenizer={words}", 2).model.config.vocab_size == 60
    capsys.readouterr()
    model(encode(["The film was great " * 20], 400))
    told = capsys.readouterr().out
    assert "tokenizer=words" in told
    assert "takes at most 30 tokens: 1 of the 1 texts of a batch have more and are cut" in told
    assert str(words) not in told


def test_a_tokenizer_that_does_not_fit_is_named(words: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"its tokenizer has \d+ tokens, but its vocab_size is 9; add \?vocab_size"
    ):
        build_hub(f"{BERT.replace('vocab_size=60', 'vocab_size=9')}&tokenizer={words}", 2)
    bare = save_tokenizer(tmp_path / "bare", "words", padding=False)
    gpt = "hf:gpt2?pretrained=false&n_embd=8&n_layer=1&n_head=1&vocab_size=60"
    with pytest.raises(
        ModelError, match="its tokenizer has no padding token, which batches of texts need"
    ):
        build_hub(f"{gpt}&tokenizer={bare}", 2)


# names


def test_a_public_name_has_no_folder(vit: Path, words: Path) -> None:
    assert parse_model(f"hf:{vit}").public_name == "hf:vit"
    assert parse_model(f"{BERT}&tokenizer={words}").public_name.endswith(
        "&tokenizer=words&vocab_size=60"
    )
    assert (
        parse_model("hf:google/vit-base?pretrained=false").public_name
        == "hf:google/vit-base?pretrained=false"
    )
    assert parse_model(f"timm:local-dir:{vit}").public_name == "timm:local-dir:vit"


def test_no_folder_reaches_a_cache(vit: Path, tmp_path: Path) -> None:
    pets = save_pets(tmp_path / "pets", train=20, test=4)
    cache = dump(
        DumpConfig(
            teacher=f"hf:{vit}",
            data=f"hfds:{pets}?size=20",
            eval_data=f"hfds:{pets}?size=20@test",
            temperature=5.0,
            out=tmp_path / "c.h5",
        )
    )
    assert cache.header.teachers[0]["name"] == "hf:vit"
    assert tuple(cache.class_names) == BREEDS
    raw = cache.path.read_bytes()
    assert str(tmp_path).encode() not in raw
    assert str(vit.parent).encode() not in raw


def test_classes_in_another_order_are_mapped_by_name(tmp_path: Path) -> None:
    names = dict(enumerate(reversed(BREEDS)))
    vit = save_vit(tmp_path / "vit", id2label=names, label2id={v: k for k, v in names.items()})
    pets = save_pets(tmp_path / "pets", train=20, test=4)
    data = f"hfds:{pets}?size=20"
    cache = dump(DumpConfig(teacher=f"hf:{vit}", data=data, temperature=5.0, out=tmp_path / "c.h5"))
    assert tuple(cache.class_names) == tuple(reversed(BREEDS))
    labels = open_source(data).fetch(range(20))[1]
    assert cache.labels.tolist() == (2 - labels).tolist()


def test_a_random_teacher_is_refused(tmp_path: Path) -> None:
    pets = save_pets(tmp_path / "pets", train=20, test=4)
    spec = VIT.format(16, 16)
    config = DumpConfig(
        teacher=spec, data=f"hfds:{pets}?size=20", temperature=5.0, out=tmp_path / "c.h5"
    )
    with pytest.raises(
        SettingsError, match="would be untrained; name its weights file with --weights"
    ):
        dump(config)


def test_what_is_saved_is_loaded_again_with_its_preprocessing(vit: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = build_hub(VIT.format(16, 12), 3).eval()
    save_hub(student, tmp_path / "saved", BREEDS)
    loaded = build_hub(f"hf:{tmp_path / 'saved'}", None).eval()
    torch.testing.assert_close(loaded(images(33)), student(images(33)))
    assert loaded.class_names == BREEDS
    assert json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())["size"] == {
        "height": 12,
        "width": 12,
    }
    with pytest.raises(SettingsError, match="only an hf: student can be saved for transformers"):
        save_hub(HubModel(nn.Linear(2, 2), nn.Identity()), tmp_path / "x")


# code that lies beside a model


@pytest.fixture
def untrusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder whose configuration, processor and tokenizer are code; all questions get a yes."""
    folder = tmp_path / "untrusted"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return folder


def add_code(folder: Path, file: str, **facts: str) -> None:
    """Let a file of a model folder name classes in code.py."""
    path = folder / file
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, "auto_map": {k: f"code.{v}" for k, v in facts.items()}}))


CODE_REFUSED = "comes with code of its own, which is never run automatically; load it in a callable"


@pytest.mark.parametrize("options", ["", "?pretrained=false"])
@pytest.mark.parametrize("classes", [None, 3])
def test_code_in_a_model_folder_is_never_run(
    untrusted: Path, options: str, classes: int | None
) -> None:
    (untrusted / "config.json").write_text('{"model_type": "unheard-of"}')
    add_code(untrusted, "config.json", AutoConfig="C", AutoModelForImageClassification="M")
    (untrusted / "model.safetensors").touch()
    with pytest.raises(ModelError, match=CODE_REFUSED):
        build_hub(f"hf:{untrusted}{options}", classes)
    assert not (untrusted.parent / "was_run").exists()


@pytest.mark.parametrize("classes", [None, 3])
def test_code_of_a_processor_or_a_tokenizer_is_never_run(
    vit: Path, untrusted: Path, classes: int | None
) -> None:
    (untrusted / "preprocessor_config.json").write_text('{"image_processor_type": "Unheard"}')
    add_code(untrusted, "preprocessor_config.json", AutoImageProcessor="P")
    with pytest.raises(ModelError, match=CODE_REFUSED):
        build_hub(f"hf:{vit}?processor={untrusted}", classes)
    (untrusted / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Unheard", "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}'
    )
    with pytest.raises(ModelError, match=CODE_REFUSED):
        build_hub(f"{BERT}&tokenizer={untrusted}", 2)
    assert not (untrusted.parent / "was_run").exists()


# timm


def test_a_missing_timm_is_named(without: Callable[[str], None]) -> None:
    without("timm")
    with pytest.raises(
        SettingsError,
        match=r"pip install 'softcache\[timm\]' \(or, in a clone, pip install -e '\.\[timm\]'\)",
    ):
        build_hub("timm:resnet18", 3)


def test_timm_is_asked_for_the_model_and_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {}

    def create_model(name: str, **options: Any) -> nn.Module:
        arguments.update(options, name=name)
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))

    config = {
        "input_size": (3, 24, 24), "interpolation": "bilinear", "crop_pct": 0.9, "crop_mode": "center",
        "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
    }  # fmt: skip
    stub: Any = ModuleType("timm")
    stub.create_model = create_model
    stub.data = SimpleNamespace(resolve_model_data_config=lambda model: config)
    monkeypatch.setitem(sys.modules, "timm", stub)
    model = build_hub("timm:vit_x?pretrained=false&img_size=16", 5)
    assert arguments == {"name": "vit_x", "pretrained": False, "img_size": 16, "num_classes": 5}
    assert isinstance(model.prepare, Preprocess)
    assert model.prepare.steps.crop == (16, 16)
    assert model(images(40)).shape == (2, 5)


def test_a_real_model_of_timm() -> None:
    pytest.importorskip("timm", exc_type=ImportError)
    model = build_hub("timm:resnet18?pretrained=false", 5).eval()
    assert model(images(40)).shape == (2, 5)
    assert "fc.weight" in model.state_dict()
