"""The files of the page, and the command that starts a studio."""

import base64
import hashlib
import re
import socket
import sys
from pathlib import Path

import httpx2
import pytest

from ctf.studio import server
from tests.conftest import Command


def test_the_page_has_no_inline_code_and_loads_nothing_from_other_sites(
    client: httpx2.Client,
) -> None:
    for path in ("/", "/docs"):
        text = client.get(path).text
        inline = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
        assert len(inline) == (path == "/")  # which the policy allows by its hash
        for code in inline:
            digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
            policy = client.get(path).headers["Content-Security-Policy"]
            assert f"script-src-elem 'self' 'sha256-{digest}';" in policy
        assert not re.search(r"<script(?!>|[^>]* src=\"page/)|<style| style=| on\w+=", text)
        for link in re.findall(r'(?:src|href)="([^"#]+)"', text):
            assert client.get(client.base_url.join(path).join(link)).status_code == 200
            assert not re.match(r"/|\w+:", link)  # relative, for proxies
    for file in server.PAGE.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text
        status = 404 if file.suffix == ".html" else 200
        assert client.get(f"/page/{file.name}").status_code == status


def test_unchanged_files_are_not_sent_again(client: httpx2.Client) -> None:
    first = client.get("/page/app.js")
    again = client.get("/page/app.js", headers={"If-None-Match": first.headers["ETag"]})
    assert again.status_code == 304 and again.content == b""


@pytest.mark.parametrize(
    "path",
    ["/page/../server.py", "/page/%2e%2e/server.py", "/page//etc/passwd", "/..%2f..%2fetc/passwd",
     "/page/app.js%00.html", "/page/", "/page/index.html"],
)  # fmt: skip
def test_no_other_files_can_be_read(client: httpx2.Client, path: str) -> None:
    url = client.base_url
    with socket.create_connection((url.host, url.port), timeout=20) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 404 ")


def test_errors_of_the_command(
    run: Path, tmp_path: Path, ctf: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: str | Path, words: str) -> None:
        result = ctf("studio", *arguments)
        assert result.code == 2 and words in result.err
        assert len(result.err.splitlines()) == 1

    refused(tmp_path / "none", "--port", "0", words="no pipeline")
    refused(run, run, "--port", "0", words="got two models named run")
    refused(words="got no model")
    refused(run, "--embed-in", "nowhere", words="expected an origin")
    for name in ("https://x.org", "x.org:80", "x.org/ctf", "", "a,b", "*x.org", "::g"):
        refused(run, "--allowed-hosts", name, words="expected a host name")
    for path in ("ctf", "/", "/a?b", "https://x.org/ctf"):
        refused(run, "--root-path", path, words="expected a path")
    refused(run, "--port", "99999", words="choose another --port")
    with socket.create_server(("127.0.0.1", 0)) as other:
        refused(run, "--port", str(other.getsockname()[1]), words="choose another --port")
    for name in [name for name in sys.modules if name.startswith("ctf.studio")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    refused(run, words="pip install 'ctf[studio]'")
