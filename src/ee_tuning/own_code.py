"""Code that comes with a checkpoint: run only where the user allows it, and never asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ee_tuning.errors import SecurityNotice, UserError
from ee_tuning.files import read_json
from ee_tuning.hub import find_file


@contextmanager
def own_code(path: str, file: str, trust: bool) -> Iterator[None]:
    """Inside, transformers may meet code that comes with what is at `path`, as its `file` says.

    trust: it may run, which is said in a warning.

    Raises:
        UserError: what is there cannot be read without it, and not `trust`.
    """
    found = _referred_to(path, file)
    if found and trust:
        text = f"code that comes with {path} is run, as --trust-remote-code says: {found}"
        warnings.warn(text, SecurityNotice, stacklevel=3)
    try:
        yield
    except ValueError as error:
        if not found or trust or isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} cannot be read without running code that comes with it ({found}): look at "
            "it, and allow it with --trust-remote-code"
        ) from error


def _referred_to(path: str, file: str) -> str:
    """The code that a checkpoint's JSON `file` refers to; empty: none."""
    found = find_file(path, file)
    try:
        values = read_json(found) if found else {}
    except UserError:  # transformers says so, too
        values = {}
    references = values.get("auto_map") if isinstance(values, dict) else None
    names = references.values() if isinstance(references, dict) else [references]
    flat = [one for name in names for one in (name if isinstance(name, list) else [name])]
    modules = {f"{one.rpartition('.')[0]}.py" for one in flat if isinstance(one, str)}
    return ", ".join(sorted(modules))


def causal_lm_class(config: Any, path: str) -> Any:
    """The class of a causal LM with this config, perhaps in code of its own; None: none.

    Its config's code has run before: without leave there would be none.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    reference = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if not reference or not is_own_code(config):
        return None
    return get_class_from_dynamic_module(reference, path)


def is_own_code(config: Any) -> bool:
    """Whether the class of a config came with a checkpoint."""
    return type(config).__module__.startswith("transformers_modules.")


def check_kernels(config: Any, path: str, trust: bool) -> None:
    """Refuse attention, or experts, that are code from the hub.

    Raises:
        UserError: names it.
    """
    for name in ("_attn_implementation", "_experts_implementation"):
        kernel = getattr(config, name, None)
        if isinstance(kernel, str) and "/" in kernel and not trust:
            raise UserError(
                f"{path} cannot be computed without code from the hub ({kernel}): look at it, and "
                "allow it with --trust-remote-code"
            )
