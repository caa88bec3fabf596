"""``python -m ee_tuning.lm_eval``: lm-eval's own command, which knows exits."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import yaml

from ee_tuning.cli import ends_in_a_line
from ee_tuning.errors import UserError, first_line

TASKS = Path(__file__).parent / "tasks"
MODEL = "ee_tuning.lm_eval.model:EarlyExitLM"


def main() -> None:
    """Run lm-eval with the arguments of this process. A user's mistake is one line, status 2."""
    debug = "--debug" in sys.argv
    sys.argv = [arg for arg in sys.argv if arg != "--debug"]
    with ends_in_a_line(debug):
        run()


def run() -> None:
    """lm-eval's command, with one model and some tasks more.

    Raises:
        UserError: lm-eval is not installed or refuses what it is asked for, or a task's data cannot
            be had from the hub.
    """
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.api.registry import model_registry
        from lm_eval.utils import setup_logging
    except ImportError as error:
        raise UserError(
            f'lm-eval cannot be imported ({first_line(error)}): pip install "ee-tuning[lm-eval]"'
        ) from error
    setup_logging()
    if "ee-tuning" not in model_registry:
        model_registry.register("ee-tuning", target=MODEL)
    command = HarnessCLI()
    args = command.parse_args()
    if hasattr(args, "include_path"):
        args.include_path = [str(TASKS), *_other_tasks(args)]
    try:
        command.execute(args)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        if _is_of_the_hub(error):
            raise UserError(
                f"a task's data or metric cannot be had: {first_line(error)}; those whose names "
                "begin with local_ need no hub"
            ) from error
        if _refuses(error):
            raise UserError(first_line(error)) from error
        raise


def _other_tasks(args: Any) -> list[str]:
    """The folders of tasks that the user names, as a flag or in a file of settings."""
    named = args.include_path
    if named is None and getattr(args, "config", None):
        try:
            settings = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            return []  # which lm-eval says better
        named = settings.get("include_path") if isinstance(settings, dict) else None
    return [named] if isinstance(named, str) else list(named or [])


def _is_of_the_hub(error: BaseException) -> bool:
    """Whether it comes from a package that fetches things."""
    return any(name in ("datasets", "huggingface_hub", "evaluate") for name in _packages(error))


def _refuses(error: BaseException) -> bool:
    """Whether lm-eval itself raised it, which then says what is wrong with the arguments."""
    return _packages(error)[-1:] == ["lm_eval"]


def _packages(error: BaseException) -> list[str]:
    """The packages that an error came through, the one that raised it last."""
    frames = traceback.extract_tb(error.__traceback__)
    parts = [Path(frame.filename).parts for frame in frames]
    marked = [(p, p.index("site-packages")) for p in parts if "site-packages" in p]
    return [p[at + 1] for p, at in marked]


if __name__ == "__main__":
    main()
