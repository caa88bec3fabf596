"""Tokens drawn for many rows at once, and whole texts in waves."""

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
from ee_tuning.decode import draws as drawing
from ee_tuning.decode.draws import Draws, Warp
from ee_tuning.decode.noise import STEP, spread
from ee_tuning.decode.whole import Text, whole_texts

WARPS = [
    Warp(),
    Warp(0.7),
    Warp(1.3, top_k=5),
    Warp(1.0, top_p=0.8),
    Warp(0.8, top_k=12, top_p=0.9),
    Warp(1.0, min_p=0.1),
    Warp(0.9, top_k=20, top_p=0.95, min_p=0.05),
]
ALL = Warp(top_k=1, top_p=0.5, min_p=0.5).samples  # what a pass does if rows ask for everything


def processors(warp):
    """Those of transformers that do the same."""
    found = [TemperatureLogitsWarper(warp.temperature)] if warp.temperature != 1 else []
    found += [TopKLogitsWarper(warp.top_k)] if warp.top_k else []
    found += [TopPLogitsWarper(warp.top_p)] if warp.top_p < 1 else []
    found += [MinPLogitsWarper(warp.min_p)] if warp.min_p else []
    return LogitsProcessorList(found)


def drawn(logits, draws, positions, samples):
    return drawing.drawn(logits, logits.argmax(-1), draws, positions, samples)


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
        torch.arange(places).expand(rows, -1), warp.samples,
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
    found = drawn(logits.expand(-1, 200, -1), table(range(200), [warp] * 200), places, warp.samples)
    assert kept.gather(1, found).all()


def test_every_row_has_its_own_temperature_and_some_take_the_likeliest():
    logits = torch.randn(3, 1, 50, generator=torch.Generator().manual_seed(4)).expand(-1, 500, -1)
    places = torch.arange(500).expand(3, -1)
    rows = table([1, 2, None], [Warp(0.01), Warp(5.0), None])
    found = drawn(logits, rows, places, samples=1)
    assert (found[0] == logits[0, 0].argmax()).float().mean() > 0.95
    assert len(found[1].unique()) > 40
    assert (found[2] == logits[2, 0].argmax()).all()


def test_what_a_row_draws_depends_on_its_seed_and_position_alone():
    logits = torch.randn(6, 1, 50, generator=torch.Generator().manual_seed(4))
    places = torch.tensor([[5], [6], [5], [9], [5], [70]])
    warps = [Warp(2.0)] * 6
    together = drawn(logits, table(range(6), warps), places, samples=1)
    for row in range(6):
        alone = drawn(logits[row, None], table([row], warps[:1]), places[row, None], ALL)
        assert alone.item() == together[row].item()


def test_uniform_numbers_are_uniform_over_seeds_and_over_positions():
    places = torch.arange(500) * (STEP - 2**64)
    found = spread(torch.arange(400)[:, None] + places).double()
    assert found.min() >= 0
    assert found.max() < 1
    for part in (found, found[:, :1], found[:1]):  # mean 1/2, variance 1/12
        deviation = (1 / 12 / part.numel()) ** 0.5
        assert abs(part.mean() - 0.5) < 4 * deviation
    neighbours = torch.stack([found[:, :-1].ravel(), found[:, 1:].ravel()])
    assert abs(torch.corrcoef(neighbours)[0, 1]) < 0.01


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
def test_whole_texts_do_not_depend_on_slots_or_looks(ahead):
    model, what = early_exit(), {"number": 9, "ends": {7, 8, 9}}
    expected = written(what, Engine(model, [], slots=1, capacity=40), 1)
    assert sorted(expected) == list(range(9))
    assert len({len(text) for text in expected.values()}) > 3
    assert written(what, Engine(model, [], slots=4, capacity=40), ahead) == expected
    padded = Engine(model, [], slots=7, capacity=40)
    padded.passes.compile = True  # for the sizes: nothing has been compiled
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
