"""ASGI middleware in front of the studio: checks of host, origin, token and size; headers."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import re
from collections.abc import AsyncIterator, Collection
from urllib.parse import urlsplit, urlunsplit

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ctf.common.errors import UserError
from ctf.studio.tasks import Limits

UPLOAD = "/v1/encode"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
LINGER_SECONDS = 5  # for the rest of a body that was refused
TOKEN = "X-CTF-Token"  # where a proxy has its own use for Authorization


def error_response(
    status: int, reason: str, where: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """Return a response as in schema.Mistake, in ASCII, as a reason may quote anything."""
    body = {"reason": reason} if where is None else {"reason": reason, "where": where}
    return Response(json.dumps(body), status, headers, "application/json")


def allowed_host(text: str) -> str:
    """Return a value of --allowed-hosts as browsers write it in the header Host.

    Raises:
        UserError: It is no host name, address, or pattern.
    """
    try:
        name = text.lower().removesuffix(".").encode("idna").decode()
        if name == "*" or re.fullmatch(r"(\*\.)?[\w-]+(\.[\w-]+)*", name, re.ASCII):
            return name
        return str(ipaddress.IPv6Address(name.removeprefix("[").removesuffix("]")))
    except ValueError:
        raise UserError(
            f"--allowed-hosts {text}: expected a host name without scheme, port and path, e.g. "
            "studio.example.org or *.example.org"
        ) from None


class Guard:
    """Refuse requests that the application must not see, and add headers to all responses.

    Args:
        app: The application.
        limits: The limits on requests.
        hosts: Host names that requests may use, or None for any; `*.example.org` is any subdomain.
            They stop DNS rebinding: a web site whose name resolves to this machine could otherwise
            read responses.
        token: The bearer token for requests to /v1, or None.
        embedders: Origins of the pages that may embed this one in a frame.
        root_path: The path under which a proxy serves the studio, if it does not remove it.
        script_hashes: Of the inline scripts of the page, as in a Content-Security-Policy.

    Behind a proxy, headers such as X-Forwarded-Host are not read: any client can send them.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        limits: Limits,
        hosts: Collection[str] | None,
        token: str | None,
        embedders: Collection[str],
        root_path: str = "",
        script_hashes: Collection[str] = (),
    ) -> None:
        self.app, self.limits, self.hosts, self.token = app, limits, hosts, token
        self.root_path = root_path.rstrip("/")
        self._receiving: set[asyncio.Timeout] = set()  # bodies that have not arrived yet
        self._stopping = False
        ancestors = " ".join(embedders) or "'none'"
        scripts = " ".join(["'self'", *(f"'{value}'" for value in script_hashes)])
        self.headers = {
            "Content-Security-Policy": (
                f"default-src 'none'; script-src 'self'; script-src-elem {scripts}; "
                "style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
                f"base-uri 'none'; form-action 'none'; frame-ancestors {ancestors}"
            ),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
        }
        if not embedders:
            self.headers["X-Frame-Options"] = "DENY"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = {**scope, "path": self._local_path(scope["path"])}
        body = _Body(receive)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(self.headers)
                headers.setdefault("Cache-Control", "no-store")
                if "location" in headers:
                    headers["location"] = _relative(headers["location"])
            elif not (body.complete or message.get("more_body", False)):
                await send({**message, "more_body": True})
                await self._discard(body)
                message = {"type": "http.response.body"}
            await send(message)

        if refusal := self._refuse(scope):
            await refusal(scope, body.receive, send_with_headers)
        else:
            await self.app(scope, self._limit(scope, body), send_with_headers)

    def stop_receiving(self) -> None:
        """End requests whose bodies have not arrived yet; expect no more of later ones."""
        self._stopping = True
        for timeout in self._receiving:
            if not timeout.expired():
                timeout.reschedule(0)

    def _local_path(self, path: str) -> str:
        """Remove the path of the proxy; a proxy that cuts off too little leaves two slashes."""
        path = "/" + path.lstrip("/")
        if f"{path}/".startswith(f"{self.root_path}/"):
            path = path.removeprefix(self.root_path)
        return "/" + path.lstrip("/")

    def _refuse(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        name = _split(f"//{headers.get('host', '')}")[0]
        if not self._allows(name):
            use = "localhost" if name is None else f"localhost, or --allowed-hosts {name}"
            return error_response(421, f"unknown host name {name}: use {use}")
        if scope["method"] != "GET" and not self._is_own_page(headers):
            return error_response(
                403,
                f"cross-origin request: got Origin {headers['origin']}, expected the Host, "
                f"{headers.get('host')}; behind a proxy, pass Host on, or use --allowed-hosts",
            )
        if scope["path"].startswith("/v1/") and not self._authorized(headers):
            challenge = {"WWW-Authenticate": "Bearer"}
            return error_response(401, "expected Authorization: Bearer TOKEN", headers=challenge)
        length, limit = headers.get("content-length", "0"), self._max_bytes(scope)
        if not (length.isascii() and length.isdigit()):
            return error_response(400, "Content-Length is not a number")
        if len(length) > 15 or int(length) > limit:
            return error_response(413, f"body larger than {limit:,} bytes")
        return None

    def _allows(self, name: str | None) -> bool:
        if self.hosts is None or name is None:
            return self.hosts is None
        parents = name.split(".")[1:]
        wildcards = {f"*.{'.'.join(parents[i:])}" for i in range(len(parents))}
        return name in self.hosts or not wildcards.isdisjoint(self.hosts)

    def _is_own_page(self, headers: Headers) -> bool:
        """Whether a request comes from the page of the studio, or not from a page at all."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is None:
            return True
        name, netloc = _split(origin)
        default_port = 443 if origin.startswith("https:") else 80
        if netloc and headers.get("host") in (netloc, f"{netloc}:{default_port}"):
            return True
        # A proxy may have put its own Host. Sec-Fetch-Site, which no page can set, then says
        # whether the page and the proxy have the same origin; browsers send it with HTTPS and on
        # localhost. Without it, a page is taken for ours by its name, not by its port.
        if site is not None:
            return site == "same-origin" and self._allows(name)
        return self.hosts is not None and name not in LOOPBACK and self._allows(name)

    def _authorized(self, headers: Headers) -> bool:
        if self.token is None:
            return True
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        bearer = credentials if scheme.lower() == "bearer" else ""
        got = headers.get(TOKEN, bearer).strip().encode("latin-1", "replace")
        return hmac.compare_digest(got, self.token.encode("utf-8", "surrogateescape"))

    def _max_bytes(self, scope: Scope) -> int:
        return self.limits.upload_bytes if scope["path"] == UPLOAD else self.limits.body_bytes

    def _limit(self, scope: Scope, body: _Body) -> Receive:
        """Limit the size and the time of a body, with or without Content-Length."""
        loop = asyncio.get_running_loop()
        deadline, limit = loop.time() + self.limits.upload_seconds, self._max_bytes(scope)

        async def limited() -> Message:
            if body.complete:
                return await body.receive()
            try:
                async with self._until(deadline):
                    message = await body.receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive in time") from None
            if body.size > limit:
                raise HTTPException(413, f"body larger than {limit:,} bytes")
            return message

        return limited

    async def _discard(self, body: _Body) -> None:
        """Receive the rest of a body whose response is already on its way.

        A connection that is closed with unread data is reset, and a client or proxy that is still
        sending then loses the response.
        """
        with contextlib.suppress(TimeoutError):
            async with self._until(asyncio.get_running_loop().time() + LINGER_SECONDS):
                while not body.complete:
                    await body.receive()

    @contextlib.asynccontextmanager
    async def _until(self, deadline: float) -> AsyncIterator[None]:
        """Raise TimeoutError at the deadline, or when the studio stops."""
        timeout = asyncio.timeout_at(0 if self._stopping else deadline)
        try:
            async with timeout:
                self._receiving.add(timeout)
                yield
        finally:
            self._receiving.discard(timeout)


class _Body:
    """What has been received of the body of a request."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.size, self.complete = 0, False

    async def receive(self) -> Message:
        message = await self._receive()
        self.size += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        return message


def _relative(url: str) -> str:
    """Return the URL without a slash at its end, to which a path with one is redirected.

    With an absolute URL, a redirection would leave the path under which a proxy serves the studio.
    """
    parts = urlsplit(url)
    return urlunsplit(("", "", f"../{parts.path.rpartition('/')[2]}", parts.query, ""))


def _split(url: str) -> tuple[str | None, str | None]:
    """Return host name, and host name with port, of a URL; None where it is invalid."""
    try:
        parts = urlsplit(url)
        return parts.hostname and parts.hostname.removesuffix("."), parts.netloc
    except ValueError:
        return None, None
