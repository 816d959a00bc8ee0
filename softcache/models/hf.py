"""Classifiers of transformers, each with the preprocessing of its own configuration.

    hf:ID_OR_FOLDER                                images or texts, with its weights
    hf:TYPE?pretrained=false&hidden_size=192…      from a configuration alone, with random weights

Options: pretrained=false; processor= and tokenizer= where they lie elsewhere; any other is a field of the
configuration.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softcache.data import text
from softcache.errors import ModelError, SettingsError
from softcache.models.hub import HubModel, library_errors, option_value
from softcache.models.preprocess import Preprocess, Steps, steps_of_processor
from softcache.models.spec import is_pretrained
from softcache.util.extras import import_extra
from softcache.util.spec import LOCAL_OPTIONS, Spec

TASKS = {"ImageClassification": "image", "SequenceClassification": "text"}

LONGEST = 1 << 16  # tokens; a tokenizer that knows no limit says a far greater number

Library = Any  # the module of transformers

Config = Any  # of a model of transformers

Tokenizer = Any  # of transformers


class Tokenize(nn.Module):
    """Code points (B, length) to what a text model takes; no weights."""

    def __init__(self, tokenizer: Tokenizer, longest: int) -> None:
        super().__init__()
        self.tokenizer, self.longest = tokenizer, longest

    def forward(self, points: Tensor) -> dict[str, Tensor]:
        tokens = self.tokenizer(
            text.decode(points),
            padding=True,
            truncation=True,
            max_length=self.longest,
            return_tensors="pt",
        )
        return {name: ids.to(points.device) for name, ids in tokens.items()}


def save_hub(model: HubModel, folder: Path, class_names: tuple[str, ...] = ()) -> None:
    """Write a model of transformers as its own library does, with its processor or tokenizer.

    Raises:
        SettingsError: it is no model of transformers.
    """
    save: Any = getattr(model.model, "save_pretrained", None)
    if save is None:
        raise SettingsError("only a student of hf: can be saved for transformers")
    if class_names:
        config: Config = model.model.config
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: number for number, name in enumerate(class_names)}
    with _quiet(import_extra("transformers", extra="hf", what="a model of hf:")):
        save(folder)
    if isinstance(model.prepare, Tokenize):
        model.prepare.tokenizer.save_pretrained(folder)
    elif isinstance(model.prepare, Preprocess):
        settings = processor_settings(model.prepare.steps)
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))


def processor_settings(steps: Steps) -> dict[str, Any]:
    """The settings of an image processor of transformers that does these steps."""

    def sides(size: tuple[int, int]) -> dict[str, int]:
        return {"height": size[0], "width": size[1]}

    size = steps.resize
    names = {name: number for number, name in ((0, "nearest"), (2, "bilinear"), (3, "bicubic"))}
    return {
        "image_processor_type": "ViTImageProcessor" if steps.crop is None else "CLIPImageProcessor",
        "do_resize": size is not None,
        "size": {"shortest_edge": size} if isinstance(size, int) else size and sides(size),
        "resample": names[steps.interpolation],
        "do_center_crop": steps.crop is not None,
        "crop_size": steps.crop and sides(steps.crop),
        "do_rescale": True,
        "rescale_factor": steps.scale / 255,
        "do_normalize": bool(steps.mean),
        "image_mean": list(steps.mean) or None,
        "image_std": list(steps.std) or None,
    }


def build_hf(spec: Spec, input_shape: Sequence[int], classes: int | None) -> HubModel:
    """A classifier of images or texts; options other than those of softcache are fields of its configuration.

    Args:
        classes: of a student, whose last layer is made anew where it has another number of outputs; None
            of a teacher, which must have all its weights.

    Raises:
        SettingsError: transformers is not installed, or an option is invalid.
        ModelError: the model cannot be loaded, or is no classifier of images or texts.
    """
    library = import_extra("transformers", extra="hf", what=f"model {spec.text}")
    with library_errors(spec), _quiet(library):
        return _build_quietly(library, spec, classes)


def _build_quietly(library: Library, model_spec: Spec, classes: int | None) -> HubModel:
    spec, pretrained = model_spec.text, is_pretrained(model_spec)
    place, options = str(model_spec.path.expanduser()), dict(model_spec.options)
    options.pop("pretrained", None)
    elsewhere = {name: options.pop(name, None) for name in LOCAL_OPTIONS}
    config = _config(library, spec, place, pretrained)
    beside = (
        None if _is_type(library, place) else place
    )  # of a type alone there is nothing on a hub
    for name, value in options.items():
        if not hasattr(config, name):
            raise SettingsError(f"model {spec!r}: its configuration has no field {name!r}")
        setattr(config, name, option_value(value))
    task = _task(library, config, spec)
    automatic = getattr(library, f"AutoModelFor{task}")
    given = {} if classes is None or classes == config.num_labels else {"num_labels": classes}
    if given:
        config.num_labels = classes
    if pretrained:
        model, loaded = automatic.from_pretrained(
            place,
            config=config,
            ignore_mismatched_sizes=classes is not None,
            output_loading_info=True,
        )
        lacking = sorted(map(str, loaded["missing_keys"]))
        if lacking and classes is None:
            raise ModelError(
                f"model {spec} has no weights for {', '.join(lacking[:3])}"
                f"{' and others' if len(lacking) > 3 else ''}; a teacher needs a trained classifier"
            )
    else:
        model = automatic.from_config(config)
    model = model.float()
    names = [str(config.id2label.get(i)) for i in range(config.num_labels)]
    named = classes is None and not all(name.startswith("LABEL_") for name in names)
    if TASKS[task] == "text":
        prepare: nn.Module = _tokenize(library, model, elsewhere["tokenizer"] or beside, spec)
    else:
        steps = _processor_steps(library, config, elsewhere["processor"] or beside, spec, classes)
        prepare = Preprocess(steps, getattr(config, "num_channels", 3))
    return HubModel(model, prepare, tuple(names) if named else ())


def _config(library: Library, spec: str, place: str, pretrained: bool) -> Config:
    if _is_type(library, place):
        if pretrained:
            raise SettingsError(
                f"model {spec!r}: {place} is a type of model, without weights; add ?pretrained=false for "
                "random ones, or name a folder or an id of the hub"
            )
        return library.AutoConfig.for_model(place)
    config = library.AutoConfig.from_pretrained(place)
    folder = Path(place)
    weights = ("*.safetensors", "*.bin", "*.safetensors.index.json")
    if pretrained and folder.is_dir() and not any(any(folder.glob(name)) for name in weights):
        raise SettingsError(
            f"model {spec!r}: the folder has no weights; add ?pretrained=false for random ones"
        )
    return config


def _is_type(library: Library, place: str) -> bool:
    return place in library.CONFIG_MAPPING and not Path(place).exists()


def _task(library: Library, config: Config, spec: str) -> str:
    """What the configuration's architecture is for, else what its type can be for."""
    for architecture in getattr(config, "architectures", None) or ():
        for task in TASKS:
            if task in architecture:
                return task
    able = [
        task
        for task, mapping in (
            ("ImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
            ("SequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
        )
        if type(config) in getattr(library, mapping)
    ]
    if len(able) != 1:
        raise ModelError(
            f"model {spec} is {config.model_type}, {', '.join(config.architectures or ['bare'])}; expected a "
            "classifier of images or of texts"
        )
    return able[0]


def _processor_steps(
    library: Library,
    config: Config,
    place: str | None,
    spec: str,
    classes: int | None,
) -> Steps:
    """Those of the image processor beside the model; a student without one has its image size."""
    try:
        if place is None:
            raise ValueError("no folder")
        processor = library.AutoImageProcessor.from_pretrained(place)
    except (OSError, ValueError) as error:
        if classes is None:
            raise ModelError(
                f"model {spec} has no preprocessor_config.json beside it, which says how it wants its images "
                f"({' '.join(str(error).split())[:200]}); name one that has with ?processor=ID_OR_FOLDER"
            ) from error
        size = getattr(config, "image_size", None)
        side = size if isinstance(size, int) or size is None else tuple(size)
        half = (0.5,) * getattr(config, "num_channels", 3)
        return Steps(resize=(side, side) if isinstance(side, int) else side, mean=half, std=half)
    return steps_of_processor(processor.to_dict(), f"model {spec}")


def _tokenize(library: Library, model: nn.Module, place: str | None, spec: str) -> Tokenize:
    try:
        if place is None:
            raise ValueError("it is a type of model, not a folder")
        tokenizer = library.AutoTokenizer.from_pretrained(place)
    except Exception as error:  # the library raises many kinds
        raise ModelError(
            f"model {spec} has no tokenizer beside it ({' '.join(str(error).split())[:200]}); name one with "
            "?tokenizer=ID_OR_FOLDER"
        ) from error
    config: Config = model.config
    if tokenizer.pad_token is None and config.pad_token_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    if tokenizer.pad_token is None:
        raise ModelError(
            f"model {spec}: its tokenizer has no padding token, which a batch of texts needs; set one in its "
            "tokenizer_config.json, and pad_token_id in its config.json"
        )
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"model {spec}: its tokenizer has {len(tokenizer):,} tokens, the model {config.vocab_size:,}; "
            f"add ?vocab_size={len(tokenizer)}, or name its own tokenizer"
        )
    positions = getattr(config, "max_position_embeddings", None) or LONGEST
    # such as RoBERTa's, whose first positions are taken by the padding
    offset = 2 if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0
    return Tokenize(tokenizer, min(tokenizer.model_max_length, positions - offset, LONGEST))


@contextlib.contextmanager
def _quiet(library: Library) -> Iterator[None]:
    """Without its progress bars and reports: softcache itself checks what they are about."""
    log = library.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
