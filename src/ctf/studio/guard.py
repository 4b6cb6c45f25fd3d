"""ASGI middleware in front of the studio: checks of host, origin, token and size; headers."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ctf.studio.tasks import Limits

UPLOAD = "/v1/encode"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def error_response(
    status: int, reason: str, where: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """Return a response as in schema.Mistake, in ASCII, as a reason may quote anything."""
    body = {"reason": reason} if where is None else {"reason": reason, "where": where}
    return Response(json.dumps(body), status, headers, "application/json")


class Guard:
    """Refuse requests that the application must not see, and add headers to all responses.

    Args:
        app: The application.
        limits: The limits on requests.
        hosts: Host names that requests may use, or None for any. They stop DNS rebinding: a web
            site whose name resolves to this machine could otherwise read responses.
        token: The bearer token for requests to /v1, or None.
        embedders: Origins of the pages that may embed this one in a frame.
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
        """Serve a request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(self.headers)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif refusal := self._refuse(scope):
            await refusal(scope, receive, send_with_headers)
        else:
            await self.app(scope, self._limit(scope, receive), send_with_headers)

    def _refuse(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts is not None and _split(f"//{host}")[0] not in self.hosts:
            return error_response(421, "unknown host name: use localhost")
        if origin is not None and scope["method"] != "GET" and _split(origin)[1] != host:
            return error_response(403, "cross-origin request")
        if scope["path"].startswith("/v1/") and not self._authorized(headers):
            challenge = {"WWW-Authenticate": "Bearer"}
            return error_response(401, "expected Authorization: Bearer TOKEN", headers=challenge)
        length, limit = headers.get("content-length", "0"), self._max_bytes(scope)
        if not (length.isascii() and length.isdigit()):
            return error_response(400, "Content-Length is not a number")
        if len(length) > 15 or int(length) > limit:
            return error_response(413, f"body larger than {limit:,} bytes")
        return None

    def _authorized(self, headers: Headers) -> bool:
        if self.token is None:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        got = token.strip().encode("latin-1", "replace")
        return scheme.lower() == "bearer" and hmac.compare_digest(got, self.token.encode())

    def _max_bytes(self, scope: Scope) -> int:
        return self.limits.upload_bytes if scope["path"] == UPLOAD else self.limits.body_bytes

    def _limit(self, scope: Scope, receive: Receive) -> Receive:
        """Wrap `receive`: bodies without Content-Length, and slow ones, have limits, too."""
        loop = asyncio.get_running_loop()
        deadline, limit = loop.time() + self.limits.upload_seconds, self._max_bytes(scope)
        size, complete = 0, False

        async def limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive in time") from None
            size += len(message.get("body", b""))
            if size > limit:
                raise HTTPException(413, f"body larger than {limit:,} bytes")
            complete = not message.get("more_body", False)
            return message

        return limited


def _split(url: str) -> tuple[str | None, str | None]:
    """Return host name, and host name with port, of a URL; None where it is invalid."""
    try:
        parts = urlsplit(url)
        return parts.hostname, parts.netloc
    except ValueError:
        return None, None
