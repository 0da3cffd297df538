"""`jaxmoe pull` against a local server that speaks the Hub's protocol."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from fake_hub import FakeHub, fake_hub

from jaxmoe import cli, hub, pull
from jaxmoe.hub import RemoteFile, Repository
from jaxmoe.pull import PullError, choose

SIZE = 3_000_001
CONTENT = random.Random(5).randbytes(SIZE)
HALF = SIZE // 2
NAME = "Model-Q4_K_M.gguf"
REPO = "owner/some.model"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub with one model, which huggingface_hub takes for the real one."""
    monkeypatch.setattr(pull, "PAUSES_SECONDS", (0.0,) * len(pull.PAUSES_SECONDS))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,127.0.0.2")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with fake_hub() as running:
        # huggingface_hub reads HF_ENDPOINT when it is imported
        template = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        running.repositories[REPO] = {"README.md": b"a model", NAME: CONTENT, "Model-Q8_0.gguf": b"other"}
        yield running
        huggingface_hub.close_session()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models"


def run(folder: Path, *arguments: str, name: str = f"hf:{REPO}") -> int:
    return cli.main(["pull", name, "--dir", str(folder), *arguments])


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.part"))


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that says why it failed."""
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = (line for line in printed.err.splitlines() if line.startswith("jaxmoe pull: "))
    assert printed.err.splitlines()[-1] == line
    return line.removeprefix("jaxmoe pull: ")


def test_the_default_is_q4_k_m_and_its_path_is_said(
    server: FakeHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{folder / NAME}\n"
    assert printed.err.endswith(f"go on with: jaxmoe serve {folder / NAME}\n")
    assert (folder / NAME).read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == [NAME]


def test_the_token_is_for_the_hub_alone(server: FakeHub, folder: Path) -> None:
    run(folder)
    assert server.hub_authorizations == ["Bearer hf_secret"] * 2
    assert [one.authorization for one in server.sent] == [None]


def test_a_connection_cut_at_half_the_file_goes_on_there(server: FakeHub, folder: Path) -> None:
    server.cuts = [HALF]
    assert run(folder) == 0
    assert (folder / NAME).read_bytes() == CONTENT
    assert [(one.wanted_range, one.size) for one in server.sent] == [
        (None, HALF),
        (f"bytes={HALF}-", SIZE - HALF),
    ]


def test_a_connection_that_stays_away_is_said_and_the_next_pull_gets_the_rest(
    server: FakeHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cuts = [HALF, *[0] * (len(pull.PAUSES_SECONDS))]
    assert run(folder) == 1
    said = sentence(capsys)
    assert said.startswith(f"the connection to {server.url} failed: ")
    assert said.endswith("; 1.431 MiB of 2.861 MiB are kept, and the same command goes on from there")
    assert not (folder / NAME).exists()
    server.sent.clear()
    assert run(folder) == 0
    assert [(one.wanted_range, one.size) for one in server.sent] == [(f"bytes={HALF}-", SIZE - HALF)]
    assert (folder / NAME).read_bytes() == CONTENT
    assert "from 1.431 MiB on" in capsys.readouterr().err


def test_tries_count_from_the_last_one_that_brought_something(server: FakeHub, folder: Path) -> None:
    server.cuts = [100_000] * 3 * len(pull.PAUSES_SECONDS)
    assert run(folder) == 0
    assert (folder / NAME).read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(server: FakeHub, folder: Path) -> None:
    server.storage_status = [503, 429]
    assert run(folder) == 0
    assert len(server.sent) == 3


def test_a_server_without_ranges_sends_all_of_it_again(server: FakeHub, folder: Path) -> None:
    server.cuts, server.takes_range = [HALF], False
    assert run(folder) == 0
    assert (folder / NAME).read_bytes() == CONTENT
    assert [one.size for one in server.sent] == [HALF, SIZE]


def test_a_wrong_checksum_removes_the_file(
    server: FakeHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.wrong_digest = True
    assert run(folder) == 1
    assert re.fullmatch(
        rf"{NAME} came with the wrong checksum \([0-9a-f]{{64}}\) and was removed: pull it again",
        sentence(capsys),
    )
    assert list(folder.iterdir()) == []


def test_a_file_outside_of_large_file_storage_has_its_blob_id_checked(server: FakeHub, folder: Path) -> None:
    server.has_lfs = False
    assert run(folder) == 0
    assert (folder / NAME).read_bytes() == CONTENT


def test_a_file_that_ends_early_is_not_taken(
    server: FakeHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.listed_larger = 1
    assert run(folder) == 1
    assert "has no bytes from" in (said := sentence(capsys)) or "the connection ended early" in said
    assert not (folder / NAME).exists()


def test_a_file_that_does_not_end_is_not_taken(
    server: FakeHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.listed_larger = -1
    assert run(folder) == 1
    assert "more bytes" in sentence(capsys)
    assert not (folder / NAME).exists()


def test_a_full_disk_is_said_and_what_came_is_kept(
    server: FakeHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # the kernel's own ENOSPC, at the first byte
    (target,) = (pull.Target(file, folder) for file in listed(server) if file.name == NAME)
    folder.mkdir()
    target.part.symlink_to("/dev/full")
    assert run(folder) == 1
    assert sentence(capsys).startswith(f"the disk is full ({folder}): 2.861 MiB of {NAME} are missing; ")
    target.part.unlink()
    target.part.write_bytes(CONTENT[:HALF])
    assert run(folder) == 0
    assert (folder / NAME).read_bytes() == CONTENT


def listed(server: FakeHub) -> tuple[RemoteFile, ...]:
    return hub.list_files(REPO, None).files


def test_space_is_looked_at_first(
    server: FakeHub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(SIZE - 1))
    assert run(folder) == 1
    assert sentence(capsys) == f"{folder} has 2.861 MiB free, and 2.861 MiB are still to come"
    assert server.sent == []
    (target,) = (pull.Target(file, folder) for file in listed(server) if file.name == NAME)
    target.part.write_bytes(CONTENT[:1])
    assert run(folder) == 0


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("hf:owner/none", [], "hf:owner/none is not there, or it is private: for that log in "),
        (
            "hf:owner/gated",
            [],
            r"hf:owner/gated is gated: accept its terms at http://127.0.0.1:\d+/owner/gated",
        ),
        ("hf:owner/broken", [], r"http://127.0.0.1:\d+ answers 500 for hf:owner/broken"),
        (f"hf:{REPO}", ["--revision", "v9"], f"hf:{REPO} has no revision 'v9'"),
        (f"hf:{REPO}:Q5_K_M", [], f"hf:{REPO} has no model for 'Q5_K_M'; name one of these:"),
        ("owner/model", [], "expected hf:OWNER/REPO or hf:OWNER/REPO:QUANT, got 'owner/model'"),
        ("hf:owner/a..b", [], "."),
    ],
)
def test_what_is_not_there_is_said(
    name: str,
    options: list[str],
    expected: str,
    server: FakeHub,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.errors = {"owner/gated": (403, "GatedRepo"), "owner/broken": (500, "")}
    assert run(folder, *options, name=name) == 1
    printed = capsys.readouterr()
    assert re.match(f"jaxmoe pull: {expected}", printed.err)
    assert "Traceback" not in printed.err
    assert server.sent == []


def test_no_network_is_said(
    server: FakeHub, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert run(folder) == 1
    assert sentence(capsys).startswith("the connection to http://127.0.0.1:9 failed: ")


def test_a_missing_library_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jaxmoe.hub", None)
    assert run(folder) == 1
    assert sentence(capsys).startswith("pull needs huggingface_hub, jaxmoe's extra 'hub' (")


def test_a_revision_is_asked_for(server: FakeHub, folder: Path) -> None:
    assert run(folder, "--revision", huggingface_hub.HfApi().model_info(REPO).sha or "") == 0


def test_what_is_there_is_checked_and_not_pulled_again(
    server: FakeHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder)
    assert run(folder) == 0
    assert len(server.sent) == 1
    assert f"{NAME} is there already" in capsys.readouterr().err
    (folder / NAME).write_bytes(CONTENT[:-1] + b"x")
    assert run(folder) == 1
    assert sentence(capsys).startswith(f"{folder / NAME} is another file: move it away")
    assert (folder / NAME).read_bytes() == CONTENT[:-1] + b"x"


def test_split_files_are_all_taken_and_the_first_is_named(
    server: FakeHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = {f"Q8/Big-Q8_0-{i:05}-of-00003.gguf": CONTENT[i::3] for i in (1, 2, 3)}
    server.repositories["owner/split"] = {**pieces, "Big-Q4_K_M.gguf": b"", "mmproj-Q8_0.gguf": b"image"}
    assert run(folder, name="hf:owner/split:q8_0") == 0
    assert capsys.readouterr().out == f"{folder / 'Big-Q8_0-00001-of-00003.gguf'}\n"
    for path, content in pieces.items():
        assert (folder / path.removeprefix("Q8/")).read_bytes() == content
    assert len(list(folder.iterdir())) == 3


def test_ctrl_c_leaves_what_has_come(server: FakeHub, folder: Path, tmp_path: Path) -> None:
    server.stall_after = HALF
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "jaxmoe", "pull", f"hf:{REPO}", "--dir", str(folder)]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[1], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        end = time.monotonic() + 20
        while not (parts(folder) and parts(folder)[0].stat().st_size == HALF):
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert "stopped: the same command goes on from here" in said
    assert "Traceback" not in said
    server.stall_after = None
    assert run(folder) == 0
    assert server.sent[-1].wanted_range == f"bytes={HALF}-"
    assert (folder / NAME).read_bytes() == CONTENT


def test_two_pulls_of_one_file_do_not_mix(
    server: FakeHub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (target,) = (pull.Target(file, folder) for file in listed(server) if file.name == NAME)
    folder.mkdir()
    with pull._part_file(target):
        assert run(folder) == 1
    assert sentence(capsys).endswith("is being written by another pull")


def named(*paths: str) -> Repository:
    return Repository("o/r", "main", tuple(RemoteFile(path, 1 << 30, None, "") for path in paths))


@pytest.mark.parametrize(
    ("quant", "chosen"),
    [
        ("Q4_K_M", ["a.Q4_K_M.gguf"]),
        ("q4_k_m", ["a.Q4_K_M.gguf"]),
        ("Q4_K", ["a-Q4_K.gguf"]),
        ("F16", ["F16/a-00001-of-00002.gguf", "F16/a-00002-of-00002.gguf"]),
        ("BF16", ["a-BF16.gguf"]),
        ("a-IQ4_XS.gguf", ["x/a-IQ4_XS.gguf"]),
        ("UD-Q8_0", ["a-UD-Q8_0.gguf"]),
        ("a-q8_0.gguf", ["a-Q8_0.gguf"]),
    ],
)
def test_a_quantisation_is_a_word_of_the_name(quant: str, chosen: list[str]) -> None:
    repository = named(
        "README.md",
        "F16/a-00001-of-00002.gguf",
        "F16/a-00002-of-00002.gguf",
        "a-BF16.gguf",
        "a-Q4_K.gguf",
        "a-Q8_0.gguf",
        "a-UD-Q8_0.gguf",
        "a.Q4_K_M.gguf",
        "imatrix-Q4_K_M.gguf",
        "mmproj-a-Q4_K_M.gguf",
        "x/a-IQ4_XS.gguf",
    )
    assert [file.path for file in choose(repository, quant)] == chosen


def test_several_are_listed() -> None:
    repository = named("a-Q8_0-00001-of-00002.gguf", "a-Q8_0-00002-of-00002.gguf", "b-Q8_0.gguf", "c.gguf")
    with pytest.raises(PullError) as caught:
        choose(repository, "Q8_0")
    assert str(caught.value) == (
        "hf:o/r has several models for 'Q8_0'; name one of these:"
        "\n  a-Q8_0.gguf (2 GiB in 2 files)\n  b-Q8_0.gguf (1 GiB)"
    )


def test_none_and_a_missing_part_are_said() -> None:
    with pytest.raises(PullError, match="hf:o/r has no GGUF model"):
        choose(named("model.safetensors", "mmproj-F16.gguf"), "Q8_0")
    with pytest.raises(
        PullError, match=r"a-Q8_0-00001-of-00003\.gguf is one of 3 parts, of which 2 are there"
    ):
        choose(named("a-Q8_0-00001-of-00003.gguf", "a-Q8_0-00003-of-00003.gguf"), "Q8_0")
