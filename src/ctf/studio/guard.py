"""What stands in front of the studio: limits of bodies, the token, hosts, and strict headers."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ctf.studio.worker import Limits

UPLOAD = "/v1/encode"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def mistake(
    status: int, reason: str, where: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """The answer to what cannot be done; in ASCII, as a reason may quote anything."""
    said = {"reason": reason} if where is None else {"reason": reason, "where": where}
    return Response(json.dumps(said), status, headers, "application/json")


class Guard:
    """An ASGI application around the studio's.

    Args:
        hosts: names that a request may call this one, or None for any. A page elsewhere, whose
            name was made to point here, cannot read answers then.
        token: what requests to /v1 must bear, or None.
        embedders: origins of pages that may show this one in a frame.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        hosts: Collection[str] | None,
        token: str | None,
        embedders: Collection[str],
    ) -> None:
        self.app, self.limits, self.hosts, self.token = app, limits, hosts, token
        ancestors = " ".join(embedders) or "'none'"
        self.headers = {
            "Content-Security-Policy": (
                "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: "
                "blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
                f"frame-ancestors {ancestors}"
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
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(self.headers)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refused = self._refused(scope)
        if refused is not None:
            await refused(scope, receive, send_with_headers)
            return
        await self.app(scope, self._limited(scope, receive), send_with_headers)

    def _refused(self, scope: MutableMapping[str, Any]) -> Response | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            return mistake(421, "this studio is for this machine alone: ask for localhost")
        origin = headers.get("origin")
        if origin is not None and scope["method"] != "GET" and _place(origin) != host:
            return mistake(403, "asked by the page of another site")
        if self.token is not None and scope["path"].startswith("/v1/"):
            given = headers.get("authorization", "")
            kind, _, word = given.partition(" ")
            expected = self.token.encode()
            same = hmac.compare_digest(word.strip().encode("latin-1", "replace"), expected)
            if kind.lower() != "bearer" or not same:
                bearer = {"WWW-Authenticate": "Bearer"}
                return mistake(401, "expected Authorization: Bearer TOKEN", headers=bearer)
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            return mistake(400, "Content-Length is no number")
        if len(length) > 15 or int(length) > self._most(scope):
            return mistake(413, f"more than {self._most(scope):,} bytes")
        return None

    def _most(self, scope: MutableMapping[str, Any]) -> int:
        upload = scope["path"] == UPLOAD
        return self.limits.upload_bytes if upload else self.limits.body_bytes

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` for bodies that say nothing of their length, or come too slowly."""
        loop = asyncio.get_running_loop()
        deadline, most = loop.time() + self.limits.upload_seconds, self._most(scope)
        count, whole = 0, False

        async def limited() -> Message:
            nonlocal count, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the request did not arrive in time") from None
            count += len(message.get("body", b""))
            if count > most:
                raise HTTPException(413, f"more than {most:,} bytes")
            whole = not message.get("more_body", False)
            return message

        return limited


def _name(host: str) -> str | None:
    """Without the port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _place(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
