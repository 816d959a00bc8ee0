"""Models from transformers, each with its own preprocessing.

    hf:ID_OR_FOLDER                                a classifier of images or texts, with pretrained weights;
                                                   for tokens, words or pixels a model of these
    hf:TYPE?pretrained=false&hidden_size=192…      from a configuration alone, with random weights

Options: pretrained=false; processor= and tokenizer= if they are not in the model's own folder; any
other option is a field of the configuration. With tokenizer=, a model with random weights takes its
vocab_size and pad_token_id from the tokenizer, unless they are given.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from softcache.data.rows import PIXEL, TOKEN, WORD
from softcache.errors import ModelError, SettingsError
from softcache.models.hub import HubModel, library_errors, needs_own_code, option_value
from softcache.models.language import TokenModel
from softcache.models.preprocess import Preprocess, Steps, steps_of_processor
from softcache.models.spec import is_pretrained
from softcache.models.tokens import Tokenize
from softcache.util.extras import import_extra
from softcache.util.log import inform
from softcache.util.spec import LOCAL_OPTIONS, Spec

TASKS = {"ImageClassification": "image", "SequenceClassification": "text"}
TASKS_OF_UNITS = {
    TOKEN: "CausalLM",
    WORD: "TokenClassification",
    PIXEL: "SemanticSegmentation",
}
REDUCED = "do_reduce_labels"  # in a processor: label 0 becomes 255, and all others one less
MAX_TOKENS = 1 << 16  # a tokenizer without a limit reports a far larger number
RESAMPLE_IDS = {"nearest": 0, "bilinear": 2, "bicubic": 3}  # Pillow's numbers

Library = Any  # the transformers module
Config = Any  # a transformers configuration
Tokenizer = Any  # a transformers tokenizer


def save_hub(model: HubModel | TokenModel, folder: Path, class_names: tuple[str, ...] = ()) -> None:
    """Save a transformers model as its library does, with its processor or tokenizer.

    Raises:
        SettingsError: the model is not from transformers.
    """
    save: Any = getattr(model.model, "save_pretrained", None)
    if save is None:
        raise SettingsError("only an hf: student can be saved for transformers")
    if class_names:
        config: Config = model.model.config
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: number for number, name in enumerate(class_names)}
    with _quiet(import_extra("transformers", extra="hf", what="an hf: model")):
        save(folder)
    if isinstance(model, TokenModel):
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(folder)
    elif isinstance(model.prepare, Tokenize):
        model.prepare.tokenizer.save_pretrained(folder)
    elif isinstance(model.prepare, Preprocess):
        settings = processor_settings(model.prepare.steps)
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))


def processor_settings(steps: Steps) -> dict[str, Any]:
    """The settings of a transformers image processor that performs these steps."""

    def sides(size: tuple[int, int]) -> dict[str, int]:
        return {"height": size[0], "width": size[1]}

    size = steps.resize
    return {
        "image_processor_type": "ViTImageProcessor" if steps.crop is None else "CLIPImageProcessor",
        "do_resize": size is not None,
        "size": {"shortest_edge": size} if isinstance(size, int) else size and sides(size),
        "resample": RESAMPLE_IDS[steps.interpolation],
        "do_center_crop": steps.crop is not None,
        "crop_size": steps.crop and sides(steps.crop),
        "do_rescale": True,
        "rescale_factor": steps.scale / 255,
        "do_normalize": bool(steps.mean),
        "image_mean": list(steps.mean) or None,
        "image_std": list(steps.std) or None,
    }


def build_hf(spec: Spec, input_shape: Sequence[int], classes: int | None) -> HubModel | TokenModel:
    """Build a model; options that softcache does not use go to its configuration.

    Args:
        classes: number of classes of a student, which gets a new last layer if the pretrained one has
            another width; None for a teacher, which must have all its weights.

    Raises:
        SettingsError: transformers is not installed, or an option is invalid.
        ModelError: the model cannot be loaded, or is none for the task of the data.
    """
    library = import_extra("transformers", extra="hf", what=f"model {spec.text}")
    with library_errors(spec), _quiet(library):
        return _build_quietly(library, spec, classes)


def _build_quietly(library: Library, spec: Spec, classes: int | None) -> HubModel | TokenModel:
    pretrained = is_pretrained(spec)
    name_or_path, options = str(spec.path.expanduser()), dict(spec.options)
    options.pop("pretrained", None)
    local = {name: options.pop(name, None) for name in LOCAL_OPTIONS}
    config = _config(library, spec, name_or_path, pretrained)
    # a bare model type has no files, neither a processor nor a tokenizer
    default = None if _is_type(library, name_or_path) else name_or_path
    for name, value in options.items():
        if not hasattr(config, name):
            raise SettingsError(f"model {spec.text!r}: its configuration has no field {name!r}")
        setattr(config, name, option_value(value))
    task = _task(library, config, spec)
    tokenizer: Tokenizer | None = None
    if spec.task in (TOKEN, WORD):
        place = local["tokenizer"] or default
        tokenizer = _tokenizer_if_any(library, place)
        return _build_of_tokens(library, spec, config, task, classes, tokenizer, options)
    if TASKS.get(task) == "text":
        tokenizer = _load_tokenizer(library, local["tokenizer"] or default, spec)
        if local["tokenizer"] and not pretrained:
            _fit_vocabulary(config, tokenizer, options)
    auto_class = getattr(library, f"AutoModelFor{task}")
    if classes is not None and classes != config.num_labels:
        config.num_labels = classes
    model = _load(auto_class, spec, config, teacher=classes is None)
    names = tuple(str(config.id2label.get(i)) for i in range(config.num_labels))
    has_names = classes is None and not all(name.startswith("LABEL_") for name in names)
    if tokenizer is not None:
        prepare: nn.Module = _tokenize(tokenizer, model.config, spec)
    else:
        steps = _processor_steps(library, config, local["processor"] or default, spec, classes)
        prepare = Preprocess(steps, getattr(config, "num_channels", 3))
    return HubModel(model, prepare, names if has_names else ())


def _load(auto_class: Any, spec: Spec, config: Config, *, teacher: bool) -> nn.Module:  # noqa: ANN401
    """The model in float32, with pretrained weights unless the specification says otherwise.

    Raises:
        ModelError: weights are missing that a teacher needs.
    """
    if not is_pretrained(spec):
        model: nn.Module = auto_class.from_config(config, trust_remote_code=False)
        return model.float()
    model, report = auto_class.from_pretrained(
        str(spec.path.expanduser()),
        config=config,
        ignore_mismatched_sizes=not teacher,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing = sorted(map(str, report["missing_keys"]))
    if missing and teacher:
        raise ModelError(
            f"model {spec.text} has no weights for {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''}; a teacher needs a trained model"
        )
    return model.float()


def _build_of_tokens(
    library: Library,
    spec: Spec,
    config: Config,
    task: str,
    classes: int | None,
    tokenizer: Tokenizer | None,
    given: Collection[str],
) -> TokenModel:
    """A language model or a token classifier; the data has its texts as token ids already.

    Args:
        classes: of a language model the size of the tokenizer's vocabulary, beyond which its outputs are
            padding; None to take them as they are.
        given: the options that set fields of the configuration.
    """
    language = task == TASKS_OF_UNITS[TOKEN]
    auto_class, pretrained = getattr(library, f"AutoModelFor{task}"), is_pretrained(spec)
    if language and not pretrained and classes is not None and "vocab_size" not in given:
        config.vocab_size = classes
    if not language and not pretrained and tokenizer is not None:
        _fit_vocabulary(config, tokenizer, given)
    if not language and classes is not None and classes != config.num_labels:
        config.num_labels = classes
    if classes is not None and language and config.vocab_size < classes:
        raise ModelError(
            f"model {spec.text} has a vocabulary of {config.vocab_size:,}, and the tokenizer of the data has "
            f"{classes:,} tokens; use the model's own tokenizer"
        )
    if language and getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"model {spec.text} has an encoder; expected a decoder alone, as gpt2 or llama are"
        )
    if not pretrained:
        _fit_special_tokens(config, tokenizer, given)
    model = _load(auto_class, spec, config, teacher=spec.teacher)
    names: tuple[str, ...] = ()
    if not language:
        names = tuple(str(config.id2label.get(i)) for i in range(config.num_labels))
        names = () if all(name.startswith("LABEL_") for name in names) else names
    return TokenModel(
        model, classes if language else None, names if spec.teacher else (), tokenizer
    )


def _fit_special_tokens(
    config: Config, tokenizer: Tokenizer | None, given: Collection[str]
) -> None:
    """Take the ids of special tokens from the tokenizer; those of a type belong to another vocabulary."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name not in given:
            setattr(config, name, getattr(tokenizer, name, None))


def _tokenizer_if_any(library: Library, place: str | None) -> Tokenizer | None:
    """The tokenizer to save with a model of tokens; None if it has none."""
    try:
        return (
            library.AutoTokenizer.from_pretrained(place, trust_remote_code=False) if place else None
        )
    except (
        Exception
    ):  # the model's inputs are tokens already; the library raises errors of many types
        return None


def context_length(place: str) -> int | None:
    """The most tokens that a language model in a folder or of the hub takes; None if it does not say.

    Raises:
        SettingsError: transformers is not installed.
    """
    library = import_extra("transformers", extra="hf", what=f"model hf:{place}")
    try:
        config = library.AutoConfig.from_pretrained(place, trust_remote_code=False)
    except Exception:  # what is wrong with the model is said where it is built
        return None
    length = getattr(config, "max_position_embeddings", None) or getattr(
        config, "n_positions", None
    )
    return length if isinstance(length, int) else None


def _config(library: Library, spec: Spec, name_or_path: str, pretrained: bool) -> Config:
    if _is_type(library, name_or_path):
        if pretrained:
            raise SettingsError(
                f"model {spec.text!r}: {name_or_path} is a model type and has no weights; add "
                "?pretrained=false for random ones, or name a folder or a hub id"
            )
        return library.AutoConfig.for_model(name_or_path)
    config = library.AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    folder = Path(name_or_path)
    weights = ("*.safetensors", "*.bin", "*.safetensors.index.json")
    if pretrained and folder.is_dir() and not any(any(folder.glob(name)) for name in weights):
        raise SettingsError(
            f"model {spec.text!r}: the folder has no weights; add ?pretrained=false for random ones"
        )
    return config


def _is_type(library: Library, name_or_path: str) -> bool:
    return name_or_path in library.CONFIG_MAPPING and not Path(name_or_path).exists()


def _task(library: Library, config: Config, spec: Spec) -> str:
    """The task of the data, of the configuration's architecture, or the only one that its type supports."""
    if spec.task in TASKS_OF_UNITS:
        return TASKS_OF_UNITS[spec.task]
    for architecture in getattr(config, "architectures", None) or ():
        for task in TASKS:
            if task in architecture:
                return task
    supported = [
        task
        for task, mapping in (
            ("ImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
            ("SequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
        )
        if type(config) in getattr(library, mapping)
    ]
    if len(supported) != 1 or any("LMHead" in name or "Causal" in name for name in _names(config)):
        raise ModelError(
            f"model {spec.text} is {config.model_type}, {', '.join(_names(config) or ['bare'])}; "
            "expected an image or text classifier; a language model takes text:, jsonl: or ids: data"
        )
    return supported[0]


def _names(config: Config) -> list[str]:
    """The names of the classes that a configuration was saved for."""
    return list(getattr(config, "architectures", None) or [])


def _processor_steps(
    library: Library,
    config: Config,
    name_or_path: str | None,
    spec: Spec,
    classes: int | None,
) -> Steps:
    """The steps of the model's image processor; a student without one resizes to its image size."""
    try:
        if name_or_path is None:
            raise ValueError("a model type has no files")
        processor = library.AutoImageProcessor.from_pretrained(
            name_or_path, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        if needs_own_code(error):
            raise
        if classes is None:
            raise ModelError(
                f"model {spec.text} has no preprocessor_config.json, which says how its images are "
                f"prepared ({' '.join(str(error).split())[:200]}); name one that fits with "
                "?processor=ID_OR_FOLDER"
            ) from error
        size = getattr(config, "image_size", None)
        side = size if isinstance(size, int) or size is None else tuple(size)
        half = (0.5,) * getattr(config, "num_channels", 3)
        return Steps(resize=(side, side) if isinstance(side, int) else side, mean=half, std=half)
    settings = processor.to_dict()
    if spec.task == PIXEL and settings.pop(REDUCED, False):
        inform(
            f"note: model {spec.text} knows no background: masks are to hold its own numbers of classes, and "
            "255 where it has none"
        )
    steps = steps_of_processor(settings, f"model {spec.text}")
    if spec.task == PIXEL and steps.crop is not None:
        raise ModelError(
            f"model {spec.text} crops the centre of its images, so it says nothing of the other pixels; set "
            "do_center_crop to false in its preprocessor_config.json"
        )
    return steps


def _load_tokenizer(library: Library, name_or_path: str | None, spec: Spec) -> Tokenizer:
    try:
        if name_or_path is None:
            raise ValueError("a model type has no files")
        return library.AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # the library raises errors of many types
        if needs_own_code(error):
            raise
        raise ModelError(
            f"model {spec.text} has no tokenizer ({' '.join(str(error).split())[:200]}); name one with "
            "?tokenizer=ID_OR_FOLDER"
        ) from error


def _fit_vocabulary(config: Config, tokenizer: Tokenizer, given: Collection[str]) -> None:
    """Take the fields that depend on the tokenizer from it, unless the user has given them."""
    if "vocab_size" not in given:
        config.vocab_size = len(tokenizer)
    if "pad_token_id" not in given and tokenizer.pad_token_id is not None:
        config.pad_token_id = tokenizer.pad_token_id


def _tokenize(tokenizer: Tokenizer, config: Config, spec: Spec) -> Tokenize:
    if tokenizer.pad_token is None and config.pad_token_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    if tokenizer.pad_token is None:
        raise ModelError(
            f"model {spec.text}: its tokenizer has no padding token, which batches of texts need; set "
            "pad_token in its tokenizer_config.json, and pad_token_id in its config.json"
        )
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"model {spec.text}: its tokenizer has {len(tokenizer):,} tokens, but its vocab_size is "
            f"{config.vocab_size:,}; add ?vocab_size={len(tokenizer)}, or name the model's own tokenizer"
        )
    positions = getattr(config, "max_position_embeddings", None) or MAX_TOKENS
    # RoBERTa and its relatives reserve their first positions for padding
    offset = 2 if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0
    limit = min(tokenizer.model_max_length, positions - offset, MAX_TOKENS)
    return Tokenize(tokenizer, limit, f"model {spec.public_name}")


@contextlib.contextmanager
def _quiet(library: Library) -> Iterator[None]:
    """Silence the library's progress bars and reports: softcache makes the same checks itself."""
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
