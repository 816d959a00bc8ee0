"""How a teacher behind a server is written: its address, its model, and how it is asked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from softcache.errors import SettingsError
from softcache.util.spec import Spec, check_options, split_options
from softcache.util.urls import is_url, public_url

SERVER = "openai"  # the kind
APIS = ("vllm", "sglang")
OPTIONS = (
    "model", "top", "api", "key_env", "concurrency", "retries", "per_minute", "timeout",
)  # fmt: skip
FORM = "openai:URL?model=NAME&top=K"
MOST_TOP = 1 << 16
KEY = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class ServerOptions:
    """Where a server is, and how it is asked.

    Attributes:
        url: its address, such as http://host:8000/v1, without a slash at the end.
        model: the name of the model there.
        top: how many of the most probable tokens of each position are asked for.
        api: which requests it understands, one of APIS.
        key_env: the environment variable that holds the key; None if no key is sent.
        concurrency: how many documents are asked for at the same time.
        retries: how often a request that failed is sent again.
        per_minute: the most requests of a minute; None for no limit.
        timeout: seconds until a request is given up.
    """

    url: str
    model: str
    top: int
    api: str = APIS[0]
    key_env: str | None = None
    concurrency: int = 8
    retries: int = 5
    per_minute: int | None = None
    timeout: int = 600

    @property
    def name(self) -> str:
        """What a file says of the teacher: not the host, which the rows do not depend on, nor a key."""
        return f"{SERVER}:{self.model}?api={self.api}&top={self.top}"

    @property
    def endpoint(self) -> str:
        """The URL that documents are sent to."""
        if self.api == "sglang":
            return f"{self.url.removesuffix('/v1')}/generate"
        return f"{self.url}/completions"

    def key(self) -> str | None:
        """The key, read from its environment variable; None if no key is sent.

        Raises:
            SettingsError: the variable is not set, or holds no key. The message does not show its value.
        """
        if self.key_env is None:
            return None
        value = os.environ.get(self.key_env, "").strip()
        if not KEY.fullmatch(value):
            state = "is not set" if not value else "holds spaces or characters that no key has"
            raise SettingsError(
                f"key_env={self.key_env}: this environment variable {state}; put the server's key into it"
            )
        return value


def parse_server(text: str) -> Spec:
    """Parse openai:URL?OPTIONS; nothing is asked.

    Raises:
        SettingsError: it is not such a specification. The message shows no part that may be a secret.
    """
    place, options = split_options(text.removeprefix(f"{SERVER}:"))
    spec = Spec(text, SERVER, place, options=options)
    server_options(spec)
    return spec


def server_options(spec: Spec) -> ServerOptions:
    """The options of a specification, checked.

    Raises:
        SettingsError: one is missing, unknown or out of range, or the URL is none.
    """
    url = spec.place.rstrip("/")
    shown = f"teacher {SERVER}:{public_url(url)}"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # such as a port that is no number
        raise SettingsError(
            f"teacher {SERVER}:…: the URL is malformed; expected {FORM}, as in http://host:8000/v1"
        ) from None
    if not valid or not is_url(url) or parts.query or parts.fragment:
        raise SettingsError(f"{shown}: expected {FORM}, as in http://host:8000/v1")
    if parts.username is not None or parts.password is not None:
        raise SettingsError(
            f"{shown}: the URL holds a user or a password; put the key into an environment variable, and "
            "name that with key_env="
        )
    given = spec.options
    check_options(given, OPTIONS, shown)
    if not given.get("model") or "top" not in given:
        raise SettingsError(
            f"{shown} does not say which model to ask, or for how many tokens; expected {FORM}"
        )
    api = given.get("api", APIS[0])
    if api not in APIS:
        raise SettingsError(f"{shown}: api={api}; expected {' or '.join(APIS)}")
    key_env = given.get("key_env")
    if key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", key_env, re.ASCII):
        raise SettingsError(
            f"{shown}: key_env= names an environment variable that holds the key, not the key itself"
        )
    return ServerOptions(
        url,
        given["model"],
        _whole(given, "top", shown, 1, MOST_TOP) or 1,
        api,
        key_env,
        _whole(given, "concurrency", shown, 1, 1024) or ServerOptions.concurrency,
        _count(given, "retries", shown, ServerOptions.retries),
        _whole(given, "per_minute", shown, 1, 1_000_000),
        _whole(given, "timeout", shown, 1, 86_400) or ServerOptions.timeout,
    )


def _count(given: Mapping[str, str], name: str, shown: str, default: int) -> int:
    """A whole number from 0."""
    value = _whole(given, name, shown, 0, 1000)
    return default if value is None else value


def _whole(given: Mapping[str, str], name: str, shown: str, least: int, most: int) -> int | None:
    """A whole number in a range; None if it is not given."""
    text = given.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not least <= int(text) <= most:
        raise SettingsError(
            f"{shown}: {name}={text[:40]}; expected a whole number from {least} to {most:,}"
        )
    return int(text)
