"""What becomes of a run of two ranks when one of them is killed, at random.

python benchmarks/kills.py --kills 30 --out benchmarks/results/kills.json
python benchmarks/kills.py --kills 1 --phase validation --layout pp2-kl

On a tiny random model, on the CPU. A kill (signal 9) strikes a rank a moment, up to a tenth of a
second, after a phase has begun: loading, a step, a checkpoint, a validation, or, of `generate`,
loading or a token. Of each it is said how long the other rank lived on, which lines of ours it
left, and how torchrun ended. `tune` is started again by torchrun, once: its exits are compared, bit
for bit, with those of a run of the same layout that nobody has disturbed. `generate` is not, and
ends with status 1. Ends with status 1 itself if one of this is not so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, LlamaConfig

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.cli import main as command
from ee_tuning.devices import versions
from ee_tuning.files import write_json
from ee_tuning.parallel.mesh import restarts

LAYOUTS = {
    "dp2": ["--dp", "2"],
    "dp2-shard": ["--dp", "2", "--shard"],
    "pp2": ["--pp", "2"],
    "pp2-kl": ["--pp", "2", "--loss", "kl"],
}
# The function that begins a phase, and at which of its calls, counted from 1, it may be.
PHASES = {
    "loading": ("ee_tuning.tune.loop", "set_up", 1),
    "step": ("ee_tuning.tune.loop", "Run.step", 8),
    "checkpoint": ("ee_tuning.tune.loop", "Run._save", 4),
    "validation": ("ee_tuning.tune.loop", "Run.validate", 4),
    "loading to decode": ("ee_tuning.commands.generate", "load_for_decoding", 1),
    "decoding": ("ee_tuning.decode.stage", "Stage.compute", 12),
}
DECODES = ("loading to decode", "decoding")
TIMEOUT = 60  # seconds


def strike(phase: str, call: int, rank: int, delay: float, mark: Path) -> None:
    """Let this process be killed, if it is `rank`, so long after that call; not once restarted."""
    own = int(os.environ["RANK"])
    if restarts() == 0:
        mark.with_name(f"pid-{own}").write_text(str(os.getpid()))
    if own != rank or restarts():
        return
    where, path, _ = PHASES[phase]
    owner: Any = importlib.import_module(where)
    *parts, name = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), []

    def kill() -> None:
        time.sleep(delay)
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def called(*args: Any, **given: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            threading.Thread(target=kill, daemon=True).start()
        return original(*args, **given)

    setattr(owner, name, called)


def make(folder: Path) -> None:
    """A model, its tokenizer, exits and data."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: n for n, word in enumerate(["<s>", *(f"w{n}" for n in range(255))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>")
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=256, eos_token_id=None,  # texts are long
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model = EarlyExitModel.from_base(str(folder / "model"), ExitConfig("2", "norm"))
    model.save_pretrained(folder / "exits")
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(255)}" for _ in range(60)) for _ in range(200)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "data.jsonl").write_text(lines)


def arguments(folder: Path, phase: str, layout: str, out: str) -> list[str]:
    """The command."""
    if phase in DECODES:
        return [
            "generate", "--exits", str(folder / "exits"), "--prompt", "w1 w2 w3", "--pp", "2",
            "--max-new-tokens", "240", "--threshold", "0", "--timeout", str(TIMEOUT),
        ]  # fmt: skip
    return [
        "tune", "--model", str(folder / "model"), "--layers", "1,3", "--arch", "mlp",
        "--head", "own", "--data", str(folder / "data.jsonl"), "--out", str(folder / out),
        "--steps", "8", "--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size",
        "8", "--lr", "1e-3", "--save-every", "2", "--eval-every", "3", "--valid-fraction", "0.1",
        "--keep", "1", "--timeout", str(TIMEOUT), *LAYOUTS[layout],
    ]  # fmt: skip


def torchrun(folder: Path, more: list[str], restarted: bool) -> tuple[int, str, float | None]:
    """Status, what was printed, and seconds from the kill until no rank of then was left."""
    mark, ended = folder / "struck", None
    process = start(folder, more, restarted)
    done = False
    while not done:
        time.sleep(0.05)
        done = process.poll() is not None  # and so are the ranks, which are looked at after that
        if ended is None and mark.exists() and not any(map(alive, folder.glob("pid-*"))):
            ended = time.time() - mark.stat().st_mtime
    return process.returncode, (folder / "log").read_text(), ended


def start(folder: Path, more: list[str], restarted: bool) -> subprocess.Popen:
    """torchrun, whose ranks are `rank(more)`; what they print is in the file `log`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", str(int(restarted)), __file__, *more]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (folder / "log").open("w") as file:
        return subprocess.Popen(command, env=env, stdout=file, stderr=file)


def rank(more: list[str]) -> None:
    """A rank: the command, and what strikes it before."""
    if more[0] == "--strike":
        *what, mark = json.loads(more[1])
        strike(*what, Path(mark))
        more = more[2:]
    command(more)


def alive(file: Path) -> bool:
    """Whether the process whose number is in a file is there."""
    try:
        return Path(f"/proc/{int(file.read_text())}/stat").read_text().split()[2] != "Z"
    except (OSError, ValueError):
        return False


def one(folder: Path, phase: str, layout: str, draw: random.Random) -> dict[str, Any]:
    """A kill, and what came of it."""
    for file in (*folder.glob("pid-*"), *folder.glob("struck")):
        file.unlink()
    rank, call = draw.randrange(2), draw.randint(1, PHASES[phase][2])
    delay, out = draw.random() / 10, f"killed-{draw.randrange(10**9)}"
    given = ["--strike", json.dumps([phase, call, rank, delay, str(folder / "struck")])]
    tunes = phase not in DECODES
    more = [*given, *arguments(folder, phase, layout, out)]
    status, said, ended = torchrun(folder, more, restarted=tunes)
    lines = re.findall(r"ee-tuning: rank .*", said)  # perhaps behind a text
    found: dict[str, Any] = {
        "phase": phase, "layout": layout if tunes else "pp2", "rank": rank, "call": call,
        "delay": round(delay, 3), "status": status, "lines": lines,
        "seconds": None if ended is None else round(ended, 2),
    }  # fmt: skip
    same = tunes and status == 0
    if same:
        files = [folder / name / "exits.safetensors" for name in (layout, out)]
        same = files[0].read_bytes() == files[1].read_bytes()
    found["same"] = same if tunes else None
    found["good"] = (
        (status == 0 and same if tunes else status == 1)
        and ended is not None
        and ended < TIMEOUT
        and len(lines) == 1
    )
    if not found["good"]:
        found["said"] = said[-4000:]
    return found


def main() -> int:
    """Kill, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--phase", nargs="+", choices=PHASES, help="in turn; default: all")
    parser.add_argument("--layout", choices=LAYOUTS, help="default: drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="added to, if it is there")
    args = parser.parse_args()
    draw, kills = random.Random(args.seed), list[dict[str, Any]]()
    there = args.out is not None and args.out.exists()
    before = json.loads(args.out.read_text())["kills"] if there else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        for number in range(args.kills):
            phase = (args.phase or [*PHASES])[number % len(args.phase or PHASES)]
            layout = args.layout or draw.choice(list(LAYOUTS))
            if phase not in DECODES and not (folder / layout).exists():
                status, said, _ = torchrun(folder, arguments(folder, phase, layout, layout), False)
                assert status == 0, said
            kills.append({"seed": args.seed} | one(folder, phase, layout, draw))
            print(json.dumps(kills[-1]), flush=True)
            if args.out:
                write_json(args.out, {"versions": versions(), "kills": before + kills})
    return int(not all(kill["good"] for kill in kills))


if __name__ == "__main__":
    if "RANK" in os.environ:
        rank(sys.argv[1:])
    else:
        raise SystemExit(main())
