"""Attention of the tokens of a window, each as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_tuning.attention import register
from ee_tuning.invariant.products import kernels
from ee_tuning.invariant.texts import attend_texts

NAME = "ee_tuning_invariant"
ALL = 1 << 30  # tokens of a window that sees all
KEYS = 32  # a CPU looks at a multiple of this many places
# And asks with a multiple of this many queries: else what one thread keeps of them begins where
# vectors are not aligned, and BLAS adds up in another order.
QUERIES = 4


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for a pass of decoding: (n, T, heads, D).

    query: (n, heads, T, E). key, value: those of all slots, up to where the pass looks, or what the
    layer makes of them; of whole texts, their own. Which a token sees, the cache of `module` says;
    the mask is not asked.
    """
    place, window = module.kept.place, module.kept.window or ALL
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if place.texts is not None:
        return attend_texts(query, key, value, place.texts, window, scale, softcap, s_aux), None
    if query.device.type == "cpu" and softcap is None and s_aux is None:
        return _on_cpu(module.kept, query, key, value, scale), None
    if query.device.type == "cpu":
        slots, firsts = place.slots.tolist(), place.positions[:, 0].tolist()
        y = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        for row, (slot, first) in enumerate(zip(slots, firsts, strict=True)):
            for token in range(query.shape[2]):
                last = first + token
                seen = module.kept.seen(max(0, last - window + 1), last)
                keys, values = key[slot][:, seen], value[slot][:, seen]
                asked = query[row, :, token]
                y[row, token] = _alone(asked, keys, values, scale, softcap, s_aux)
        return y, None
    y = kernels.attend(
        query, key, value, place.slots, place.positions, place.reach, window, scale,
        softcap or 0.0, s_aux,
    )  # fmt: skip
    return y, None


class Look(NamedTuple):
    """Tokens that are looked for in one call: each is a text of its own to it.

    asked: which of queries (n, T, …) they are. slots: theirs, one for each or one for all. length:
    places that are looked at, as many for a token in whatever call. mask: (B, 1, 1, length), what
    is added to scores. places: (B, length), where they are in slots; None: at the beginning.
    """

    asked: tuple[Any, Any]
    slots: slice | Tensor
    length: int
    mask: Tensor
    places: Tensor | None


def _on_cpu(kept: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention without caps and sinks, by torch's own on a CPU.

    To that, each text of a batch with each head of K/V is a task, whose sums depend on how many
    queries and places it has alone. Here the heads of one token that share K/V are its queries,
    and how many places there are follows from the token's position.
    """
    heads, out, width = key.shape[1], value.shape[3], query.shape[3]
    number, of_all, tokens, _ = query.shape
    shared = of_all // heads
    padding = 0, 0, 0, -shared % QUERIES
    queries = F.pad(query.transpose(1, 2).unflatten(2, (heads, shared)), padding)
    key, value = _dense(key), _dense(F.pad(value, (0, width - out)) if out < width else value)
    looks = kept.place.remembered((kept.window, key.shape[2], query.dtype), _looks)
    y = query.new_empty(number, tokens, of_all, out)
    for look in looks:
        # One task alone may be split among threads.
        batch = 2 if heads == len(look.mask) == 1 else -1
        asked, keys, values, mask = (
            one.expand(batch, -1, -1, -1)
            for one in (queries[look.asked], _seen(key, look), _seen(value, look), look.mask)
        )
        found = F.scaled_dot_product_attention(asked, keys, values, mask, scale=scale)
        y[look.asked] = found[: len(look.mask), :, :shared, :out].flatten(1, 2)
    return y


def _looks(place: Any, window: int | None, places: int, dtype: torch.dtype) -> list[Look]:
    """The calls for a pass at `place`, of slots with a ring of `places`: tokens of one row share
    one, or those of one place in all rows, whichever are fewer."""
    slots, firsts = place.slots.tolist(), place.positions[:, 0].tolist()
    tokens = place.positions.shape[1]
    by_row = len(slots) <= tokens
    groups: dict[tuple[int, int, bool], list[tuple[int, int]]] = {}
    for row, first in enumerate(firsts):
        for token in range(tokens):
            last = first + token
            length = -(-min(last + 1, window or ALL) // KEYS) * KEYS
            turned = window is not None and (last >= window or length > places)
            kind = row if by_row else token, length, turned
            groups.setdefault(kind, []).append((row, token))
    looks = []
    for (_, length, turned), group in groups.items():
        rows, columns = (list(one) for one in zip(*group, strict=True))
        asked = (rows[0], _span(columns)) if by_row else (_span(rows), columns[0])
        own = [slots[row] for row in rows]
        lasts = torch.tensor([firsts[row] + token for row, token in group])[:, None]
        seen = torch.arange(length)
        counts = (lasts + 1).clamp(max=window or ALL)
        hidden = torch.zeros(len(group), length, dtype=dtype)
        hidden.masked_fill_(seen >= counts, -torch.inf)
        where = (lasts + 1 - counts + seen) % places if turned else None
        looks.append(Look(asked, _span(own[:1] if by_row else own), length,
                          hidden[:, None, None], where))  # fmt: skip
    return looks


def _span(numbers: Sequence[int]) -> slice | Tensor:
    """An index for numbers; a slice is a look at what there is, nothing is copied."""
    if [*numbers] == [*range(numbers[0], numbers[0] + len(numbers))]:
        return slice(numbers[0], numbers[-1] + 1)
    return torch.tensor(numbers)


def _dense(x: Tensor) -> Tensor:
    """K or V (slots, heads, L, D) whose places lie one after another, as of every pass."""
    return x if x.stride(2) == x.shape[3] and x.stride(3) == 1 else x.contiguous()


def _seen(x: Tensor, look: Look) -> Tensor:
    """Of K or V (slots, heads, L, D) what the tokens of one call see: (B, heads, length, D)."""
    if look.places is None:
        found = x[:, :, : look.length][look.slots]
    else:
        slots = torch.arange(len(x))[look.slots][:, None]
        found = x[slots, :, look.places].transpose(1, 2).contiguous()
    return found if len(found) == len(look.mask) else found.expand(len(look.mask), -1, -1, -1)


def _alone(
    query: Tensor, key: Tensor, value: Tensor, scale: float, cap: float | None, sinks: Tensor | None
) -> Tensor:
    """Of one token: query (heads, E), key and value (K/V heads, L, E or D): (heads, D)."""
    grouped = query.unflatten(0, (len(key), -1))
    scores = (grouped @ key.transpose(1, 2)).float() * scale
    if cap is not None:
        scores = cap * (scores / cap).tanh()
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(*grouped.shape[:2], 1)], -1)
    weights = scores.softmax(-1)[..., : key.shape[1]].to(value.dtype)
    return (weights @ value).flatten(0, 1)


register(NAME, attend)
