"""The studio behind a real nginx, with the configuration of the documentation and worse ones."""

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from ctf import Pipeline
from ctf.studio import guard
from ctf.studio.tasks import Limits
from ctf.studio.worker import Worker
from tests.serving import (
    LENGTH,
    LIMITS,
    expect_error,
    hold_steps,
    image_file,
    post,
    serving,
    wait_until,
)

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin:/sbin:/bin")
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "proxy.md"
NAME = "studio.example.org"
STREAM = {"Accept": "text/event-stream"}
HTTP = """
daemon off;
master_process off;
pid nginx.pid;
error_log error.log;
events {{ }}
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    {servers}
}}
"""
# As people write it: another Host, HTTP/1.0, compression, short timeouts, paths cut off wrongly.
CARELESS = """
server {
    listen 8081;
    proxy_read_timeout 1s;
    gzip on; gzip_min_length 1; gzip_proxied any; gzip_types *;
    location /short { proxy_pass http://127.0.0.1:7860/; }
    location /raw/ { proxy_pass http://127.0.0.1:7860; }
    location /user/name/proxy/7860/ { proxy_pass http://127.0.0.1:7860/; }
}
"""

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is missing: apt-get install nginx")


def guide() -> str:
    """The server of the documentation."""
    (block,) = re.findall(r"```nginx\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    return str(block)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@contextmanager
def nginx(folder: Path, url: str) -> Iterator[tuple[str, str]]:
    """Run nginx in front of a studio; yield the URLs of its two servers."""
    ports = {"7860;": f"{httpx2.URL(url).port};", "7860/;": f"{httpx2.URL(url).port}/;"}
    ports |= {"listen 8080": f"listen {free_port()}", "listen 8081": f"listen {free_port()}"}
    text = HTTP.format(servers=guide() + CARELESS)
    for old, new in ports.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text)
    command = [str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "error.log"]
    with subprocess.Popen(command) as process:
        try:
            urls = [f"http://127.0.0.1:{port}" for port in re.findall(r"listen (\d+)", text)]
            for one in urls:
                wait_until(lambda one=one: is_listening(one))
            yield urls[0], urls[1]
        finally:
            process.terminate()


def is_listening(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", httpx2.URL(url).port)) == 0


@pytest.fixture(scope="module")
def proxies(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    limits = Limits(**{**vars(LIMITS), "silence": 0.1})
    hosts = {*guard.LOOPBACK, NAME}
    with (
        serving([worker], limits, hosts=hosts, token="word", root_path="/raw") as url,
        nginx(tmp_path_factory.mktemp("nginx"), url) as urls,
    ):
        yield urls


PATHS = ["/ctf/", "/short/", "/raw/", "/user/name/proxy/7860/"]
TOKEN = {"X-CTF-Token": "word"}


@contextmanager
def open_client(proxies: tuple[str, str], path: str) -> Iterator[httpx2.Client]:
    base = proxies[path != "/ctf/"] + path
    with httpx2.Client(base_url=base, timeout=60, headers=TOKEN) as client:
        yield client


@pytest.fixture(params=PATHS)
def client(request: pytest.FixtureRequest, proxies: tuple[str, str]) -> Iterator[httpx2.Client]:
    with open_client(proxies, request.param) as client:
        yield client


@pytest.fixture
def documented(proxies: tuple[str, str]) -> Iterator[httpx2.Client]:
    with open_client(proxies, "/ctf/") as client:
        yield client


def test_all_files_and_endpoints_are_found_under_the_path(client: httpx2.Client) -> None:
    for page in ("", "docs"):
        text = client.get(page).text
        for link in re.findall(r'(?:src|href)="([^"#]+)"', text):
            assert client.get(client.base_url.join(link)).status_code == 200
    assert client.get("v1/models").json()["models"][0]["name"] == "run"
    assert client.get("docs/", follow_redirects=True).url == client.base_url.join("docs")
    (server,) = client.get("openapi.json").json()["servers"]
    assert client.base_url.join("openapi.json").join(server["url"]) == client.base_url


def test_events_arrive_one_by_one(client: httpx2.Client, pipe: Pipeline) -> None:
    body = {"classes": [0], "preview": False}
    with (
        hold_steps(pipe, again_after=LENGTH // 4) as (gate, steps),
        client.stream("POST", "v1/generate", json=body, headers=STREAM) as response,
    ):
        assert response.headers["Cache-Control"] == "no-store, no-transform"
        if client.base_url.path == "/ctf/":  # for another nginx in front of this one
            assert response.headers["X-Accel-Buffering"] == "no"
        lines = response.iter_lines()
        assert "event: queued" in lines  # while the first step waits for the gate
        gate.set()
        assert "event: row" in lines  # while the second row does
        wait_until(lambda: len(steps) == LENGTH // 4 + 1)
        gate.set()
        assert "event: done" in lines


def test_comments_keep_a_silent_stream_open(client: httpx2.Client, pipe: Pipeline) -> None:
    """Of the proxies, all but the documented one close connections after 1 second of silence."""
    with (
        hold_steps(pipe) as (gate, _),
        client.stream("POST", "v1/generate", json={"classes": [0]}, headers=STREAM) as response,
    ):
        lines = response.iter_lines()
        assert all(": waiting" in lines for _ in range(15))
        gate.set()
        assert "event: done" in lines


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
def test_a_client_that_leaves_cancels_its_request(
    documented: httpx2.Client, pipe: Pipeline, worker: Worker, accept: str
) -> None:
    url = documented.base_url
    with hold_steps(pipe) as (gate, steps):
        with socket.create_connection((url.host, url.port)) as connection:
            connection.sendall(
                "POST /ctf/v1/generate HTTP/1.1\r\nHost: localhost\r\nX-CTF-Token: word\r\n"
                f"Content-Type: application/json\r\nAccept: {accept}\r\n"
                'Content-Length: 15\r\n\r\n{"classes":[0]}'.encode()
            )
            wait_until(lambda: steps)
        wait_until(lambda: all(job.cancelled for job in worker.running))
        gate.set()
        wait_until(lambda: worker.state()["running"] == 0)
        assert len(steps) == 1


def test_names_and_origins_behind_a_proxy(documented: httpx2.Client) -> None:
    own = f"http://{documented.base_url.netloc.decode()}"

    def status(host: str | None = None, **headers: str) -> int:
        headers = {**({} if host is None else {"Host": host}), **headers}
        body = {"classes": [0], "preview": False}
        return documented.post("v1/generate", json=body, headers=headers).status_code

    assert status() == status(Origin=own) == 200
    assert status(NAME, Origin=f"https://{NAME}") == 200
    assert status(f"{NAME}:8443", Origin=f"https://{NAME}:8443") == 200
    assert status(f"{NAME}:443", Origin=f"https://{NAME}") == 200
    assert status("evil.example") == status("evil.example", Origin="http://evil.example") == 421
    assert status("evil.example", **{"X-Forwarded-Host": NAME}) == 421
    assert status(NAME, Origin="http://evil.example") == 403
    forged = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "http"}
    assert status(NAME, Origin="http://evil.example", **forged) == 403


def test_origins_behind_a_proxy_that_sends_its_own_host(proxies: tuple[str, str]) -> None:
    def status(origin: str, site: str | None = None) -> int:
        headers = {"Origin": origin} | ({} if site is None else {"Sec-Fetch-Site": site})
        body = {"classes": [0], "preview": False}
        with open_client(proxies, "/short/") as client:
            return client.post("v1/generate", json=body, headers=headers).status_code

    assert status(f"https://{NAME}") == status(f"https://{NAME}", "same-origin") == 200
    assert status("http://localhost:8081", "same-origin") == 200  # in no option, but in browsers
    assert status("http://localhost:8081") == 403  # may be another program on another port
    for site in ("same-site", "cross-site"):
        assert status(f"https://{NAME}:8443", site) == 403
    assert status("http://evil.example") == status("http://evil.example", "same-origin") == 403
    assert status("null") == status("null", "cross-site") == 403


def test_the_token_beside_a_password_of_the_proxy(documented: httpx2.Client) -> None:
    basic = ("name", "password")  # nginx passes it on
    assert documented.get("v1/models", auth=basic).status_code == 200
    for token in ("", "wrong"):
        headers = {"X-CTF-Token": token}
        expect_error(documented.get("v1/models", headers=headers, auth=basic), 401)


def test_uploads_through_a_proxy(documented: httpx2.Client) -> None:
    png = {"Content-Type": "image/png"}
    file = image_file() + bytes(150_000)  # bytes after the end of a PNG file do no harm
    assert documented.post("v1/encode", content=file, headers=png).status_code == 200
    chunks = (file[i : i + 50_000] for i in range(0, len(file), 50_000))
    assert documented.post("v1/encode", content=chunks, headers=png).status_code == 200
    long = bytes(LIMITS.upload_bytes + 1)
    expect_error(documented.post("v1/encode", content=long, headers=png), 413, "200,000 bytes")
    body = b" " * (LIMITS.body_bytes + 1)
    headers = {"Content-Type": "application/json"}
    expect_error(documented.post("v1/generate", content=body, headers=headers), 413)
    assert "client_max_body_size 10m" in guide() and Limits().upload_bytes == 10 << 20


def test_the_rest_of_a_refused_body_is_received(url: str) -> None:
    """As nginx sends it: unread data would reset the connection, and lose the response."""
    address = httpx2.URL(url)
    head = (
        f"POST /v1/encode HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        f"Connection: close\r\nContent-Length: {2 * LIMITS.upload_bytes}\r\n\r\n"
    )
    half = bytes(LIMITS.upload_bytes)
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(head.encode() + half)
        wait_until(lambda: connection.recv(1, socket.MSG_PEEK))  # the response comes at once
        connection.sendall(half)
        response = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert response.startswith(b"HTTP/1.1 413") and b"200,000 bytes" in response


def test_concurrent_clients_through_a_proxy_get_their_own_images(
    documented: httpx2.Client, pipe: Pipeline
) -> None:
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(post, documented, "v1/generate", classes=[0], seed=i) for i in range(3)]
        for i, job in enumerate(jobs):
            codes = pipe.sample([0], i).codes[0].tolist()
            assert job.result()["pictures"][0]["codes"] == codes


def test_unchanged_files_are_not_sent_again_through_compression(proxies: tuple[str, str]) -> None:
    with open_client(proxies, "/short/") as client:
        first = client.get("page/app.js")
        assert first.headers["ETag"].startswith("W/") and first.headers["Content-Encoding"]
        again = client.get("page/app.js", headers={"If-None-Match": first.headers["ETag"]})
        assert again.status_code == 304
