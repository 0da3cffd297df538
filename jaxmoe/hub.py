"""The Hugging Face Hub, by huggingface_hub: what a repository holds, and the bytes of its files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

import httpx2
from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

TIMEOUT_SECONDS: Final = 30.0

_LOGIN: Final = "log in (hf auth login) or set HF_TOKEN"
_BUSY: Final = (408, 429)  # and every 5xx: it may do better soon
_RANGE_NOT_SATISFIABLE: Final = 416


class HubError(ValueError):
    """What the Hub does not give, in a sentence."""


class ConnectionLost(HubError):
    """A failure that another try may not have."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its path there, its bytes, and its SHA-256 or else its git blob's SHA-1."""

    path: str
    size: int
    sha256: str | None
    blob_id: str

    @property
    def name(self) -> str:
        """The name without directories."""
        return PurePosixPath(self.path).name


@dataclass(frozen=True)
class Repository:
    """What one commit of a repository holds."""

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]


def list_files(repo: str, revision: str | None) -> Repository:
    """The files of a branch, tag or commit (None: the main branch); raises HubError."""
    api = HfApi()
    with _explained(repo, revision):
        try:
            found = api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
        except (KeyError, TypeError) as error:
            raise HubError(f"{api.endpoint} does not answer as the Hub does") from error
    files = (
        RemoteFile(
            path=file.rfilename,
            size=file.size,
            sha256=None if file.lfs is None else file.lfs.sha256,
            blob_id=file.blob_id or "",
        )
        for file in found.siblings or ()
        if file.size is not None
    )
    return Repository(repo, found.sha or revision or "main", tuple(files))


@contextmanager
def open_file(repository: Repository, file: RemoteFile, start: int) -> Iterator[tuple[int, Iterator[bytes]]]:
    """A file's bytes in pieces, and where they begin: at `start`, or at 0 where the server has it so.

    Raises HubError; ConnectionLost, in the body too, where another try may help.
    """
    url = hf_hub_url(repository.repo, file.path, revision=repository.commit)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with (
        _explained(repository.repo, repository.commit),
        get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS) as response,
    ):
        if response.status_code == _RANGE_NOT_SATISFIABLE:
            raise HubError(f"{file.path} has no bytes from {start} on: remove what is there of it")
        hf_raise_for_status(response)
        yield (start if response.status_code == httpx2.codes.PARTIAL_CONTENT else 0), response.iter_bytes()


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turns the library's errors into sentences; the first class that fits speaks."""
    endpoint = HfApi().endpoint
    try:
        yield
    except GatedRepoError:
        raise HubError(f"hf:{repo} is gated: accept its terms at {endpoint}/{repo}, then {_LOGIN}") from None
    except RepositoryNotFoundError:
        raise HubError(f"hf:{repo} is not there, or it is private: for that {_LOGIN}") from None
    except RevisionNotFoundError:
        raise HubError(f"hf:{repo} has no revision {revision!r}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        kind = ConnectionLost if status in _BUSY or status >= 500 else HubError
        raise kind(f"{endpoint} answers {status} for hf:{repo}") from None
    except OfflineModeIsEnabled:
        raise HubError("huggingface_hub is told to stay offline (HF_HUB_OFFLINE)") from None
    except HFValidationError as error:
        raise HubError(str(error)) from None
    except httpx2.TransportError as error:
        reason = str(error) or type(error).__name__
        raise ConnectionLost(f"the connection to {endpoint} failed: {reason}") from None
