"""Servers to ask: in a thread of this process, or as a user starts one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any
from unittest.mock import patch
from urllib.request import Request, urlopen

import uvicorn
from openai import OpenAI

from ee_tuning.serve import core
from ee_tuning.serve.app import Served, make_app
from ee_tuning.serve.config import ServeConfig, check_settings
from ee_tuning.serve.core import Core
from ee_tuning.serve.guard import Guard
from ee_tuning.serve.load import load_served
from ee_tuning.serve.messages import Stop, send
from helpers.commands import PATIENCE


@dataclass
class Running:
    """A server that can be asked.

    log: its lines, as far as they have come. core: what feeds its engine, if that is in a thread.
    """

    url: str
    key: str = ""
    log: list[dict[str, Any]] = field(default_factory=list)
    served: Served | None = None
    core: Core | None = None
    process: subprocess.Popen[str] | None = None

    @property
    def openai(self) -> OpenAI:
        """The official client."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0)

    def ask(self, path: str, body: Any = None, timeout: float = 60) -> Any:
        """JSON from a route: posted if there is a body."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {self.key}"}
        with urlopen(Request(self.url + path, data, headers), timeout=timeout) as reply:
            return json.load(reply)

    def complete(self, **body: Any) -> Any:
        """A completion's reply."""
        return self.ask("/v1/completions", body)


@contextmanager
def engine_in_a_thread(config: ServeConfig, cores: list[Core]) -> Iterator[Connection]:
    """As `ee_tuning.serve.process.in_a_process`; cores: gets what feeds the engine."""
    own, other = Pipe()

    class Watched(Core):
        def run(self) -> None:
            cores.append(self)
            super().run()

    with patch.object(core, "Core", Watched):
        arguments = config, other, lambda: None
        thread = threading.Thread(target=core.run, args=arguments, name="engine")
        thread.start()
        try:
            yield own
        finally:
            with contextlib.suppress(OSError):  # it may be over
                send(own, Stop())
            thread.join(PATIENCE)
            own.close()
            assert not thread.is_alive()


@contextmanager
def in_a_thread(**settings: Any) -> Iterator[Running]:
    """A server with these settings of `ServeConfig`."""
    config, log = ServeConfig(**{"port": 0, "device": "cpu", **settings}), []
    cores: list[Core] = []
    check_settings(config)
    with engine_in_a_thread(config, cores) as connection:
        found = load_served(config, connection, log.append)
        app = Guard(make_app(found), config.api_key, log.append)
        server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=5)
        )
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                thread.join(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            running = Running(f"http://127.0.0.1:{port}", config.api_key, log, found, *cores)
            while found.worker.state == "warming up":
                thread.join(0.01)
            yield running
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@contextmanager
def as_a_process(*flags: Any, key: str = "") -> Iterator[Running]:
    """`ee-tuning serve` with these flags, ready; killed at the end if it is still there."""
    command = [sys.executable, "-m", "ee_tuning", "serve", "--port", "0", "--device", "cpu"]
    command += [*map(str, flags), *(["--api-key", key] if key else [])]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        address, said = "", ""
        while "http://" not in address:
            address = process.stderr.readline()
            said += address
            assert address, f"the server did not start: {said}"
        running = Running(address.split(": ")[-1].strip(), key, process=process)
        threading.Thread(target=_read, args=(process.stdout, running.log), daemon=True).start()
        while process.poll() is None and not _is_ready(running.url):
            time.sleep(0.05)
        yield running
    finally:
        process.kill()
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=10) as reply:
            return reply.status == 200
    except OSError:
        return False


def _read(lines: Any, log: list[dict[str, Any]]) -> None:
    for line in lines:
        log.append(json.loads(line))
