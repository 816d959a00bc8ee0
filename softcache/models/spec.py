"""What a specification of a model names."""

from __future__ import annotations

from pathlib import Path

from softcache.util.spec import public_place, query_of, split_options

KINDS = ("hf:", "timm:")


def is_hub(spec: str) -> bool:
    return spec.startswith(KINDS)


def is_random(spec: str) -> bool:
    """Whether a specification asks for a model that has learned nothing yet."""
    return is_hub(spec) and split_options(spec)[1].get("pretrained") == "false"


def public_hub_name(spec: str) -> str:
    """The specification without folders of this machine."""
    place, options = split_options(spec)
    kind, _, rest = place.partition(":")
    shown = {
        name: public_place(value) if name in ("processor", "tokenizer") else value
        for name, value in options.items()
    }
    return f"{kind}:{_public(rest)}{query_of(shown)}"


def _public(place: str) -> str:
    folder = place.removeprefix("local-dir:")
    return f"local-dir:{public_place(folder)}" if folder != place else public_place(place)


def public_name(spec: str) -> str:
    """The specification without folders: what may be written into a shared file."""
    if is_hub(spec):
        return public_hub_name(spec)
    place, colon, rest = spec.rpartition(":")
    return f"{Path(place).name}:{rest}" if colon else Path(spec).name
