"""Ports for the ranks to meet at."""

from __future__ import annotations

import contextlib
import random
import socket


def free_ports(number):
    """Ports that nothing listens on, below those the system hands out to connections."""
    found = set()
    while len(found) < number:
        port = random.SystemRandom().randrange(2000, 10000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)
