"""A server with the endpoints of the Hugging Face Hub that ctf uses, and faults to inject.

Its answers are those of the real one, as far as huggingface_hub reads them: small files are named
by git's SHA-1, large ones by SHA-256, and large ones are at another host (here: another name of the
same one).
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_made_for_tests"
LICENSES = ("apache-2.0", "mit", "openrail")
Files = dict[str, bytes]


def is_large(path: str) -> bool:
    """By the .gitattributes of a new repository."""
    return path.endswith((".safetensors", ".png"))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    private: bool = False
    gated: bool = False

    def commit(self, files: Files, branch: str = "main", message: str = "made by a test") -> str:
        """Make `files` the content of a branch; return the commit's name."""
        name = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[name] = dict(files)
        self.branches[branch] = name
        self.messages.append(message)
        return name

    def resolve(self, revision: str) -> str | None:
        name = self.branches.get(revision, revision)
        return name if name in self.commits else None

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.resolve(revision) or revision]


@dataclass
class Faults:
    status: int | None = None  # of every answer
    # Files whose connection is cut: at which byte, and how often.
    cuts: dict[str, tuple[int, int]] = field(default_factory=dict)
    flipped: set[str] = field(default_factory=set)  # files with a wrong byte


class Hub:
    """The server, in threads: `with Hub() as hub:` it listens at `hub.address`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}  # large files, by SHA-256
        self.requests: list[tuple[str, str]] = []  # method and path; ranges as the method "RANGE"
        self.faults = Faults()

    def __enter__(self) -> "Hub":
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def storage(self) -> str:
        return f"http://localhost:{self.server.server_port}"

    def create(self, name: str, files: Files | None = None, **settings: bool) -> Repository:
        self.repositories[name] = Repository(**settings)
        self.repositories[name].commit(files or {})
        return self.repositories[name]

    def downloads(self) -> list[str]:
        """The files whose content was requested since the last call."""
        requested = [
            path.partition("file=")[2] or path.rpartition("/resolve/")[2].partition("/")[2]
            for method, path in self.requests
            if method == "GET" and ("/resolve/" in path or path.startswith("/storage/"))
        ]
        self.requests.clear()
        return sorted(set(requested))


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", **more: Any) -> None:
        self.status, self.code, self.more = status, code, more


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("GET", r"/api/models/(\w+/[\w.-]+)(?:/revision/(.+))?", "info"),
        ("GET", r"/api/models/(\w+/[\w.-]+)/tree/([^/]+)", "tree"),
        ("HEAD|GET", r"/(\w+/[\w.-]+)/resolve/([^/]+)/(.+)", "file"),
        ("GET", r"/storage/(\w+)", "large_file"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/models/(\w+/[\w.-]+)/branch/(.+)", "branch"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/(\w+/[\w.-]+)/preupload/(.+)", "preupload"),
        ("POST", r"/(\w+/[\w.-]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/storage/(\w+)", "upload"),
        ("POST", r"/api/models/(\w+/[\w.-]+)/commit/(.+)", "commit"),
    )

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        self.hub.requests.append((self.command, self.path))
        if "Range" in self.headers:
            self.hub.requests.append(("RANGE", self.headers["Range"]))
        self.body = self.read_body()
        path = urlsplit(self.path).path
        try:
            if self.hub.faults.status is not None:
                raise Refusal(self.hub.faults.status)
            for methods, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, path)
                if match and re.fullmatch(methods, self.command):
                    getattr(self, name)(*(part and unquote(part) for part in match.groups()))
                    return
            raise Refusal(404)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            self.answer({"error": refusal.code, **refusal.more}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(
        self, content: Any, status: int = 200, headers: dict[str, str] | None = None, cut: int = -1
    ) -> None:
        """Send bytes, or anything else as JSON; only the first `cut` bytes unless negative."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut < 0 else body[:cut])
        self.close_connection = cut >= 0

    # --- Reading ----------------------------------------------------------------------------------

    def is_logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.is_logged_in()):
            raise Refusal(404 if self.is_logged_in() else 401, "RepoNotFound")
        if repository.gated and not self.is_logged_in():
            raise Refusal(403, "GatedRepo")
        return repository

    def revision(self, name: str, revision: str | None) -> tuple[str, Files]:
        repository = self.repository(name)
        commit = repository.resolve(revision or "main")
        if commit is None:
            raise Refusal(404, "RevisionNotFound")
        return commit, repository.commits[commit]

    def info(self, name: str, revision: str | None) -> None:
        commit, files = self.revision(name, revision)
        siblings = [{"rfilename": path} for path in files]
        self.answer({"id": name, "sha": commit, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        entries = []
        for path, content in self.revision(name, revision)[1].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
            entry["oid"] = git_sha1(content)
            if is_large(path):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self.answer(entries)

    def file(self, name: str, revision: str, path: str) -> None:
        commit, files = self.revision(name, revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound")
        content = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_sha1(content)}"'}
        if not is_large(path):
            self.send_file(path, content, headers)
            return
        digest = sha256(content)
        self.hub.uploads[digest] = content
        headers |= {
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.hub.storage}/storage/{digest}?file={path}",
        }
        self.answer(b"", 302, headers)

    def large_file(self, digest: str) -> None:
        self.send_file(self.path.partition("file=")[2], self.hub.uploads[digest], {})

    def send_file(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        if path in self.hub.faults.flipped:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        cut = -1
        at, times = self.hub.faults.cuts.get(path, (0, 0))
        if times and self.command == "GET":
            self.hub.faults.cuts[path] = (at, times - 1)
            cut = max(at - start, 0)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(content[start:], 206 if start else 200, headers, cut)

    # --- Writing ----------------------------------------------------------------------------------

    def write_access(self) -> None:
        if not self.is_logged_in():
            raise Refusal(401)

    def create(self) -> None:
        self.write_access()
        request = json.loads(self.body)
        name = f"{request['organization']}/{request['name']}"
        if request["organization"] == "others":
            raise Refusal(403)
        url = f"{self.hub.address}/{name}"
        if name in self.hub.repositories:
            raise Refusal(409, url=url)
        self.hub.create(
            name, {".gitattributes": b""}, private=request.get("visibility") == "private"
        )
        self.answer({"url": url})

    def branch(self, name: str, branch: str) -> None:
        self.write_access()
        repository = self.repository(name)
        if branch in repository.branches:
            raise Refusal(409)
        repository.branches[branch] = repository.branches["main"]
        self.answer({})

    def validate(self) -> None:
        match = re.search(r"^license: (.+)$", json.loads(self.body)["content"], re.MULTILINE)
        if match and match[1] not in LICENSES:
            message = f'"license" must be one of {", ".join(LICENSES)}'
            raise Refusal(400, errors=[{"message": message}])
        self.answer({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        self.write_access()
        self.revision(name, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer({"files": files})

    def batch(self, name: str) -> None:
        self.write_access()
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.uploads:
                href = f"{self.hub.storage}/storage/{entry['oid']}"
                entry["actions"] = {"upload": {"href": href}}
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, digest: str) -> None:
        if sha256(self.body) != digest:
            raise Refusal(400)
        self.hub.uploads[digest] = self.body
        self.answer({})

    def commit(self, name: str, revision: str) -> None:
        self.write_access()
        files = dict(self.revision(name, revision)[1])
        message = ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            match entry["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.uploads[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        commit = self.repository(name).commit(files, revision, message)
        url = f"{self.hub.address}/{name}/commit/{commit}"
        self.answer({"success": True, "commitOid": commit, "commitUrl": url})
