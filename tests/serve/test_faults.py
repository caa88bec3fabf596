"""Load, clients that leave, and what fails: the others are served as if nothing had been."""

import contextlib
import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.parse import urlsplit

import pytest
import torch
from helpers.commands import PATIENCE
from helpers.families import tiny
from helpers.memory import kept_each_time
from helpers.serving import in_a_thread

from ee_tuning import EarlyExitModel, ExitConfig, UserError
from ee_tuning.passes.draws import ALL, NOTHING, TOP_P
from ee_tuning.serve.choices import Choice

LONG = {"prompt": [5, 9], "max_tokens": 10_000, "ignore_eos": True, "temperature": 0}
SHORT = {"prompt": [7, 8], "max_tokens": 3, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def long_exits(tmp_path_factory, tokenizer):
    """A tiny model whose texts may have more than 10,000 tokens."""
    folder = tmp_path_factory.mktemp("long")
    tiny("llama", vocab_size=300, max_position_embeddings=10_240).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = EarlyExitModel.from_base(str(folder / "base"), ExitConfig("2", arch="norm"))
    model.save_pretrained(folder / "exits")
    return str(folder / "exits")


@pytest.fixture
def long_server(long_exits):
    with in_a_thread(exits=long_exits, slots=2, capacity=10_240, max_queue=2) as running:
        yield running


@contextlib.contextmanager
def asking(running, body, length=None):
    """A connection on which a request was sent, and nothing read; length: it says to have."""
    address = urlsplit(running.url)
    data = json.dumps(body).encode()
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (length or len(data), data)
        )
        yield connection


def wait_for(what):
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def status_of(running, **body):
    with pytest.raises(HTTPError) as failed:
        running.complete(**body)
    return failed.value.code, json.load(failed.value)["error"], failed.value.headers


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_within_one_step(long_server, stream):
    engine = long_server.core.engine
    step, seen = engine.step, []

    def watched():
        given_up = [row.request for row in engine.sequences.live if row.request.cancelled]
        found = step()
        seen.append((given_up, [row.request for row in engine.sequences.live]))
        return found

    engine.step = watched
    with asking(long_server, LONG | {"stream": stream}) as connection:
        wait_for(lambda: long_server.served.worker.running)
        if stream:
            assert connection.recv(100)
    wait_for(lambda: not engine.busy)
    assert any(given_up for given_up, _ in seen)
    assert not any(set(given_up) & set(after) for given_up, after in seen)
    assert len(long_server.complete(**SHORT)["choices"][0]["ee"]["exit_layers"]) == 3
    wait_for(lambda: len(long_server.log) == 2)
    statuses = sorted(line["status"] for line in long_server.log)
    assert statuses == [200, 200 if stream else 499]


scored: list[None] = []


def slowly(*_):
    """What is called in the place of `score`: by its name, as anything is."""
    scored.append(time.sleep(0.05))


def test_prompts_of_a_client_that_leaves_are_not_scored_to_the_end(tiny_server, monkeypatch):
    monkeypatch.setattr("ee_tuning.serve.app.score", slowly)
    before = len(tiny_server.log)
    with asking(tiny_server, {"prompt": [[5, 6]] * 100, "max_tokens": 0, "echo": True,
                              "logprobs": 0}):  # fmt: skip
        wait_for(lambda: scored)
    wait_for(lambda: len(tiny_server.log) > before)
    assert tiny_server.log[-1]["status"] == 499
    assert len(scored) < 50


def test_clients_that_lose_patience_leave_nothing_behind(long_exits):
    """200 of them, with 10,000 tokens each, none of which is ever written to its end."""
    with in_a_thread(exits=long_exits, slots=4, capacity=10_240, max_queue=256) as running:
        engine, lengths = running.core.engine, []
        step = engine.step

        def watched():
            lengths.extend(len(row.ids) for row in engine.sequences.live)
            return step()

        engine.step = watched
        with contextlib.ExitStack() as stack:
            for i in range(200):
                stack.enter_context(asking(running, LONG | {"stream": i % 2 == 0}))
            wait_for(lambda: running.served.worker.running == 4)
            wait_for(lambda: max(lengths, default=0) > 100)
        running.ask("/v1/completions", SHORT, timeout=PATIENCE)
        wait_for(lambda: not running.served.worker.running + running.served.worker.waiting)
        assert max(lengths) < 9_000


def test_a_full_queue_says_when_to_come_back(long_server):
    with contextlib.ExitStack() as stack:
        worker = long_server.served.worker
        for running, waiting in ((1, 0), (2, 0), (2, 1), (2, 2)):
            stack.enter_context(asking(long_server, LONG))
            wait_for(lambda: (worker.running, worker.waiting) == (running, waiting))  # noqa: B023
        status, error, headers = status_of(long_server, **SHORT)
        assert (status, error["code"], headers["Retry-After"]) == (429, "queue_full", "2")
        assert long_server.ask("/health") == {"status": "ready"}
    wait_for(lambda: not worker.running)
    assert long_server.complete(**SHORT)["usage"]["completion_tokens"] == 3


def test_slots_that_are_free_come_before_the_queue(long_server):
    bodies = [SHORT | {"prompt": [7, i]} for i in range(4)]  # two run, two wait
    for _ in range(5):
        together = threading.Barrier(len(bodies))

        def ask(body, together=together):
            together.wait()
            return long_server.complete(**body)["usage"]["completion_tokens"]

        with ThreadPoolExecutor(len(bodies)) as pool:
            assert [*pool.map(ask, bodies)] == [3] * 4
        wait_for(lambda: not long_server.served.worker.running)


def test_a_request_that_the_engine_refuses_fails_alone(long_server):
    engine, worker = long_server.core.engine, long_server.served.worker
    submit = engine.submit

    def refuses(request):
        if len(request.ids) == 3:
            raise UserError("it does not fit")
        submit(request)

    engine.submit = refuses
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(long_server.complete, **SHORT | {"max_tokens": 400})
        wait_for(lambda: worker.running)
        for _ in range(4):
            status, error, _ = status_of(long_server, **SHORT | {"prompt": [5, 6, 7]})
            assert (status, error["message"]) == (400, "it does not fit")
        assert other.result(PATIENCE)["usage"]["completion_tokens"] == 400
    assert long_server.ask("/health") == {"status": "ready"}
    assert worker.running + worker.waiting == 0


def test_what_does_not_fit_is_refused_before_it_waits(long_server):
    status, error, _ = status_of(long_server, prompt=[5] * 300, max_tokens=10_000)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    with asking(long_server, {}, length=9_000_000) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert status_of(long_server, prompt="x" * 7_000_000)[0] == 400


def test_a_request_has_a_deadline(long_exits):
    with in_a_thread(exits=long_exits, slots=1, capacity=10_240, deadline=1.0) as running:
        status, error, _ = status_of(running, **LONG)
        assert (status, error["type"]) == (504, "timeout_error")
        with asking(running, LONG | {"stream": True}) as connection, asking(running, SHORT) as late:
            said = read(connection)
            assert read(late).startswith(b"HTTP/1.1 504")
        events = [line[6:] for line in said.split(b"\n") if line.startswith(b"data: ")]
        assert json.loads(events[-2])["error"]["code"] == "deadline_exceeded"
        assert events[-1].strip() == b"[DONE]"
        assert running.complete(**SHORT)["usage"]["completion_tokens"] == 3


def unended(running, reason):
    """Texts that did not end, as the metrics have it."""
    metrics = running.served.worker.metrics
    labels = {"model_name": running.served.name, "reason": reason}
    return metrics.registry.get_sample_value("ee_tuning:request_failure_total", labels) or 0


def test_each_text_that_does_not_end_is_counted_once(long_exits):
    """Whether it had a slot or not, and for its own reason."""
    settings = {"exits": long_exits, "slots": 2, "capacity": 10_240}
    with in_a_thread(**settings, deadline=2.0) as running:
        worker = running.served.worker
        with asking(running, LONG | {"n": 5, "stream": True}):
            wait_for(lambda: (worker.running, worker.waiting) == (2, 3))
        wait_for(lambda: not worker.running)
        assert (unended(running, "abort"), unended(running, "deadline")) == (5, 0)
        assert status_of(running, **LONG | {"n": 3})[0] == 504
        wait_for(lambda: not worker.running)
        assert (unended(running, "abort"), unended(running, "deadline")) == (5, 3)
        assert unended(running, "error") == 0


def read(connection):
    """All of a reply, whose chunks come line by line."""
    said = b""
    while not said.endswith((b"0\r\n\r\n", b"}")):
        said += connection.recv(65_536)
    return said


# -- what fails ------------------------------------------------------------------------------------


def test_a_text_that_fails_fails_alone(tiny_server, monkeypatch):
    put = Choice.put

    def failing(self, settled):
        if self.request.ids == [6] and self.layers:
            raise RuntimeError("a mistake of this one")
        return put(self, settled)

    monkeypatch.setattr(Choice, "put", failing)
    with ThreadPoolExecutor(3) as pool:
        good = [pool.submit(tiny_server.complete, **SHORT | {"max_tokens": 20}) for _ in range(2)]
        status, error, _ = status_of(tiny_server, prompt=[6], ignore_eos=True)
    assert (status, "a mistake of this one" in error["message"]) == (500, True)
    assert (unended(tiny_server, "error"), unended(tiny_server, "abort")) == (1, 0)
    assert [one.result()["usage"]["completion_tokens"] for one in good] == [20, 20]
    assert tiny_server.ask("/health") == {"status": "ready"}
    (line,) = [line for line in tiny_server.log if line["event"] == "error"]
    assert "Traceback" in line["traceback"]


def test_a_step_that_fails_ends_what_was_in_progress_alone(tiny_exits, monkeypatch):
    """And three of them in a row the engine, which health says."""
    with in_a_thread(exits=tiny_exits) as running:
        engine, failing = running.core.engine, [True]
        step = engine.step

        def sometimes():
            if engine._waiting and failing.pop():
                raise torch.OutOfMemoryError("no room for a pass")
            return step()

        monkeypatch.setattr(engine, "step", sometimes)
        status, error, _ = status_of(running, **SHORT)
        assert (status, "no room for a pass" in error["message"]) == (500, True)
        failing += [False]
        assert running.complete(**SHORT)["usage"]["completion_tokens"] == 3
        failing += [True] * 3
        for _ in range(3):
            assert status_of(running, **SHORT)[0] == 500
        wait_for(lambda: running.served.worker.state.startswith("dead"))
        assert status_of(running, **SHORT)[0] == 503
        with pytest.raises(HTTPError) as failed:
            running.ask("/health")
        assert failed.value.code == 503
        assert "no room" in json.load(failed.value)["status"]


def test_health_waits_for_the_warm_up(tiny_exits, monkeypatch):
    warm, compiled = threading.Event(), []

    def warm_up(_, measures, samples, texts, told):
        compiled.append((measures, samples, texts))
        told(1, 4)
        warm.wait(30)

    monkeypatch.setattr("ee_tuning.decode.Engine.warm_up", warm_up)
    monkeypatch.setattr("ee_tuning.serve.core.TELL", 0)
    states = []

    def look():
        worker = servers[0].served.worker if servers else None
        states.append(worker.state if worker else None)

    servers = []
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: _serve(tiny_exits, servers))
        time.sleep(0.2)
        look()
        warm.set()
        assert waiting.result(60) == "ready"
    assert states[0] in (None, "warming up")
    assert compiled == [(["probability"], [NOTHING, ALL, ALL | TOP_P], False)]
    (line,) = [line for line in servers[0].log if line["event"] == "compiling"]
    assert (line["done"], line["of"]) == (1, 4)
    assert line["seconds_left"] >= 0
    (line,) = [line for line in servers[0].log if line["event"] == "compiled"]
    assert line["sampling"] == ["greedy", "temperature", "temperature and top_p"]


def test_a_warm_up_that_fails_is_logged_whole(tiny_exits, monkeypatch):
    def warm_up(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("ee_tuning.decode.Engine.warm_up", warm_up)
    with in_a_thread(exits=tiny_exits, compile="on") as running:
        assert running.served.worker.state == "dead: no compiler"
        assert status_of(running, **SHORT)[0] == 503
    (line,) = [line for line in running.log if line["event"] == "error"]
    assert "Traceback" in line["traceback"]


def _serve(exits, servers):
    with in_a_thread(exits=exits, compile="on") as running:
        servers.append(running)
        return running.served.worker.state


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_2000_requests_leave_no_trace(tiny_server):
    """No thread, no slot, no object and no memory of one is left."""
    worker = tiny_server.served.worker

    def serve():
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: tiny_server.complete(**SHORT | {"seed": i}), range(500)))
        wait_for(lambda: not worker.running)

    serve()  # what is kept for good has come by then
    threads = threading.active_count()
    assert kept_each_time(serve) < 500  # KiB: one of each request
    assert threading.active_count() <= threads
    assert not worker._live
    assert not worker._waiting
    wait_for(lambda: not tiny_server.core.engine.busy)
