"""Image classifiers from timm."""

from __future__ import annotations

from collections.abc import Sequence

from softcache.models.hub import HubModel, library_errors, option_value
from softcache.models.preprocess import Preprocess, steps_of_timm
from softcache.models.spec import is_pretrained
from softcache.util.extras import import_extra
from softcache.util.spec import Spec


def build_timm(spec: Spec, input_shape: Sequence[int], classes: int | None) -> HubModel:
    """Build a timm model; options other than `pretrained` are passed to timm.create_model().

    Args:
        classes: number of outputs; None keeps those of the pretrained model.

    Raises:
        SettingsError: timm is not installed.
        ModelError: the model cannot be built, or its preprocessing is not supported.
    """
    what = f"model {spec.text}"
    timm = import_extra("timm", extra="timm", what=what)
    options = {name: option_value(value) for name, value in spec.options.items()}
    options.pop("pretrained", None)
    if classes is not None:
        options.setdefault("num_classes", classes)
    with library_errors(spec):
        model = timm.create_model(spec.place, pretrained=is_pretrained(spec), **options)
        settings = dict(timm.data.resolve_model_data_config(model))
        side = options.get("img_size")
        if isinstance(side, int):  # which timm's data config ignores
            settings["input_size"] = (settings["input_size"][0], side, side)
        return HubModel(model, Preprocess(steps_of_timm(settings, what), settings["input_size"][0]))
