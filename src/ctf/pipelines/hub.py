"""Repositories of the Hugging Face Hub: downloads with verified hashes, uploads, errors for users.

This module knows files only, not what is in them. huggingface_hub takes long to import, so this is
imported where it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
from huggingface_hub import HfApi, constants, errors, snapshot_download
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.common.version import __version__

# An empty file in a snapshot of the cache: the hashes of all its files were verified.
VERIFIED = ".ctf-verified"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class Address(NamedTuple):
    """A repository, written org/name or org/name@revision."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def parse(name: str, revision: str | None = None) -> Address | None:
    """Return the address that `name` is, or None if it is not org/name or org/name@revision.

    Raises:
        UserError: There are two revisions, or one that is not a valid name.
    """
    repo, at, own = name.partition("@")
    try:
        validate_repo_id(repo)
    except errors.HFValidationError:
        return None
    if "/" not in repo or not repo.isascii():
        return None
    if at and revision is not None:
        raise UserError(f"{name}: got revision {revision!r} as well, expected one of the two")
    chosen = own if at else revision
    # It becomes part of a path in the cache.
    if chosen is not None and (
        not re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*)*", chosen, re.ASCII) or ".." in chosen
    ):
        raise UserError(f"{name}: got revision {chosen!r}, expected a branch, a tag or a commit")
    return Address(repo, chosen)


def target(name: str) -> Address:
    """Return the address of an upload: org/name or org/name@branch.

    Raises:
        UserError: `name` has another form.
    """
    address = parse(name)
    if address is None:
        raise UserError(f"got {name!r}, expected org/name or org/name@branch on the Hub")
    return address


# --- Download -------------------------------------------------------------------------------------


def download(
    address: Address,
    files: Sequence[str],
    *,
    local_files_only: bool = False,
    force_download: bool = False,
    **options: Any,
) -> Path:
    """Download those of `files` that the repository has, and return their folder in the cache.

    Cached files are not downloaded again, and are used without network access. Files are complete
    or missing: an interrupted download is continued by the next call. The keywords are those of
    `huggingface_hub.snapshot_download`.

    Raises:
        UserError: There is no such repository or revision, no access to it, or no network; a file
            does not match its hash (it is deleted).
    """
    if force_download and (local_files_only or constants.is_offline_mode()):
        raise UserError(f"{address}: cannot be downloaded again without network access")
    with _user_errors(
        address,
        f"{address}: not a local folder, and the Hub shows no such repository",
        f"check the name; if the repository is private, {LOG_IN}",
    ):
        folder = Path(
            snapshot_download(
                address.repo,
                revision=address.revision,
                local_files_only=local_files_only,
                force_download=force_download,
                allow_patterns=list(files),
                library_name="ctf",
                library_version=__version__,
                **options,
            )
        )
        verify(folder, files, address, again=force_download)
    return folder


def verify(folder: Path, files: Sequence[str], address: Address, *, again: bool) -> None:
    """Compare files with their hashes, once per snapshot; huggingface_hub compares sizes alone."""
    marker = folder / VERIFIED
    if marker.exists() and not again:
        return
    damaged = [file for file in files if (folder / file).is_file() and not is_intact(folder / file)]
    for path in (folder / file for file in damaged):
        _blob(path).unlink()
        path.unlink()
    if damaged:
        raise UserError(
            f"{address}: {', '.join(damaged)}: does not match its hash; deleted\n"
            "run the command again to download it again"
        )
    with contextlib.suppress(OSError):  # the cache is read-only
        marker.touch()


def _blob(path: Path) -> Path:
    """Return the target of a link in a snapshot; unlike `resolve`, if it is a link itself."""
    return path.parent / os.readlink(path)


def is_intact(path: Path) -> bool:
    """Return whether a file of a snapshot has the content that the Hub announced.

    The cache names it by the Hub's hash: SHA-256 for large files, git's SHA-1 for small ones. File
    systems without links have no hash to compare with.
    """
    name = _blob(path).name if path.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{64}", name):
        return storage.hash_file(path) == name
    if re.fullmatch("[0-9a-f]{40}", name):
        header = f"blob {path.stat().st_size}\0".encode()
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.sha1(header, usedforsecurity=False))
        return digest.hexdigest() == name
    return True


# --- Upload ---------------------------------------------------------------------------------------


def create(address: Address, *, private: bool | None = None, token: str | None = None) -> None:
    """Create a repository, and its branch, unless it exists.

    Raises:
        UserError: The Hub refuses, or there is no network.
    """
    with _upload_errors(address):
        api = HfApi(token=token)
        api.create_repo(address.repo, private=private, exist_ok=True)
        if address.revision is not None:
            api.create_branch(address.repo, branch=address.revision, exist_ok=True)


def push(
    write: Callable[[Path], None],
    address: Address,
    *,
    replaced: Sequence[str],
    message: str,
    token: str | None = None,
) -> str:
    """Upload a folder as one commit of an existing repository.

    Args:
        write: Writes the files into a folder.
        address: Of the repository.
        replaced: Files of the repository that are deleted unless `write` writes them.
        message: Of the commit.
        token: By default the one of `hf auth login`.

    Returns:
        The URL of the commit.

    Raises:
        UserError: The Hub refuses, or there is no network; nothing is changed then.
    """
    with _upload_errors(address), tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        commit = HfApi(token=token).upload_folder(
            repo_id=address.repo,
            revision=address.revision,
            folder_path=folder,
            delete_patterns=list(replaced),
            commit_message=message,
        )
    return commit.commit_url


# --- Errors ---------------------------------------------------------------------------------------


def _upload_errors(address: Address) -> contextlib.AbstractContextManager[None]:
    return _user_errors(
        address,
        f"{address.repo}: the Hub refuses to be written to",
        "check the name, and that your token may write: `hf auth login`, or HF_TOKEN",
    )


@contextlib.contextmanager
def _user_errors(address: Address, refused: str, advice: str) -> Iterator[None]:
    """Turn exceptions of huggingface_hub into UserErrors, and keep it from printing more than bars.

    Args:
        address: Of the repository.
        refused: What status 401, 403 or 404 means, in one line.
        advice: What to do about it, in one line.
    """
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    # As everywhere in ctf, bars are for terminals; and for notebooks, which have their own.
    show_bars = sys.stderr.isatty() or "ipykernel" in sys.modules or are_progress_bars_disabled()
    if not show_bars:
        disable_progress_bars()
    try:
        yield
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise UserError(_message(error, address, refused, advice)) from error
    finally:
        hub_logging.set_verbosity(verbosity)
        if not show_bars:
            enable_progress_bars()


def _message(error: Exception, address: Address, refused: str, advice: str) -> str:
    hub = f"the Hub ({constants.ENDPOINT})"
    match error:
        case errors.LocalEntryNotFoundError():
            if isinstance(error.__cause__, errors.HfHubHTTPError):
                return _http_message(error.__cause__, address, refused, advice)
            return _cache_message(error.__cause__, address)
        case errors.HfHubHTTPError():
            return _http_message(error, address, refused, advice)
        case errors.OfflineModeIsEnabled():
            return f"{address}: HF_HUB_OFFLINE is set, and this needs the network"
        case errors.LocalTokenNotFoundError():
            return f"{address}: no token of the Hub\n{LOG_IN}"
        case httpx2.ConnectError():
            return f"{address}: {hub} cannot be reached\ncheck the network: {_first_line(error)}"
        case ValueError():
            return f"{address}: {hub}: {' '.join(str(error).split())}"
        case OSError(errno=int()):
            return (
                f"{error.filename or constants.HF_HUB_CACHE}: {error.strerror}\n"
                "free some space, or choose another folder for the cache with HF_HUB_CACHE"
            )
    if "home directory" in str(error):  # Path.home(): neither $HOME nor an entry for the user
        return f"{address}: there is no home directory for the cache\nset HF_HOME to a folder"
    return (
        f"{address}: the connection to {hub} was lost: {_first_line(error.__cause__ or error)}\n"
        "run the command again: complete files are not transferred twice"
    )


def _http_message(error: errors.HfHubHTTPError, address: Address, refused: str, advice: str) -> str:
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{address.repo} has no revision {address.revision!r}\n"
            "expected one of its branches, tags or commits"
        )
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{address.repo}: its owner grants access on request\n"
            f"request it at {constants.ENDPOINT}/{address.repo}, and {LOG_IN}"
        )
    status = error.response.status_code
    if status in (401, 403, 404):
        return f"{refused} ({status})\n{advice}"
    reason = _first_line(error.server_message or error.response.reason_phrase)
    return f"{address}: the Hub ({constants.ENDPOINT}) answered {status}: {reason}"


def _cache_message(cause: BaseException | None, address: Address) -> str:
    if cause is None or isinstance(cause, errors.OfflineModeIsEnabled):
        return (
            f"{address} is not, or not completely, in the cache, and network access is disabled\n"
            "run the command once without HF_HUB_OFFLINE and local_files_only"
        )
    return (
        f"{address}: not a local folder, not in the cache, and the Hub ({constants.ENDPOINT}) "
        f"cannot be reached\ncheck the network: {_first_line(cause)}"
    )


def _first_line(message: object) -> str:
    lines = [line.strip() for line in str(message).splitlines() if line.strip()]
    return lines[0] if lines else type(message).__name__
