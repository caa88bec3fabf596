"""Requests and tokens per second of a server, and how long clients wait, beside transformers serve.

Each number of clients asks in turn, on this machine, every client for one streamed completion after
another, on a connection that it keeps: greedy, as many tokens each, for so many seconds at most.
The servers are started one after another, as processes of their own; both run the same model at
full depth, and with `--exits` ours once more, drafting. What the engine alone does with as many
prompts at a time (`generate_batch`) is measured in this process, at full depth.

python benchmarks/serve.py
python benchmarks/serve.py --model demo/smollm2 --exits demo/smollm2-exits --new-tokens 128
python benchmarks/serve.py --shape llama2-7b --new-tokens 128 --clients 16 64 --seconds 40
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import torch
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, build

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.cli import ends_in_a_line
from ee_tuning.devices import hardware, pick_device, pick_dtype, versions
from ee_tuning.files import write_json
from ee_tuning.loading import load_tokenizer

DEMO = Path(__file__).parents[1] / "demo" / "model"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
DRAFTS = {
    "rounds_with_drafts": "ee_tuning:spec_decode_num_drafts_total",
    "drafts": "ee_tuning:spec_decode_num_draft_tokens_total",
    "kept": "ee_tuning:spec_decode_num_accepted_tokens_total",
}
PROMPT = "def function_{0}(value):\n    total = {0}\n    for item in value:\n        total"


@contextmanager
def server(command: list[str], port: int, health: str, log: Path) -> Iterator[int]:
    """The id of a server, as long as it is needed, from when it says that it is ready."""
    with log.open("a") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=file, stderr=file,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(6000):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
            try:
                with urlopen(url + health, timeout=5):
                    break
            except OSError:
                time.sleep(0.1)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_seconds(pid: int) -> float | None:
    """What a process and those that it has started have used so far, where the system tells it:
    others on the machine change it less than they change how long a row takes."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return None
    user, system = stat.read_text().rpartition(")")[2].split()[11:13]
    children = Path(f"/proc/{pid}/task/{pid}/children")
    started = children.read_text().split() if children.exists() else []
    own = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_seconds(int(one)) or 0.0 for one in started)


def drafted(port: int) -> Counter[str]:
    """What our server has counted of drafts so far; of others nothing."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as found:
            families = text_string_to_metric_families(found.read().decode())
    except HTTPError:
        return Counter()
    samples = {one.name: one.value for family in families for one in family.samples}
    return Counter({said: int(samples.get(name, 0)) for said, name in DRAFTS.items()})


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


async def complete(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]
) -> tuple[list[float], int]:
    """Seconds from a request to each of its chunks with text, and how many tokens they were."""
    start = time.perf_counter()
    data = json.dumps(body | {"stream": True}).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)
    )
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"the server answers {status.decode().strip() or 'nothing'}")
    times, tokens = [], 0
    while (line := await reader.readline()) != b"0\r\n":  # how long the last piece is
        if not line:
            raise RuntimeError("the server has ended the connection")
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if chunk.get("error"):
            raise RuntimeError(chunk["error"])
        if any(choice.get("text") for choice in chunk["choices"]):
            times.append(time.perf_counter() - start)
        tokens = (chunk.get("usage") or {}).get("completion_tokens") or tokens
    await reader.readline()
    return times, tokens


async def load(port: int, body: dict[str, Any], clients: int, seconds: float) -> dict[str, Any]:
    """What `clients` see in so many seconds, after which none begins again."""
    first, between, tokens, failed, numbers = [], [], 0, 0, iter(range(10**9))
    start = time.perf_counter()

    async def client() -> None:
        nonlocal tokens, failed
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() - start < seconds:
            prompt = PROMPT.format(next(numbers) % 97)
            times, own = await complete(reader, writer, body | {"prompt": prompt})
            if own != body["max_tokens"] or not times:
                failed += 1
                continue
            first.append(times[0])
            between.extend(b - a for a, b in pairwise(times))
            tokens += own
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    took = time.perf_counter() - start
    return {
        "clients": clients,
        "requests": len(first),
        "failed": failed,  # replies that are not as long as they were to be
        "requests_per_second": len(first) / took,
        "tokens_per_second": tokens / took,
        "first_token_ms": quantiles(first),
        "between_chunks_ms": quantiles(between),
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    """The middle and the slowest hundredth, in milliseconds."""
    found = sorted(seconds) or [0.0]
    return {
        name: 1000 * found[min(len(found) - 1, round(share * (len(found) - 1)))]
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }


def measure(
    command: list[str], health: str, body: dict[str, Any], args: argparse.Namespace, log: Path
) -> Iterator[dict[str, Any]]:
    """A server under every number of clients, after a few requests that do not count."""
    port, start = free_port(), time.perf_counter()
    with server(command, port, health, log) as pid:
        ready = time.perf_counter() - start
        asyncio.run(load(port, body, 2, args.seconds / 10))
        for clients in args.clients:
            before, earlier = cpu_seconds(pid), drafted(port)
            row = asyncio.run(load(port, body, clients, args.seconds)) | drafted(port) - earlier
            if before is not None:
                used = (cpu_seconds(pid) or 0.0) - before
                row["tokens_per_cpu_second"] = row["requests"] * body["max_tokens"] / used
            yield row | {"load_average": os.getloadavg()[0], "seconds_until_ready": ready}


def engine_alone(
    model: Path, clients: list[int], args: argparse.Namespace
) -> Iterator[tuple[str, float]]:
    """Tokens per second of `generate_batch` with as many prompts at a time, the second time."""
    device = pick_device(args.device)
    found = EarlyExitModel.from_base(
        str(model), ExitConfig("1/1", "embedding", head="shared"),
        dtype=pick_dtype(args.precision, device), device=str(device),
    ).eval()  # fmt: skip
    tokenizer = load_tokenizer(str(model))
    for number in sorted(clients):  # a larger engine would be taken for fewer prompts, too
        count = max(number, min(4 * number, 128))
        prompts = [tokenizer(PROMPT.format(i % 97)).input_ids for i in range(count)]
        settings = {
            "slots": number, "capacity": args.capacity, "mode": "full", "do_sample": False,
            "max_new_tokens": args.new_tokens, "eos_token_id": None,
        }  # fmt: skip
        for _ in range(2):
            start = time.perf_counter()
            list(found.generate_batch(prompts, **settings))
        yield str(number), count * args.new_tokens / (time.perf_counter() - start)


def make(args: argparse.Namespace, folder: Path) -> Path:
    """The backbone to serve, as a folder."""
    if not args.shape:
        return Path(args.model)
    device = pick_device(args.device)
    exits = ExitConfig("1/1", "embedding", head="shared")
    model = build(args.shape, exits, device, pick_dtype(args.precision, device), fp8=False)
    tokenizer = load_tokenizer(str(DEMO))
    # Random weights say what the tokenizer has whole characters for, so that there are chunks.
    said = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip().isalnum()]
    head = model.backbone.head.weight.data
    rows = head[said].clone()
    head.zero_()[said] = rows
    model.backbone.model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / file, folder)
    return folder


def show(result: dict[str, Any]) -> None:
    """A table for the terminal."""
    table = Table(title=result["hardware"], caption=result["versions"])
    for column in ("server", "clients", "failed", "requests/s", "tokens/s", "per CPU second"):
        table.add_column(column)
    for column in ("first token", "between chunks"):
        table.add_column(f"{column}, ms p50 / p99")
    for name, rows in result["servers"].items():
        for row in rows:
            first, between = row["first_token_ms"], row["between_chunks_ms"]
            table.add_row(
                name, str(row["clients"]), str(row["failed"]), f"{row['requests_per_second']:.2f}",
                f"{row['tokens_per_second']:.0f}", f"{first['p50']:.0f} / {first['p99']:.0f}",
                f"{between['p50']:.1f} / {between['p99']:.1f}",
            )  # fmt: skip
    for clients, speed in result["engine"].items():
        table.add_row("generate_batch", clients, "", "", f"{speed:.0f}", "", "", "")
    Console().print(table)


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--exits", default="", help="folder of a draft exit of the model")
    parser.add_argument("--shape", choices=SHAPES, default="")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--engine", type=int, nargs="*", help="default: the same numbers")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--slots", type=int, default=0, help="default: as many as clients")
    parser.add_argument("--capacity", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1, help="of all servers, in turn")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=DTYPES, help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--alone", action="store_true", help="without transformers serve")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    args.slots = args.slots or max(args.clients)
    args.engine = args.clients if args.engine is None else args.engine
    on_gpu = pick_device(args.device).type == "cuda"
    args.precision = args.precision or ("bf16" if on_gpu else "fp32")
    return args


def main() -> None:
    """Measure, show, write."""
    args = arguments()
    device = pick_device(args.device)
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = make(args, Path(folder))
        ours = [
            sys.executable, "-m", "ee_tuning", "serve", "--model", str(model),
            "--slots", str(args.slots), "--capacity", str(args.capacity),
            "--device", device.type, "--max-queue", "256", "--precision", args.precision,
        ]  # fmt: skip
        theirs = [
            str(Path(sys.executable).parent / "transformers"), "serve", str(model),
            "--device", device.type, "--dtype", DTYPES[args.precision],
        ]  # fmt: skip
        body = {"max_tokens": args.new_tokens, "temperature": 0}
        own = body | {"ignore_eos": True, "stream_options": {"include_usage": True}}
        settings = {"eos_token_id": None, "do_sample": False}
        other = body | {"model": str(model), "generation_config": json.dumps(settings)}
        asked: list[tuple[str, list[str], dict[str, Any]]] = [("ee-tuning serve", ours, own)]
        if args.exits:
            drafting = ["--exits", args.exits, "--mode", "speculative", "--threshold", "0.1"]
            asked.append(("ee-tuning serve, drafts", [*ours, *drafting], own))
        if not args.alone:
            asked += [
                ("transformers serve", theirs, other),
                ("continuous batching", [*theirs, "--continuous-batching"], other),
            ]
        result: dict[str, Any] = {
            "hardware": hardware(device), "versions": versions(), "settings": vars(args),
            "servers": {name: [] for name, _, _ in asked}, "engine": {},
        }  # fmt: skip

        def write() -> None:
            if args.out:
                write_json(Path(args.out), result)

        log = Path(args.out).with_suffix(".log") if args.out else Path(folder) / "log"
        for _ in range(args.rounds):
            for name, command, given in asked:
                try:
                    for row in measure(command, "/health", given, args, log):
                        result["servers"][name].append(row)
                        write()
                except (RuntimeError, OSError) as error:
                    print(f"{name}: {error}", file=sys.stderr)
        torch.manual_seed(0)
        for number, speed in engine_alone(model, args.engine, args):
            result["engine"][number] = speed
            write()
    show(result)


if __name__ == "__main__":
    with ends_in_a_line():
        main()
