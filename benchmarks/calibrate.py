"""What calibration finds and how long it takes: the demo's exits, prompts of Python's own library.

python benchmarks/calibrate.py --exits demo/exits            # after make demo
python benchmarks/calibrate.py --exits layers --data prompts.jsonl --model demo/smollm2

Prompts are the beginnings of functions and classes, three of a file or as many more as it takes, of
files that the demo's exits were not tuned on. Written to --out, which `python benchmarks/table.py`
puts into the docs.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ee_tuning.calibrate.config import CalibrateConfig
from ee_tuning.calibrate.run import calibrate
from ee_tuning.cli import ends_in_a_line
from ee_tuning.files import write_json

ROOT = Path(__file__).parent.parent
STDLIB = Path(sysconfig.get_paths()["stdlib"])


def functions(number: int) -> list[str]:
    """At least so many beginnings, if there are, a few to spare: some begin alike."""
    for per_file in (3, 6, 12, 24):
        found = beginnings(per_file)
        if len(found) >= 1.25 * number:
            break
    return found


def beginnings(per_file: int, lines: int = 12) -> list[str]:
    """Beginnings of functions and classes of the standard library, in an order that is drawn."""
    records = (ROOT / "demo" / "data" / "train.jsonl").read_text().splitlines()
    tuned_on = {json.loads(line)["path"] for line in records}
    draw, found = random.Random(0), list[str]()
    for path in _files():
        if str(path.relative_to(STDLIB)) in tuned_on:
            continue
        text = path.read_text(encoding="utf-8", errors="replace").splitlines()
        starts = [n for n, line in enumerate(text) if line.lstrip().startswith(("def ", "class "))]
        for start in draw.sample(starts, min(per_file, len(starts))):
            found.append("\n".join(text[start : start + lines]))
    draw.shuffle(found)
    return found


def _files() -> Iterator[Path]:
    for path in sorted(STDLIB.rglob("*.py")):
        if not {"site-packages", "test", "tests"} & {*path.relative_to(STDLIB).parts}:
            yield path


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate; gives what was found, and seconds of the clock and of all cores."""
    with tempfile.TemporaryDirectory() as folder:
        data = [args.data]
        if not args.data:
            path = Path(folder) / "prompts.jsonl"
            path.write_text(
                "".join(json.dumps({"text": one}) + "\n" for one in functions(args.prompts))
            )
            data = [str(path)]
        config = CalibrateConfig(
            exits=args.exits, model=args.model, data=data, epsilon=args.epsilon,
            delta=args.delta, risk=args.risk, prompts=args.prompts,
        )  # fmt: skip
        clock, cores = time.perf_counter(), time.process_time()
        found = calibrate(config)
        seconds = time.perf_counter() - clock
        cores = time.process_time() - cores
    return {"calibration": found.to_json(), "seconds": seconds, "seconds_of_cores": cores}


def main() -> None:
    """Calibrate, print and write one result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exits", default="demo/exits")
    parser.add_argument("--model", default="")
    parser.add_argument("--data", default="")
    parser.add_argument("--risk", default="next-token")
    parser.add_argument("--epsilon", type=float, default=0.02)
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--out", default="benchmarks/results/calibrate-cpu.json")
    args = parser.parse_args()
    result = {"settings": vars(args)} | measure(args)
    write_json(Path(args.out), result)
    found = result["calibration"]
    print(f"{found['thresholds']}, report {found['report']}, {result['seconds']:.0f} s")


if __name__ == "__main__":
    with ends_in_a_line():
        main()
