"""Check on a GPU that every kernel agrees with its twins, and whole models with themselves.

`python -m tools.device_check [--model FILE.gguf] [--part kernels,model,batch] [--seed N] [--out FILE.json]`

- kernels: each kernel against its twin and its float twin, on random arrays of the shapes of SHAPES, three
  times on outputs that held 0xFF bytes before; the three results must have the same bits.
- model: 2,000 positions of random ids in a synthetic file, and in --model's, and of held-out conversations in
  the demo model: greedy ids as the rounded twin's, divergence from the float path, ids where that is sure.
- batch: ids and page bytes of a stream in every batch and chunk size.

Without --out a run of all parts writes contracts/evidence/GPU/kernels.json, with a hash of the kernels'
sources: a test fails when it no longer matches them, unless contracts/evidence/kernels-waiting.json says of
this very hash why it waits for a device. Exit status: 0 all agreed, 1 something did not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib import import_module, metadata
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

from jaxmoe import demo_model
from jaxmoe.config import ModelConfig
from jaxmoe.kernels.comparison import Comparison
from tools.environment import ROOT, host_name, read_environment

if TYPE_CHECKING:
    from tools.agreement import Agreement, Invariance

Document = dict[str, Any]

KERNELS = ROOT / "jaxmoe" / "kernels"
EVIDENCE = ROOT / "contracts" / "evidence"
TWIN_ERROR = 1e-3
FLOAT_ERROR = 0.015
RUNS = 3
POSITIONS = 2000
PROMPT_LENGTH = 500
PARTS = ("kernels", "model", "batch")
PACKAGES = ("jax", "jaxlib", "flax", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")


def _shape(name: str, **sizes: int) -> ModelConfig:
    return ModelConfig(**sizes, norm_eps=1e-6, rope_base=1e6, rope_scaling=None, name=name)


# Two layers: more would only take memory, as kernels read a stack's other layers never.
SHAPES = (
    _shape(
        "30b", num_layers=2, d_model=2048, num_heads=32, num_kv_heads=4, head_dim=128, num_experts=128,
        experts_per_token=8, expert_width=768, vocab_size=151_936, context_length=40_960,
    ),
    _shape(
        "mini", num_layers=2, d_model=512, num_heads=8, num_kv_heads=4, head_dim=64, num_experts=16,
        experts_per_token=4, expert_width=256, vocab_size=2048, context_length=4096,
    ),
    _shape(
        "odd", num_layers=2, d_model=768, num_heads=20, num_kv_heads=4, head_dim=64, num_experts=40,
        experts_per_token=6, expert_width=512, vocab_size=1003, context_length=2048,
    ),
)  # fmt: skip


# --- The sources that the evidence speaks for.

_TOKENS = re.compile(
    r"""(?P<skipped> //[^\n]* | /\*.*?\*/ | \s+ )
    | R"\((?:.*?)\)" | "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*'
    | \w+ | <<=|>>=|\.\.\.|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||::|\#\#|[-+*/%&|^]= | . """,
    re.VERBOSE | re.DOTALL,
)
_COMMENTS = re.compile(r""""(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/""", re.DOTALL)


def sources_hash(folder: Path = KERNELS) -> str:
    """sha256 over all kernel sources, without comments and white space. Needs no GPU."""
    paths = sorted([*folder.glob("*.cu"), *folder.glob("*.cuh")])
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\n{bare(path.read_text('utf-8'))}\n".encode())
    return digest.hexdigest()


def bare(source: str) -> str:
    """C++ as its tokens, one a line; a macro's line keeps single spaces, which may mean something there."""
    lines = []
    for part in re.split(r"(?m)^([ \t]*#(?:[^\n]|\n(?<=\\\n))*)", source):
        if part.lstrip().startswith("#"):
            plain = _COMMENTS.sub(lambda m: m[0] if m[0][0] == '"' else " ", part.replace("\\\n", " "))
            lines.append(" ".join(plain.split()))
        else:
            lines += [m[0] for m in _TOKENS.finditer(part) if m["skipped"] is None]
    return "\n".join(lines)


# --- One kernel.


@dataclass(frozen=True)
class Finding:
    """A kernel beside its twins; an error is None where there was nothing to compare. `failed` says why."""

    shape: str
    name: str
    exact: bool
    twin_error: float | None = None
    float_error: float | None = None
    failed: str | None = None

    @property
    def passed(self) -> bool:
        return self.failed is None


def check(comparison: Comparison, shape: str, prepare: Callable[[Comparison], None]) -> Finding:
    """Run a kernel RUNS times, each after `prepare`, and hold it to its twins."""
    blank = Finding(shape, comparison.name, comparison.exact)
    try:
        return _check(comparison, blank, prepare)
    except Exception as error:
        return replace(blank, failed=f"{type(error).__name__}: {str(error)[:2000]}")


def _check(comparison: Comparison, blank: Finding, prepare: Callable[[Comparison], None]) -> Finding:
    results = []
    for _ in range(RUNS):
        prepare(comparison)
        results.append(_leaves(comparison.kernel(*comparison.arrays)))
    expected = _leaves(comparison.twin(*comparison.arrays))
    if [len(one) for one in results] != [len(expected)] * RUNS:
        return replace(blank, failed=f"{len(results[0])} results, the twin has {len(expected)}")
    if any(not _same_bytes(first, again) for one in results[1:] for first, again in zip(results[0], one)):  # noqa: B905
        return replace(blank, failed="another run gave other bits")
    if comparison.exact:
        return replace(blank, failed=_difference(results[0], expected))
    found = replace(blank, twin_error=worst_error(results[0], expected))
    if comparison.float_twin is not None:
        plain = _leaves(comparison.float_twin(*comparison.arrays))
        found = replace(found, float_error=worst_error(results[0], plain))
    return replace(found, failed=verdict(found))


def verdict(found: Finding) -> str | None:
    """Which bound the errors break; None for neither. NaN breaks both."""
    bounds = (("twin", found.twin_error, TWIN_ERROR), ("float twin", found.float_error, FLOAT_ERROR))
    broken = [
        f"error against the {name} {error:.3g}, at most {bound:g}"
        for name, error, bound in bounds
        if error is not None and not error <= bound
    ]
    return "; ".join(broken) or None


def worst_error(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The largest relative L2 error of any result; infinite where shapes differ, NaN where one is."""
    errors = [
        relative_error(one, other) if one.shape == other.shape else float("inf")
        for one, other in zip(found, expected, strict=True)
    ]
    return float(np.max(errors))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected| by L2 norm; 0 where both are 0."""
    wide = found.astype(np.float64), expected.astype(np.float64)
    difference, size = float(np.linalg.norm(wide[0] - wide[1])), float(np.linalg.norm(wide[1]))
    if difference == 0:
        return 0.0
    return difference / size if size else float("inf")


def _difference(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> str | None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return f"result {i} is {one.dtype}{one.shape}, the twin's {other.dtype}{other.shape}"
        if not _same_bytes(one, other):
            places = np.argwhere(_bits(one) != _bits(other))
            at = tuple(places[0].tolist())
            where = f"{len(places)} of {one.size} places, first {at}: {one[at]} for {other[at]}"
            return f"result {i} differs in {where}"
    return None


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}") if array.dtype != np.bool_ else array


def _same_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    return one.tobytes() == other.tobytes()


def _leaves(tree: Any) -> list[np.ndarray]:
    import jax

    return [
        np.ascontiguousarray(jax.device_get(leaf)).reshape(np.shape(leaf)) for leaf in jax.tree.leaves(tree)
    ]


def poison(shapes: Sequence[Any]) -> None:
    """Fill buffers of these shapes' sizes with 0xFF (NaN as floats, -1 as integers) and free them."""
    import jax
    import jax.numpy as jnp

    sizes = [max(1, shape.size * shape.dtype.itemsize) for shape in shapes]
    # several of each size, and one of all: whatever hole an output is put into must have held poison
    whole = (*sizes, *sizes, *sizes, *sizes, sum(sizes))
    jax.block_until_ready([jnp.full(size, 255, jnp.uint8) for size in whole])


def poison_results(comparison: Comparison) -> None:
    """Poison what the results of a comparison's kernel will lie in."""
    import jax

    poison(jax.tree.leaves(jax.eval_shape(lambda: comparison.kernel(*comparison.arrays))))


@contextmanager
def poisoned_launches() -> Iterator[None]:
    """Poison the outputs of every kernel that is launched outside of a trace, just before it."""
    import jax

    from jaxmoe.kernels import ptx

    launch = ptx.launch

    def poisoned(
        file: str, name: str, defines: Any, arrays: Sequence[Any], outputs: Sequence[Any], **how: Any
    ) -> Any:
        if not any(isinstance(array, jax.core.Tracer) for array in arrays):
            poison(outputs)
        return launch(file, name, defines, arrays, outputs, **how)

    with patch.object(ptx, "launch", poisoned):
        yield


# --- All kernels.


# a module of kernels, and for long ones which of its products
MODULES = (
    "matmul/qkv", "matmul/attn_output", "matmul/lm_head", "matmul/gate_up", "matmul/down",
    "experts", "decode_row", "attention", "rows", "router", "sampling",
)  # fmt: skip


def comparisons_of(name: str, config: ModelConfig, seed: int) -> Iterator[Comparison]:
    """The comparisons of one module of kernels for one shape."""
    import jax

    from jaxmoe.sampling import SamplingRow, sample

    @jax.jit
    def twin(logits: Any, fields: Mapping[str, Any]) -> tuple[Any, ...]:
        sampled = sample(logits, SamplingRow(**fields))
        return sampled.token_id, sampled.logprob, sampled.top_ids, sampled.top_logprobs

    module, _, product = name.partition("/")
    rest: tuple[Any, ...] = (twin,) if module == "sampling" else (product,) if product else ()
    yield from import_module(f"jaxmoe.kernels.{module}").comparisons(config, seed, *rest)


def check_kernels(seed: int, only: str | None = None) -> list[Finding]:
    """Every kernel on every shape, or those of one "shape/module", said on the terminal as it goes."""
    with poisoned_launches():
        return [
            found
            for config in SHAPES
            for name in MODULES
            if only in (None, f"{config.name}/{name}")
            for found in _check_module(name, config, seed)
        ]


def _check_module(name: str, config: ModelConfig, seed: int) -> list[Finding]:
    findings = []
    try:
        for comparison in comparisons_of(name, config, seed):
            findings.append(check(comparison, config.name, poison_results))
            print(shown(findings[-1]), flush=True)
    except Exception as error:
        failed = f"its comparisons: {type(error).__name__}: {str(error)[:2000]}"
        findings.append(Finding(config.name, name, False, failed=failed))
        print(shown(findings[-1]), flush=True)
    return findings


def shown(found: Finding) -> str:
    """One line of the terminal."""
    errors = [f"{name} {value:.2e}" for name, value in _errors(found).items() if value is not None]
    what = found.failed or ", ".join(errors) or "equal"
    return f"{'ok' if found.passed else 'FAILED':<7} {found.shape:<5} {found.name}: {what}"


def _errors(found: Finding) -> dict[str, float | None]:
    return {"twin": found.twin_error, "float": found.float_error}


# --- Whole models.


def check_models(files: Mapping[str, Path], seed: int) -> Document:
    """Agreement of the three paths on each file, and on the demo model."""
    asked: dict[str, Callable[[], list[Agreement]]] = {
        name: partial(_agreement, path, partial(_random_prompts, seed)) for name, path in files.items()
    }
    asked["demo model"] = partial(_agreement, demo_model(), partial(held_out_prompts, seed))
    return {name: _guarded(name, ask) for name, ask in asked.items()}


def check_batches(files: Mapping[str, Path], seed: int) -> Document:
    """Batch invariance on each file."""
    return {name: _guarded(name, partial(_invariance, path, seed)) for name, path in files.items()}


def _agreement(path: Path, prompts: Callable[[int], list[tuple[int, ...]]]) -> list[Agreement]:
    from tools.agreement import open_paths, whole_model

    paths, vocab_size = open_paths(path, PROMPT_LENGTH)
    return [whole_model(paths, prompts(vocab_size))]


def _random_prompts(seed: int, vocab_size: int) -> list[tuple[int, ...]]:
    from tools.player import random_ids

    return [random_ids(PROMPT_LENGTH, vocab_size, (seed, i)) for i in range(-(-POSITIONS // PROMPT_LENGTH))]


def held_out_prompts(seed: int, _: int) -> list[tuple[int, ...]]:
    """Conversations that the demo model was not trained on, one after the other, cut into prompts."""
    from tools.demo_corpus import make_conversation
    from tools.demo_rows import Renderer
    from tools.demo_vocabulary import vocabulary_of

    renderer = Renderer(vocabulary_of(demo_model()))
    token_ids: list[int] = []
    for number in count(seed):
        token_ids += renderer.sample(make_conversation(number, "held_out")).tokens
        if len(token_ids) >= POSITIONS:
            break
    return [tuple(token_ids[i : i + PROMPT_LENGTH]) for i in range(0, POSITIONS, PROMPT_LENGTH)]


def _invariance(path: Path, seed: int) -> list[Invariance]:
    from tools.agreement import Company, batch_invariance
    from tools.player import open_model

    company = Company()
    model, config = open_model(path, company.long_prompt + company.new_tokens)
    return batch_invariance(model, config, seed, company)


def _guarded(name: str, measure: Callable[[], Sequence[Agreement | Invariance]]) -> list[Document]:
    """What was measured as rows with `passed`, or one failed row: a lost part must not lose the others."""
    try:
        rows = [{**asdict(found), "passed": found.passed} for found in measure()]
    except Exception as error:
        rows = [{"passed": False, "failed": f"{type(error).__name__}: {str(error)[:2000]}"}]
    for row in rows:
        print(f"{'ok' if row['passed'] else 'FAILED':<7} {name}: {row}", flush=True)
    return rows


# --- The document.


def document(
    seed: int, parts: Sequence[str], findings: Sequence[Finding], models: Document, batches: Document
) -> Document:
    """What a run found, where, and for which sources."""
    environment = read_environment()
    rows = [{**asdict(found), "passed": found.passed} for found in findings]
    whole = [row["passed"] for part in (models, batches) for one in part.values() for row in one]
    return {
        "machine": host_name(environment),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment,
        "versions": {"python": sys.version.split()[0], **_versions()},
        "seed": seed,
        "sources": sources_hash(),
        "parts": list(parts),
        "passed": all(found.passed for found in findings) and all(whole),
        "kernels": rows,
        "whole_model": models,
        "batch_invariance": batches,
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def gpu_folder(name: str) -> str:
    """Where the evidence of a GPU lies: "NVIDIA H200" gives h200, "NVIDIA H100 80GB HBM3" h100."""
    words = name.removeprefix("NVIDIA ").split()
    sizes = [i for i, word in enumerate(words) if re.fullmatch(r"\d+GB", word)]
    return "-".join(words[: sizes[0]] if sizes else words).lower()


def newest_evidence(folder: Path = EVIDENCE) -> Document:
    """The newest kernels.json below `folder`. Raises FileNotFoundError, with what to run, for none."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*/kernels.json"))]
    if not found:
        raise FileNotFoundError("no kernels.json yet: run `python -m tools.device_check` on a GPU")
    return max(found, key=lambda one: str(one["date"]))


def waits(sources: str, folder: Path = EVIDENCE) -> str | None:
    """Why the kernels of this hash wait for a device, if kernels-waiting.json says so of this very hash."""
    path = folder / "kernels-waiting.json"
    if not path.exists():
        return None
    waiting = json.loads(path.read_text("utf-8"))
    return str(waiting["why"]) if waiting["sources"] == sources else None


def complaints(evidence: Document, sources: str) -> list[str]:
    """Why a kernels.json does not speak for the sources of this hash; empty when it does.

    What rounding costs a whole model (part "model") is written there for people to read, and is no condition.
    """
    rows = evidence["kernels"]
    shapes = {row["shape"] for row in rows}
    missing = [config.name for config in SHAPES if config.name not in shapes]
    broken = [f"{row['shape']} {row['name']}" for row in rows if not row["passed"]]
    batches = [row["passed"] for found in evidence["batch_invariance"].values() for row in found]
    checks = {
        "the kernels changed since: run `python -m tools.device_check` on a GPU again": (
            evidence["sources"] != sources
        ),
        f"it holds only the parts {evidence['parts']}": not {"kernels", "batch"} <= set(evidence["parts"]),
        f"it lacks the shapes {missing}": bool(missing),
        f"it failed: {', '.join(broken)}": bool(broken),
        "it has no stream that is the same in all company": not batches or not all(batches),
    }
    return [what for what, is_so in checks.items() if is_so]


# --- The command line.


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(dict.fromkeys(text.split(",")))
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(PARTS)}")
    return parts


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.device_check", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, metavar="FILE.gguf", help="another file for model and batch")
    parser.add_argument("--part", type=_parts, default=PARTS, help=",".join(PARTS))
    parser.add_argument("--only", metavar="SHAPE/MODULE", help="of the kernels")
    parser.add_argument("--seed", type=int, help="fresh at random if not given")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    return parser.parse_args(argv)


def run(parts: Sequence[str], model: Path | None, seed: int, only: str | None = None) -> Document:
    """Run the parts; returns the document. `only`: a "shape/module" of the kernels."""
    from tools.synth_gguf import write_synthetic

    findings, models, batches = [], {}, {}
    if "kernels" in parts:
        findings = check_kernels(seed, only)
    with tempfile.TemporaryDirectory() as folder:
        files = {} if model is None else {model.name: model}
        if {"model", "batch"} & set(parts):
            files = {"synthetic mini": Path(folder) / "mini.gguf", **files}
            write_synthetic(files["synthetic mini"], "mini", "Q4_K_M")
        if "model" in parts:
            models = check_models(files, seed)
        if "batch" in parts:
            batches = check_batches(files, seed)
    return document(seed, parts, findings, models, batches)


def run_apart(parts: Sequence[str], model: Path | None, seed: int) -> Document:
    """Run the parts, the kernels' by shape and module, in processes side by side; join what they find."""
    tasks: list[tuple[str, ...]] = [("--part", part) for part in parts if part != "kernels"]
    if "kernels" in parts:
        tasks += [("--part", "kernels", "--only", f"{c.name}/{name}") for c in SHAPES for name in MODULES]
    others = ["--seed", str(seed), *([] if model is None else ["--model", str(model)])]
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{i}.json" for i in range(len(tasks))]
        running = [
            subprocess.Popen([sys.executable, "-m", "tools.device_check", *task, *others, "--out", str(out)])
            for task, out in zip(tasks, outs, strict=True)
        ]
        for process in running:
            process.wait()
        return joined(parts, [json.loads(out.read_text("utf-8")) for out in outs])


def joined(parts: Sequence[str], documents: Sequence[Document]) -> Document:
    """One document of several, which ran on the same sources with the same seed."""
    first, *others = documents
    for other in others:
        assert all(first[key] == other[key] for key in ("seed", "sources", "machine")), "not of one run"
    return {
        **first,
        "parts": list(parts),
        "passed": all(one["passed"] for one in documents),
        "kernels": [row for one in documents for row in one["kernels"]],
        "whole_model": {name: rows for one in documents for name, rows in one["whole_model"].items()},
        "batch_invariance": {
            name: rows for one in documents for name, rows in one["batch_invariance"].items()
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    # several processes share the GPU
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from jaxmoe.kernels import ptx

    arguments = _arguments(argv)
    if reason := ptx.unavailable():
        print(f"nothing was checked: {reason}", file=sys.stderr)
        return 1
    seed = secrets.randbits(31) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    if arguments.only or arguments.part in (("model",), ("batch",)):
        found = run(arguments.part, arguments.model, seed, arguments.only)
    else:
        found = run_apart(arguments.part, arguments.model, seed)
    out: Path | None = arguments.out
    if out is None and set(arguments.part) == set(PARTS):
        out = EVIDENCE / gpu_folder(str(found["gpu"])) / "kernels.json"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print("all agreed" if found["passed"] else "something did not agree")
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
