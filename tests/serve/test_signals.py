"""How a server ends."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from helpers.commands import PATIENCE
from helpers.serving import as_a_process
from openai import APIError

from ee_tuning.serve.process import _held

DEMO = str(Path(__file__).parents[2] / "demo" / "model")


def streaming(running, texts, prompt, number=100):
    """A thread that reads a stream; `texts` gets its last line."""

    def read():
        try:
            for chunk in running.openai.completions.create(
                model=running.ask("/v1/models")["data"][0]["id"], prompt=prompt, max_tokens=number,
                temperature=0, stream=True, extra_body={"ignore_eos": True},
            ):  # fmt: skip
                texts.append(chunk.choices[0])
        except Exception as error:
            texts.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    deadline = time.monotonic() + PATIENCE
    while not texts:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return thread


def listens(address):
    try:
        socket.create_connection((address.hostname, address.port), timeout=5).close()
    except OSError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("tell", [os.kill, os.killpg])  # its processes share a group
def test_after_sigterm_what_is_in_progress_ends_and_nothing_new_begins(demo, tell):
    with as_a_process("--exits", demo / "exits", "--grace", 60) as running:
        texts, address = [], urlsplit(running.url)
        thread = streaming(running, texts, "def f(x):")
        assert running.process is not None
        tell(running.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while listens(address):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        thread.join(PATIENCE)
        assert texts[-1].finish_reason == "length"
        assert running.process.wait(PATIENCE) in (0, -signal.SIGTERM)
        assert running.process.stderr is not None
        assert "Traceback" not in running.process.stderr.read()
        assert [line["path"] for line in running.log][-1] == "/v1/completions"


@pytest.mark.slow
def test_what_has_not_ended_after_its_time_hears_so(demo):
    with as_a_process("--exits", demo / "exits", "--grace", 0.5) as running:
        texts = []
        thread = streaming(running, texts, "def f(x):", 900)
        whole = {"model": running.ask("/v1/models")["data"][0]["id"], "prompt": "x"}
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(
                running.openai.completions.create, **whole, max_tokens=900,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            while not re.search(
                rb"num_requests_running.* 2", urlopen(f"{running.url}/metrics").read()
            ):
                time.sleep(0.01)
            assert running.process is not None
            running.process.send_signal(signal.SIGTERM)
            error = asked.exception(PATIENCE)
        thread.join(PATIENCE)
        assert (error.status_code, error.type) == (503, "service_unavailable_error")
        assert "the engine is stopped" in str(error)
        assert isinstance(texts[-1], APIError)
        assert "the engine is stopped" in str(texts[-1])
        assert running.process.wait(PATIENCE) in (0, -signal.SIGTERM)
        assert "Traceback" not in running.process.stderr.read()


@pytest.mark.slow
def test_a_killed_server_leaves_its_clients_an_error_and_its_port_free(demo):
    with as_a_process("--exits", demo / "exits") as running:
        texts, address = [], urlsplit(running.url)
        thread = streaming(running, texts, "def f(x):", 900)
        assert running.process is not None
        running.process.send_signal(signal.SIGKILL)
        thread.join(PATIENCE)
        assert isinstance(texts[-1], Exception)
        assert running.process.wait(PATIENCE) == -signal.SIGKILL
    # As a server begins to listen.
    socket.create_server((address.hostname, address.port)).close()


def engine_of(server):
    """The process of its engine: its one child that was spawned."""
    for file in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            command = (file.parent / "cmdline").read_bytes()
            if f"PPid:\t{server.pid}\n" in file.read_text() and b"multiprocessing.spawn" in command:
                return int(file.parent.name)
    raise AssertionError("it has none")


def is_there(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_engine_whose_process_ends_is_dead_and_one_ends_with_its_server(demo):
    """Whoever kills either, the way a system does that is out of memory."""
    with as_a_process("--exits", demo / "exits") as running:
        texts = []
        thread = streaming(running, texts, "def f(x):", 900)
        os.kill(engine_of(running.process), signal.SIGKILL)
        thread.join(PATIENCE)
        assert isinstance(texts[-1], APIError)
        assert "the engine is dead: its process has ended" in str(texts[-1])
        with pytest.raises(HTTPError) as failed:
            running.ask("/health")
        assert failed.value.code == 503
    with as_a_process("--exits", demo / "exits") as running:
        engine = engine_of(running.process)
        running.process.kill()
        deadline = time.monotonic() + PATIENCE
        while is_there(engine):
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="has no masks of signals")
def test_a_signal_while_the_engine_is_started_is_the_servers_and_not_lost():
    heard, comes = [], threading.Event()
    ends = "import signal; signal.raise_signal(signal.SIGTERM); print('it goes on')"
    other = threading.Thread(target=lambda: (comes.wait(), signal.raise_signal(signal.SIGTERM)))
    other.start()  # of one that is not the first
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
    try:
        with _held(signal.SIGTERM):
            comes.set()
            other.join()
            started = subprocess.run([sys.executable, "-c", ends], capture_output=True, text=True)
            assert not heard
        assert heard == ["SIGTERM"]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert started.stdout == "it goes on\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_engine_that_is_loading_ends_with_its_server():
    command = sys.executable, "-m", "ee_tuning", "serve", "--model", DEMO, "--port", "0"
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline, engine = time.monotonic() + PATIENCE, None
    while engine is None:
        assert time.monotonic() < deadline
        with contextlib.suppress(AssertionError):
            engine = engine_of(server)
    server.terminate()
    _, said = server.communicate(timeout=PATIENCE)
    assert said == ""
    while is_there(engine):
        assert time.monotonic() < deadline
        time.sleep(0.01)
