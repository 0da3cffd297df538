"""What a discharge leaves behind: findings.json, red.json and their logs, without any absolute path."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tools.contracts import Contract
from tools.environment import ROOT, Environment, host_name
from tools.trial import Outcome, Samples

Document = dict[str, Any]
ABSOLUTE_PATH = re.compile(
    r"(?<![\w:/.~-])/(?!(?:v1|health|x-mutant)\b)(?:[\w.+@~-]+/)*(?P<name>[\w.+@~-]+)", re.ASCII
)
LIST_OF_PLAIN = re.compile(r"\[\n\s+([^\[\]{}\"]*?)\n\s*\]")


@dataclass(frozen=True)
class Subject:
    """What was discharged: the model's name, its architecture where it is known, the command, the place."""

    model: str
    model_arch: str | None
    command: str
    env: Environment


@dataclass(frozen=True)
class RedOutcome:
    """One mutant met by one gate: the check that should have failed, and what happened."""

    gate: str
    mutant: str
    expected_check: str
    verdict: str
    failed_check: str | None
    evidence: str
    seconds: float

    @property
    def as_expected(self) -> bool:
        return (self.verdict, self.failed_check) == ("failed", self.expected_check)


def scrub(text: str) -> str:
    """The text with every absolute path cut to its last part; URLs and API paths stay."""
    return ABSOLUTE_PATH.sub(r"\g<name>", text)


def shown_path(path: Path) -> str:
    """A path relative to the repository, or just its name where it lies outside."""
    resolved = path.resolve()
    return str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else resolved.name


def write_findings(
    contract: Contract, outcomes: Sequence[Outcome], subject: Subject, folder: Path, log: Sequence[str]
) -> Document:
    """Write FOLDER/findings.json and FOLDER/discharge.log; returns the findings."""
    verdicts = [outcome.verdict for outcome in outcomes]
    findings = {
        **_heading(contract, subject, folder, "discharge.log"),
        "results": {
            "tests_total": len(outcomes),
            "tests_passed": verdicts.count("passed"),
            "tests_failed": verdicts.count("failed"),
            "tests_not_run": verdicts.count("not_run"),
            "wall_time_seconds": round(sum(outcome.seconds for outcome in outcomes), 3),
        },
        "falsifiers": {outcome.gate.id: _falsifier(outcome) for outcome in outcomes},
        "ancillary": _ancillary(outcomes),
    }
    _write(folder, "findings.json", findings, "discharge.log", log)
    return findings


def write_red(
    contract: Contract,
    green: Sequence[Outcome],
    red: Sequence[RedOutcome],
    subject: Subject,
    folder: Path,
    log: Sequence[str],
) -> Document:
    """Write FOLDER/red.json and FOLDER/red.log: each gate unchanged, and on each of its mutants."""
    turned = sum(outcome.as_expected for outcome in red)
    document = {
        **_heading(contract, subject, folder, "red.log"),
        "results": {
            "gates": len(green),
            "gates_green_unchanged": sum(outcome.verdict == "passed" for outcome in green),
            "mutants": len(red),
            "mutants_turned_red": turned,
        },
        "unchanged": {
            outcome.gate.id: {"verdict": outcome.verdict, "evidence": outcome.evidence} for outcome in green
        },
        "mutants": [{**asdict(outcome), "as_expected": outcome.as_expected} for outcome in red],
    }
    _write(folder, "red.json", document, "red.log", log)
    return document


def _heading(contract: Contract, subject: Subject, folder: Path, log: str) -> Document:
    return {
        "contract": contract.name,
        "contract_version": contract.version,
        "discharge_pr": None,
        "discharged_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "discharged_by": "python -m tools.discharge",
        "verification": {
            "host": host_name(subject.env),
            "binary_commit": subject.env["commit"],
            "model": subject.model,
            "model_arch": subject.model_arch,
            "test_command": subject.command,
            "run_dir": shown_path(folder),
            "log": shown_path(folder / log),
        },
        "env": subject.env,
    }


def _falsifier(outcome: Outcome) -> Document:
    return {
        "test": outcome.gate.test,
        "verdict": outcome.verdict,
        "evidence": outcome.evidence,
        "failed_check": outcome.check,
        "thresholds": dict(outcome.gate.thresholds),
        **asdict(outcome.samples),
        "wall_time_seconds": outcome.seconds,
    }


def _ancillary(outcomes: Sequence[Outcome]) -> Document:
    """Speed as the streams of V1_003 showed it, and what the server lacks."""
    samples = next((outcome.samples for outcome in outcomes if outcome.gate.id == "V1_003"), Samples())
    gaps = [gap for one in samples.gaps_ms for gap in one]
    not_run = {outcome.gate.id: outcome.evidence for outcome in outcomes if outcome.verdict == "not_run"}
    speed = {"median_gap_ms": median(gaps), "median_ttft_ms": median(samples.ttft_ms)} if gaps else {}
    return {**speed, "not_run": not_run}


def _write(folder: Path, name: str, document: Document, log_name: str, log: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_scrubbed(document), indent=2, ensure_ascii=False)
    (folder / name).write_text(LIST_OF_PLAIN.sub(_on_one_line, text) + "\n", encoding="utf-8")
    (folder / log_name).write_text(scrub("\n".join(log)) + "\n", encoding="utf-8")


def _scrubbed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _scrubbed(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_scrubbed(one) for one in value]
    return scrub(value) if isinstance(value, str) else value


def _on_one_line(match: re.Match[str]) -> str:
    return "[" + " ".join(match[1].split()) + "]"
