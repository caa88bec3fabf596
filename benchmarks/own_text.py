"""Prompts for text that a model writes itself: functions and documents of this machine's packages.

python benchmarks/own_text.py --out own/
ee-tuning regenerate --form text --data own/functions.jsonl own/documents.jsonl --out own.jsonl …

Python source of permissive licences, as `documents.py` takes it: without the files that demo/data
was taken from, of which `real.py` has its documents. Functions are given up to the end of their
docstring, the inner ones as if they stood alone; of documents, pieces from anywhere.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))

from corpus import build_corpus
from documents import HELD_OUT

SHORTEST, LONGEST = 80, 700  # characters of a function's beginning
PIECES, EVERY = (160, 220, 280), 4000  # characters of a piece; and of text for each piece


def functions(source: str) -> Iterator[str]:
    """Beginnings of functions that have a docstring, and something behind it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node):
            continue
        if len(node.body) > 1:
            found = textwrap.dedent("".join(lines[node.lineno - 1 : node.body[0].end_lineno]))
            if SHORTEST < len(found) < LONGEST:
                yield found


def pieces(source: str, draw: random.Random) -> Iterator[str]:
    """Pieces of a file, the more the longer it is."""
    for _ in range(1 + len(source) // EVERY):
        start = draw.randrange(max(1, len(source) - max(PIECES)))
        yield source[start : start + draw.choice(PIECES)]


def main() -> None:
    """Write functions.jsonl and documents.jsonl, each prompt once, in an order that is drawn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=8000, help="that are read at most")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    texts, _, _ = build_corpus(HELD_OUT, args.files, seed=0)
    draw = random.Random(0)
    found = {
        "functions": [one for text in texts.values() for one in functions(text)],
        "documents": [one for text in texts.values() for one in pieces(text, draw)],
    }
    for name, prompts in found.items():
        prompts = list(dict.fromkeys(prompts))
        draw.shuffle(prompts)
        lines = (json.dumps({"prompt": one}) + "\n" for one in prompts)
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{len(prompts):,} {name}")


if __name__ == "__main__":
    main()
