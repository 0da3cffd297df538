"""Settings from the environment and from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxmoe import EngineConfig
from server.__main__ import main
from server.settings import OPTIONS, SettingError, Settings, read_settings


def test_nothing_set_gives_the_defaults() -> None:
    assert read_settings({}) == Settings()
    assert read_settings({"JAXMOE_SLOTS": ""}) == Settings()


def test_every_variable_is_read() -> None:
    settings = read_settings(
        {
            "JAXMOE_MODEL": "m.gguf",
            "JAXMOE_MODEL_ID": "mine",
            "JAXMOE_API_KEY": "secret",
            "JAXMOE_ALLOWED_HOSTS": "a.example, B.example",
            "JAXMOE_PING_SECONDS": "0",
            "JAXMOE_GRACE_SECONDS": "1.5",
            "JAXMOE_PROFILE_DIR": "traces",
            "JAXMOE_CONTEXT_LENGTH": "4096",
            "JAXMOE_SLOTS": "3",
            "JAXMOE_CACHE_SIZE": "4GiB",
            "JAXMOE_CACHE_DTYPE": "bfloat16",
            "JAXMOE_PREFILL_CHUNK": "256",
            "JAXMOE_PAGE_LENGTH": "32",
            "JAXMOE_MAX_WAITING": "9",
            "JAXMOE_COMPILATION_CACHE": "off",
            "JAXMOE_TEMPERATURE": "0.7",
            "JAXMOE_TOP_K": "20",
            "JAXMOE_TOP_P": "0.8",
            "JAXMOE_MIN_P": "0.05",
            "JAXMOE_REPETITION_PENALTY": "1.05",
        }
    )
    assert settings == Settings(
        model="m.gguf",
        model_id="mine",
        api_key="secret",
        allowed_hosts=("a.example", "b.example"),
        ping_seconds=0.0,
        grace_seconds=1.5,
        profile_dir=Path("traces"),
        engine=EngineConfig(
            context_length=4096,
            num_slots=3,
            cache_size=4 << 30,
            cache_dtype="bfloat16",
            prefill_chunk=256,
            page_length=32,
            max_waiting=9,
            compilation_cache=False,
        ),
        sampling={
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
            "min_p": 0.05,
            "repetition_penalty": 1.05,
        },
    )
    assert "secret" not in repr(settings)
    assert len(OPTIONS) == 20, "a new option belongs into this test"


@pytest.mark.parametrize(
    ("text", "size"), [("1024", 1024), ("1k", 1024), ("2MiB", 2 << 20), ("1GB", 1 << 30)]
)
def test_sizes_take_units(text: str, size: int) -> None:
    assert read_settings({"JAXMOE_CACHE_SIZE": text}).engine.cache_size == size


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("JAXMOE_SLOTS", "many", "a number of requests"),
        ("JAXMOE_SLOTS", "0", "num_slots must be an integer between 1"),
        ("JAXMOE_CONTEXT_LENGTH", "1e3", "a number of tokens"),
        ("JAXMOE_PAGE_LENGTH", "many", "a number of tokens that divides 256"),
        ("JAXMOE_PAGE_LENGTH", "48", "page_length must divide 256"),
        ("JAXMOE_CACHE_SIZE", "4 apples", "bytes, or a size such as 4GiB"),
        ("JAXMOE_CACHE_SIZE", "-1", "cache_size must be"),
        ("JAXMOE_CACHE_DTYPE", "float64", "cache_dtype must be one of"),
        ("JAXMOE_PING_SECONDS", "-1", "seconds"),
        ("JAXMOE_PING_SECONDS", "nan", "seconds"),
        ("JAXMOE_COMPILATION_CACHE", "maybe", "true or false"),
        ("JAXMOE_TEMPERATURE", "hot", "a number from 0 to 2"),
        ("JAXMOE_TEMPERATURE", "3", "temperature must be"),
        ("JAXMOE_TOP_K", "-5", "top_k must be"),
    ],
)
def test_a_bad_value_is_named(variable: str, value: str, expected: str) -> None:
    with pytest.raises(SettingError) as caught:
        read_settings({variable: value})
    assert str(caught.value).startswith(f"{variable}={value!r}: ")
    assert expected in str(caught.value)


def test_an_empty_key_is_no_key() -> None:
    with pytest.raises(SettingError, match="JAXMOE_API_KEY is empty"):
        read_settings({"JAXMOE_API_KEY": ""})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m.gguf", "--slots", "none"], "JAXMOE_SLOTS='none'"),
        (["m.gguf", "--port", "x"], "invalid int value"),
        (["m.gguf", "--api-key", "secret"], "unrecognized arguments"),
    ],
)
def test_a_wrong_command_line_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAXMOE_MODEL", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
