"""How teachers behind servers are written on the command line."""

from __future__ import annotations

import pytest

from softcache.errors import SettingsError
from softcache.teachers.server_options import ServerOptions, parse_server, server_options
from softcache.teachers.spec import parse_teacher

KEY = "sk-0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("openai:http://h/v1", "does not say which model"),
        ("openai:http://h/v1?model=m", "does not say which model"),
        ("openai:http://h/v1?model=m&top=0", "top=0; expected a whole number from 1"),
        ("openai:http://h/v1?model=m&top=20&api=tgi", "api=tgi; expected vllm or sglang"),
        ("openai:http://h/v1?model=m&top=20&retries=many", "retries=many"),
        ("openai:h/v1?model=m&top=20", "as in http://host:8000/v1"),
        ("openai:ftp://h/v1?model=m&top=20", "as in http://host:8000/v1"),
        ("openai:http://h:port/v1?model=m&top=20", "as in http://host:8000/v1"),
        (f"openai:http://me:{KEY}@h/v1?model=m&top=20", "holds a user or a password"),
        (f"openai:http://h/v1?model=m&top=20&api_key={KEY}", "unknown option 'api_key'"),
        (f"openai:http://h/v1?model=m&top=20&key_env={KEY}", "not the key itself"),
    ],
)
def test_a_specification_that_is_wrong_is_refused(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        parse_teacher(text)
    assert KEY not in str(caught.value)


def test_options_are_read() -> None:
    spec = parse_server(
        "openai:https://h:1/v1/?model=a/b.npy&top=20&api=sglang&key_env=K&concurrency=2&retries=0"
        "&per_minute=60&timeout=9"
    )
    assert server_options(spec) == ServerOptions(
        "https://h:1/v1", "a/b.npy", 20, "sglang", "K", 2, 0, 60, 9
    )
    assert server_options(spec).endpoint == "https://h:1/generate"
    assert parse_teacher(spec.text).kind == "openai"
