"""How the command line reads what it is given, and what it says."""

import subprocess
import sys

import pytest

from ee_tuning.cli import COMMANDS


@pytest.mark.parametrize("args", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_imports_neither_torch_nor_transformers(args):
    code = (
        "import sys; from ee_tuning.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.exit(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, *args, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "[]"
    assert done.stdout.startswith("usage: ee-tuning")
