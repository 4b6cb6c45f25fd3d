"""Repositories of the Hugging Face Hub: downloaded and checked, pushed, mistakes told in words.

Nothing but files goes through here; `pipeline` knows what is in them. It takes a sixth of a second
to import, so `pipeline` imports it where it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx2
from huggingface_hub import HfApi, ModelHubMixin, constants, errors, snapshot_download
from huggingface_hub.utils import logging, validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from ctf.common import storage
from ctf.common.errors import UserError
from ctf.common.version import __version__

# An empty file in a snapshot of the cache: the hashes of all its files were compared.
VERIFIED = ".ctf-verified"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class Address(NamedTuple):
    """org/name, or org/name@revision."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def parse(name: str, revision: str | None = None) -> Address | None:
    """What `name` addresses; None where it has not the form org/name or org/name@revision.

    Raises:
        UserError: a revision that cannot be one, or two of them.
    """
    repo, at, own = name.partition("@")
    try:
        validate_repo_id(repo)
    except errors.HFValidationError:
        return None
    if "/" not in repo or not repo.isascii():
        return None
    if at and revision is not None:
        raise UserError(f"{name}: got the revision {revision!r}, too; expected one of the two")
    chosen = own if at else revision
    # It becomes part of a path in the cache.
    if chosen is not None and (
        not re.fullmatch(r"\w[\w.+-]*(/\w[\w.+-]*)*", chosen, re.ASCII) or ".." in chosen
    ):
        raise UserError(f"{name}: got revision {chosen!r}, expected a branch, a tag or a commit")
    return Address(repo, chosen)


def target(name: str) -> Address:
    """Where to push: org/name or org/name@branch.

    Raises:
        UserError: it has not that form.
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
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """A folder in the cache with those of `files` that the repository has, and no others.

    What is in the cache is not downloaded again, and is used where the Hub cannot be reached or
    HF_HUB_OFFLINE is set. Files come whole or not at all: a call after one that broke off goes on.

    Raises:
        UserError: there is no such repository or revision, or no access to it; no network; a file
            whose content is not what its hash says (it is removed).
    """
    if force_download and (local_files_only or constants.is_offline_mode()):
        raise UserError(f"{address}: cannot be downloaded anew without the network")
    with _explained(
        address,
        f"{address} is no folder here, and the Hub shows no such repository",
        f"check the name; if it is a private one, {LOG_IN}",
    ):
        folder = Path(
            snapshot_download(
                address.repo,
                revision=address.revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                force_download=force_download,
                allow_patterns=list(files),
                library_name="ctf",
                library_version=__version__,
            )
        )
        _verify(folder, files, address, again=force_download)
    return folder


def _verify(folder: Path, files: Sequence[str], address: Address, *, again: bool) -> None:
    """Compares hashes, once for each snapshot: huggingface_hub compares sizes alone.

    It is marked as done in the snapshot, so that a call that was killed before is made up for.
    """
    marker = folder / VERIFIED
    if marker.exists() and not again:
        return
    damaged = []
    for path in (folder / file for file in files):
        if path.is_file() and not _matches_its_hash(path):
            damaged.append(str(path.relative_to(folder)))
            _blob(path).unlink()
            path.unlink()
    if damaged:
        raise UserError(
            f"{address}: {', '.join(damaged)}: the content is not what its hash says; removed\n"
            "run it again to download it anew"
        )
    with contextlib.suppress(OSError):  # a cache that is only to be read
        marker.touch()


def _blob(path: Path) -> Path:
    """What the link in a snapshot points to; not `resolve`: it may itself be a link."""
    return path.parent / os.readlink(path)


def _matches_its_hash(path: Path) -> bool:
    """Whether a file of a snapshot has the content that the Hub announced.

    The cache names it by the Hub's hash: SHA-256 of a large file, git's SHA-1 of a small one. Where
    the file system has no links there is no such name, and nothing to compare with.
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


# --- Push -----------------------------------------------------------------------------------------


class _Upload(ModelHubMixin):
    """What huggingface_hub's mixin pushes: something that writes itself into a folder.

    A class of its own, and not a base of `Pipeline`: it would add a sixth to the time of `import
    ctf`, and its `save_pretrained` deletes a file config.json of whatever folder it is given.
    """

    def __init__(self, write: Callable[[Path], None]) -> None:
        self.write = write

    def _save_pretrained(self, save_directory: Path) -> None:
        self.write(save_directory)


def create(address: Address, *, private: bool | None = None, token: str | None = None) -> None:
    """Creates a repository, and the branch, where there is none.

    Raises:
        UserError: it is refused, or there is no network.
    """
    with _writing(address):
        api = HfApi(token=token)
        api.create_repo(address.repo, private=private, exist_ok=True)
        if address.revision is not None:
            api.create_branch(address.repo, branch=address.revision, exist_ok=True)


def _writing(address: Address) -> contextlib.AbstractContextManager[None]:
    return _explained(
        address,
        f"{address.repo}: the Hub refuses to be written to",
        "check the name, and that your token may write: `hf auth login`, or HF_TOKEN",
    )


def push(
    write: Callable[[Path], None],
    address: Address,
    *,
    replaced: Sequence[str],
    message: str,
    token: str | None = None,
) -> str:
    """Pushes what `write` writes into a folder, as one commit of a repository that there is.

    Args:
        replaced: files of the repository that are deleted where `write` does not write them.

    Returns:
        The web address of the commit.

    Raises:
        UserError: it is refused, or there is no network; nothing is changed then.
    """
    with _writing(address):
        pushed = _Upload(write).push_to_hub(
            address.repo,
            token=token,
            branch=address.revision,
            commit_message=message,
            delete_patterns=list(replaced),
        )
    return str(pushed)


# --- What goes wrong ------------------------------------------------------------------------------


@contextlib.contextmanager
def _explained(address: Address, refused: str, advice: str) -> Iterator[None]:
    """Says in a UserError what huggingface_hub raises, which may print nothing but bars meanwhile.

    Args:
        refused: what an answer of 401, 403 or 404 means, in a line.
        advice: what to do then, in a line.
    """
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    # As everywhere here, bars are for terminals; and for notebooks, which have their own.
    bars = sys.stderr.isatty() or "ipykernel" in sys.modules or are_progress_bars_disabled()
    if not bars:
        disable_progress_bars()
    try:
        yield
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise UserError(_explanation(error, address, refused, advice)) from error
    finally:
        logging.set_verbosity(before)
        if not bars:
            enable_progress_bars()


def _explanation(error: BaseException, address: Address, refused: str, advice: str) -> str:
    hub = f"the Hub ({constants.ENDPOINT})"
    cause = error.__cause__
    match error:
        case errors.RevisionNotFoundError():
            return (
                f"{address.repo} has no revision {address.revision!r}\n"
                "expected one of its branches, tags or commits"
            )
        case errors.GatedRepoError():
            return (
                f"{address.repo}: its owner grants access on demand\n"
                f"ask for it at {constants.ENDPOINT}/{address.repo}, and {LOG_IN}"
            )
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403, 404):
            return f"{refused} ({error.response.status_code})\n{advice}"
        case errors.HfHubHTTPError():
            said = error.server_message or error.response.reason_phrase
            return f"{address}: {hub} answered {error.response.status_code}: {_first_line(said)}"
        case errors.LocalEntryNotFoundError() if isinstance(cause, errors.HfHubHTTPError):
            return _explanation(cause, address, refused, advice)
        case errors.LocalEntryNotFoundError() if cause is None or _is_offline(cause):
            return (
                f"{address} is not or not wholly in the cache, and the network is not to be used\n"
                "run it once without HF_HUB_OFFLINE and local_files_only"
            )
        case errors.LocalEntryNotFoundError():
            return (
                f"{address} is no folder here, not in the cache, and {hub} cannot be reached\n"
                f"check the network: {_first_line(cause)}"
            )
        case errors.OfflineModeIsEnabled():
            return f"{address}: HF_HUB_OFFLINE is set, and this needs the network"
        case errors.LocalTokenNotFoundError():
            return f"{address}: there is no token here\n{LOG_IN}"
        case httpx2.ConnectError():
            return f"{address}: {hub} cannot be reached\ncheck the network: {_first_line(error)}"
        case ValueError():
            return f"{address}: {hub}: {' '.join(str(error).split())}"
        case OSError() if error.errno is not None:
            return (
                f"{error.filename or constants.HF_HUB_CACHE}: {error.strerror}\n"
                "make room, or choose another folder for the cache with HF_HUB_CACHE"
            )
    return (
        f"{address}: the connection to {hub} broke off: {_first_line(cause or error)}\n"
        "run it again: files that are there are not transferred twice"
    )


def _is_offline(error: BaseException) -> bool:
    return isinstance(error, errors.OfflineModeIsEnabled)


def _first_line(said: object) -> str:
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    return lines[0] if lines else type(said).__name__
