"""What protects a studio: limits on bodies, host names, origins, the token, headers."""

import socket

import httpx2
import pytest

from ctf.cli import publish
from ctf.studio import guard
from ctf.studio.tasks import Limits
from ctf.studio.worker import Worker
from tests.serving import LIMITS, expect_error, serving

JSON = {"Content-Type": "application/json"}


def test_bodies_are_limited(client: httpx2.Client) -> None:
    long = b" " * (LIMITS.body_bytes + 1)
    expect_error(client.post("/v1/generate", content=long, headers=JSON), 413, "100,000 bytes")
    chunks = (b" " * 10_000 for _ in range(11))  # without Content-Length
    expect_error(client.post("/v1/generate", content=chunks, headers=JSON), 413, "100,000 bytes")
    long = b" " * (LIMITS.upload_bytes + 1)
    headers = {"Content-Type": "image/png"}
    expect_error(client.post("/v1/encode", content=long, headers=headers), 413, "200,000 bytes")


def test_slow_bodies_are_refused(worker: Worker) -> None:
    with serving([worker], Limits(upload_seconds=0.3)) as address:
        url = httpx2.URL(address)
        with socket.create_connection((url.host, url.port), timeout=20) as connection:
            connection.sendall(
                b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("path", ["/", "/docs", "/page/app.js", "/v1/models", "/nothing"])
def test_headers_are_strict(client: httpx2.Client, path: str) -> None:
    headers = client.get(path).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["X-Frame-Options"] == "DENY"


def test_a_local_studio_is_served_under_local_host_names_only(client: httpx2.Client) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "[", ""):
        expect_error(client.get("/v1/models", headers={"Host": host}), 421)
    for host in ("localhost", "localhost:99", "127.0.0.1:7860", "[::1]:7860"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_allowed_hosts_are_names_addresses_and_patterns(worker: Worker) -> None:
    given = ("Studio.Example.org.", "*.sub.org", "b\u00fccher.example", "192.168.1.5", "[FE80::1]")
    hosts = {*guard.LOOPBACK, *map(guard.allowed_host, given)}
    with serving([worker], hosts=hosts) as url, httpx2.Client(base_url=url) as client:

        def status(host: str) -> int:
            return client.get("/health", headers={"Host": host}).status_code

        for host in ("studio.example.org", "STUDIO.example.org.:80", "a.sub.org", "a.b.sub.org:1",
                     "xn--bcher-kva.example", "192.168.1.5:7860", "[fe80::1]"):  # fmt: skip
            assert status(host) == 200, host
        for host in ("example.org", "sub.org", "asub.org", "a.sub.org.evil.org", "*.sub.org.x"):
            assert status(host) == 421, host
        refused = client.get("/health", headers={"Host": "other.example:80"})
        expect_error(refused, 421, "--allowed-hosts other.example")


def test_pages_of_other_origins_cannot_send_requests(client: httpx2.Client) -> None:
    body = {"classes": [0]}
    for origin in ("http://evil.example", "null", "http://localhost:1", "http://["):
        response = client.post("/v1/generate", json=body, headers={"Origin": origin})
        expect_error(response, 403)
    own = str(client.base_url).rstrip("/")
    assert client.post("/v1/generate", json=body, headers={"Origin": own}).status_code == 200


def test_a_token_is_required_by_the_api(worker: Worker) -> None:
    options = {"hosts": None, "token": "w\u00f6rd", "embedders": ["https://huggingface.co"]}
    with serving([worker], **options) as url, httpx2.Client(base_url=url) as client:
        assert client.get("/", headers={"Host": "any.example"}).status_code == 200
        policy = client.get("/health").headers["Content-Security-Policy"]
        assert "frame-ancestors https://huggingface.co" in policy
        assert "X-Frame-Options" not in client.get("/").headers
        for headers in ({}, {"Authorization": "Bearer word"}, {"Authorization": b"w\xc3\xb6rd"},
                        {"Authorization": b"Basic w\xc3\xb6rd"}):  # fmt: skip
            response = client.get("/v1/models", headers=headers)  # type: ignore[arg-type]
            expect_error(response, 401, "Bearer TOKEN")
            assert response.headers["WWW-Authenticate"] == "Bearer"
        bearer = {"Authorization": "Bearer w\u00f6rd".encode()}
        assert client.get("/v1/models", headers=bearer).status_code == 200


def test_the_command_listens_on_the_loopback_interface_by_default() -> None:
    assert publish.studio.__kwdefaults__["host"] in guard.LOOPBACK
