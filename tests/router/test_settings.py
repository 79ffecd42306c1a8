"""Command line > environment > default, and errors that say what to do."""

from __future__ import annotations

from typing import Any

import pytest

from lmkv.errors import ConfigError
from lmkv.router.bodies import Side
from lmkv.router.engines import Engines, parse_engine
from lmkv.router.settings import RouterSettings, router_settings


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMKV_ROUTER_PORT", "1234")
    monkeypatch.setenv("LMKV_ROUTER_RETRIES", "5")
    settings = router_settings({"port": 4321}, {})
    assert (settings.port, settings.retries, settings.drain_s) == (4321, 5, 30.0)


def test_lists_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMKV_ROUTER_DECODE", "http://a:1, http://b:2=tcp://b:3")
    assert router_settings({}, {}).decode == ("http://a:1", "http://b:2=tcp://b:3")


def test_an_unknown_variable_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'LMKV_ROUTER_RETRIES'"):
        router_settings({}, {"LMKV_ROUTER_RETRYS": "1"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"port": 70000}, "'port' has the value 70000"),
        ({"policy": "best"}, "correct --policy or LMKV_ROUTER_POLICY"),
        ({"retries": -1}, "'retries'"),
        ({"first_token_timeout_s": 0}, "--first-token-timeout-s"),
        ({"engine_api_key": "x"}, "api_key is not"),
    ],
)
def test_bad_values(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        router_settings(given, {})
    assert message in str(caught.value)


def test_keys_are_not_shown() -> None:
    assert "secret" not in repr(router_settings({"api_key": "secret"}, {}))


@pytest.mark.parametrize(
    ("text", "url", "control"),
    [
        ("http://host:8100", "http://host:8100", "tcp://host:18100"),
        ("http://host:8100/", "http://host:8100", "tcp://host:18100"),
        ("http://host:8100=tcp://other:7777", "http://host:8100", "tcp://other:7777"),
        ("https://host:8443", "https://host:8443", "tcp://host:18443"),
        ("http://[::1]:8100", "http://[::1]:8100", "tcp://[::1]:18100"),
        ("http://host:60000=tcp://host:1", "http://host:60000", "tcp://host:1"),
    ],
)
def test_engine_addresses(text: str, url: str, control: str) -> None:
    spec = parse_engine(Side.DECODE, text)
    assert (spec.url, spec.control) == (url, control)


@pytest.mark.parametrize(
    "text",
    ["", "host:8100", "http://host", "http://:8100", "ftp://host:1", "http://host:99999", "http://host:1/v1",
     "http://host:x", "http://host:60000", "http://host:1=host:2", "http://host:1=tcp://host", "http://host:1=",
     "http://user@host:1", "http://host:1?x=1", "http://host:1#x"],
)  # fmt: skip
def test_bad_engine_addresses(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_engine(Side.DECODE, text)


@pytest.mark.parametrize(
    ("prefill", "decode", "message"),
    [
        ([], ["http://a:1", "http://a:1"], "a:1 is given twice"),
        (["http://a:1"], ["http://a:1"], "a:1 is given twice"),
        (["http://a:1"], ["http://a:2=tcp://a:10001"], "tcp://a:10001 is given twice"),
        (["http://a:1"], [], "no decode engine is given"),
    ],
)
def test_contradictory_engines(prefill: list[str], decode: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engines(router_settings({"prefill": prefill, "decode": decode}, {}))


def test_every_setting_is_described() -> None:
    assert all(field.description for field in RouterSettings.model_fields.values())
