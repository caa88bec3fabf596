"""`ee-tuning serve`: an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import json
import math
import socket
import sys
import time
import warnings
from typing import Any

from ee_tuning.errors import Notice, UserError, all_checked
from ee_tuning.serve.config import ServeConfig, check_settings
from ee_tuning.serve.process import in_a_process

BACKLOG = 2048  # connections that wait to be taken, as uvicorn has it
LAST = 5  # seconds behind --grace that clients have to hear that there was no time for them
SWITCH = 2e-4  # seconds that a thread waits for another one that has the interpreter


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C; a line of JSON on standard output for each request.

    Raises:
        UserError: packages are missing, the address cannot be had, or see
            `ee_tuning.serve.load.load_served`.
        ProcessFailed: the engine's process has ended.
    """
    check_settings(config)
    sys.setswitchinterval(SWITCH)
    if not config.api_key and not _is_loopback(config.host):
        warnings.warn(
            f"anyone who reaches {config.host} can use this server: give --api-key",
            Notice,
            stacklevel=1,
        )
    with _listening(config) as listener, in_a_process(config, _keep) as connection:
        try:
            import uvicorn

            from ee_tuning.serve.app import make_app
            from ee_tuning.serve.guard import Guard
            from ee_tuning.serve.load import load_served
        except ModuleNotFoundError as error:
            raise UserError(
                f"serve needs the package {error.name}: pip install 'ee-tuning[serve]'"
            ) from error
        found = load_served(config, connection, _log, _keep)
        all_checked()
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"{found.name}: http://{shown}:{port}", file=sys.stderr, flush=True)
        settings = uvicorn.Config(
            Guard(make_app(found), config.api_key, _log),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(config.grace) + LAST,
        )

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                asyncio.get_running_loop().call_later(config.grace, found.worker.halt)
                await super().shutdown(sockets)

        Server(settings).run(sockets=[listener])


def _keep() -> None:
    """Let the garbage collector look at what comes from now on alone: at modules and the model it
    would look for a third of a second each time, and everybody would wait."""
    gc.collect()
    gc.freeze()


def _log(line: dict[str, Any]) -> None:
    print(json.dumps({"time": round(time.time(), 3), **line}), flush=True)


def _listening(config: ServeConfig) -> socket.socket:
    """A socket at the address, before a model is loaded in vain.

    Raises:
        UserError: it cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)  # at once: until then another server can bind there, too
    except OSError as error:
        raise UserError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror}; see --host and --port"
        ) from error
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
