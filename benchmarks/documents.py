"""Documents for `experiments.py`: Python source of permissive licences installed on this machine.

python benchmarks/documents.py --characters 4e7 --out documents.jsonl

The files that demo/data was taken from, and near copies of them, are left out: those of its
validation are held-out text.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))

from corpus import build_corpus

HELD_OUT = 0.4  # of the standard library, as demo/pretrain.py has it

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--characters", type=float, default=4e7)
    parser.add_argument("--files", type=int, default=8000, help="that are read at most")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    texts, _, facts = build_corpus(HELD_OUT, args.files, seed=0)
    size = 0
    with Path(args.out).open("w", encoding="utf-8") as file:
        for text in texts.values():
            if size < args.characters:
                file.write(json.dumps({"text": text}) + "\n")
                size += len(text)
    print(f"{size:,} characters of {facts['train_files']:,} files")
