"""What stands before all routes: the key, and a line for each request afterwards."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ee_tuning.serve.errors import Refused
from ee_tuning.serve.writer import Log

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
# The page asks for a key itself; health and metrics tell nothing of what is written.
OPEN = ("/", "/health", "/metrics", "/version", "/docs", "/openapi.json")


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: Any, key: str, log: Log) -> None:
        self.app, self.key, self.log = app, key.encode(), log

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer, and log how; what is not a request goes through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499  # the client left before there was a status
        noted: dict[str, Any] = {}
        scope.setdefault("state", {})["noted"] = noted

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self.key and scope["path"] not in OPEN and not self._may(scope):
                refused = Refused("the API key is missing or wrong", status=401)
                await _answer(refused, sending)
            else:
                await self.app(scope, receive, sending)
        finally:
            client = scope.get("client")
            self.log(
                {
                    "event": "request",
                    "client": client[0] if client else None,
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "seconds": round(time.perf_counter() - start, 4),
                    **noted,
                }
            )

    def _may(self, scope: Message) -> bool:
        """Whether the request has the key, compared in the same time whatever it has."""
        given = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        return hmac.compare_digest(key.strip(), self.key) and kind.lower() == b"bearer"


async def _answer(refused: Refused, send: Send) -> None:
    body = json.dumps(refused.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
