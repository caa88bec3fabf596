"""Connections between processes for small messages that one of them waits for.

gloo hands a message through threads of its own, each of which has to be woken; here the one that
waits is woken by the message itself.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import socket
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait

from ee_tuning.parallel.mesh import Mesh


def connect(mesh: Mesh, to: Sequence[int]) -> tuple[dict[int, Connection], dict[Connection, int]]:
    """Connections to processes, and from those that connect to this one, with their numbers.

    Every process of a connected mesh calls it. to: numbers among all that were started.

    Raises:
        OSError: a process cannot be reached, or another one does not come in time.
    """
    own, key = mesh.counterpart(mesh.pp_rank), mesh.on_main(lambda: secrets.token_bytes(16))
    host, family = _own_address()
    with socket.create_server(("", 0), family=family) as server:
        entries = mesh.gather_on_host((own, host, server.getsockname()[1], list(to)))
        book = {number: (host, port) for number, host, port, _ in entries}
        ways = {number: _call(book[number], key, own, mesh.patience) for number in to}
        missing = {number for number, *_, others in entries if own in others}
        found: dict[Connection, int] = {}
        while missing:
            if not wait([server], mesh.patience):
                raise TimeoutError(f"time-out: rank {min(missing)} does not connect")
            connection = _connection(server.accept()[0])
            name = _name(connection, mesh.patience)
            if hmac.compare_digest(name[:16], key):
                found[connection] = number = int.from_bytes(name[16:], "big")
                missing.remove(number)
    return ways, found


def _name(connection: Connection, patience: float) -> bytes:
    """Who says to be on the other side; nothing, if it is none of ours."""
    try:
        return connection.recv_bytes(64) if connection.poll(patience) else b""
    except (EOFError, OSError):
        return b""


def _own_address() -> tuple[str, int]:
    """Where other processes reach this one, and its family: where it reaches the first one from.

    On that one's host it is what the others know it by.
    """
    name = os.environ["MASTER_ADDR"]
    place = socket.getaddrinfo(name, int(os.environ["MASTER_PORT"]), type=socket.SOCK_DGRAM)[0]
    with socket.socket(place[0], socket.SOCK_DGRAM) as probe:
        probe.connect(place[4])  # sends nothing
        own, there = probe.getsockname()[0], probe.getpeername()[0]
    at_home = own == there or ipaddress.ip_address(own).is_loopback
    return name if at_home else own, place[0]


def _call(address: tuple[str, int], key: bytes, own: int, patience: float) -> Connection:
    """A connection to an address, on which this process has said who it is."""
    connection = _connection(socket.create_connection(address, patience))
    connection.send_bytes(key + own.to_bytes(4, "big"))
    return connection


def _connection(one: socket.socket) -> Connection:
    """What sends and receives whole messages, each at once."""
    one.settimeout(None)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(one.detach())
