"""tools.discharge against a small app without jaxmoe: green as it is, red as each mutant."""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_openai
import pytest

from tools import discharge as tool
from tools.contracts import NAMES, Contract, Gate, load_contract, schema_problems
from tools.discharge import Server, discharge, exit_status, turn_red
from tools.environment import host_name, read_environment
from tools.evidence import scrub, shown_path
from tools.launch import LaunchError, launch
from tools.synth_vocab import make_vocabulary
from tools.target import Health
from tools.trial import NotRun, Scale, Trial, run_gate
from tools.vocabulary import Vocabulary

TESTS = Path(__file__).parent
SMALL = Scale(repeats=5, texts=1, disconnects=10)
VOCABULARY = Vocabulary(fake_openai.PIECES, fake_openai.END)
LEADING_SLASH = re.compile(r"(?<![\w:/.<])/(?!v1/|health)\w")


@pytest.fixture(scope="module")
def fake_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    environment = {"DISCHARGE_APP": "fake_openai:app", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    log = tmp_path_factory.mktemp("fake") / "server.log"
    with launch(
        "tools.mutant_app:app", Path("none.gguf"), log=log, seconds=60, environment=environment
    ) as url:
        yield url


@pytest.fixture
def fake(fake_url: str) -> Server:
    return Server(fake_url, "fake", None, "tiny", VOCABULARY)


def contracts() -> list[Contract]:
    """The contracts with shorter streams where the length is not the point."""
    found = [load_contract(name) for name in NAMES]
    return [replace(contract, gates=tuple(map(shorter, contract.gates))) for contract in found]


def shorter(gate: Gate) -> Gate:
    shorter_by_gate: dict[str, dict[str, Any]] = {
        "V1_001": {"max_tokens": [8, 32, 96]},
        "V1_002": {"max_tokens": 24},
        "SERVING_001": {"max_tokens": 120},
        "SERVING_010": {"max_tokens": 24},
        "SERVING_011": {"max_tokens": 8, "prompt_tokens": [5, 64, 513]},
    }
    return replace(gate, thresholds={**gate.thresholds, **shorter_by_gate.get(gate.id, {})})


class Watched(dict[str, Any]):
    """Thresholds that note which of them a gate reads, those of a nested table as `table.name`."""

    def __init__(self, thresholds: Mapping[str, Any], read: set[str], prefix: str = "") -> None:
        super().__init__(thresholds)
        self._read, self._prefix = read, prefix

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        self._read.add(self._prefix + name)
        return Watched(value, self._read, f"{name}.") if isinstance(value, dict) else value


def names_of(thresholds: Mapping[str, Any]) -> set[str]:
    nested = {name: value if isinstance(value, dict) else {} for name, value in thresholds.items()}
    return set(thresholds) | {f"{name}.{key}" for name, table in nested.items() for key in table}


def read_folder(folder: Path, name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return document


@pytest.mark.e2e
def test_every_gate_is_green_on_a_right_server(
    fake: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And reads each of its thresholds and makes each of its checks."""
    read, made = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    expect = Trial.expect

    def noted(trial: Trial, holds: bool, check: str, evidence: str) -> None:
        made[trial.gate.id].add(check)
        expect(trial, holds, check, evidence)

    def watched(contract: Contract) -> Contract:
        gates = (replace(one, thresholds=Watched(one.thresholds, read[one.id])) for one in contract.gates)
        return replace(contract, gates=tuple(gates))

    monkeypatch.setattr(Trial, "expect", noted)
    asked = [watched(contract) for contract in contracts()]
    status = asyncio.run(discharge(fake, asked, command="x", out=tmp_path, scale=SMALL))
    assert status == 0
    assert {gate.id: set(gate.checks) for one in asked for gate in one.gates} == made
    unread = {gate.id: names_of(gate.thresholds) - read[gate.id] for one in asked for gate in one.gates}
    others = {name: gate_named("V1_003").thresholds[name] for name in ("h200_30b", "other")}
    elsewhere = {"V1_001": {"held_chunk_share"}, "V1_003": names_of(others)}  # tested below
    assert {gate_id: names for gate_id, names in unread.items() if names} == elsewhere
    for contract in contracts():
        findings = read_folder(tmp_path / contract.name, "findings.json")
        assert schema_problems(findings, "findings.schema.json") == []
        gates = len(contract.gates)
        assert findings["results"]["tests_passed"] == findings["results"]["tests_total"] == gates
        assert list(findings["falsifiers"]) == [gate.id for gate in contract.gates]
        log = (tmp_path / contract.name / "discharge.log").read_text(encoding="utf-8")
        for text in (log, json.dumps(findings)):
            assert str(tmp_path) not in text
            assert not LEADING_SLASH.findall(text)
        for gate in contract.gates:
            assert re.search(rf"^{gate.id} +passed ", log, re.MULTILINE)
    expect_raw_samples(read_folder(tmp_path / NAMES[0], "findings.json")["falsifiers"]["V1_001"])


def expect_raw_samples(first: dict[str, Any]) -> None:
    streams = 2 * 3 * SMALL.repeats  # prompts, lengths
    assert [len(first[name]) for name in ("prompt_tokens", "ttft_ms", "gaps_ms")] == [streams] * 3
    assert max(first["prompt_tokens"]) > 512 > min(first["prompt_tokens"]) > 0
    assert all(ttft > 0 for ttft in first["ttft_ms"])
    assert max(map(len, first["gaps_ms"])) > 64
    assert first["thresholds"]["first_token_ratio"] == 1.5
    assert first["concurrency"] == 1


@pytest.mark.e2e
@pytest.mark.slow
def test_every_gate_turns_red_on_each_of_its_mutants(fake: Server, tmp_path: Path) -> None:
    status = asyncio.run(turn_red(fake, contracts(), command="x --red", out=tmp_path, scale=SMALL))
    for contract in contracts():
        red = read_folder(tmp_path / contract.name, "red.json")
        assert [one for one in red["mutants"] if not one["as_expected"]] == []
        assert red["results"]["gates_green_unchanged"] == len(contract.gates)
        assert {one["gate"] for one in red["mutants"]} == {gate.id for gate in contract.gates}
        assert not LEADING_SLASH.findall((tmp_path / contract.name / "red.log").read_text(encoding="utf-8"))
    assert status == 0


@pytest.mark.e2e
def test_a_mutant_that_changes_nothing_fails_the_red_run(
    fake: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = next(gate for gate in contracts()[0].gates if gate.id == "V1_002")
    harmless = replace(gate, red=(replace(gate.red[0], mutant="seed_always_1"),))
    contract = Contract("one", "1.0.0", (harmless,))
    assert asyncio.run(turn_red(fake, [contract], command="x", out=tmp_path, scale=SMALL)) == 1
    assert "NOT RED" in capsys.readouterr().out


@pytest.mark.e2e
def test_a_failed_gate_is_exit_1_and_stands_in_the_findings(fake: Server, tmp_path: Path) -> None:
    gate = next(gate for gate in contracts()[0].gates if gate.id == "V1_003")
    impossible = replace(gate, thresholds={**gate.thresholds, "tiny": {"over_engine_ms": -1000}})
    contract = Contract("one", "1.0.0", (impossible,))
    assert asyncio.run(discharge(fake, [contract], command="x", out=tmp_path, scale=SMALL)) == 1
    falsifier = read_folder(tmp_path / "one", "findings.json")["falsifiers"]["V1_003"]
    assert (falsifier["verdict"], falsifier["failed_check"]) == ("failed", "median_gap")
    assert "the limit is -99" in falsifier["evidence"]
    assert falsifier["gaps_ms"]


@pytest.mark.e2e
def test_a_plain_openai_server_leaves_gates_not_run_and_says_why(tmp_path: Path) -> None:
    environment = {"FAKE_PLAIN": "1", "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    log = tmp_path / "server.log"
    with launch("fake_openai:app", Path("none"), log=log, seconds=60, environment=environment) as url:
        status = asyncio.run(discharge(Server(url), contracts(), command="x", out=tmp_path, scale=SMALL))
    assert status == 3
    found: dict[str, Any] = {}
    for name in NAMES:
        found |= read_folder(tmp_path / name, "findings.json")["falsifiers"]
    passed = {gate for gate, falsifier in found.items() if falsifier["verdict"] == "passed"}
    assert passed == {"V1_003", "SERVING_001", "SERVING_008", "SERVING_009", "SERVING_010"}
    assert {found[gate]["verdict"] for gate in set(found) - passed} == {"not_run"}
    assert "the server lacks return_token_ids (0 ids came for" in found["V1_001"]["evidence"]
    assert "health (/health has no 'running')" in found["SERVING_003"]["evidence"]
    assert "token_id_prompts (the server answered 400" in found["SERVING_011"]["evidence"]


@pytest.mark.e2e
def test_without_the_vocabulary_a_server_may_hold_some_ids_but_not_merge_all(
    fake: Server, tmp_path: Path
) -> None:
    gate = next(gate for gate in contracts()[0].gates if gate.id == "V1_001")
    merged = tuple(red for red in gate.red if red.mutant == "merged_tokens")
    read: set[str] = set()
    thresholds = Watched(gate.thresholds, read)
    contract = Contract("one", "1.0.0", (replace(gate, red=merged, thresholds=thresholds),))
    unknown = replace(fake, vocabulary=None)
    assert asyncio.run(turn_red(unknown, [contract], command="x", out=tmp_path, scale=SMALL)) == 0
    assert "held_chunk_share" in read


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("speed", "impossible"),
    [
        ("other", {"median_ms": 0}),
        ("h200_30b", {"median_ms": 0, "p95_over_median": 1000}),
        ("h200_30b", {"median_ms": 1000, "p95_over_median": 0}),
    ],
)
def test_the_other_speeds_have_thresholds_of_their_own(
    fake: Server, tmp_path: Path, speed: str, impossible: dict[str, float]
) -> None:
    gate = gate_named("V1_003")
    assert set(gate.thresholds[speed]) == set(impossible)
    contract = Contract("one", "1.0.0", (replace(gate, thresholds={**gate.thresholds, speed: impossible}),))
    server = replace(fake, speed=speed)
    assert asyncio.run(discharge(server, [contract], command="x", out=tmp_path, scale=SMALL)) == 1


def test_a_server_that_does_not_come_up_is_a_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(LaunchError, match=r"the server ended with .*no_such_app"),
        launch("no_such_app:app", Path("none"), log=tmp_path / "log", seconds=30),
    ):
        pass


def test_the_model_is_found_from_the_folder_the_tool_was_called_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tell.py").write_text("import os\nraise SystemExit('model ' + os.environ['JAXMOE_MODEL'])")
    monkeypatch.chdir(tmp_path)
    environment = {"PYTHONPATH": str(tmp_path)}
    with (
        pytest.raises(LaunchError, match=re.escape(f"model {tmp_path / 'sub' / 'a.gguf'}")),
        launch("tell:app", Path("sub/a.gguf"), log=tmp_path / "log", seconds=30, environment=environment),
    ):
        pass


def test_a_model_is_served_with_the_chunks_the_gates_count(
    monkeypatch: pytest.MonkeyPatch, tiny_gguf: Path
) -> None:
    settings: dict[str, str] = {}

    @contextmanager
    def launched(app: str, model: Path, *, log: Path, environment: Mapping[str, str]) -> Iterator[str]:
        settings.update(environment)
        yield "http://there"

    monkeypatch.setattr(tool, "launch", launched)
    with tool.serve(tiny_gguf, "server:app"):
        assert settings == {"JAXMOE_PREFILL_CHUNK": "512"}


def test_a_server_that_is_not_there_is_a_sentence(
    unused_tcp_port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--url", f"http://127.0.0.1:{unused_tcp_port}", "--out", str(tmp_path)]) == 1
    assert tool.main(["--url", "ftp://here", "--out", str(tmp_path)]) == 1
    assert re.findall(r"nothing was measured: (\S+)", capsys.readouterr().err) == ["[Errno", "--url"]


@pytest.mark.e2e
def test_a_file_that_cannot_be_served_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "empty.gguf"
    path.write_bytes(b"")
    assert tool.main(["--model", str(path), "--out", str(tmp_path)]) == 1
    assert re.search(r"nothing was measured: the server failed: .*empty\.gguf", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [
        (["passed", "passed"], 0),
        (["passed", "failed", "not_run"], 1),
        (["not_run", "passed"], 3),
    ],
)
def test_the_exit_status(verdicts: list[Any], status: int) -> None:
    assert exit_status(verdicts) == status


def gate_named(gate_id: str) -> Gate:
    return next(gate for contract in contracts() for gate in contract.gates if gate.id == gate_id)


async def test_a_gate_whose_server_is_gone_has_failed_by_no_check_of_its_own(unused_tcp_port: int) -> None:
    target = tool.Target(tool.Client("127.0.0.1", unused_tcp_port))
    outcome = await run_gate(target, gate_named("SERVING_009"), SMALL, tool.GATES["SERVING_009"])
    assert (outcome.verdict, outcome.check) == ("failed", "error")
    assert "Connect" in outcome.evidence


async def test_a_gate_that_cannot_be_tried_is_not_run() -> None:
    async def check(trial: Trial) -> str:
        raise NotRun("no weather today")

    target = tool.Target(tool.Client("127.0.0.1", 1))
    outcome = await run_gate(target, gate_named("SERVING_009"), SMALL, check)
    assert (outcome.verdict, outcome.evidence) == ("not_run", "no weather today")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot open /home/somebody/models/tiny.gguf", "cannot open tiny.gguf"),
        ("'/tmp/x/server.log' (/etc)", "'server.log' (etc)"),
        ("POST /v1/chat/completions and /health", "POST /v1/chat/completions and /health"),
        ("http://127.0.0.1:80/v1/models, tools/client.py", "http://127.0.0.1:80/v1/models, tools/client.py"),
        ("12 ms / token, 1/2", "12 ms / token, 1/2"),
    ],
)
def test_no_absolute_path_is_left(text: str, expected: str) -> None:
    assert scrub(text) == expected


def test_paths_are_shown_from_the_repository_or_by_name(tmp_path: Path) -> None:
    assert shown_path(TESTS / "x.gguf") == "tests/x.gguf"
    assert shown_path(tmp_path / "x.gguf") == "x.gguf"


def test_the_environment_names_machine_and_commit() -> None:
    env = read_environment()
    assert list(env) == ["cpu", "gpu", "driver", "jax", "commit", "dirty"]
    assert isinstance(env["cpu"], str)
    assert env["jax"]
    assert host_name({**env, "gpu": "NVIDIA H200"}) == f"{env['cpu']} + NVIDIA H200"


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = tool._arguments(["--model", str(tmp_path / "a.gguf"), "--contract", NAMES[1], "--red"])
    command = tool._command(arguments)
    assert command == f"python -m tools.discharge --model a.gguf --contract {NAMES[1]} --red"
    assert "secret" not in tool._command(tool._arguments(["--url", "http://me:secret@host:1"]))
    for wrong in (["--red", "--url", "http://host"], ["--model", "a", "--url", "b"], ["--contract", "c"]):
        with pytest.raises(SystemExit) as caught:
            tool.main(wrong)
        assert caught.value.code == 2
    assert "does not go with --url" in capsys.readouterr().err


def test_only_a_big_file_on_an_h200_gets_its_thresholds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    for size, gpu, expected in (
        (1000, "NVIDIA H200", "tiny"),
        (2_000_000_000, "NVIDIA H200", "other"),
        (20_000_000_000, "NVIDIA H200", "h200_30b"),
        (20_000_000_000, None, "other"),
    ):
        with path.open("wb") as file:
            file.truncate(size)
        monkeypatch.setattr(tool, "read_environment", lambda gpu=gpu: {"gpu": gpu})
        assert tool._speed(path) == expected


def test_health_is_idle_only_when_all_is_free() -> None:
    assert Health(0, 0, 8, 8).idle
    for busy in (Health(1, 0, 8, 8), Health(0, 1, 8, 8), Health(0, 0, 7, 8)):
        assert not busy.idle


def test_the_vocabulary_of_a_file_spells_its_tokens(tiny_gguf: Path) -> None:
    from jaxmoe.gguf import read_gguf
    from jaxmoe.tokenizer import Tokenizer

    vocabulary = Vocabulary.from_gguf(tiny_gguf)
    tokenizer = Tokenizer.from_gguf(read_gguf(tiny_gguf))
    text = "the rain came 中 😀 é\n\n  x"
    assert vocabulary.decode(tokenizer.encode(text, parse_special=False)) == text
    assert vocabulary.end_token_id in tokenizer.eos_ids
    assert vocabulary.pieces[vocabulary.end_token_id or 0] == b""
    assert vocabulary.decode(vocabulary.byte_ids("中")) == "中"


def test_every_id_is_silent_or_spelt_as_the_server_has_it(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    from jaxmoe.gguf import read_gguf
    from jaxmoe.tokenizer import TextStream, Tokenizer

    made = make_vocabulary(512)
    extra = {"[PAD512]": 5, "<unk>": 2, "é": 4, "<end of turn>": 4, "plain": 1, "日": 1}
    tokens, types = [*made.tokens, *extra], [*made.token_types, *extra.values()]
    writer = GGUFWriter(tmp_path / "vocabulary.gguf", "qwen3moe")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(list(made.merges))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_eot_token_id(tokens.index("<end of turn>"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    vocabulary = Vocabulary.from_gguf(tmp_path / "vocabulary.gguf")
    tokenizer = Tokenizer.from_gguf(read_gguf(tmp_path / "vocabulary.gguf"))
    for token_id, token in enumerate(tokens):
        stream = TextStream(tokenizer)
        assert vocabulary.decode([token_id]) == stream.push(token_id) + stream.finish(), token
    silent = {token for token, piece in zip(tokens, vocabulary.pieces, strict=True) if not piece}
    assert {"[PAD512]", "<unk>", "<end of turn>", "<|im_end|>"} <= silent
    letter = vocabulary.byte_ids("a")
    assert vocabulary.held_rightly([[tokens.index("[PAD512]"), *letter], letter])


def test_several_ids_in_a_chunk_are_right_only_for_an_unfinished_character() -> None:
    ids = VOCABULARY.byte_ids("中")
    letter = VOCABULARY.byte_ids("a")
    assert VOCABULARY.held_rightly([letter, ids, letter])
    assert VOCABULARY.held_rightly([[*ids[:1], *letter], [*ids[:2]], letter])
    assert not VOCABULARY.held_rightly([letter * 2])
    assert not VOCABULARY.held_rightly([ids + letter])
    assert not VOCABULARY.held_rightly([letter + ids])
    assert VOCABULARY.ids_where(lambda text: text == "中", 4) == [fake_openai.PIECES.index("中".encode())]
