"""The dependency rule: who may import whom, and which words only one file says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    *("display", "demo", "hub", "pull"),
    *(
        "request",
        "gguf",
        "config",
        "tokenizer",
        "chat",
        "parsers",
        "constraint",
        "pages",
        "user_cache",
        "profiler",
        "quants",
        "kernels",
    ),
    *("cache", "layers", "attention", "moe", "model", "weights", "sampling", "step", "scheduler", "engine"),
    "llm",
    *("inspect_file", "terminal", "cli", "__main__"),
]
WITHOUT_JAX = [*takewhile(lambda name: name != "quants", ORDER), "scheduler"]
MODULES = {
    ".".join(path.relative_to(ROOT / "jaxmoe").with_suffix("").parts): path
    for path in sorted((ROOT / "jaxmoe").rglob("*.py"))
    if path.stem != "__init__"
}
SERVER = sorted((ROOT / "server").glob("*.py"))
PRODUCT = sorted([*(ROOT / "jaxmoe").rglob("*.py"), *SERVER])


def imports(path: Path) -> Iterator[str]:
    """Full names of all modules and names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports by a relative name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def says(path: Path, pattern: str) -> bool:
    """Whether a string literal that is no docstring, or a part of an f-string, matches."""
    tree = ast.parse(path.read_text("utf-8"))
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in docstrings)
    return any(isinstance(n.value, str | bytes) and re.search(pattern, _text(n.value)) for n in strings)


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


def who_says(pattern: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in PRODUCT if says(path, pattern)}


def test_every_module_has_its_place_in_the_order() -> None:
    assert {place(name) for name in MODULES} <= set(ORDER)


def place(name: str) -> str:
    """The word of ORDER for a module: its name, or its package's."""
    return name.partition(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_earlier_ones(name: str) -> None:
    used = {full.split(".")[1] for full in imports(MODULES[name]) if full.startswith("jaxmoe.")}
    own = {place(name)} if "." in name else set()
    assert used <= {*ORDER[: ORDER.index(place(name))], *own}
    assert not [full for full in imports(MODULES[name]) if full.split(".")[0] in ("server", "tools", "tests")]


@pytest.mark.parametrize("path", SERVER, ids=lambda path: path.stem)
def test_the_server_imports_public_names_and_never_jax(path: Path) -> None:
    for full in imports(path):
        package, _, name = full.partition(".")
        assert package not in ("jax", "jaxlib", "flax", "tools")
        assert package != "jaxmoe" or name in public_names()


def public_names() -> set[str]:
    tree = ast.parse((ROOT / "jaxmoe" / "__init__.py").read_text("utf-8"))
    (names,) = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return set(ast.literal_eval(names))


def test_only_the_command_says_the_server() -> None:
    assert {path for path in who_says(r"^server\b") if path.startswith("jaxmoe/")} == {"jaxmoe/cli.py"}


def test_only_step_and_weights_say_jit() -> None:
    sayers = {path.stem for path in PRODUCT if re.search(r"\bp?jit\b", code_of(path))}
    assert sayers == {"step", "weights"}


def code_of(path: Path) -> str:
    """A file without its docstrings and comments."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return ast.unparse(tree)


def test_only_weights_says_a_tensor_name() -> None:
    assert who_says(r"\.weight\b|\bblk\.|\btoken_embd\b") == {"jaxmoe/weights.py"}


def test_only_config_says_a_network_metadata_key() -> None:
    keys = r"qwen3moe|general\.architecture|\brope\.|\battention\.(head|key|value|layer)|expert_(used_)?count"
    assert who_says(keys) == {"jaxmoe/config.py"}


def test_only_sse_says_data() -> None:
    assert who_says(r"\bdata: ?$|\bdata: ") == {"server/sse.py"}


def test_what_needs_no_device_loads_without_jax() -> None:
    names = [name for name in WITHOUT_JAX if name in MODULES]
    assert {"request", "gguf", "config", "tokenizer", "chat", "pages", "scheduler"} <= set(names)
    check = "import sys, {}; sys.exit(any(m.split('.')[0] in ('jax', 'jaxlib', 'flax') for m in sys.modules))"
    script = check.format(", ".join(f"jaxmoe.{name}" for name in names))
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
