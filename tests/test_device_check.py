"""The device check without a device: its hash, its verdicts, and the evidence that must be fresh."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import demo_model
from jaxmoe.cache import KVCache
from jaxmoe.config import ModelConfig
from jaxmoe.gguf import read_gguf
from jaxmoe.kernels.comparison import Comparison
from jaxmoe.model import Decoder
from jaxmoe.tokenizer import Tokenizer
from jaxmoe.weights import load_model
from tools import agreement, demo_corpus, device_check
from tools.agreement import Company, Forward, Paths, batch_invariance, whole_model
from tools.demo_corpus import Conversation, Split, make_conversation
from tools.device_check import Finding, bare, check, complaints, sources_hash
from tools.player import open_model, random_ids

SOURCE = """#include "common.cuh"
// adds
DEVICE int add(int a, int b) { return a + b; }  /* of two */
#define WIDTH(x) ((x) + 1)
asm("mov.u32 %0, 1;  // kept" : "=r"(size));
"""
X = jnp.linspace(-1.0, 1.0, 512, dtype=jnp.float32)


# --- The hash.


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("// adds", "// adds two numbers"),
        ("/* of two */", ""),
        ("{ return", "{\n\n    return"),
        ("int a, int b", "int  a,int b"),
        ("a + b", "a+b"),
        ("\n#define WIDTH(x) ((x) + 1)", "\n  #define WIDTH(x)  \\\n   ((x) + 1) // one more"),
    ],
)
def test_comments_and_white_space_do_not_count(old: str, new: str) -> None:
    assert old in SOURCE
    assert bare(SOURCE.replace(old, new)) == bare(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a + b", "a - b"),
        ("a + b", "a + + b"),
        ("int add", "intadd"),
        ("WIDTH(x)", "WIDTH (x)"),
        ("((x) + 1)", "((x) + 2)"),
        ("%0, 1;  //", "%0, 1; //"),
        ("// kept", "// lost"),
        ("common.cuh", "other.cuh"),
    ],
)
def test_code_counts(old: str, new: str) -> None:
    assert old in SOURCE
    assert bare(SOURCE.replace(old, new)) != bare(SOURCE)


def test_operators_are_not_joined_from_pieces() -> None:
    assert bare("a ++b") != bare("a + +b")
    assert bare("a = -b") != bare("a =- b").replace("\n", " ")


def test_every_source_file_and_its_name_count(tmp_path: Path) -> None:
    names = ["a.cu", "b.cuh"]
    for name in names:
        (tmp_path / name).write_text(SOURCE)
    before = sources_hash(tmp_path)
    (tmp_path / "c.py").write_text("x = 1\n")
    (tmp_path / "a.cu").write_text(SOURCE.replace("// adds", ""))
    assert sources_hash(tmp_path) == before
    found = {before}
    for name in names:
        (tmp_path / name).write_text(SOURCE.replace("a + b", "a - b"))
        found.add(sources_hash(tmp_path))
        (tmp_path / name).write_text(SOURCE)
    (tmp_path / "a.cu").rename(tmp_path / "d.cu")
    assert len({*found, sources_hash(tmp_path)}) == 4


# --- The evidence.


def test_the_newest_evidence_is_of_these_kernels() -> None:
    """Fails when a kernel has changed: `python -m tools.device_check` on a GPU writes new evidence.

    Where none could be had, kernels-waiting.json names the sources that wait: those, and no others.
    """
    if device_check.waits(sources_hash()) is not None:
        return
    try:
        evidence = device_check.newest_evidence()
    except FileNotFoundError as error:
        pytest.fail(str(error))
    assert complaints(evidence, sources_hash()) == []


def test_only_the_named_sources_wait(tmp_path: Path) -> None:
    assert device_check.waits("a", tmp_path) is None
    (tmp_path / "kernels-waiting.json").write_text(json.dumps({"sources": "a", "why": "no device"}))
    assert device_check.waits("a", tmp_path) == "no device"
    assert device_check.waits("b", tmp_path) is None


def _evidence(**changes: Any) -> dict[str, Any]:
    rows = [Finding(config.name, "qkv", False, 1e-4) for config in device_check.SHAPES]
    made = device_check.document(
        1, device_check.PARTS, rows, {"mini": [{"passed": True}]}, {"mini": [{"passed": True}]}
    )
    return {**made, **changes}


def test_good_evidence_has_no_complaint() -> None:
    assert complaints(_evidence(), sources_hash()) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sources": "0"}, "kernels changed"),
        ({"parts": ["kernels"]}, "only the parts"),
        ({"kernels": []}, "lacks the shapes"),
        ({"kernels": [{"shape": "30b", "name": "qkv", "passed": False}]}, "failed: 30b qkv"),
        ({"batch_invariance": {}}, "no stream that is the same"),
        ({"batch_invariance": {"mini": [{"passed": False}]}}, "no stream that is the same"),
    ],
)
def test_evidence_that_says_too_little(changes: dict[str, Any], says: str) -> None:
    assert says in " ".join(complaints(_evidence(**changes), sources_hash()))


@pytest.mark.parametrize("part", ["models", "batches"])
def test_a_failed_model_fails_the_document(part: str) -> None:
    found: dict[str, Any] = {"models": {"a": [{"passed": True}]}, "batches": {"a": [{"passed": True}]}}
    assert device_check.document(1, device_check.PARTS, [], **found)["passed"]
    found[part] = {"a": [{"passed": True}, {"passed": False}]}
    assert not device_check.document(1, device_check.PARTS, [], **found)["passed"]


def test_the_newest_of_several_machines(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tools\.device_check"):
        device_check.newest_evidence(tmp_path)
    for folder, date in (("b", "2026-01-02T00:00:00+00:00"), ("a", "2026-11-02T00:00:00+00:00")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "kernels.json").write_text(json.dumps({"date": date}))
    assert device_check.newest_evidence(tmp_path)["date"].startswith("2026-11")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 5090", "geforce-rtx-5090"),
    ],
)
def test_a_folder_for_each_gpu(name: str, folder: str) -> None:
    assert device_check.gpu_folder(name) == folder


# --- Verdicts on made-up kernels.


def _twin(x: Any) -> Any:
    return {"a": x * 2, "b": (x > 0).astype(jnp.int32)}


def _checked(kernel: Callable[..., Any], *, exact: bool = False, **twins: Any) -> Finding:
    twins = {"twin": _twin, "float_twin": _twin, **twins}
    comparison = Comparison("made up", kernel, arrays=(X,), exact=exact, **twins)
    return check(comparison, "odd", device_check.poison_results)


def _off_by(share: float) -> Callable[[Any], Any]:
    return lambda x: {**_twin(x), "a": x * 2 * (1 + share)}


@pytest.mark.parametrize("exact", [False, True])
def test_the_twin_itself_passes(exact: bool) -> None:
    found = _checked(_twin, exact=exact)
    assert found.passed
    assert found.twin_error == (None if exact else 0)


@pytest.mark.parametrize(("share", "passes"), [(0.9e-3, True), (1.1e-3, False)])
def test_the_bound_of_the_twin(share: float, passes: bool) -> None:
    found = _checked(_off_by(share))
    assert found.passed is passes
    assert found.twin_error == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize(("share", "passes"), [(0.014, True), (0.016, False)])
def test_the_bound_of_the_float_twin(share: float, passes: bool) -> None:
    found = _checked(_twin, float_twin=_off_by(share))
    assert found.passed is passes
    assert ("float twin" in (found.failed or "")) is not passes


def test_the_worst_result_counts() -> None:
    assert not _checked(lambda x: {**_twin(x), "b": jnp.ones(512, jnp.int32)}).passed


def test_exact_means_every_bit() -> None:
    found = _checked(lambda x: {**_twin(x), "a": (x * 2).at[7].add(1e-6)}, exact=True)
    assert "differs in 1 of 512 places, first (7,)" in (found.failed or "")
    assert "float16(512,)" in (
        _checked(lambda x: {**_twin(x), "a": x.astype(jnp.float16)}, exact=True).failed or ""
    )


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (lambda x: {**_twin(x), "a": (x * 2).at[0].set(jnp.nan)}, "nan"),
        (lambda x: {**_twin(x), "a": x[:3]}, "inf"),
        (lambda x: {"a": x * 2}, "1 results, the twin has 2"),
        (lambda x: x.no_such_thing, "no_such_thing"),
    ],
)
def test_what_is_broken_fails(kernel: Callable[..., Any], says: str) -> None:
    assert says in (_checked(kernel).failed or "")


def test_a_kernel_that_gives_other_bits_each_time_fails() -> None:
    times = iter(range(100))
    found = _checked(lambda x: {**_twin(x), "a": x * 2 + 1e-7 * next(times)})
    assert "another run" in (found.failed or "")


def test_a_module_that_breaks_off_fails_and_the_others_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(name: str, config: ModelConfig, seed: int) -> Iterator[Comparison]:
        yield Comparison(name, _twin, _twin, None, (X,))
        if name == "rows":
            raise ValueError("no such shape")

    monkeypatch.setattr(device_check, "comparisons_of", breaks)
    monkeypatch.setattr(device_check, "SHAPES", device_check.SHAPES[:1])
    found = device_check.check_kernels(1)
    assert [one.name for one in found if one.passed] == list(device_check.MODULES)
    assert [(one.name, one.failed) for one in found if not one.passed] == [
        ("rows", "its comparisons: ValueError: no such shape")
    ]


def test_the_sampler_is_compared_with_the_one_of_the_plain_path() -> None:
    first, second = device_check.comparisons_of("sampling", device_check.SHAPES[2], 1)
    ids, logprobs = (one.twin(*one.arrays) for one in (first, second))
    logits, *_, active = first.arrays
    greedy = list(active).index(0)  # the slot whose row is greedy
    assert ids[4][greedy] == logits[greedy].argmax()
    assert logprobs[0].shape == ids[4].shape


def test_zero_is_zero() -> None:
    zeros = np.zeros(4, np.float32)
    assert device_check.relative_error(zeros, zeros) == 0
    assert device_check.relative_error(zeros + 1, zeros) == float("inf")


def test_poison_is_made_before_every_run() -> None:
    order: list[str] = []

    def kernel(x: Any) -> Any:
        order.append("run")
        return _twin(x)

    comparison = Comparison("made up", kernel, _twin, None, (X,))
    check(comparison, "odd", lambda _: order.append("poison"))
    assert order == ["poison", "run"] * device_check.RUNS


def test_every_launch_outside_of_a_trace_finds_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxmoe.kernels import ptx

    order: list[Any] = []
    monkeypatch.setattr(ptx, "launch", lambda *args, **how: order.append("run") or args[4])
    monkeypatch.setattr(
        device_check, "poison", lambda shapes: order.append([shape.shape for shape in shapes])
    )
    outputs = [jax.ShapeDtypeStruct((3, 4), jnp.int8)]
    with device_check.poisoned_launches():
        ptx.launch("a.cu", "a", {}, [X], outputs, grid=(1, 1, 1), threads=32)
        assert order == [[(3, 4)], "run"]
        jax.eval_shape(
            lambda x: ptx.launch("a.cu", "a", {}, [x], outputs, grid=(1, 1, 1), threads=32) and x, X
        )
        assert order == [[(3, 4)], "run", "run"]
    ptx.launch("a.cu", "a", {}, [X], outputs, grid=(1, 1, 1), threads=32)
    assert order[-2:] == ["run", "run"]


def test_poison_is_freed() -> None:
    before = len(jax.live_arrays())
    device_check.poison([jax.ShapeDtypeStruct((3, 4), jnp.int8), jax.ShapeDtypeStruct((0,), jnp.int8)])
    assert len(jax.live_arrays()) == before


def test_a_failed_part_is_a_failed_row(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> list[agreement.Agreement]:
        raise ValueError("no room")

    assert device_check._guarded("mini", fails) == [{"passed": False, "failed": "ValueError: no room"}]
    assert "FAILED" in capsys.readouterr().out


# --- Whole models.


def _paths(kernel: np.ndarray, rounded: np.ndarray, plain: np.ndarray) -> Paths:
    return Paths(lambda _: kernel, lambda _: rounded, lambda _: rounded, lambda _: plain, lambda _: plain)


def _logits(seed: int, length: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (length, 50)).astype(np.float32)


def test_paths_that_agree() -> None:
    plain = _logits(0)
    found = whole_model(_paths(plain + 1e-4, plain, plain), [range(400), range(400)])
    assert found.passed
    assert (found.positions, found.same_as_twin, found.plain.clear_missed) == (800, 1.0, 0)
    assert found.plain.clear == 2 * int((agreement.margin(plain) > 0.5).sum())


def test_another_greedy_id_than_the_twin_in_one_of_a_hundred() -> None:
    plain = _logits(0)
    rounded = plain.copy()
    rounded[::100, 3] = 99
    found = whole_model(_paths(plain, rounded, plain), [range(400)])
    assert (found.same_as_twin, found.same_in_step, found.passed) == (0.99, 0.99, False)
    found = whole_model(
        dataclasses.replace(_paths(plain, plain, plain), in_step=lambda _: rounded), [range(400)]
    )
    assert (found.same_as_twin, found.same_in_step, found.passed) == (1.0, 0.99, False)


def test_a_sure_id_that_was_missed() -> None:
    plain = _logits(0)
    kernel = plain.copy()
    sure = int(np.argmax(agreement.margin(plain)))
    kernel[sure, (int(plain[sure].argmax()) + 1) % 50] = plain[sure].max() + 0.01
    found = whole_model(_paths(kernel, kernel, plain), [range(400)])
    assert (found.plain.clear_missed, found.passed) == (1, False)


def test_too_far_from_the_float_path() -> None:
    plain = _logits(0)
    kernel = plain * 1.1
    found = whole_model(_paths(kernel, kernel, plain), [range(400)])
    assert found.plain.clear_missed == 0
    assert found.plain.mean_kl > agreement.MEAN_KL
    assert not found.passed


def test_the_float_path_on_its_own_decides() -> None:
    plain, far = _logits(0), _logits(1)
    paths = _paths(plain, plain, plain)
    found = whole_model(dataclasses.replace(paths, plain_routed=lambda _: far), [range(400)])
    assert found.passed
    assert found.plain.mean_kl == 0
    assert found.plain_routed.mean_kl > agreement.MEAN_KL
    found = whole_model(dataclasses.replace(paths, plain=lambda _: far), [range(400)])
    assert not found.passed
    assert found.plain_routed == agreement.Distance(0, int((agreement.margin(plain) > 0.5).sum()), 0)


def test_nan_passes_nothing() -> None:
    plain = _logits(0)
    assert not whole_model(_paths(plain, plain, plain * np.nan), [range(400)]).passed


def test_the_demo_model_is_asked_held_out_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[tuple[int, ...]]] = {}
    splits: set[str] = set()

    def made(number: int, split: Split) -> Conversation:
        splits.add(split)
        return make_conversation(number, split)

    def note(path: Path, prompts: Callable[[int], list[tuple[int, ...]]]) -> list[agreement.Agreement]:
        asked[path.name] = prompts(2048)
        return []

    monkeypatch.setattr(device_check, "_agreement", note)
    monkeypatch.setattr(demo_corpus, "make_conversation", made)
    device_check.check_models({"a file": Path("random.gguf")}, seed=7)
    assert [len(prompt) for prompt in asked["random.gguf"]] == [500] * 4
    assert [len(prompt) for prompt in asked["demo.gguf"]] == [500] * 4
    assert (
        asked["demo.gguf"] == device_check.held_out_prompts(7, 2048) != device_check.held_out_prompts(8, 2048)
    )
    text = Tokenizer.from_gguf(read_gguf(demo_model())).decode(asked["demo.gguf"][0])
    assert "<|im_start|>user" in text
    assert splits == {"held_out"}


def test_divergence_by_hand() -> None:
    half, skew = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    assert agreement.divergence(half + 7, skew - 3) == pytest.approx([0.5 * np.log(2) + 0.5 * np.log(2 / 3)])


@pytest.fixture(scope="module")
def tiny(tiny_q4: Path) -> tuple[Decoder, ModelConfig]:
    return open_model(tiny_q4, 1024)


IDS = random_ids(90, 512, (1,))


@pytest.fixture(scope="module")
def plain_logits(tiny: tuple[Decoder, ModelConfig]) -> np.ndarray:
    return Forward(*tiny, agreement.plain_call, length=300, chunk=64, dtype="float32")(IDS)


def test_logits_do_not_depend_on_the_chunk(
    tiny: tuple[Decoder, ModelConfig], plain_logits: np.ndarray
) -> None:
    whole = Forward(*tiny, agreement.plain_call, length=300, chunk=128, dtype="float32")(IDS)
    assert whole.shape == (90, 512)
    assert np.array_equal(whole, plain_logits)


def test_the_rounded_path_is_near_the_float_path(
    tiny: tuple[Decoder, ModelConfig], plain_logits: np.ndarray
) -> None:
    rounded = Forward(*tiny, agreement.rounded_call, length=300, chunk=64, dtype="bfloat16")(IDS)
    assert 1e-3 < device_check.relative_error(rounded, plain_logits) < 0.1
    assert agreement.divergence(plain_logits, rounded).mean() < 0.02


def _run(call: agreement.Call, tiny: tuple[Decoder, ModelConfig], caches: Any) -> np.ndarray:
    """Logits after each of IDS, nothing compiled as a whole: kernels in the emulator would wait long."""
    model, _ = tiny
    where, tables = jnp.array([0, 0, len(IDS), 1], jnp.int32), jnp.arange(4, dtype=jnp.int32)[None]
    padded = jnp.zeros(128, jnp.int32).at[: len(IDS)].set(jnp.array(IDS))
    logits, _ = call(model, padded, caches, where, tables)
    return np.asarray(logits)[: len(IDS)]


def test_the_routed_path_is_the_float_path_with_the_kernels_experts(
    tiny_q4: Path, emulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = read_gguf(tiny_q4)
    config = ModelConfig.from_gguf(file)
    tiny = load_model(file, config, context_length=1024, layout="rows"), config
    caches = [KVCache.empty(config, 4, 64, dtype) for dtype in ("bfloat16", "float32", "float32")]
    plain = _run(agreement.plain_call, tiny, caches[2])
    routed = _run(agreement.routed_call, tiny, (caches[0], caches[1]))
    kernel = _run(agreement.kernel_call, tiny, caches[0])
    same = np.array([np.abs(a - b).max() < 1e-4 for a, b in zip(plain, routed, strict=True)])
    assert same[0]  # alike until the first row with another expert
    assert not same[-1]
    assert agreement.divergence(routed, kernel).mean() < agreement.divergence(plain, kernel).mean() / 5


# --- Batch invariance.

SMALL = Company(new_tokens=6, long_prompt=140, short_prompt=20, batches=(1, 2, 4), chunks=(128, 64))
NAMES = ["batch 2", "batch 4", "prefill(n + m)", "prefill in chunks of 64"]


def test_the_plain_path_is_batch_invariant(tiny: tuple[Decoder, ModelConfig]) -> None:
    found = batch_invariance(*tiny, seed=3, company=SMALL)
    assert [row.name for row in found] == NAMES
    assert [row.streams for row in found] == [1, 2, 1, 1]
    assert all(row.passed for row in found)


def test_a_cache_that_depends_on_the_batch_is_seen(
    tiny: tuple[Decoder, ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    play = agreement._play

    def spoiled(steps: Any, prompts: Any, company: Company) -> agreement.Streams:
        found = play(steps, prompts, company)
        if len(prompts) == 2:
            found[0] = ([*found[0][0][:-1], -1], found[0][1])
        if steps.shapes.prefill_chunk == 64:
            found[0] = (found[0][0], "other bytes")
        return found

    monkeypatch.setattr(agreement, "_play", spoiled)
    found = {row.name: row for row in batch_invariance(*tiny, seed=3, company=SMALL)}
    assert found["batch 2"].other_ids == (0,)
    assert found["prefill in chunks of 64"].other_pages == (0,)
    assert [row.name for row in found.values() if row.passed] == ["prefill(n + m)"]


def test_nothing_compared_is_nothing_passed() -> None:
    assert not agreement.Invariance("batch 8", 0, (), ()).passed


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jaxmoe.kernels import ptx

    monkeypatch.setattr(ptx, "unavailable", lambda: "no GPU")
    assert device_check.main([]) == 1
    assert "nothing was checked: no GPU" in capsys.readouterr().err


def test_a_run_writes_its_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxmoe.kernels import ptx

    made = Comparison("qkv", _twin, _twin, None, (X,))
    monkeypatch.setattr(ptx, "unavailable", lambda: None)
    monkeypatch.setattr(device_check, "MODULES", ("made up",))
    monkeypatch.setattr(device_check, "comparisons_of", lambda *_: iter([made]))
    out = tmp_path / "deep" / "kernels.json"
    monkeypatch.setattr(device_check, "run_apart", device_check.run)
    assert device_check.main(["--part=kernels", f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert [row["shape"] for row in found["kernels"]] == ["30b", "mini", "odd"]
    assert found["sources"] == sources_hash()
    assert complaints(found, sources_hash()) == [
        "it holds only the parts ['kernels']",
        "it has no stream that is the same in all company",
    ]
    wrong = dataclasses.replace(made, kernel=_off_by(0.1))
    monkeypatch.setattr(device_check, "comparisons_of", lambda *_: iter([wrong]))
    assert device_check.main(["--part=kernels", f"--out={out}"]) == 1
    assert jax.default_backend() == "cpu" or out.exists()


def test_parts_that_ran_apart_are_joined() -> None:
    common = {"seed": 3, "sources": "s", "machine": "m", "date": "2026"}
    empty: dict[str, Any] = {"kernels": [], "whole_model": {}, "batch_invariance": {}}
    kernels = common | empty | {"kernels": [{"name": "qkv"}], "parts": ["kernels"], "passed": True}
    model = common | empty | {"whole_model": {"mini": []}, "parts": ["model"], "passed": False}
    whole = device_check.joined(["kernels", "model"], [kernels, model])
    assert whole["parts"] == ["kernels", "model"]
    assert whole["kernels"] == [{"name": "qkv"}]
    assert whole["whole_model"] == {"mini": []}
    assert whole["passed"] is False
    with pytest.raises(AssertionError, match="not of one run"):
        device_check.joined(["kernels", "model"], [kernels, model | {"seed": 4}])
