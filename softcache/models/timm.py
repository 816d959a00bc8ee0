"""Image classifiers of timm."""

from __future__ import annotations

from softcache.models.hub import HubModel, option_value
from softcache.models.preprocess import Preprocess, steps_of_timm
from softcache.util.extras import import_extra


def build_timm(
    spec: str, place: str, options: dict[str, str], classes: int | None, pretrained: bool
) -> HubModel:
    timm = import_extra("timm", extra="timm", what=f"model {spec}")
    given = {name: option_value(value) for name, value in options.items()}
    if classes is not None:
        given.setdefault("num_classes", classes)
    model = timm.create_model(place, pretrained=pretrained, **given)
    settings = dict(timm.data.resolve_model_data_config(model))
    if isinstance(given.get("img_size"), int):  # which timm's data config does not know of
        side = given["img_size"]
        settings["input_size"] = (settings["input_size"][0], side, side)
    steps = steps_of_timm(settings, f"model {spec}")
    return HubModel(model, Preprocess(steps, settings["input_size"][0]))
