"""`jaxmoe pull hf:OWNER/REPO[:QUANT]`: a GGUF file, or all parts of a split one, from the Hugging Face Hub.

The bytes are fetched here and not by huggingface_hub's own download: that one forgets what it has when a
connection ends for good, and a model takes hours.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import IO, TYPE_CHECKING, Final, NoReturn

from tqdm import tqdm

from jaxmoe.display import printable, size_text

if TYPE_CHECKING:
    from jaxmoe.hub import RemoteFile, Repository

DEFAULT_QUANT: Final = "Q4_K_M"
PAUSES_SECONDS: Final = (1.0, 2.0, 4.0, 8.0, 16.0)  # before the next try, when one has brought nothing

_NAME: Final = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<quant>[^:]+))?", re.ASCII)
_PART: Final = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")
# projectors of images, importance matrices, heads that draft tokens: GGUF files that are no model
_BESIDE: Final = re.compile(r"(?:^|[-_.])(?:mmproj|imatrix|mtp|vocab)(?=[-_.]|$)", re.IGNORECASE)
_PIECE_SIZE: Final = 1 << 20
_DISK_ERRORS: Final[Mapping[int | None, str]] = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "files may not be that large there",
}


class PullError(ValueError):
    """What cannot be pulled, in a sentence."""


@dataclass(frozen=True)
class Target:
    """A remote file and where it goes; `part` is what there is of it before it is whole and checked."""

    file: RemoteFile
    directory: Path

    @property
    def path(self) -> Path:
        """The file when it is done."""
        return self.directory / self.file.name

    @property
    def part(self) -> Path:
        """The bytes so far, of these contents and no other."""
        return self.directory / f"{self.file.name}.{(self.file.sha256 or self.file.blob_id)[:12]}.part"

    @property
    def missing_size(self) -> int:
        """Bytes that are still to come."""
        if self.path.exists():
            return 0
        return self.file.size - (self.part.stat().st_size if self.part.exists() else 0)


def main(arguments: list[str], prog: str = "jaxmoe pull") -> int:
    """Download what the command line names; returns the exit status."""
    asked = _parser(prog).parse_args(arguments)
    found = _NAME.fullmatch(asked.name)
    if found is None:
        raise PullError(f"expected hf:OWNER/REPO or hf:OWNER/REPO:QUANT, got {asked.name!r}")
    repository = _list_files(found["repo"], asked.revision)
    directory = asked.dir.expanduser()
    targets = [Target(file, directory) for file in choose(repository, found["quant"] or DEFAULT_QUANT)]
    directory.mkdir(parents=True, exist_ok=True)
    _check_space(targets, directory)
    try:
        for target in targets:
            _pull(target, repository)
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here", file=sys.stderr)
        raise
    first = targets[0].path
    print(printable(str(first)))
    print(f"go on with: jaxmoe serve {printable(quote(str(first)))}", file=sys.stderr)
    return 0


def _list_files(repo: str, revision: str | None) -> Repository:
    try:
        from jaxmoe.hub import list_files
    except ImportError as error:
        raise PullError(f"pull needs huggingface_hub, jaxmoe's extra 'hub' ({error})") from None
    return list_files(repo, revision)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Download a GGUF file from the Hugging Face Hub, and check it. A download that was "
        "broken off goes on where it was.",
        epilog="For a private repository log in (hf auth login) or set HF_TOKEN.",
    )
    name_help = f"QUANT is part of a file's name, or the name itself (by default {DEFAULT_QUANT})"
    parser.add_argument("name", metavar="hf:OWNER/REPO[:QUANT]", help=name_help)
    parser.add_argument("--revision", help="a branch, a tag or a commit (by default main)")
    parser.add_argument("--dir", type=Path, default=Path(), help="where to put it (by default here)")
    return parser


# --- Which files.


def choose(repository: Repository, quant: str) -> list[RemoteFile]:
    """The one model that `quant` names, all parts of it in order.

    Raises PullError, with a list of what there is, for none or several.
    """
    models = _models(repository.files)
    if not models:
        raise PullError(f"hf:{repository.repo} has no GGUF model")
    exact = [name for name in models if quant.lower() in (name.lower(), PurePosixPath(name).name.lower())]
    word = re.compile(rf"(?<![a-z0-9_]){re.escape(quant)}(?![a-z0-9_])", re.IGNORECASE)
    named = exact or [name for name in models if word.search(name.removesuffix(".gguf"))]
    if len(named) != 1:
        what = "several models" if named else "no model"
        listed = "".join(f"\n  {name} ({_files_text(models[name])})" for name in named or models)
        raise PullError(f"hf:{repository.repo} has {what} for {quant!r}; name one of these:{listed}")
    return _whole(models[named[0]])


def _models(files: Sequence[RemoteFile]) -> dict[str, list[RemoteFile]]:
    """The models by name: that of the file, for a split one less the parts' numbers."""
    models: dict[str, list[RemoteFile]] = {}
    for file in sorted(files, key=lambda file: file.path):
        if file.path.lower().endswith(".gguf") and not _BESIDE.search(file.name[: -len(".gguf")]):
            part = _part_of(file)
            name = file.path if part is None else f"{part['prefix']}.gguf"
            models.setdefault(name, []).append(file)
    return models


def _part_of(file: RemoteFile) -> re.Match[str] | None:
    return _PART.fullmatch(file.path[: -len(".gguf")])


def _files_text(files: Sequence[RemoteFile]) -> str:
    size = size_text(sum(file.size for file in files))
    return f"{size} in {len(files)} files" if len(files) > 1 else size


def _whole(files: list[RemoteFile]) -> list[RemoteFile]:
    """The same files, if no part is missing."""
    part = _part_of(files[0])
    if part is not None and len(files) != int(part["count"]):
        raise PullError(
            f"{files[0].path} is one of {int(part['count'])} parts, of which {len(files)} are there"
        )
    return files


# --- The bytes.


def _check_space(targets: Sequence[Target], directory: Path) -> None:
    missing, free = sum(target.missing_size for target in targets), shutil.disk_usage(directory).free
    if missing > free:
        raise PullError(f"{directory} has {size_text(free)} free, and {size_text(missing)} are still to come")


def _pull(target: Target, repository: Repository) -> None:
    """Download and check one file, if it is not there."""
    if target.path.exists():
        _check_present(target)
        return
    with _disk_errors_explained(target), _part_file(target) as out:
        _fill(out, target, repository)
        os.fsync(out.fileno())
        # still locked: nobody else takes the part before it has its name
        if (found := _wrong_digest(target.part, target.file)) is not None:
            target.part.unlink()
            raise PullError(
                f"{target.file.name} came with the wrong checksum ({found}) and was removed: pull it again"
            )
        target.part.replace(target.path)


def _check_present(target: Target) -> None:
    size = target.path.stat().st_size
    if size != target.file.size or _wrong_digest(target.path, target.file) is not None:
        raise PullError(f"{target.path} is another file: move it away, or name another directory by --dir")
    print(f"{printable(target.file.name)} is there already", file=sys.stderr)


@contextmanager
def _disk_errors_explained(target: Target) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        what = f"{_DISK_ERRORS[error.errno]} ({target.directory}): {size_text(target.missing_size)}"
        raise PullError(
            f"{what} of {target.file.name} are missing; the same command goes on from here"
        ) from None


@contextmanager
def _part_file(target: Target) -> Iterator[IO[bytes]]:
    """The part, open at its end and for this process alone."""
    # without a buffer: what was written counts, also when the disk is full
    with target.part.open("ab", buffering=0) as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PullError(f"{target.part} is being written by another pull") from None
        yield out


def _fill(out: IO[bytes], target: Target, repository: Repository) -> None:
    """Append what is missing, in as many tries as it takes while they bring something."""
    from jaxmoe.hub import ConnectionLost

    size, num_failures = target.file.size, 0
    with _bar(target.file.name, size, out.tell()) as bar:
        while (start := out.tell()) < size:
            try:
                _append(out, target.file, repository, bar)
            except ConnectionLost as error:
                num_failures = num_failures + 1 if out.tell() == start else 1
                if num_failures > len(PAUSES_SECONDS):
                    kept = f"{size_text(out.tell())} of {size_text(size)} are kept"
                    raise PullError(f"{error}; {kept}, and the same command goes on from there") from None
                bar.write(printable(f"{error}; trying again"), file=sys.stderr)
                time.sleep(PAUSES_SECONDS[num_failures - 1])


def _append(out: IO[bytes], file: RemoteFile, repository: Repository, bar: tqdm[NoReturn]) -> None:
    """One try: everything from the end of `out` on, or from the start where the server cannot do that."""
    from jaxmoe.hub import ConnectionLost, open_file

    with open_file(repository, file, out.tell()) as (first, pieces):
        if first != out.tell():
            out.truncate(first)
            bar.reset()
        for piece in pieces:
            if out.tell() + len(piece) > file.size:
                raise PullError(
                    f"more bytes of {file.name} came than the {file.size} that the repository lists"
                )
            _write(out, piece)
            bar.update(len(piece))
    if out.tell() < file.size:
        raise ConnectionLost("the connection ended early")


def _write(out: IO[bytes], piece: bytes) -> None:
    while piece:
        piece = piece[out.write(piece) :]


def _wrong_digest(path: Path, file: RemoteFile) -> str | None:
    """The file's digest if it is not the one that the repository lists."""
    # a file outside of large file storage has the SHA-1 of its git blob
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size)
    with path.open("rb") as source, _bar(f"checking {file.name}", file.size, 0) as bar:
        while piece := source.read(_PIECE_SIZE):
            digest.update(piece)
            bar.update(len(piece))
    found = digest.hexdigest()
    return None if found == (file.sha256 or file.blob_id) else found


def _bar(what: str, size: int, start: int) -> tqdm[NoReturn]:
    """A bar on a terminal, one line elsewhere."""
    what, is_terminal = printable(what), sys.stderr.isatty()
    if not is_terminal:
        print(
            f"{what} ({size_text(size)})" + (f", from {size_text(start)} on" if start else ""),
            file=sys.stderr,
        )
    return tqdm(
        total=size,
        initial=start,
        desc=what,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=not is_terminal,
    )
