"""Which exits to try, one kind after another, within the time there is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ee_tuning.config import Leaving
from ee_tuning.costs import draft_cost
from ee_tuning.data import load_packed
from ee_tuning.devices import pick_device, pick_dtype
from ee_tuning.errors import UserError, all_checked
from ee_tuning.evaluate.speed import take_prompts
from ee_tuning.exit_config import DRAFT, ExitConfig
from ee_tuning.loading import load_config, load_tokenizer
from ee_tuning.model import Network
from ee_tuning.share import New, Share, load
from ee_tuning.suggest.config import SuggestConfig
from ee_tuning.suggest.predict import Costs, Heard, Told, drafted, left
from ee_tuning.suggest.probes import batches, heard, tuned, written
from ee_tuning.suggest.rounds import measure, measure_full
from ee_tuning.vocabulary import LEAST as LEAST_VOCABULARY
from ee_tuning.vocabulary import count_tokens, most_frequent

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
BARS = (0.05, 0.1, 0.2, 0.4, 0.6)  # of a draft exit
SHARES = 4, 16  # of the vocabulary, one in so many tokens, that are tried
LONGEST = (1, 2, 3, 4, 6, 8)  # drafts
LENGTH = 128  # tokens of a text that probes are tuned on
TUNED, ASKED = 64, 16  # texts to tune on, and prompts that speed is predicted for
SHORTLIST = 3  # layers that are measured, and tried with a whole layer
LEAST = 0.95  # agreement at which leaving for good is still suggested
PAYS = 1.05  # times full depth's speed from which an exit pays


@dataclass(frozen=True)
class Candidate:
    """One exit, as its probe promises: `agreement` of its likeliest token with the backbone's own.

    speedup: predicted, over full depth, of mode ``speculative`` with the threshold `threshold` and
    drafts of at most `longest`; tokens_per_pass: with it, for each token that goes to the end.
    leaving: the same of mode ``threshold``, (speed-up, threshold, agreement), or None where no
    threshold keeps enough, as of a draft exit. measured: whether rounds were timed, or only
    counted. vocab: tokens that it knows; 0: all.
    """

    layer: int
    arch: str
    agreement: float
    speedup: float
    threshold: float
    longest: int
    tokens_per_pass: float
    leaving: tuple[float, float, float] | None
    measured: bool
    vocab: int = 0


@dataclass(frozen=True)
class Suggestion:
    """What was found. candidates: measured ones first, by speed-up. full: tokens per second at full
    depth, prompts included. steps: of the probes. seconds: that it took."""

    candidates: list[Candidate]
    full: float
    steps: dict[str, int]
    seconds: float

    @property
    def best(self) -> Candidate | None:
        """The one that promises most without changing the text, if it pays."""
        pays = [one for one in self.candidates if one.measured and one.speedup >= PAYS]
        return max(pays, key=lambda one: one.speedup, default=None)


@dataclass
class _Search:
    """What all probes share. texts: to tune on; prompts, and `spoken`, these with what full depth
    says after them. full: what decoding at full depth costs. timing: seconds for the rounds of an
    exit in a mode."""

    config: SuggestConfig
    say: Callable[[str], None]
    texts: list[list[int]]
    prompts: list[list[int]]
    spoken: list[list[int]]
    full: Costs
    timing: float = float("inf")

    @property
    def full_seconds(self) -> float:
        """Of all prompts, at full depth."""
        rounds = self.config.max_new_tokens - 1
        return len(self.prompts) * (self.full.prompt + rounds * self.full.round(0, asked=False))


def suggest(config: SuggestConfig, say: Callable[[str], None] = lambda text: None) -> Suggestion:
    """Probe exits of `config.model`: a ``norm`` exit with the shared head after every layer, then a
    ``layer`` exit after the few that promise most, a ``draft`` exit, and that of the last two which
    promises more with reduced vocabularies.

    say: told what is being done.

    Raises:
        UserError: a backbone or data that cannot be used, or numbers that make no sense.
    """
    begun = time.perf_counter()
    _check(config)
    model, tokenizer = _loaded(config)
    search = _begin(config, model, tokenizer, say)
    third = max(1.0, (config.minutes * 60 - (time.perf_counter() - begun)) / 3)
    search.timing = third / 3 / (2 * SHORTLIST)  # what tuning leaves, of two modes of each
    steps: dict[str, int] = {}
    steps["norm"], found = _try(search, model, "norm", third)
    shortlist, more = sorted(one.layer for one in found if one.measured), list[Candidate]()
    backbone, probes = model.model, {}
    del model
    for arch, layers in (("layer", shortlist), ("draft", [DRAFT])):
        probes[arch] = _probes(backbone, layers, arch)
        steps[arch], tried = _try(search, probes[arch], arch, third)
        more += tried
    best = max(more, key=lambda one: one.speedup)
    more += _with_fewer_tokens(search, probes[best.arch], best)
    found = sorted([*found, *more], key=lambda one: (not one.measured, -one.speedup))
    tokens = len(search.prompts) * config.max_new_tokens
    return Suggestion(found, tokens / search.full_seconds, steps, time.perf_counter() - begun)


def _check(config: SuggestConfig) -> None:
    if not config.minutes > 0:
        raise UserError(f"minutes {config.minutes:g} is no time: give more than 0")
    for name, least in (("prompt_length", 2), ("max_new_tokens", 2)):
        if getattr(config, name) < least:
            raise UserError(f"{name} {getattr(config, name)} is too small: give at least {least}")


def _loaded(config: SuggestConfig) -> tuple[Network, PreTrainedTokenizerBase]:
    """The backbone with a ``norm`` exit after every layer but the last, and its tokenizer.

    Raises:
        UserError: it has no place for an exit, or cannot be had.
    """
    device, trust = pick_device(config.device), config.trust_remote_code
    share = Share(dtype=pick_dtype(config.precision, device), device=str(device))
    depth = load_config(config.model, trust).num_hidden_layers
    if depth < 2:
        raise UserError("the backbone has one layer alone: there is no place for an exit")
    exits = ExitConfig([*range(1, depth)], arch="norm", head="shared")
    model = load(New(config.model, exits, trust), share, Network)
    return model, load_tokenizer(config.model, model.backbone.config.vocab_size, trust)


def _probes(backbone: PreTrainedModel, layers: list[int], arch: str) -> Network:
    """The same backbone with new exits."""
    exits = ExitConfig([*layers], arch=arch, head="shared")
    return load(New(backbone, exits), Share(), Network)


def _begin(
    config: SuggestConfig,
    model: Network,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None],
) -> _Search:
    """The texts that all probes are tuned on and asked about, and what full depth costs."""
    context = model.backbone.context or LENGTH
    length = min(LENGTH, context)
    if config.prompt_length + config.max_new_tokens > context:
        raise UserError(
            f"prompts of {config.prompt_length} tokens with {config.max_new_tokens} more do not "
            f"fit into the context of {context}: lower --prompt-length or --max-new-tokens"
        )
    if config.data:
        rows = load_packed(config.data, tokenizer, length, config.seed)
        texts = take_prompts(rows, TUNED + ASKED, length, "give longer ones")
        if len(texts) < 2:
            raise UserError("there is one text alone: give more with --data")
        all_checked()
        say(f"{len(texts)} texts were read")
    else:
        start = tokenizer.bos_token_id
        start = tokenizer.eos_token_id if start is None else start
        if start is None:
            raise UserError("the tokenizer has no token that a text begins with: give --data")
        all_checked()
        say("letting the backbone write texts")
        first = [[start]] * (TUNED + ASKED)
        texts = written(model, first, length - 1, config.seed, config.minutes * 60 / 5)
    asked = min(ASKED, len(texts) // 2)
    prompts = [ids[: config.prompt_length] for ids in texts[:asked]]
    spoken = written(model, prompts, config.max_new_tokens)
    full = measure_full(model, prompts[0])
    return _Search(config, say, texts[asked:], prompts, spoken, full)


def _try(search: _Search, model: Network, arch: str, seconds: float) -> tuple[int, list[Candidate]]:
    """Tune exits of one kind for about two thirds of the time, and measure the best of them."""
    places = "" if arch == "draft" else f", after layers {model.exit_layers}"
    search.say(f"tuning probes: {arch}{places}")
    steps = tuned(model, search.texts, seconds * 2 / 3)
    said = heard(model, search.spoken, search.config.prompt_length)
    rough = [_counted(search, model, layer, arch, said[layer]) for layer in model.exit_layers]
    rough.sort(key=lambda one: -one.speedup)
    timed = [_timed(search, model, one.layer, arch, said[one.layer]) for one in rough[:SHORTLIST]]
    return steps, [*timed, *rough[SHORTLIST:]]


def _timed(search: _Search, model: Network, layer: int, arch: str, said: list[Heard]) -> Candidate:
    """What an exit promises by what its rounds take."""
    known = model.vocabulary
    search.say(
        f"timing rounds: {arch}{f', after layer {layer}' if layer != DRAFT else ''}"
        f"{f', {len(known.tokens):,} tokens' if known else ''}"
    )
    ways = (True,) if layer == DRAFT else (True, False)
    given = search.prompts[0], search.full, search.timing
    costs = [measure(model, layer, drafts, *given) for drafts in ways]
    return _candidate(search, model, layer, arch, said, *costs)


def _with_fewer_tokens(search: _Search, model: Network, one: Candidate) -> list[Candidate]:
    """The same exit, knowing the tokens alone that are most frequent in the texts that probes were
    tuned on; none of a vocabulary that is small as it is."""
    size, found = model.backbone.config.vocab_size, list[Candidate]()
    if size < LEAST_VOCABULARY:
        return found
    state = model.exit(one.layer).state_dict()
    counts = count_tokens(batches(search.texts), size)
    for number in dict.fromkeys(max(64, size // share // 64 * 64) for share in SHARES):
        fewer = _probes(model.model, [one.layer], one.arch)
        fewer.exit(one.layer).load_state_dict(state)
        fewer.reduce_vocabulary(most_frequent(counts, number))
        said = heard(fewer, search.spoken, search.config.prompt_length)
        found.append(_timed(search, fewer, one.layer, one.arch, said[one.layer]))
    return found


def _counted(
    search: _Search, model: Network, layer: int, arch: str, said: list[Heard]
) -> Candidate:
    """What an exit promises if time goes as weights are read."""
    draft, whole = draft_cost(model, layer), search.full.round(0, asked=False)
    costs = Costs(
        {
            (number, asked): whole * (1 + draft * number)
            for number in (0, Leaving.max_pending)
            for asked in (False, True)
        },
        search.full.prompt,
    )
    both = (costs,) if layer == DRAFT else (costs, costs)
    return replace(_candidate(search, model, layer, arch, said, *both), measured=False)


def _candidate(
    search: _Search, model: Network, layer: int, arch: str, said: list[Heard],
    verified: Costs, unverified: Costs | None = None,
) -> Candidate:  # fmt: skip
    """An exit with the settings that promise most. verified, unverified: costs in the two modes, or
    the one that a draft exit has."""
    draft, full = draft_cost(model, layer), search.full_seconds
    ways = {
        (threshold, longest): drafted(said, threshold, longest, draft, verified)
        for threshold in (BARS if layer == DRAFT else THRESHOLDS)
        for longest in LONGEST
    }
    threshold, longest = min(ways, key=lambda way: ways[way].seconds)
    told = ways[threshold, longest]
    leaving: dict[float, Told] = {}
    if unverified:
        for one in THRESHOLDS:
            leaving[one] = left(said, one, Leaving.max_pending, unverified)
    kept = {one: what for one, what in leaving.items() if what.agreement >= LEAST}
    best = min(kept, key=lambda one: kept[one].seconds, default=None)
    places = [right for text in said for right in text.right]
    return Candidate(
        layer=layer,
        arch=arch,
        agreement=sum(places) / len(places),
        speedup=full / told.seconds,
        threshold=threshold,
        longest=longest,
        tokens_per_pass=told.tokens / told.ends,
        leaving=None if best is None else (full / kept[best].seconds, best, kept[best].agreement),
        measured=True,
        vocab=len(model.vocabulary.tokens) if model.vocabulary else 0,
    )
