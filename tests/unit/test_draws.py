"""Tokens drawn for many rows at once, and whole texts in waves."""

import math
from collections import deque

import pytest
import torch
from helpers.models import DEPTH, early_exit
from helpers.prompts import prompt
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ee_tuning import UserError
from ee_tuning.decode import Engine, Full
from ee_tuning.decode.whole import Text, whole_texts
from ee_tuning.passes import draws as drawing
from ee_tuning.passes.draws import ALL, AMONG_FEW, FEW, Draws, Warp
from ee_tuning.passes.noise import gumbel as noise_of
from ee_tuning.passes.noise import places as places_of

WARPS = [
    Warp(),
    Warp(0.7),
    Warp(1.3, top_k=5),
    Warp(1.0, top_p=0.8),
    Warp(0.8, top_k=12, top_p=0.9),
    Warp(1.0, min_p=0.1),
    Warp(0.9, top_k=20, top_p=0.95, min_p=0.05),
]

AMONG_ALL = Warp(top_k=99, top_p=0.5, min_p=0.5).samples  # whatever rows may ask for


def processors(warp):
    """Those of transformers that do the same."""
    found = [TemperatureLogitsWarper(warp.temperature)] if warp.temperature != 1 else []
    found += [TopKLogitsWarper(warp.top_k)] if warp.top_k else []
    found += [TopPLogitsWarper(warp.top_p)] if warp.top_p < 1 else []
    found += [MinPLogitsWarper(warp.min_p)] if warp.min_p else []
    return LogitsProcessorList(found)


def drawn(logits, draws, positions, samples):
    place = drawing.places_of(draws, positions)
    return drawing.drawn(logits, logits.argmax(-1), draws, place, samples)


def table(seeds, warps):
    draws = Draws(len(seeds), torch.device("cpu"))
    for slot, (seed, warp) in enumerate(zip(seeds, warps, strict=True)):
        draws.set(slot, seed, warp)
    draws.tell()
    return draws.table


@pytest.mark.parametrize("warp", WARPS)
def test_samples_of_a_batch_have_the_distribution_that_transformers_gives(warp):
    """Chi-square, 40,000 samples: 100 rows at 400 positions each; significance 1e-4."""
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    scores = processors(warp)(torch.tensor([[0]]), logits.clone())[0]
    rows, places = 100, 400
    expected = scores.softmax(-1).double() * rows * places
    found = drawn(
        logits.expand(rows, places, -1), table(range(rows), [warp] * rows),
        torch.arange(places).expand(rows, -1), AMONG_ALL,
    )  # fmt: skip
    counts, kept = found.flatten().bincount(minlength=40).double(), scores.isfinite()
    assert counts[~kept].sum() == 0
    square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    degrees = torch.tensor(float(kept.sum() - 1))
    # Wilson and Hilferty's approximation of the chi-square quantile, at 3.72 standard deviations.
    limit = degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)).sqrt()) ** 3
    assert square < limit


@pytest.mark.parametrize("warp", WARPS)
def test_the_tokens_left_out_are_those_of_transformers(warp):
    """Of 200 rows of random logits; each is drawn from 200 times."""
    logits = 3 * torch.randn(200, 1, 50, generator=torch.Generator().manual_seed(4))
    kept = processors(warp)(torch.zeros(200, 1).long(), logits[:, 0].clone()).isfinite()
    places = torch.arange(200).expand(200, -1)
    found = drawn(logits.expand(-1, 200, -1), table(range(200), [warp] * 200), places, AMONG_ALL)
    assert kept.gather(1, found).all()


def test_every_row_has_its_own_temperature_and_some_take_the_likeliest():
    logits = torch.randn(3, 1, 50, generator=torch.Generator().manual_seed(4)).expand(-1, 500, -1)
    places = torch.arange(500).expand(3, -1)
    rows = table([1, 2, None], [Warp(0.01), Warp(5.0), None])
    found = drawn(logits, rows, places, ALL)
    assert (found[0] == logits[0, 0].argmax()).float().mean() > 0.95
    assert len(found[1].unique()) > 40
    assert (found[2] == logits[2, 0].argmax()).all()


def test_what_a_row_draws_depends_on_its_seed_and_position_alone():
    logits = torch.randn(6, 1, 50, generator=torch.Generator().manual_seed(4))
    places = torch.tensor([[5], [6], [5], [9], [5], [70]])
    warps = [Warp(2.0)] * 6
    together = drawn(logits, table(range(6), warps), places, ALL)
    for row in range(6):
        alone = drawn(logits[row, None], table([row], warps[:1]), places[row, None], AMONG_ALL)
        assert alone.item() == together[row].item()


def test_few_tokens_are_drawn_from_as_all_would_be():
    """Of 1,000 tokens 128 are looked at, whatever else is left out of these; ties at the edge."""
    logits = 2 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(5))
    logits[0, :60] = logits[0, 60:].sort(descending=True).values[40]  # as many as the 41st
    for warp in (Warp(0.8, top_k=50), Warp(top_k=20, top_p=0.9), Warp(top_k=64, min_p=0.02)):
        assert warp.samples & AMONG_FEW
        assert warp.top_k <= FEW // 2
        rows, places = table(range(50), [warp] * 50), torch.arange(40).expand(50, -1)
        given = logits.expand(50, 40, -1)
        found = drawn(given, rows, places, warp.samples)
        assert torch.equal(found, drawn(given, rows, places, AMONG_ALL))
        assert len(found.unique()) > 10
        kept = processors(warp)(torch.zeros(1, 1).long(), logits.clone())[0].isfinite()
        assert kept[found].all()


def test_logits_of_some_tokens_are_drawn_from_with_the_noise_of_these():
    logits = torch.randn(8, 30, 200, generator=torch.Generator().manual_seed(4))
    tokens = torch.randperm(200, generator=torch.Generator().manual_seed(5))
    rows, places = table(range(8), [Warp(1.5, top_k=60)] * 8), torch.arange(30).expand(8, -1)
    for samples in (ALL, AMONG_FEW | drawing.TOP_K, AMONG_ALL):
        place = drawing.places_of(rows, places)
        found = drawing.drawn(
            logits[..., tokens], logits[..., 0].long(), rows, place, samples, tokens
        )
        assert torch.equal(tokens[found], drawn(logits, rows, places, samples))


@pytest.mark.parametrize("mixed", [0.0, 0.3, 0.9])
def test_two_distributions_draw_the_same_token_as_often_as_theory_says(mixed):
    """Pr = Σᵢ 1 / Σⱼ max(pⱼ/pᵢ, qⱼ/qᵢ), which is (1 − d) / (1 + d) or more, d of total variation.

    40,000 places; the bound is 4 standard deviations.
    """
    p, q = torch.randn(2, 40, generator=torch.Generator().manual_seed(6)).mul(1.5).softmax(-1)
    q = mixed * p + (1 - mixed) * q
    rows, places = table(range(100), [Warp()] * 100), torch.arange(400).expand(100, -1)
    first, second = (drawn(x.log().expand(100, 400, -1), rows, places, ALL) for x in (p, q))
    found = (first == second).double().mean()
    expected = (1 / torch.maximum(p / p[:, None], q / q[:, None]).double().sum(1)).sum()
    assert abs(found - expected) < 4 * (expected * (1 - expected) / 40_000).sqrt()
    most = torch.minimum(p, q).sum()
    assert most / (2 - most) <= expected + 1e-6 <= most + 2e-6


def gumbel(seeds, positions, tokens):
    return noise_of(places_of(seeds, positions), tokens)


def levels(noise):
    """Between 0 and 1, with equal probability, of Gumbel noise."""
    return (-(-noise.double()).exp()).exp()


def test_noise_is_of_gumbels_distribution_over_tokens_places_and_seeds():
    """χ² over 64 classes of equal probability; the bound is its mean plus 5 standard deviations.

    And neighbours have nothing in common: correlations are within 5 standard deviations of 0.
    """
    tokens, one = torch.arange(64_000), torch.tensor([0])
    bound = 63 + 5 * (2 * 63) ** 0.5
    seeds = [0, 1, 2**52 + 12345, 2**53 - 1]
    for kind in (
        lambda s: gumbel(torch.tensor([s]), one, tokens)[0],
        lambda s: gumbel(torch.full((64_000,), s), tokens, one)[:, 0],
        lambda s: gumbel((tokens + s) % 2**53, one + 9, one + 4242)[:, 0],
    ):
        for seed in seeds:
            found = levels(kind(seed))
            counts = torch.histc(found, 64, 0, 1)
            assert ((counts - 1000) ** 2 / 1000).sum() < bound
            near = torch.stack([found[1:], found[:-1]])
            assert torch.corrcoef(near)[0, 1].abs() < 5 / 64_000**0.5
    rows = levels(gumbel(torch.arange(4)[:, None], torch.arange(5), tokens[:50_000]))
    found = torch.corrcoef(rows.flatten(0, 1)) - torch.eye(20)
    assert found.abs().max() < 5 / 50_000**0.5


def test_large_noise_is_as_frequent_as_it_should_be():
    """Of 10 million numbers those that win: beyond 10, 12 and 14, within 4 standard deviations."""
    found = gumbel(torch.arange(200)[:, None], torch.tensor([3]), torch.arange(50_000))
    for bound in (10.0, 12.0, 14.0):
        expected = found.numel() * -math.expm1(-math.exp(-bound))
        assert abs((found > bound).sum().item() - expected) < 4 * expected**0.5
    assert found.isfinite().all()
    assert found.min() > -3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_noise_is_the_same_alone_and_on_every_device(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    seeds, places = torch.tensor([[5], [2**53 - 1]]), torch.tensor([[0, 7], [9, 2**20]])
    found = gumbel(seeds.to(device), places.to(device), torch.arange(99, device=device)).cpu()
    alone = gumbel(seeds[1, 0], places[1, 1], torch.tensor([98]))
    torch.testing.assert_close(found[1, 1, 98:], alone, rtol=1e-5, atol=1e-5)  # of log, by device


# -- in an engine --------------------------------------------------------------------------------


def texts(number, length=20, ends=(), warp=WARPS[4]):
    made = []
    for seed in range(number):
        ids = prompt(3 + seed % 3, seed)
        made.append(Text(ids, Full(DEPTH), len(ids) + length, ends=ends, seed=seed, warp=warp))
    return made


def written(found, engine, ahead):
    wanted = texts(**found)
    numbers = {request: i for i, request in enumerate(wanted)}
    found = whole_texts(engine, deque(wanted), ahead)
    return {numbers[request]: text for request, text in found}


@pytest.mark.parametrize("ahead", [1, 3, 8])
def test_whole_texts_do_not_depend_on_slots_or_looks(ahead, monkeypatch):
    model, what = early_exit(), {"number": 9, "ends": {7, 8, 9}}
    expected = written(what, Engine(model, [], slots=1, capacity=40), 1)
    assert sorted(expected) == list(range(9))
    assert len({len(text) for text in expected.values()}) > 3
    assert written(what, Engine(model, [], slots=4, capacity=40), ahead) == expected
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    padded = Engine(model, [], slots=7, capacity=40, compile=True)
    assert written(what, padded, ahead) == expected
    for text in expected.values():
        assert len(text) == 20 or text[-1] in what["ends"]
        assert not {7, 8, 9} & {*text[:-1]}


def test_whole_texts_of_the_likeliest_tokens_are_those_of_generate():
    model = early_exit()
    wanted = [Text(prompt(4 + i, i), Full(DEPTH), 4 + i + 12) for i in range(5)]
    for request, text in whole_texts(Engine(model, [], slots=3, capacity=40), deque(wanted)):
        ids = torch.tensor([request.ids])
        full = model.generate(ids, mode="full", max_new_tokens=12, eos_token_id=None)
        assert text == full.sequences[0, len(request.ids) :].tolist()


def test_texts_that_come_to_wait_meanwhile_are_written_too():
    engine, later = Engine(early_exit(), [], slots=2, capacity=40), texts(5)
    waiting, ended = deque(later[:1]), []
    for request, _ in whole_texts(engine, waiting):
        ended.append(request)
        waiting += later[len(ended) : len(ended) + 1]
    assert ended == later


def test_logits_that_are_no_numbers_are_one_line():
    model, wanted = early_exit(), texts(2, warp=Warp(1.0))
    with torch.no_grad():
        model.backbone.head.weight[5] = float("nan")
    try:
        with pytest.raises(UserError, match="no token to choose"):
            list(whole_texts(Engine(model, [], slots=2, capacity=40), deque(wanted)))
    finally:
        early_exit.cache_clear()


@pytest.mark.slow
def test_compiled_passes_draw_the_same_tokens():
    model, what = early_exit(), {"number": 5, "length": 9, "ends": {7, 8, 9}}
    expected = written(what, Engine(model, [], slots=4, capacity=40), 1)
    assert written(what, Engine(model, [], slots=4, capacity=40, compile=True), 4) == expected
