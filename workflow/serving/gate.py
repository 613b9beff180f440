"""What every request passes before its body is read: host, key, type and size."""

import asyncio
import contextlib
import hmac
import re

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from complexity_deep.workflow.serving.refusal import Refusal

MOST_BYTES = 2**20  # of a body; a long context has some 4 bytes a token
SECONDS_OF_BODY = 30
SECONDS_OF_SEND = 60  # a client that takes nothing for so long has gone


class Gate:
    """ASGI middleware. `hosts` are the names that a request may be for, and `key` is asked for under /v1/; None is any.

    A page on the internet can send its reader's browser to this machine under a name of the page's own. It cannot
    choose the header Host, nor send JSON to another origin.
    """

    def __init__(self, app: ASGIApp, refused, key: bytes | None, hosts: set[str] | None):
        self.app, self.refused, self.key, self.hosts = app, refused, key, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_in_time(message: Message) -> None:
            await asyncio.wait_for(send(message), SECONDS_OF_SEND)

        headers = Headers(scope=scope)
        try:
            self._check(scope, headers)
            body = await self._body(headers, receive) if scope["method"] == "POST" else b""
        except Refusal as refusal:
            self.refused(refusal.status)
            response = JSONResponse(refusal.body(), refusal.status, {"Connection": "close"})
            return await response(scope, receive, send_in_time)

        rest = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_body() -> Message:
            return rest.pop() if rest else await receive()

        with contextlib.suppress(asyncio.TimeoutError):  # the connection ends without the rest
            await self.app(scope, receive_body, send_in_time)
        return None

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if self.hosts is not None and host not in self.hosts:
            raise Refusal(403, "This server answers only requests to its own address.", "wrong_host")
        if self.key is not None and scope["path"].startswith("/v1/"):
            given = re.sub(r"^Bearer +", "", headers.get("authorization", ""), flags=re.IGNORECASE).encode("latin-1")
            if not hmac.compare_digest(given, self.key):
                raise Refusal(401, "The API key is missing or wrong.", "invalid_api_key")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        try:
            body, size = await asyncio.wait_for(_read(receive), SECONDS_OF_BODY)
        except asyncio.TimeoutError:
            raise Refusal(408, f"The body did not come within {SECONDS_OF_BODY} seconds.", "timeout") from None
        if size > MOST_BYTES:
            raise Refusal(413, f"The body has {size:,} bytes, and {MOST_BYTES:,} are the most.", "body_too_large")
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "The body must be JSON: send the header 'Content-Type: application/json'.", "no_json")
        return body


async def _read(receive: Receive) -> tuple[bytes, int]:
    """The body, and its size, which may be more than is kept.

    What is too much is read all the same: a connection that is closed on a client that sends takes the answer with it.
    """
    kept, size = [], 0
    while True:
        message = await receive()
        piece = message.get("body", b"")
        size += len(piece)
        if size <= MOST_BYTES:
            kept.append(piece)
        if not message.get("more_body", False):
            return b"".join(kept), size
