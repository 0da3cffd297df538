"""The tables of server/README.md are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

from quart import Quart

from jaxmoe import EngineConfig
from jaxmoe.request import MAX_LOGIT_BIAS, MAX_STOP_LENGTH, MAX_STOP_STRINGS, MAX_TOP_LOGPROBS
from server import access, create_app, lifetime, page, profiler, schema
from server.settings import OPTIONS, Settings

PAGE = (Path(__file__).parents[1] / "server" / "README.md").read_text("utf-8")


def table(first: str) -> list[list[str]]:
    """The cells of the rows below the header that begins with `first`."""
    body = PAGE.partition(f"\n| {first} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in body]


def names(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def routes(app: Quart) -> dict[str, str]:
    """{path: its one method}, of the page only `/`."""
    found = {
        rule.rule.replace("<path:model_id>", "{id}"): (rule.methods or set()) - {"HEAD", "OPTIONS"}
        for rule in app.url_map.iter_rules()
        if rule.rule == "/" or rule.rule not in page.FILES
    }
    return {path: ", ".join(methods) for path, methods in found.items()}


def test_every_endpoint_is_listed() -> None:
    rows = table("method")
    assert {names(path)[0]: method for method, path, *_ in rows} == routes(create_app())
    is_open = {names(path)[0]: key == "no" for _, path, _, key in rows}
    assert {path for path, opened in is_open.items() if opened} == access.OPEN_PATHS & is_open.keys()


def test_every_field_is_listed_where_it_is_served() -> None:
    rows = [(name, row) for row in table("field") for name in names(row[0])]
    assert {name for name, row in rows if row[1] == "yes"} == schema._CHAT_FIELDS.keys()
    assert {name for name, row in rows if row[2] == "yes"} == schema._COMPLETION_FIELDS.keys()
    unserved = PAGE.partition("Not served yet")[2].partition("and so on):")[2].partition(".\n\n")[0]
    assert names(unserved) == list(schema._UNSERVED)


def test_the_limits_are_the_codes() -> None:
    for text in (
        f"1 to {schema.MAX_MESSAGES:,}; roles",
        f"1 to {schema.MAX_CHOICES} choices",
        f"0 to {MAX_TOP_LOGPROBS} alternatives",
        f"at most {MAX_LOGIT_BIAS:,} token ids",
        f"at most {MAX_STOP_STRINGS}, of 1 to {MAX_STOP_LENGTH} characters",
        f"at most {schema.MAX_DEPTH} levels and {schema.MAX_COMMAS:,} values",
        f"larger than {schema.MAX_BODY_SIZE >> 20} MiB",
        f"client_max_body_size {schema.MAX_BODY_SIZE >> 20}m;",
        f"takes nothing for {Settings().write_seconds:g} seconds",
        f"({profiler.MIN_SECONDS:g} to {profiler.MAX_SECONDS:g}, one trace at a time)",
    ):
        assert text in PAGE
    # nginx keeps idle connections for 60 seconds: the server must not close them before
    assert lifetime.KEEP_ALIVE_SECONDS > 60


def test_every_setting_is_listed() -> None:
    on_command_line = {option.variable for option in OPTIONS} - {"JAXMOE_MODEL", "JAXMOE_API_KEY"}
    expected = [
        [
            f"`{option.variable}`",
            f"`{option.flag}`" if option.variable in on_command_line else "",
            option.expected,
        ]
        for option in OPTIONS
    ]
    rows = table("variable")
    assert [row[:3] for row in rows] == expected
    for option, row in zip(OPTIONS, rows, strict=True):
        default = getattr({"engine": EngineConfig(), "": Settings()}.get(option.group), option.name, None)
        if isinstance(default, int | float):
            assert row[3] == (str(default).lower() if isinstance(default, bool) else f"{default:g}")
