"""Telling weights apart: exits belong to the backbone that they were made for, and what was made of
weights is theirs as long as they do not change."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ee_tuning.backbone import Backbone, in_memory
from ee_tuning.errors import UserError
from ee_tuning.slices import ParallelLinear, SplitParameter, whole

# Values of a config that change what a model computes, whatever its weights are.
CONFIG_KEYS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "hidden_act", "rms_norm_eps",
    "layer_norm_eps", "rope_parameters", "sliding_window", "layer_types", "tie_word_embeddings",
)  # fmt: skip
SAMPLES_PER_TENSOR = 64


def config_values(config: Any) -> dict[str, Any]:
    """The values of a backbone's config that its exits depend on: half of its fingerprint."""
    return {key: getattr(config, key, None) for key in CONFIG_KEYS}


def tensor_hashes(backbone: Backbone, deepest: int) -> dict[str, str]:
    """A hash per part of a backbone up to layer `deepest`: the other half of its fingerprint.

    Over the tensors' names, shapes and `SAMPLES_PER_TENSOR` values of each, rounded to bf16 so
    that the dtype a checkpoint is loaded in makes no difference. Deeper layers are not covered:
    they need not be in memory. Nor are parts that another stage of a pipeline holds.
    """
    parts = {
        "embedding": backbone.model.get_input_embeddings(),
        "final norm": backbone.norm,
        "head": backbone.head,
    }
    layers = backbone.layers[:deepest]
    parts |= {f"layer {number}": layer for number, layer in enumerate(layers, start=1)}
    return {name: _hash_tensors(part) for name, part in parts.items() if in_memory(part)}


def _hash_tensors(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, p in module.named_parameters():
        if isinstance(p, SplitParameter):
            assert p.sample is not None, "split after it was read: too late for a fingerprint"
            shape, values = p.whole_shape, p.sample
        elif not _is_plain(p):
            digest.update(f"{name}{tuple(p.shape)} {type(p).__name__}".encode())
            continue
        else:
            shape, values = p.shape, sample(p)
        rounded = values.to(torch.bfloat16).float().cpu().numpy()
        digest.update(f"{name}{tuple(shape)}".encode() + rounded.tobytes())
    return digest.hexdigest()[:16]


@cache
def sample_places(size: int) -> Tensor:
    """The places among `size` values that are looked at."""
    samples = SAMPLES_PER_TENSOR if size else 0
    return torch.linspace(0, size - 1, samples, dtype=torch.float64, device="cpu").long()


def sample(weight: Tensor) -> Tensor:
    """The values of a weight, (`SAMPLES_PER_TENSOR`,), that stand for all of them."""
    places = sample_places(weight.numel()).to(weight.device)
    return weight.detach().flatten().index_select(0, places)


def state_of(weight: Tensor, every_value: bool = False) -> tuple[Any, ...]:
    """What is another one if a weight was changed where it is, or lies elsewhere.

    PEFT merges adapters through `.data`, of which torch's versions do not tell: on a CPU a sample
    of the values does, or the sum of every one, which takes as long as to read them. A GPU would
    have to be waited for, and has no copies of matrices; nor has anything of quantised weights,
    which are tensors of another kind.
    """
    seen = cast(Any, None)
    if weight.is_cpu and _is_plain(weight):
        values = weight.detach()
        seen = _sum(values) if every_value else sample(values).view(torch.uint8).numpy().tobytes()
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), weight.dtype, version, seen


def _is_plain(weight: Tensor) -> bool:
    """Whether it is an ordinary tensor, which quantised weights are not."""
    return type(weight.detach()) is Tensor


def states_of(module: nn.Module) -> tuple[Any, ...]:
    """`state_of` each parameter; torch's own walk names them all, which takes a call longer than a
    token."""
    modules, weights = [module], list[Tensor]()
    for one in modules:
        if own := one._parameters:
            weights += [p for p in own.values() if p is not None]
        if children := one._modules:
            modules += [child for child in children.values() if child is not None]
    return tuple(map(state_of, weights))


def _sum(values: Tensor) -> int:
    """That of values as integers: long ones, if may be, which add up as fast as memory is read."""
    long = values.shape[-1] * values.element_size() % 8 == 0 and values.storage_offset() % 8 == 0
    return int(values.contiguous().view(torch.int64 if long else torch.uint8).sum())


def check_same(expected: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Refuse a backbone that the exits in `where` were not made for.

    Raises:
        UserError: names the first value of a fingerprint that differs.
    """
    for key, value in expected.items():
        other = found.get(key)
        if value != other:
            raise UserError(
                f"the exits in {where} were made for another backbone: "
                f"{key} is {other!r} here and {value!r} there"
            )


# How messages call what is hashed.
EXIT, PART = "exit at layer {}", "{} of the backbone"

_SEEN: WeakKeyDictionary[nn.Module, tuple[Any, Any]] = WeakKeyDictionary()


def _unless_seen(module: nn.Module, state: Any, find: Callable[[], Any]) -> Any:
    """What was found of a module in this state; found now, if it was not."""
    if module not in _SEEN or _SEEN[module][0] != state:
        _SEEN[module] = state, find()
    return _SEEN[module][1]


def backbone_hashes(backbone: Backbone) -> dict[str, str]:
    """`tensor_hashes` of the layers in memory as they are now; not made again while no weight
    changed, see `state_of`."""
    model, deepest = backbone.model, backbone.num_layers
    found: dict[str, str] = _unless_seen(
        model, states_of(model), lambda: tensor_hashes(backbone, deepest)
    )
    return found


def is_whole(exit: nn.Module) -> bool:
    """Whether no other process has parts of an exit's weights."""
    return not any(isinstance(module, ParallelLinear) for module in exit.modules())


def exit_hash(exit: nn.Module) -> str:
    """A hash of all of an exit's weights as they are now, in their dtype; of those that other
    processes have parts of, of this one's.

    Those that were hashed before and did not change since, see `state_of`, are not hashed again.
    """
    tensors = _tensors(exit)
    state = [state_of(one) for one in tensors.values()]
    found: str = _unless_seen(exit, state, lambda: hash_tensors(tensors))
    return found


def whole_exit_hash(exit: nn.Module) -> str:
    """`exit_hash` of the whole exit, which processes that have parts of it call together."""
    if is_whole(exit):
        return exit_hash(exit)
    split = {name: m for name, m in exit.named_modules() if isinstance(m, ParallelLinear)}
    tensors = _tensors(exit)
    for name, p in exit.named_parameters():
        tensors[name] = whole(p, p.detach())
    for name, value in exit.named_buffers():
        if owner := split.get(name.rpartition(".")[0]):  # rows that were picked of a head
            tensors[f"buffer {name}"] = owner.parallel.group.gather(value, 0)
    return hash_tensors(tensors)


def _tensors(exit: nn.Module) -> dict[str, Tensor]:
    found = {name: p.detach() for name, p in exit.named_parameters()}
    return found | {f"buffer {name}": value for name, value in exit.named_buffers()}


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """A hash of all values of tensors, by their names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, one in sorted(tensors.items()):
        digest.update(f"{name} {tuple(one.shape)} {one.dtype}".encode())
        digest.update(one.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()[:32]
