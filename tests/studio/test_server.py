"""The studio's API: the pictures are the pipeline's, however they were drawn, and nothing that is
asked brings it down."""

import base64
import io
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

from ctf.pipelines import export
from ctf.pipelines.pipeline import Pipeline
from ctf.studio import guard, load, server
from ctf.studio.worker import Job, Limits, Worker
from tests.conftest import CLASSES, Command, picture
from tests.serving import serving

LENGTH = 16
LIMITS = Limits(
    images=8, waiting=4, seconds=20, body_bytes=100_000, upload_bytes=200_000, upload_pixels=10_000
)


@pytest.fixture(scope="module")
def worker(run: Path) -> Worker:
    (loaded,) = server.load([str(run)], torch.device("cpu"), "eager", LIMITS)
    for model in (loaded.pipe.coarse, loaded.pipe.fine):
        assert model is not None
        model.head.weight.mul_(8)  # training of seconds leaves it nearly blind
    return loaded


@pytest.fixture(scope="module")
def pipe(worker: Worker) -> Pipeline:
    return worker.pipe


@pytest.fixture(scope="module")
def address(worker: Worker) -> Iterator[str]:
    with serving([worker], LIMITS) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=address, timeout=60) as found:
        yield found


def post(client: httpx2.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def events(client: httpx2.Client, **body: Any) -> list[tuple[str, dict[str, Any]]]:
    accept = {"Accept": "text/event-stream"}
    with client.stream("POST", "/v1/generate", json=body, headers=accept) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.read().decode()
    found = re.findall(r"^event: (\w+)\ndata: (.*)\n$", text, re.M)
    return [(name, json.loads(data)) for name, data in found]


def image(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def file_of(shape: tuple[int, int] = (48, 40), kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    picture(0.3, 1).resize(shape).save(out, format=kind)
    return out.getvalue()


def mistaken(answer: httpx2.Response, status: int, *words: str) -> None:
    """Checks that a mistake was told as it should be."""
    assert answer.status_code == status, answer.text
    said = answer.json()
    assert set(said) <= {"reason", "where"} and said["reason"]
    assert "Traceback" not in answer.text
    for word in words:
        assert word in answer.text


@contextmanager
def held(pipe: Pipeline, again: int = -1) -> Iterator[tuple[threading.Event, list[int]]]:
    """No step of the coarse model ends until the event is set; the list has one entry for each.

    Args:
        again: after that many steps the event is cleared.
    """
    gate, steps = threading.Event(), []  # type: ignore[var-annotated]

    def wait(_: object, inputs: tuple[torch.Tensor], __: object) -> None:
        if len(steps) == again:
            gate.clear()
        steps.append(len(inputs[0]))
        assert gate.wait(30)

    hook = pipe.coarse.head.register_forward_hook(wait)
    try:
        yield gate, steps
    finally:
        gate.set()
        hook.remove()


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that nobody waits for any more, as the server saw it."""
    leave, found = Job.leave, []

    def watched(job: Job) -> None:
        leave(job)
        found.append(job)

    monkeypatch.setattr(Job, "leave", watched)
    return found


def until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- what is drawn --------------------------------------------------------------------------------


def test_pictures_are_the_pipelines(client: httpx2.Client, pipe: Pipeline) -> None:
    given = {"guidance": 3.0, "fine_guidance": 2.0, "fine_top_k": 3, "guidance_window": [0.1, 0.9]}
    answer = post(client, "/v1/generate", classes=["red", 0], count=2, seed=5, settings=given)
    expected = pipe.sample([2, 2, 0, 0], 5, **{**given, "guidance_window": (0.1, 0.9)})
    assert [p["seed"] for p in answer["pictures"]] == [5, 6, 7, 8]
    assert [p["class_name"] for p in answer["pictures"]] == ["red", "red", "blue", "blue"]
    for i, drawn in enumerate(answer["pictures"]):
        assert drawn["codes"] == expected.codes[i].tolist()
        assert drawn["coarse"] == expected.coarse[i].tolist()
        one = pipe.sample([drawn["class_number"]], drawn["seed"], **expected_settings(drawn))
        assert base64.b64decode(drawn["image"]) == export.png(one.images[0])


def expected_settings(drawn: dict[str, Any]) -> dict[str, Any]:
    stored = dict(drawn["settings"]["sampling"])
    return {**stored, "guidance_window": tuple(stored["guidance_window"])}


def test_events_grow_row_by_row(client: httpx2.Client, pipe: Pipeline) -> None:
    told = events(client, classes=["red", "blue"], seed=3)
    assert [name for name, _ in told] == ["queued", "row", "row", "row", "row", "done"]
    assert told[0][1] == {"ahead": 0}
    expected = list(pipe.stream(["red", "blue"], 3))
    for (_, said), grown in zip(told[1:-1], expected[:-1], strict=True):
        assert (said["rows"], said["total"]) == (grown.rows, grown.total)
        for shown, drawn in zip(said["images"], grown.images, strict=True):
            assert (np.asarray(image(shown)) == np.asarray(drawn)).all()
    assert told[-1][1] == post(client, "/v1/generate", classes=["red", "blue"], seed=3)
    quiet = events(client, classes=["red"], preview=False)
    assert all(said["images"] == [] for name, said in quiet if name == "row")


def test_redrawn_around_what_is_kept(client: httpx2.Client, pipe: Pipeline) -> None:
    codes = [(5 * i) % 64 for i in range(LENGTH)]
    keep = [i < 6 for i in range(LENGTH)]
    body = {"classes": ["red"], "count": 3, "seed": 9, "codes": [codes], "keep": [keep]}
    answer = post(client, "/v1/generate", **body)
    expected = pipe.sample(["red"] * 3, 9, codes=torch.tensor(codes), known=torch.tensor(keep))
    assert [p["codes"] for p in answer["pictures"]] == expected.codes.tolist()
    assert all(p["codes"][:6] == codes[:6] for p in answer["pictures"])
    rows = [said for name, said in events(client, **body) if name == "row"]
    previews = list(
        pipe.stream(["red"] * 3, 9, codes=torch.tensor(codes), known=torch.tensor(keep))
    )
    assert (np.asarray(image(rows[0]["images"][1])) == np.asarray(previews[0].images[1])).all()


def test_details_again(client: httpx2.Client, pipe: Pipeline) -> None:
    (first,) = post(client, "/v1/generate", classes=[1], seed=2)["pictures"]
    body = {"classes": [1, 1], "coarse": [first["coarse"]], "seed": 2}
    same, other = post(client, "/v1/refine", **body)["pictures"]
    assert same["image"] == first["image"] and same["codes"] == first["codes"]
    assert other["coarse"] == first["coarse"] and other["codes"] != first["codes"]
    assert "coarse" in same["settings"] and "codes" not in same["settings"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_from_outside(client: httpx2.Client, pipe: Pipeline, kind: str) -> None:
    data = file_of(kind=kind)
    answer = client.post(
        "/v1/encode?class=green", content=data, headers={"Content-Type": f"image/{kind.lower()}"}
    )
    assert answer.status_code == 200, answer.text
    said = answer.json()
    codes_1L = pipe.encode([Image.open(io.BytesIO(data))])
    assert said["picture"]["codes"] == codes_1L[0].tolist()
    labels_1L = pipe.clusters.labels_V[codes_1L]
    assert said["picture"]["coarse"] == labels_1L[0].tolist()
    assert (np.asarray(image(said["coarse"])) == np.asarray(pipe.preview(labels_1L)[0])).all()
    assert image(said["original"]).size == image(said["picture"]["image"]).size == (32, 32)
    assert said["picture"]["class_name"] == "green"


def test_inside_a_cluster(client: httpx2.Client, pipe: Pipeline) -> None:
    (drawn,) = post(client, "/v1/generate", classes=[0], seed=1)["pictures"]
    position = 6
    said = post(
        client, "/v1/members", **{"class": 0, "codes": drawn["codes"], "position": position}
    )
    assert said["cluster"] == drawn["coarse"][position]
    members = {member["code"] for member in said["members"]}
    assert members == {
        code for code, label in enumerate(pipe.clusters.labels_V.tolist())
        if label == said["cluster"]
    }  # fmt: skip
    chances = [member["probability"] for member in said["members"]]
    assert chances == sorted(chances, reverse=True) and sum(chances) == pytest.approx(1)
    for member in said["members"]:
        if member["code"] == drawn["codes"][position]:
            assert member["image"] == drawn["image"]
        else:
            assert member["image"] != drawn["image"]


# --- the same bytes from the command line ---------------------------------------------------------


def every_kind(client: httpx2.Client) -> list[dict[str, Any]]:
    """A picture that was drawn, redrawn, refined, and one from outside."""
    (drawn,) = post(
        client, "/v1/generate", classes=["green"], seed=11, settings={"guidance": 2.5, "top_k": 5}
    )["pictures"]
    keep = [i % 3 > 0 for i in range(LENGTH)]
    body = {"classes": [1], "seed": 12, "codes": [drawn["codes"]], "keep": [keep]}
    (redrawn,) = post(client, "/v1/generate", **body)["pictures"]
    body = {"classes": [1], "seed": 13, "coarse": [redrawn["coarse"]]}
    (refined,) = post(
        client, "/v1/refine", **body, settings={"fine_temperature": 1.5}
    )["pictures"]  # fmt: skip
    outside = client.post(
        "/v1/encode", content=file_of(), headers={"Content-Type": "image/png"}
    ).json()["picture"]
    return [drawn, redrawn, refined, outside]


def test_settings_draw_the_same_bytes(
    client: httpx2.Client, worker: Worker, run: Path, tmp_path: Path, ctf: Command
) -> None:
    pipe = worker.pipe
    for i, drawn in enumerate(every_kind(client)):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(drawn["settings"]))
        again = export.sample(pipe, export.load(path), decode_separately=True)
        assert export.png(again.images[0]) == base64.b64decode(drawn["image"])
        assert again.codes[0].tolist() == drawn["codes"]


def test_the_command_draws_the_same_bytes(run: Path, tmp_path: Path, ctf: Command) -> None:
    (worker,) = server.load([str(run)], torch.device("cpu"), "auto", LIMITS)
    with (
        serving([worker], LIMITS) as address,
        httpx2.Client(base_url=address, timeout=60) as client,
    ):
        drawn = every_kind(client)
    for i, one in enumerate(drawn):
        path, out = tmp_path / f"{i}.json", tmp_path / f"{i}.png"
        path.write_text(json.dumps(one["settings"]))
        result = ctf("sample", run, "--settings", path, "--out", out)
        assert result.code == 0, result.err
        assert out.read_bytes() == base64.b64decode(one["image"])


# --- together, and apart --------------------------------------------------------------------------


def test_waiting_requests_are_drawn_together(client: httpx2.Client, pipe: Pipeline) -> None:
    """One batch for all that wait and have the same settings; each gets its own picture."""
    with ThreadPoolExecutor(4) as pool, held(pipe) as (gate, steps):
        first = pool.submit(post, client, "/v1/generate", classes=[0], seed=100)
        until(lambda: steps)
        others = [
            pool.submit(post, client, "/v1/generate", classes=[i % 3], count=i, seed=200 + 10 * i)
            for i in (1, 2, 3)
        ]
        until(lambda: client.get("/health").json()["models"]["run"]["waiting"] == 3)
        gate.set()
        answers = [first.result(), *(other.result() for other in others)]
    # With guidance, the rows of a step are twice the images.
    assert steps == [2] * LENGTH + [12] * LENGTH
    for answer in answers:
        for drawn in answer["pictures"]:
            alone = pipe.sample([drawn["class_number"]], drawn["seed"])
            assert drawn["codes"] == alone.codes[0].tolist()


def test_other_settings_are_another_batch(client: httpx2.Client, pipe: Pipeline) -> None:
    with ThreadPoolExecutor(4) as pool, held(pipe) as (gate, steps):
        first = pool.submit(post, client, "/v1/generate", classes=[0])
        until(lambda: steps)
        others = [
            pool.submit(post, client, "/v1/generate", classes=[1], settings={"guidance": guidance})
            for guidance in (1.0, 3.0, 1.0)
        ]
        until(lambda: client.get("/health").json()["models"]["run"]["waiting"] == 3)
        gate.set()
        for answer in (first, *others):
            answer.result()
    assert sorted(steps) == sorted([2] * 2 * LENGTH + [2] * LENGTH)


def test_who_leaves_is_cancelled_within_a_step(
    client: httpx2.Client, pipe: Pipeline, left: list[Job]
) -> None:
    body = json.dumps({"classes": [0]}).encode()
    for accept in ("application/json", "text/event-stream"):
        left.clear()
        with held(pipe) as (gate, steps):
            asking = ask(client, body, accept)
            until(lambda: steps)
            asking.close()
            until(lambda: left)
            gate.set()
            until(lambda: client.get("/health").json()["models"]["run"]["running"] == 0)
            assert len(steps) == 1  # that which was being taken


def test_who_stays_keeps_the_batch_and_who_leaves_does_not(
    client: httpx2.Client, pipe: Pipeline, left: list[Job]
) -> None:
    expected = pipe.sample([1, 1], 40)
    with ThreadPoolExecutor(2) as pool, held(pipe, again=LENGTH) as (gate, steps):
        first = pool.submit(post, client, "/v1/generate", classes=[0])
        until(lambda: steps)
        leaves = ask(client, json.dumps({"classes": [0], "count": 5}).encode(), "text/event-stream")
        stays = pool.submit(post, client, "/v1/generate", classes=[1], count=2, seed=40)
        until(lambda: client.get("/health").json()["models"]["run"]["waiting"] == 2)
        gate.set()
        first.result()
        until(lambda: len(steps) > LENGTH)
        leaves.close()
        until(lambda: any(job.size == 5 for job in left))
        gate.set()
        codes = [drawn["codes"] for drawn in stays.result()["pictures"]]
    assert codes == expected.codes.tolist()
    assert steps[LENGTH:] == [14] + [4] * (LENGTH - 1)


def ask(client: httpx2.Client, body: bytes, accept: str) -> socket.socket:
    """A request whose answer is not waited for."""
    url = client.base_url
    asking = socket.create_connection((url.host, url.port))
    asking.sendall(
        f"POST /v1/generate HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
        f"Accept: {accept}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    return asking


def test_a_full_line_sends_away(client: httpx2.Client, pipe: Pipeline) -> None:
    with ThreadPoolExecutor(8) as pool, held(pipe) as (gate, steps):
        first = pool.submit(post, client, "/v1/generate", classes=[0])
        until(lambda: steps)
        waiting = [
            pool.submit(post, client, "/v1/generate", classes=[0], seed=i)
            for i in range(LIMITS.waiting)
        ]
        until(lambda: client.get("/health").json()["models"]["run"]["waiting"] == LIMITS.waiting)
        answer = client.post("/v1/generate", json={"classes": [0]})
        mistaken(answer, 429, "too many requests wait")
        assert int(answer.headers["Retry-After"]) >= 1
        gate.set()
        for one in (first, *waiting):
            one.result()
    assert client.post("/v1/generate", json={"classes": [0]}).status_code == 200


def test_time_is_limited(worker: Worker) -> None:
    limits = Limits(seconds=0.5)
    with (
        serving([worker], limits) as address,
        httpx2.Client(base_url=address, timeout=60) as client,
        held(worker.pipe) as (gate, steps),
    ):
        mistaken(client.post("/v1/generate", json={"classes": [0]}), 429, "0.5 seconds")
        assert events(client, classes=[0])[-1][0] == "error"
        gate.set()
        until(lambda: worker.state() == {"waiting": 0, "running": 0})
        assert len(steps) == 1


def test_many_at_once(run: Path) -> None:
    """The short form of `python -m ctf.studio.load`."""
    found = load.measure(str(run), clients=40, seconds=2, alone=0.5)
    assert found.mistakes() == []
    assert found.answers >= 40
    assert found.memory[0] > 0 or not Path("/proc/self/status").exists()


# --- what is refused ------------------------------------------------------------------------------

CODES, KEEP = [[0] * LENGTH], [[True] * LENGTH]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("generate", {}, ["classes"]),
        ("generate", {"classes": []}, ["classes"]),
        ("generate", {"classes": ["rad"]}, ["did you mean 'red'"]),
        ("generate", {"classes": [3]}, ["class 3 of 3"]),
        ("generate", {"classes": [True]}, ["classes"]),
        ("generate", {"classes": [0] * 9}, ["got 9 images, expected 8 or fewer"]),
        ("generate", {"classes": [0], "count": 9}, ["got 9 images"]),
        ("generate", {"classes": [0], "count": 10**30}, ["count"]),
        ("generate", {"classes": [0], "seed": 2**63}, ["seed"]),
        ("generate", {"classes": [0, 0], "seed": 2**63 - 1}, ["64 bits"]),
        ("generate", {"classes": [0], "sed": 1}, ["sed"]),
        ("generate", {"classes": [0], "model": "../run"}, ["no model '../run'", "run"]),
        ("generate", {"classes": [0], "model": "/etc/passwd"}, ["no model"]),
        ("generate", {"classes": [0], "settings": {"temperature": 0}}, ["temperature"]),
        ("generate", {"classes": [0], "settings": {"guidance": 1e300}}, ["guidance"]),
        ("generate", {"classes": [0], "settings": {"guidance_window": [0.5, 0.5]}}, ["window"]),
        ("generate", {"classes": [0], "settings": {"heat": 1}}, ["heat"]),
        ("generate", {"classes": [0], "codes": CODES}, ["expected both or neither"]),
        ("generate", {"classes": [0], "codes": [[0] * 15], "keep": KEEP}, ["of 15, expected"]),
        ("generate", {"classes": [0], "codes": CODES * 2, "keep": KEEP}, ["got 2 lists"]),
        ("generate", {"classes": [0], "codes": [[64] * LENGTH], "keep": KEEP}, ["0 to 63"]),
        ("generate", {"classes": [0], "codes": [[-1] * LENGTH], "keep": KEEP}, ["0 to 63"]),
        ("refine", {"classes": [0], "coarse": [[8] * LENGTH]}, ["0 to 7"]),
        ("refine", {"classes": [0]}, ["coarse"]),
        ("members", {"class": 0, "codes": [0] * LENGTH, "position": 16}, ["position"]),
        ("members", {"class": 0, "codes": [64] * LENGTH, "position": 0}, ["0 to 63"]),
    ],
)  # fmt: skip
def test_bad_requests(
    client: httpx2.Client, path: str, body: dict[str, Any], words: list[str]
) -> None:
    mistaken(client.post(f"/v1/{path}", json=body), 422, *words)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ('{"classes": [0], "seed": NaN}', 422),
        ('{"classes": [0], "settings": {"guidance": Infinity}}', 422),
        ('{"classes": [0], "settings": {"guidance": -Infinity}}', 422),
        ('{"classes": [0], "settings": {"temperature": 1e999}}', 422),
        ('{"classes": [0], "seed": ' + "9" * 5000 + "}", 400),
        ('{"classes": ["\\ud800"]}', 422),
        ('{"classes": ["' + "x" * 300 + '"]}', 422),
        ("[" * 50_000, 400),
        ('{"classes": [0]', 400),
        ("", 422),
        ("null", 422),
        ("\x00", 400),
    ],
)
def test_bad_json(client: httpx2.Client, text: str, status: int) -> None:
    json_type = {"Content-Type": "application/json"}
    mistaken(client.post("/v1/generate", content=text.encode(), headers=json_type), status)


def test_bodies_are_limited(client: httpx2.Client) -> None:
    json_type = {"Content-Type": "application/json"}
    long = b" " * (LIMITS.body_bytes + 1)
    mistaken(client.post("/v1/generate", content=long, headers=json_type), 413, "100,000 bytes")
    # In chunks of no stated length.
    chunks = (b" " * 10_000 for _ in range(11))
    mistaken(client.post("/v1/generate", content=chunks, headers=json_type), 413, "100,000 bytes")
    image_type = {"Content-Type": "image/png"}
    long = b" " * (LIMITS.upload_bytes + 1)
    mistaken(client.post("/v1/encode", content=long, headers=image_type), 413, "200,000 bytes")


def test_pictures_that_cannot_be_read(client: httpx2.Client) -> None:
    def encode(data: bytes, kind: str = "image/png", query: str = "") -> httpx2.Response:
        return client.post(f"/v1/encode{query}", content=data, headers={"Content-Type": kind})

    mistaken(encode(b""), 422, "got no picture")
    mistaken(encode(b"<svg/>"), 422, "unknown format")
    mistaken(encode(file_of()[:500]), 422, "corrupt")
    mistaken(encode(file_of((101, 100))), 422, "101 x 100 pixels, expected 10,000 or fewer")
    mistaken(encode(file_of(), "text/plain"), 415, "Content-Type: image/")
    mistaken(encode(file_of(), query="?class=violet"), 422, "unknown class")
    mistaken(encode(file_of(), query="?model=other"), 422, "no model")
    assert encode(file_of((100, 100))).status_code == 200


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_bombs_are_not_unpacked(client: httpx2.Client, side: int) -> None:
    """A picture of 100 or 400 million pixels in a few kilobytes is refused by its header."""
    out = io.BytesIO()
    Image.new("1", (side, side)).save(out, format="PNG")
    assert len(out.getvalue()) < LIMITS.upload_bytes
    began = time.monotonic()
    answer = client.post(
        "/v1/encode", content=out.getvalue(), headers={"Content-Type": "image/png"}
    )
    mistaken(answer, 422, "expected 10,000 or fewer")
    assert time.monotonic() - began < 2


def test_a_slow_request_is_given_up(worker: Worker) -> None:
    with serving([worker], Limits(upload_seconds=0.3)) as address:
        url = httpx2.URL(address)
        with socket.create_connection((url.host, url.port), timeout=20) as asking:
            asking.sendall(
                b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            assert asking.recv(1000).startswith(b"HTTP/1.1 408 ")


# --- security -------------------------------------------------------------------------------------


def test_headers_are_strict(client: httpx2.Client) -> None:
    for path in ("/", "/docs", "/page/app.js", "/v1/models", "/nothing"):
        headers = client.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["X-Frame-Options"] == "DENY"


def test_the_page_has_nothing_inline_and_nothing_from_elsewhere(client: httpx2.Client) -> None:
    for path in ("/", "/docs"):
        text = client.get(path).text
        assert not re.search(r"<script(?![^>]* src=\"/page/)|<style| style=| on\w+=", text)
        for link in re.findall(r'(?:src|href)="([^"#]+)"', text):
            assert client.get(link).status_code == 200
            assert link.startswith("/")
    for path in server.PAGE.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text
        assert client.get(f"/page/{path.name}").status_code == (
            200 if path.suffix != ".html" else 404
        )


def test_unchanged_files_are_not_sent_again(client: httpx2.Client) -> None:
    first = client.get("/page/app.js")
    again = client.get("/page/app.js", headers={"If-None-Match": first.headers["ETag"]})
    assert again.status_code == 304 and again.content == b""


@pytest.mark.parametrize(
    "path",
    ["/page/../server.py", "/page/%2e%2e/server.py", "/page//etc/passwd", "/..%2f..%2fetc/passwd",
     "/page/app.js%00.html", "/page/", "/page/index.html"],
)  # fmt: skip
def test_no_path_reaches_the_files(client: httpx2.Client, path: str) -> None:
    url = client.base_url
    with socket.create_connection((url.host, url.port), timeout=20) as asking:
        asking.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert asking.recv(1000).startswith(b"HTTP/1.1 404 ")


def test_only_this_machine_by_its_name(client: httpx2.Client) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "[", ""):
        mistaken(client.get("/v1/models", headers={"Host": host}), 421)
    for host in ("localhost", "localhost:99", "127.0.0.1:7860", "[::1]:7860"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_other_sites_cannot_ask(client: httpx2.Client) -> None:
    body = {"classes": [0]}
    for origin in ("http://evil.example", "null", "http://localhost:1", "http://["):
        answer = client.post("/v1/generate", json=body, headers={"Origin": origin})
        mistaken(answer, 403)
    own = str(client.base_url).rstrip("/")
    assert client.post("/v1/generate", json=body, headers={"Origin": own}).status_code == 200


def test_token(worker: Worker) -> None:
    more = {"hosts": None, "token": "w\u00f6rd", "embedders": ["https://huggingface.co"]}
    with serving([worker], LIMITS, **more) as address, httpx2.Client(base_url=address) as client:
        assert client.get("/", headers={"Host": "any.example"}).status_code == 200
        policy = client.get("/health").headers["Content-Security-Policy"]
        assert "frame-ancestors https://huggingface.co" in policy
        assert "X-Frame-Options" not in client.get("/").headers
        for given in ({}, {"Authorization": "Bearer word"}, {"Authorization": b"w\xc3\xb6rd"},
                      {"Authorization": b"Basic w\xc3\xb6rd"}):  # fmt: skip
            answer = client.get("/v1/models", headers=given)  # type: ignore[arg-type]
            mistaken(answer, 401, "Bearer TOKEN")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        bearer = {"Authorization": "Bearer w\u00f6rd".encode()}
        assert client.get("/v1/models", headers=bearer).status_code == 200


# --- any request ----------------------------------------------------------------------------------


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def values(
    schema: dict[str, Any], known: dict[str, Any], fits: bool, name: str = ""
) -> st.SearchStrategy[Any]:
    """Values of a JSON schema, as OpenAPI has it: those that nearly always fit, or often do not."""
    if "$ref" in schema:
        return values(known[schema["$ref"].rsplit("/", 1)[-1]], known, fits, name)
    if "anyOf" in schema:
        return st.one_of([values(one, known, fits, name) for one in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    match schema.get("type"):
        case "object":
            required = set(schema.get("required", ()))
            fields = {
                key: values(inner, known, fits, key)
                for key, inner in schema.get("properties", {}).items()
            }
            return st.fixed_dictionaries(
                {key: inner for key, inner in fields.items() if key in required},
                optional={key: inner for key, inner in fields.items() if key not in required},
            )
        case "array" if "prefixItems" in schema:
            pair = [values(item, known, fits, name) for item in schema["prefixItems"]]
            return st.tuples(*pair).map(sorted if fits else list)
        case "array":
            item = values(schema["items"], known, fits, name)
            of_tokens = schema["items"].get("type") in ("integer", "boolean")
            sizes = st.sampled_from([LENGTH if of_tokens else 1] if fits else [1, 2, 3, LENGTH])
            return sizes.flatmap(lambda n: st.lists(item, min_size=n, max_size=n))
        case "integer" if fits:
            return st.integers(max(low or 0, 0), 2)
        case "integer":
            ends = [end + by for end in (low, high) if end is not None for by in (-1, 0, 1)]
            near = st.integers(-2, 70)
            return near | st.sampled_from(ends) if ends else near
        case "number":
            return st.floats(low, high) if fits else st.floats(low, high) | st.floats()
        case "string":
            sensible = st.sampled_from(["run"] if name == "model" else CLASSES)
            return sensible if fits else sensible | st.text(max_size=20)
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case kind:
            raise AssertionError(f"the schema has a {kind}")


@pytest.fixture(scope="module")
def described(client: httpx2.Client) -> dict[str, Any]:
    return dict(client.get("/openapi.json").json())


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/refine", "/v1/members"])
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture,
    HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(data=st.data())
def test_any_request_is_answered_or_refused(
    client: httpx2.Client, described: dict[str, Any], path: str, data: st.DataObject
) -> None:
    known = described["components"]["schemas"]
    operation = described["paths"][path]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    fits = values(schema, known, True)
    body = data.draw(st.one_of(fits, fits, fits, values(schema, known, False), anything))
    generates = path == "/v1/generate" and isinstance(body, dict)
    if generates and None in (body.get("codes"), body.get("keep")) and data.draw(st.booleans()):
        # One without the other is wrong, which would be most that is drawn.
        body = {key: value for key, value in body.items() if key not in ("codes", "keep")}
    if isinstance(body, dict) and body and data.draw(st.integers(0, 4)) == 0:
        body[data.draw(st.sampled_from(sorted(body)))] = data.draw(anything)
    text = json.dumps(body)  # with NaN and Infinity, which are no JSON
    stream = data.draw(st.booleans())
    headers = {"Content-Type": "application/json"}
    if stream:
        headers["Accept"] = "text/event-stream"
    answer = client.post(path, content=text.encode(), headers=headers)
    event(f"status {answer.status_code}")
    assert answer.status_code in (200, 400, 422), answer.text
    if answer.status_code != 200:
        mistaken(answer, answer.status_code)
    elif stream:
        assert "\nevent: done\n" in answer.text


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    data=st.binary(max_size=200) | st.builds(
        lambda at, byte: file_of()[:at] + bytes([byte]) + file_of()[at + 1 :],
        st.integers(0, len(file_of()) - 1), st.integers(0, 255),
    ),
    query=st.dictionaries(st.sampled_from(["model", "class", "x"]), st.text(max_size=10)),
)  # fmt: skip
def test_any_upload_is_answered_or_refused(
    client: httpx2.Client, data: bytes, query: dict[str, str]
) -> None:
    try:
        answer = client.post(
            "/v1/encode", params=query, content=data, headers={"Content-Type": "image/png"}
        )
    except UnicodeEncodeError:
        return  # a lone surrogate, which no URL can have
    assert answer.status_code in (200, 422), answer.text
    if answer.status_code != 200:
        mistaken(answer, 422)


@given(path=st.text(max_size=20), method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD"]))
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_address_is_answered_or_refused(client: httpx2.Client, path: str, method: str) -> None:
    try:
        answer = client.request(method, "/" + path)
    except (UnicodeEncodeError, httpx2.InvalidURL):
        return
    assert answer.status_code < 500


def test_the_api_is_described(client: httpx2.Client, described: dict[str, Any]) -> None:
    assert set(described["paths"]) == {
        "/v1/generate", "/v1/refine", "/v1/members", "/v1/encode", "/v1/models", "/health",
    }  # fmt: skip
    said = client.get("/v1/models").json()
    (model,) = said["models"]
    assert model["name"] == "run" and model["class_names"] == list(CLASSES)
    assert (model["grid"], model["image_size"], model["images"]) == (4, 32, 8)
    assert client.get("/health").json()["status"] == "ok"


# --- the command ----------------------------------------------------------------------------------


def test_mistakes_of_the_command(
    run: Path, tmp_path: Path, ctf: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str | Path, words: str) -> None:
        result = ctf("studio", *arguments)
        assert result.code == 2 and words in result.err
        assert len(result.err.splitlines()) == 1

    refused(tmp_path / "none", "--port", "0", words="no pipeline")
    refused(run, run, "--port", "0", words="got two models called run")
    refused(words="got no model")
    refused(run, "--embed-in", "nowhere", words="expected an origin")
    refused(run, "--port", "99999", words="choose another --port")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(run, "--port", str(taken.getsockname()[1]), words="choose another --port")
    for name in [name for name in sys.modules if name.startswith("ctf.studio")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    refused(run, words="pip install 'ctf[studio]'")


def test_listens_at_this_machine_alone_by_default() -> None:
    from ctf.cli import pipelines

    assert pipelines.studio.__kwdefaults__["host"] in guard.LOOPBACK
