"""Pipelines from and to the Hub, with its real client, against a server on this machine."""

import copy
import dataclasses
import io
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import ctf as package
from ctf.common.errors import UserError
from ctf.pipelines import card, hub
from ctf.pipelines.folder import PIPELINE_FILES
from ctf.pipelines.pipeline import Pipeline
from ctf.training.start import open_start
from tests.conftest import Command, read_files
from tests.pipelines.helpers import CLASSES, same
from tests.pipelines.hub_server import TOKEN, Files, Hub, Repository, git_sha1

ID = "org/discs"
WEIGHTS = "coarse/model.safetensors"


@pytest.fixture(scope="session", autouse=True)
def _no_other_host() -> Iterator[None]:
    """No test resolves the name of another machine."""
    getaddrinfo = socket.getaddrinfo

    def guarded(host: Any, *rest: Any, **more: Any) -> Any:
        assert host in ("127.0.0.1", "localhost"), f"a test resolved {host!r}"
        return getaddrinfo(host, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", guarded)
        yield


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub, for this process; an empty cache, and no token."""
    with Hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        template = running.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
        huggingface_hub.close_session()
        yield running
        huggingface_hub.close_session()


@pytest.fixture
def logged_in(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub, with a token; uploads by plain HTTP, the only protocol that the server has."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return server


@pytest.fixture
def saved(pipe: Pipeline, tmp_path: Path) -> Files:
    pipe.save_pretrained(tmp_path / "saved")
    return read_files(tmp_path / "saved")


@pytest.fixture
def discs(server: Hub, saved: Files) -> Repository:
    """A repository with the pipeline."""
    return server.create(ID, saved)


@pytest.fixture
def other(pipe: Pipeline) -> Pipeline:
    """A pipeline of the same shapes with other weights."""
    changed = copy.deepcopy(pipe)
    for parameter in changed.coarse.parameters():
        parameter.mul_(1.5)
    return changed


def message(error: pytest.ExceptionInfo[UserError]) -> str:
    """The text of an error, which has one or two lines."""
    text = str(error.value)
    assert len(text.splitlines()) <= 2, text
    return text


# --- Names ----------------------------------------------------------------------------------------

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9._]?[a-z0-9]){0,8}", fullmatch=True)
REVISIONS = st.from_regex(r"\w[\w+-]{0,5}(/\w[\w-]{0,5}){0,2}", fullmatch=True)


@given(NAMES, NAMES, st.none() | REVISIONS.filter(str.isascii))
def test_an_address_is_parsed_as_it_is_written(org: str, name: str, revision: str | None) -> None:
    if name.endswith(".git"):
        return
    address = hub.Address(f"{org}/{name}", revision)
    assert hub.parse(str(address)) == address
    assert hub.parse(address.repo, revision) == address


@given(st.text(alphabet="ab/.@-_~\\ \n:é", max_size=12))
def test_no_name_leads_out_of_the_cache(name: str) -> None:
    try:
        address = hub.parse(name)
    except UserError as error:
        assert "expected a branch, a tag or a commit" in str(error)
        return
    if address is not None:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", address.repo, re.ASCII)
        for part in (*address.repo.split("/"), *(address.revision or "x").split("/")):
            assert part and not part.startswith(".") and ".." not in part


@pytest.mark.parametrize(
    "name", ["discs", "./org/discs", "/org/discs", "a/b/c", "org/../x", "a--b/c"]
)
def test_other_names_are_not_requested_from_the_hub(server: Hub, name: str) -> None:
    with pytest.raises(UserError, match="not a folder, a shipped pipeline or org/name") as error:
        Pipeline.from_pretrained(name)
    message(error)
    assert server.requests == []


def test_two_revisions_or_one_of_a_local_pipeline(server: Hub, run: Path) -> None:
    with pytest.raises(UserError, match="got revision 'v2' as well") as error:
        Pipeline.from_pretrained(f"{ID}@v1", revision="v2")
    message(error)
    for local in (run, "fashion-mnist"):
        with pytest.raises(UserError, match="a local pipeline has no revisions, got 'v2'"):
            Pipeline.from_pretrained(local, revision="v2")
    assert server.requests == []


def test_a_folder_takes_precedence(
    discs: Repository, pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Hub
) -> None:
    pipe.save_pretrained(tmp_path / ID)
    monkeypatch.chdir(tmp_path)
    Pipeline.from_pretrained(ID)
    assert server.requests == []


# --- Downloads ------------------------------------------------------------------------------------


def test_a_download_has_the_files_of_a_pipeline_only(
    discs: Repository, server: Hub, pipe: Pipeline
) -> None:
    others = {
        "pytorch_model.bin": b"\x80",
        "../outside": b"x",
        "tokens/a.npy": b"x",
        "coarse/x.pt": b"",
    }
    discs.commit({**discs.files(), **others})
    pulled = Pipeline.from_pretrained(ID)
    assert same(pulled.sample(CLASSES, seed=3), pipe.sample(CLASSES, seed=3))
    assert pulled.origin == pipe.origin and pulled.class_names == pipe.class_names
    # No other file is requested.
    assert server.downloads() == sorted(PIPELINE_FILES)
    assert not list(Path(constants.HF_HUB_CACHE).parent.rglob("outside"))
    # Cached files are downloaded again only if forced.
    Pipeline.from_pretrained(ID)
    assert [path for _, path in server.requests] == [f"/api/models/{ID}/revision/main"]
    assert server.downloads() == []
    Pipeline.from_pretrained(ID, force_download=True)
    assert server.downloads() == sorted(PIPELINE_FILES)


def test_revisions(discs: Repository, pipe: Pipeline, other: Pipeline, tmp_path: Path) -> None:
    first = discs.branches["main"]
    discs.branches["v1"] = first
    other.save_pretrained(tmp_path / "other")
    discs.commit(read_files(tmp_path / "other"))
    old, new = (p.sample(CLASSES, seed=0) for p in (pipe, other))
    assert not torch.equal(old.codes, new.codes)
    for name in (f"{ID}@v1", f"{ID}@{first}"):
        assert same(Pipeline.from_pretrained(name).sample(CLASSES, seed=0), old)
    assert same(Pipeline.from_pretrained(ID, revision="v1").sample(CLASSES, seed=0), old)
    assert same(Pipeline.from_pretrained(ID).sample(CLASSES, seed=0), new)


def test_a_private_repository(discs: Repository, tmp_path: Path) -> None:
    discs.private = True
    with pytest.raises(UserError) as error:
        Pipeline.from_pretrained(ID)
    assert (
        "shows no such repository (401)\ncheck the name; if the repository is private"
        in message(error)
    )
    Pipeline.from_pretrained(ID, token=TOKEN, cache_dir=tmp_path / "mine")
    assert (tmp_path / "mine" / "models--org--discs").is_dir()
    assert not Path(constants.HF_HUB_CACHE).exists()


@pytest.mark.parametrize("way", ["HF_HUB_OFFLINE", "local_files_only", "unreachable", "500"])
def test_from_the_cache(
    discs: Repository, pipe: Pipeline, server: Hub, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    Pipeline.from_pretrained(ID)
    server.requests.clear()
    options: dict[str, Any] = {}
    match way:
        case "HF_HUB_OFFLINE":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        case "local_files_only":
            options = {"local_files_only": True}
        case "unreachable":
            monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        case _:
            server.faults.status = 500
    pulled = Pipeline.from_pretrained(ID, **options)
    assert same(pulled.sample(CLASSES, seed=0), pipe.sample(CLASSES, seed=0))
    assert server.downloads() == []
    with pytest.raises(UserError) as error:
        Pipeline.from_pretrained(f"{ID}@v9", **options)
    expected = {
        "unreachable": "cannot be reached\ncheck the network: [Errno 111] Connection refused",
        "500": "answered 500: Internal Server Error",
    }
    assert expected.get(way, "network access is disabled\nrun the command once without") in message(
        error
    )


def test_forced_downloads_need_the_network(discs: Repository) -> None:
    with pytest.raises(UserError, match="cannot be downloaded again without network access"):
        Pipeline.from_pretrained(ID, local_files_only=True, force_download=True)


def test_a_baseline_has_no_fine_model(server: Hub, baseline: Pipeline, tmp_path: Path) -> None:
    baseline.save_pretrained(tmp_path / "baseline")
    server.create(ID, read_files(tmp_path / "baseline"))
    pulled = Pipeline.from_pretrained(ID)
    assert pulled.fine is None
    assert same(pulled.sample(CLASSES, seed=0), baseline.sample(CLASSES, seed=0))


# --- Interrupted, damaged and missing files -------------------------------------------------------


def test_a_connection_that_is_cut_is_resumed(
    discs: Repository, server: Hub, pipe: Pipeline
) -> None:
    half = len(discs.files()[WEIGHTS]) // 2
    server.faults.cuts[WEIGHTS] = (half, 1)
    pulled = Pipeline.from_pretrained(ID)
    assert same(pulled.sample(CLASSES, seed=0), pipe.sample(CLASSES, seed=0))
    ranges = [re.fullmatch(r"bytes=(\d+)-", path) for m, path in server.requests if m == "RANGE"]
    assert [0 < int(found[1]) <= half for found in ranges if found] == [True]


def test_an_interrupted_download_is_continued_by_the_next_call(
    discs: Repository, server: Hub, pipe: Pipeline
) -> None:
    server.faults.cuts[WEIGHTS] = (5000, 1000)
    with pytest.raises(UserError, match=f"{ID}: the connection to the Hub .* was lost") as error:
        Pipeline.from_pretrained(ID)
    assert "run the command again" in message(error)
    # No incomplete file is left.
    cache = Path(constants.HF_HUB_CACHE)
    assert not list(cache.rglob(WEIGHTS)) and not list(cache.rglob("*.incomplete"))
    with pytest.raises(UserError, match="not completely, in the cache"):
        Pipeline.from_pretrained(ID, local_files_only=True)
    server.faults.cuts.clear()
    before = server.downloads()
    assert WEIGHTS in before
    pulled = Pipeline.from_pretrained(ID)
    assert same(pulled.sample(CLASSES, seed=0), pipe.sample(CLASSES, seed=0))
    assert server.downloads() == sorted({*PIPELINE_FILES} - ({*before} - {WEIGHTS}))


@pytest.mark.parametrize("damaged", [WEIGHTS, "pipeline.json"])
def test_a_file_that_does_not_match_its_hash_is_deleted(
    discs: Repository, server: Hub, pipe: Pipeline, damaged: str
) -> None:
    """Its size is right, which is all that huggingface_hub verifies."""
    server.faults.flipped.add(damaged)
    for _ in range(2):
        with pytest.raises(UserError) as error:
            Pipeline.from_pretrained(ID)
        expected = f"{ID}: {damaged}: does not match its hash; deleted\nrun the command again"
        assert expected in message(error)
    server.faults.flipped.clear()
    server.downloads()
    pulled = Pipeline.from_pretrained(ID)
    assert same(pulled.sample(CLASSES, seed=0), pipe.sample(CLASSES, seed=0))
    assert server.downloads() == [damaged]


def test_hashes_are_verified_after_a_killed_download(
    discs: Repository, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults.flipped.add(WEIGHTS)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hub, "verify", killed)
        Pipeline.from_pretrained(ID)
    with pytest.raises(UserError, match="does not match its hash"):
        Pipeline.from_pretrained(ID, local_files_only=True)


def test_hashes_are_verified_once(
    discs: Repository, saved: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[str] = []
    is_intact = hub.is_intact
    monkeypatch.setattr(
        hub, "is_intact", lambda path: (verified.append(path.name), is_intact(path))[1]
    )
    Pipeline.from_pretrained(ID)
    assert len(verified) == len(PIPELINE_FILES)
    Pipeline.from_pretrained(ID)
    assert len(verified) == len(PIPELINE_FILES)
    # The cache is still valid for huggingface_hub's own tools.
    report = huggingface_hub.scan_cache_dir()
    assert not report.warnings and report.size_on_disk == sum(
        len(saved[file]) for file in PIPELINE_FILES
    )


def test_files_are_compared_with_gits_hash(tmp_path: Path) -> None:
    """The hash of the empty file, and one from git's documentation."""
    assert git_sha1(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    content = b"what is up, doc?"
    name = git_sha1(content)
    assert name == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"
    (tmp_path / name).write_bytes(content)
    link = tmp_path / "link"
    link.symlink_to(name)
    assert hub.is_intact(link)
    (tmp_path / name).write_bytes(content + b"!")
    assert not hub.is_intact(link)


@pytest.mark.parametrize("missing", [WEIGHTS, "fine/config.json", "clusters/clusters.safetensors"])
def test_a_missing_file(discs: Repository, missing: str) -> None:
    discs.commit({path: content for path, content in discs.files().items() if path != missing})
    with pytest.raises(UserError) as error:
        Pipeline.from_pretrained(ID)
    assert message(error).startswith(f"{ID}: the repository has no {missing}\nexpected all files")


def test_a_repository_without_a_pipeline(server: Hub) -> None:
    server.create("org/words", {"config.json": b"{}", "model.safetensors": b"x"})
    with pytest.raises(UserError) as error:
        Pipeline.from_pretrained("org/words")
    assert message(error) == "org/words is not a pipeline: the repository has no pipeline.json"


def test_missing_repositories_and_revisions(
    discs: Repository, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for token, status in (("", 401), (TOKEN, 404)):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(UserError) as error:
            Pipeline.from_pretrained("org/nothing")
        expected = (
            f"org/nothing: not a local folder, and the Hub shows no such repository ({status})"
        )
        assert message(error).splitlines()[0] == expected
    with pytest.raises(UserError) as error:
        Pipeline.from_pretrained(f"{ID}@v9")
    assert message(error).startswith(f"{ID} has no revision 'v9'\n")
    monkeypatch.delenv("HF_TOKEN")
    discs.gated = True
    with pytest.raises(UserError) as error:
        Pipeline.from_pretrained(ID)
    assert f"request it at {server.address}/{ID}, and log in" in message(error)


def test_a_cache_that_cannot_be_written(discs: Repository, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*: (Not a directory|File exists)\n.*HF_HUB_CACHE"):
        Pipeline.from_pretrained(ID, cache_dir=tmp_path / "file")


# --- Uploads --------------------------------------------------------------------------------------


def test_a_pushed_pipeline_loads_as_it_was(logged_in: Hub, pipe: Pipeline, tmp_path: Path) -> None:
    address = pipe.push_to_hub("me/discs", license="mit", commit_message="First discs")
    repository = logged_in.repositories["me/discs"]
    assert address == f"{logged_in.address}/me/discs/commit/{repository.branches['main']}"
    assert repository.messages[-1] == "First discs" and not repository.private
    pushed = repository.files()
    assert sorted(pushed) == sorted((*PIPELINE_FILES, "README.md", "samples.png", ".gitattributes"))
    pulled = Pipeline.from_pretrained("me/discs")
    assert same(pulled.sample(CLASSES, seed=3), pipe.sample(CLASSES, seed=3))
    assert pulled.origin == {**pipe.origin, "license": "mit"}
    # Large files are uploaded in another way than the rest.
    pipe.save_pretrained(tmp_path / "saved", license="mit")
    assert {k: pushed[k] for k in PIPELINE_FILES} == {
        k: read_files(tmp_path / "saved")[k] for k in PIPELINE_FILES
    }
    licensed = Pipeline.from_pretrained(tmp_path / "saved")
    expected = card.text(licensed, "me/discs", with_image=True)
    assert pushed["README.md"].decode() == expected
    with Image.open(io.BytesIO(pushed["samples.png"])) as sheet:
        assert np.array_equal(np.asarray(sheet), np.asarray(card.sample_sheet(pipe)))


def test_a_training_can_start_from_a_pushed_pipeline(logged_in: Hub, pipe: Pipeline) -> None:
    pipe.push_to_hub("me/discs", image=False, evaluation="FID-Lite0: 20")
    pushed = logged_in.repositories["me/discs"].files()
    assert b"## Evaluation\n\nFID-Lite0: 20\n" in pushed["README.md"]
    start = open_start("me/discs@main")
    assert start.image_size == pipe.tokenizer.image_size
    assert start.to_json()["pipeline"] == start.origin()["pipeline"] == "me/discs@main"
    started = dataclasses.replace(pipe, origin={"from": start.origin()})
    assert "base_model: me/discs\n" in card.text(started)


def test_pushing_the_same_again_uploads_nothing(logged_in: Hub, pipe: Pipeline) -> None:
    pipe.push_to_hub("me/discs", image=False)
    before = logged_in.repositories["me/discs"].files()
    logged_in.requests.clear()
    pipe.push_to_hub("me/discs", image=False)
    assert logged_in.repositories["me/discs"].files() == before
    assert [path for method, path in logged_in.requests if method == "PUT"] == []


def test_a_push_to_a_branch_in_half_precision(logged_in: Hub, pipe: Pipeline) -> None:
    pipe.push_to_hub("me/discs", private=True, image=False)
    pipe.push_to_hub("me/discs@small", half=True, image=False)
    repository = logged_in.repositories["me/discs"]
    assert repository.private and set(repository.branches) == {"main", "small"}
    sizes = [len(repository.files(branch)[WEIGHTS]) for branch in ("main", "small")]
    assert sizes[1] < 0.6 * sizes[0]
    assert 'from_pretrained("me/discs@small")' in repository.files("small")["README.md"].decode()
    Pipeline.from_pretrained("me/discs@small")


def test_files_of_an_older_push_are_deleted(logged_in: Hub, pipe: Pipeline, saved: Files) -> None:
    mine = {"notes.txt": b"mine"}
    logged_in.create("me/discs", {**saved, **mine, "samples.png": b"old", "README.md": b"old"})
    pipe.push_to_hub("me/discs", image=False)
    pushed = logged_in.repositories["me/discs"].files()
    assert sorted(pushed) == sorted((*PIPELINE_FILES, "README.md", "notes.txt"))
    assert pushed["README.md"] != b"old"


def test_refused_pushes(server: Hub, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)

    def refusal(to: str, **options: Any) -> str:
        with pytest.raises(UserError) as error:
            pipe.push_to_hub(to, **options)
        return message(error)

    assert "got 'discs', expected org/name or org/name@branch" in refusal("discs")
    assert "refuses to be written to (401)\ncheck the name, and that your token" in refusal("me/x")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "others/discs: the Hub refuses to be written to (403)" in refusal("others/discs")
    assert '"license" must be one of apache-2.0' in refusal("me/x", license="mine", image=False)
    server.faults.status = 500
    assert "answered 500" in refusal("me/x")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "cannot be reached\ncheck the network" in refusal("me/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, and this needs the network" in refusal("me/x")
    assert sorted(server.repositories["me/x"].files()) == [".gitattributes"]


# --- Commands -------------------------------------------------------------------------------------


def test_ctf_push_uploads_the_pipeline_of_a_run(logged_in: Hub, run: Path, ctf: Command) -> None:
    assert (run / "tokens").is_dir()
    planned = ctf("push", run, "--to", "me/discs", "--dry-run")
    assert planned.out.strip() == (
        "would push the pipeline, a new README.md and samples.png to me/discs"
    )
    assert logged_in.requests == []
    result = ctf("push", run, "--to", "me/discs", "--private", "--license", "mit")
    assert result.code == 0
    assert result.out.startswith(f"{logged_in.address}/me/discs/commit/")
    pushed = logged_in.repositories["me/discs"]
    assert pushed.private
    assert sorted(pushed.files()) == sorted(
        (*PIPELINE_FILES, "README.md", "samples.png", ".gitattributes")
    )
    assert not any(path.endswith((".bin", ".pt", ".pkl", ".npy")) for path in pushed.files())


def test_ctf_push_keeps_an_edited_card(
    logged_in: Hub, pipe: Pipeline, ctf: Command, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    pipe.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    result = ctf("push", folder, "--to", "me/discs", "--license", "mit")
    assert result.code == 2 and "write the licence into its header instead" in result.err
    assert ctf("push", folder, "--to", "me/discs").code == 0
    pushed = logged_in.repositories["me/discs"].files()
    assert pushed["README.md"].decode().endswith("# Mine\n") and "samples.png" not in pushed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("sample", "org/nothing"), "shows no such repository (401)"),
        (("sample", f"{ID}@v9"), f"{ID} has no revision 'v9'"),
        (("sample", f"{ID}@../v9"), "got revision '../v9'"),
        (("sample", "org/words"), "org/words is not a pipeline"),
        (("tokenizer", "evaluate", "org/part", "--images", "x"), f"has no {WEIGHTS}"),
        (("push", ID, "--to", "discs", "--dry-run"), "got 'discs', expected org/name"),
        (("push", ID, "--to", "me/discs"), "refuses to be written to (401)"),
        (("push", "org/nothing", "--to", "me/discs"), "shows no such repository (401)"),
    ],
)
def test_errors_on_the_command_line(
    discs: Repository, server: Hub, ctf: Command, arguments: tuple[str, ...], expected: str
) -> None:
    server.create("org/words", {"config.json": b"{}"})
    server.create("org/part", {k: v for k, v in discs.files().items() if k != WEIGHTS})
    result = ctf(*arguments)
    assert result.code == 2 and expected in result.err
    lines = result.err.strip().splitlines()
    assert len(lines) <= 2 and lines[0].startswith("ctf: "), result.err


@pytest.mark.parametrize("fault", ["cut", "flipped", "500", "unreachable"])
def test_network_errors_on_the_command_line(
    discs: Repository, server: Hub, ctf: Command, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    match fault:
        case "cut":
            server.faults.cuts[WEIGHTS] = (5000, 1000)
        case "flipped":
            server.faults.flipped.add(WEIGHTS)
        case "500":
            server.faults.status = 500
        case _:
            monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    result = ctf("sample", ID)
    lines = result.err.strip().splitlines()
    assert result.code == 2 and len(lines) <= 2 and lines[0].startswith("ctf: "), result.err


# --- Other processes ------------------------------------------------------------------------------


def clean(home: Path, **more: str) -> dict[str, str]:
    """The environment of a process with another HF_HOME and no token."""
    others = {k: v for k, v in os.environ.items() if not k.upper().startswith(("HF_", "HUGGING"))}
    source = str(Path(package.__file__).parents[1])
    return {**others, "PYTHONPATH": source, "HF_HOME": str(home), **more}


def run_ctf(*arguments: str | Path, env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "ctf", *map(str, arguments), "--device", "cpu"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_processes_configured_by_the_environment(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    sheets = [tmp_path / "online.png", tmp_path / "offline.png"]
    with Hub() as running:
        push = ("push", tmp_path / "saved", "--to", "me/discs@v1", "--no-sheet")
        env = clean(tmp_path / "one", HF_ENDPOINT=running.address, HF_TOKEN=TOKEN)
        run_ctf(*push, env={**env, "HF_HUB_DISABLE_XET": "1"})
        running.downloads()
        env = clean(tmp_path / "another", HF_ENDPOINT=running.address)
        run_ctf("sample", "me/discs@v1", "--out", sheets[0], env=env)
        assert running.downloads() == sorted(PIPELINE_FILES)
    env["HF_HUB_OFFLINE"] = "1"
    run_ctf("sample", "me/discs@v1", "--out", sheets[1], env=env)
    assert sheets[0].read_bytes() == sheets[1].read_bytes()
