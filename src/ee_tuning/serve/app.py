"""The routes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from starlette.exceptions import HTTPException

from ee_tuning.errors import UserError
from ee_tuning.serve.bodies import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Generation,
    LensBody,
    TokenizeBody,
    check_fields,
    explain,
)
from ee_tuning.serve.choices import Delta, joined
from ee_tuning.serve.errors import Refused
from ee_tuning.serve.jobs import Gone, Job
from ee_tuning.serve.processors import Likely
from ee_tuning.serve.reading import Asked, Reader
from ee_tuning.serve.replies import DONE, ChatReply, CompletionReply, Head, Reply, event
from ee_tuning.serve.scoring import lens, score
from ee_tuning.serve.worker import Worker
from ee_tuning.version import __version__

MAX_BODY = 8 * 2**20  # bytes
# Of the playground: nothing from elsewhere.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"
)
Found = TypeVar("Found")


@dataclass
class Served:
    """What is served: a model's name, how bodies are read for it, and who has texts written.

    measures, texts: what most requests ask for, see `Engine.warm_up`.
    """

    name: str
    reader: Reader
    worker: Worker
    measures: list[str]
    texts: bool


class Events(StreamingResponse):
    """Chunks as they come. Whether the client is still there, `Server._watch` asks."""

    media_type = "text/event-stream"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send them."""
        await self.stream_response(send)


class Server:
    """The handlers of the routes."""

    def __init__(self, served: Served) -> None:
        self.name, self._served = served.name, served
        self.reader, self.worker = served.reader, served.worker
        self.created = int(time.time())
        # Tokenizers and templates take their time: others are answered meanwhile.
        self._desk = ThreadPoolExecutor(1, thread_name_prefix="reader")

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """The engine is heard as long as the server is there."""
        self.worker.start(self._served.measures, self._served.texts)
        yield
        self.worker.stop()
        self._desk.shutdown(cancel_futures=True)

    # -- what is written ---------------------------------------------------------------------------

    async def completions(self, body: CompletionBody, request: Request) -> Any:
        """Texts after prompts."""
        self._check(body)
        asked = await self._read(self.reader.completion, body)
        head = Head(asked, self.reader.pieces, self.name, bool(body.return_exits))
        if asked.echo:
            head.prompts = await self._read(self._echoed, body, asked)
        if asked.prompt_scores:
            for number in range(len(asked.prompts)):
                if await request.is_disconnected():
                    return Response(status_code=499)
                head.scores.append(await self._score(asked, number))
        return await self._reply(CompletionReply(head), body, request)

    async def chat(self, body: ChatBody, request: Request) -> Any:
        """What the assistant says next."""
        self._check(body)
        asked = await self._read(self.reader.chat, body)
        head = Head(asked, self.reader.pieces, self.name, bool(body.return_exits))
        return await self._reply(ChatReply(head), body, request)

    async def _reply(self, reply: Reply, body: Generation, request: Request) -> Any:
        job = Job(reply.head.asked.choices)
        noted = request.scope["state"]["noted"]
        noted |= {"id": reply.head.id, "user": body.user}
        self.worker.submit(job)
        watch = asyncio.create_task(self._watch(request, job))
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            content = self._stream(reply, job, watch, usage, noted)
            return Events(content, headers={"Cache-Control": "no-cache"})
        try:
            deltas: dict[int, list[Delta]] = {choice.index: [] for choice in job.choices}
            while job.open:
                for delta in await job.take():
                    deltas[delta.index].append(delta)
                    reply.head.written += len(delta.tokens)
            noted |= reply.head.usage()
            written = [joined(own) for own in deltas.values()]
            found = reply.whole([*written, *_silent(reply.head.asked, job)])
            text = found.model_dump_json(warnings=False)
            return Response(text, media_type="application/json")
        except Gone:
            return Response(status_code=499)
        except Refused:
            self.worker.give_up(job, "error")
            raise
        finally:
            watch.cancel()
            self.worker.give_up(job, "abort")

    async def _stream(
        self, reply: Reply, job: Job, watch: asyncio.Task[None], usage: bool, noted: dict[str, Any]
    ) -> AsyncIterator[bytes]:
        """Chunks, as the engine settles tokens; a mistake is an event, too."""
        try:
            events = [event(chunk) for chunk in reply.start()]
            events += [event(reply.piece(one)) for one in _silent(reply.head.asked, job)]
            while job.open:
                if events:  # what there is at a time goes out as one
                    yield b"".join(events)
                news: dict[int, list[Delta]] = {}
                for delta in await job.take():
                    news.setdefault(delta.index, []).append(delta)
                found = [joined(own) for own in news.values()]
                reply.head.written += sum(len(delta.tokens) for delta in found)
                events = [event(reply.piece(one)) for one in found if reply.is_worth_it(one)]
            yield b"".join([*events, *([event(reply.last())] if usage else []), DONE])
        except Gone:
            return
        except Refused as refused:
            self.worker.give_up(job, "error")
            yield event(refused.body())
            yield DONE
        finally:
            noted |= reply.head.usage()
            watch.cancel()
            self.worker.give_up(job, "abort")

    async def _watch(self, request: Request, job: Job) -> None:
        """Give a job up when its client leaves."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.worker.give_up(job, "abort")
        job.give(Gone())

    async def _score(self, asked: Asked, number: int) -> list[Likely]:
        ids, top = asked.prompts[number], asked.top or 0
        return await self.worker.call(score, ids, asked.policy, top)

    def _echoed(self, body: CompletionBody, asked: Asked) -> list[str]:
        given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if isinstance(given[0], str):
            return [str(text) for text in given]
        return [self.reader.text(ids) for ids in asked.prompts]

    # -- the rest ----------------------------------------------------------------------------------

    async def lens(self, body: LensBody) -> Any:
        """What every exit says after each token of a text."""
        self._check(body)
        if body.first >= len(body.tokens):
            raise Refused(f"first: there are {len(body.tokens)} tokens", "first")
        await self._read(self.reader.text, body.tokens)
        if len(body.tokens) > self.reader.capacity:
            raise Refused(f"tokens: more than {self.reader.capacity}", "tokens")
        layers = self.reader.exit_layers
        found = await self.worker.call(lens, body.tokens, body.first, layers)
        text = self.reader.pieces.text
        for place in found:
            for row in place:
                row["top"] = [[text(token), p] for token, p in row["top"]]
        return {"tokens": [text(token) for token in body.tokens[body.first :]], "places": found}

    async def models(self) -> Any:
        """The one there is."""
        own = Model(id=self.name, created=self.created, object="model", owned_by="ee-tuning")
        more = {
            "max_model_len": self.reader.capacity,
            "depth": self.reader.depth,
            "exit_layers": list(self.reader.exit_layers),
            "chat": bool(self.reader.tokenizer.chat_template),
            "mode": self.reader.mode,
            "threshold": self.reader.leaving.threshold,
        }
        return {"object": "list", "data": [own.model_dump() | more]}

    async def tokenize(self, body: TokenizeBody) -> Any:
        """A prompt, or a chat, as tokens."""
        self._check(body)
        ids = await self._read(self.reader.tokens, body)
        return {"count": len(ids), "max_model_len": self.reader.capacity, "tokens": ids}

    async def detokenize(self, body: DetokenizeBody) -> Any:
        """Tokens as text."""
        self._check(body)
        return {"prompt": await self._read(self.reader.text, body.tokens)}

    async def health(self) -> Any:
        """200, or 503 and why."""
        state = self.worker.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def metrics(self) -> Any:
        """As Prometheus reads them."""
        found = self.worker.metrics.text(self.worker.running, self.worker.waiting)
        return Response(found, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self) -> Any:
        """Of this server."""
        return {"version": __version__}

    async def page(self) -> Any:
        """The playground."""
        return HTMLResponse(_page(), headers={"Content-Security-Policy": POLICY})

    def _check(self, body: Body) -> None:
        check_fields(body)
        if body.model not in (None, self.name):
            message = f"model: {body.model!r} is not served here, {self.name!r} is"
            raise Refused(message, "model", 404, "model_not_found")

    async def _read(self, function: Callable[..., Found], *arguments: Any) -> Found:
        """Let the reader's thread do it."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._desk, function, *arguments)


@functools.cache
def _page() -> str:
    return resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")


def _silent(asked: Asked, job: Job) -> list[Delta]:
    """The choices of a request for no token at all."""
    number = 0 if job.choices else len(asked.prompts) * asked.n
    return [Delta(index, finish="length") for index in range(number)]


def make_app(served: Served) -> FastAPI:
    """An ASGI application with all routes."""
    server = Server(served)
    app = FastAPI(
        title="ee-tuning",
        version=__version__,
        lifespan=server.lifespan,
        redoc_url=None,
        max_body_size=MAX_BODY,
        exception_handlers={
            Refused: _refused,
            UserError: _mistaken,
            RequestValidationError: _not_understood,
            HTTPException: _not_found,
            Exception: _failed,
        },
    )
    add = functools.partial(app.add_api_route, response_model=None)
    add("/v1/completions", server.completions, methods=["POST"], responses=_of(Completion))
    add("/v1/chat/completions", server.chat, methods=["POST"], responses=_of(ChatCompletion))
    posts: dict[str, Any] = {
        "/tokenize": server.tokenize, "/detokenize": server.detokenize, "/lens": server.lens,
    }  # fmt: skip
    gets: dict[str, Any] = {
        "/v1/models": server.models, "/health": server.health, "/metrics": server.metrics,
        "/version": server.version, "/": server.page,
    }  # fmt: skip
    for path, handler in posts.items():
        add(path, handler, methods=["POST"])
    for path, handler in gets.items():
        add(path, handler, methods=["GET"])
    return app


def _of(model: type) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model}}


def _errors(refused: Refused) -> JSONResponse:
    headers = {} if refused.retry is None else {"Retry-After": str(refused.retry)}
    return JSONResponse(refused.body(), refused.status, headers)


async def _refused(_: Request, error: Any) -> JSONResponse:
    return _errors(error)


async def _mistaken(_: Request, error: Any) -> JSONResponse:
    return _errors(Refused(str(error)))


async def _not_understood(_: Request, error: Any) -> JSONResponse:
    return _errors(explain(error.errors()))


async def _not_found(_: Request, error: Any) -> JSONResponse:
    found = _errors(Refused(str(error.detail), status=error.status_code))
    found.headers.update(error.headers or {})
    return found


async def _failed(_: Request, error: Exception) -> JSONResponse:
    return _errors(Refused("an error in the server; its log has more", status=500))
