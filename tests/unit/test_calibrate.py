"""Calibration of a tiny model: its losses against slow decoding, its certificate, its audit."""

import json
import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers.models import good_exit
from helpers.prompts import prompt
from helpers.slow_decoder import Decoder

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.calibrate.audit import Audit
from ee_tuning.calibrate.risks import Along, Free, full_texts, look
from ee_tuning.calibrate.tasks import read_scores, read_task
from ee_tuning.calibrate.walk import BELOW_OFF, FINE, by_pareto, by_quantile
from ee_tuning.certificate import Certificate
from ee_tuning.config import Leaving
from ee_tuning.errors import Notice, UserError
from ee_tuning.fingerprint import backbone_hashes, exit_hash

NEW, LAYERS, DEPTH = 16, [2, 3], 4
PROMPTS = [prompt(4 + seed % 5, seed) for seed in range(24)]
EVERY = np.arange(len(PROMPTS))


@pytest.fixture(scope="module")
def model():
    return good_exit("llama")


@pytest.fixture(scope="module")
def texts(model):
    return full_texts(model, PROMPTS, NEW, 8, False, lambda more: None)


@pytest.fixture(scope="module")
def seen(model, texts):
    return look(model, LAYERS, PROMPTS, texts, "probability", likelihoods=True)


@pytest.fixture(scope="module")
def thresholds(seen):
    """Of the middle of what exits say."""
    return {layer: float(np.median(seen.sure[:, e])) for e, layer in enumerate(seen.layers)}


def test_texts_are_those_of_full_depth(model, texts):
    for ids, text in list(zip(PROMPTS, texts, strict=True))[::4]:
        out = model.generate(torch.tensor([ids]), mode="full", max_new_tokens=NEW)
        assert out.sequences[0, len(ids) :].tolist() == text


def slow_losses(model, ids, text, thresholds, max_pending):
    """Token by token, each fed with the token of full depth: whether it differs, where it left, and
    how much less likely the token of full depth was."""

    def leaves(layer, confidence):
        return confidence >= thresholds[layer]

    active = [layer for layer, value in thresholds.items() if value < 1]
    decoder = Decoder(model, active, DEPTH, max_pending, leaves)
    token, found = decoder.prefill(torch.tensor([ids])), []
    full = model(torch.tensor([[*ids, *text]]), output_logits=True).logits[0].log_softmax(-1)
    for place, right in enumerate(text):
        said = token.logits[-1]
        wrong = int(said.argmax()) != right
        nats = full[len(ids) - 1 + place, right] - said.log_softmax(-1)[right]
        found.append((wrong, token.exit_layer, nats.item()))
        if wrong:  # the right one took a pass to the end
            decoder.pending = 0
        if place + 1 < len(text):
            token = decoder.step(torch.tensor([[right]]))
    wrong, layers, nats = zip(*found, strict=True)
    return np.mean(wrong), np.mean(layers), np.clip(np.mean(nats), 0, 1)


@pytest.mark.parametrize("max_pending", [100, 2, 0])
@pytest.mark.parametrize("active", [(2, 3), (2,), (3,)])
def test_losses_along_the_text_are_those_of_slow_decoding(
    model, texts, seen, thresholds, max_pending, active
):
    own = {layer: thresholds[layer] if layer in active else 1.0 for layer in LAYERS}
    rows = np.array([0, 5, 17])
    tokens = Along(replace(seen, worse=None), max_pending).measure(own, rows)
    nats = Along(seen, max_pending).measure(own, rows)
    slow = [slow_losses(model, PROMPTS[n], texts[n], own, max_pending) for n in rows]
    wrong, layers, worse = zip(*slow, strict=True)
    assert tokens.losses == pytest.approx(wrong)
    assert nats.losses == pytest.approx(worse, abs=1e-5)  # sums in another order
    assert tokens.depth == nats.depth == pytest.approx(np.mean(layers))
    assert max_pending == 0 or tokens.depth < DEPTH


def test_the_exits_disagree_sometimes(seen):
    """Or the tests above would show nothing."""
    assert 0.1 < seen.right.mean() < 0.9


def test_the_hazard_of_a_first_difference_is_that_of_free_decoding(model, texts, seen, thresholds):
    """Up to the first difference, the free text has been the text of full depth."""
    taken = Along(seen, 3).taken(thresholds, EVERY)
    for n in EVERY[::3]:
        ids, text = PROMPTS[n], texts[n]
        out = model.generate(
            torch.tensor([ids]), threshold=thresholds, max_new_tokens=NEW, max_pending=3
        )
        own, layers = out.sequences[0, len(ids) :].tolist(), out.exit_layers[0].tolist()
        same = next((k for k in range(len(text)) if own[k] != text[k]), len(text))
        places = [[*LAYERS, DEPTH][e] for e in taken[n, : same + 1]]
        assert layers[: same + 1] == places[: len(layers[: same + 1])]


def test_losses_of_the_free_text(model, texts, thresholds):
    leaving = Leaving(max_pending=3)
    risk = Free(model, PROMPTS, texts, leaving, NEW, 4, False)
    found = risk.measure(thresholds, EVERY[:6])
    for n in range(6):
        ids, text = PROMPTS[n], texts[n]
        out = model.generate(
            torch.tensor([ids]), threshold=thresholds, max_new_tokens=NEW, max_pending=3
        )
        own = out.sequences[0, len(ids) :].tolist()
        longest = max(len(own), len(text))
        same = sum(k < min(len(own), len(text)) and own[k] == text[k] for k in range(longest))
        assert found.losses[n] == pytest.approx(1 - same / longest)
    assert found.losses.max() > 0
    assert risk.measure(dict.fromkeys(LAYERS, 1.0), EVERY[:6]).losses.tolist() == [0] * 6


def test_candidates_go_from_careful_to_bold(seen):
    risk = Along(replace(seen, worse=None), 8)
    for path in (by_quantile, by_pareto):
        candidates = path(risk, EVERY, FINE[::10])
        found = [risk.measure(one, EVERY) for one in candidates]
        assert len(candidates) > 5
        assert all(0 <= value < 1 or value == 1 for one in candidates for value in one.values())
        assert found[0].depth > found[-1].depth
        if path is by_pareto:  # none is beaten by another one
            assert all(a.depth > b.depth for a, b in pairwise(found))
            means = [one.losses.mean() for one in found]
            assert means == sorted(means)
    boldest = by_quantile(risk, EVERY, [1.0])[0]
    assert risk.measure(boldest, EVERY).depth < DEPTH
    assert max(boldest.values()) <= BELOW_OFF


# -- the certificate -----------------------------------------------------------------------------


@pytest.fixture
def calibrated(thresholds):
    """A model of its own, with a certificate."""
    model = good_exit.__wrapped__("llama")
    model.calibration = certificate(model, thresholds)
    return model


def certificate(model, thresholds, **changes):
    values = {
        "thresholds": thresholds, "risk": "next-token", "epsilon": 0.1, "delta": 0.05, "n": 300,
        "p": 0.01, "test": "betting", "tested": 0.05, "report": {}, "dtype": "float32",
        "exits": {layer: exit_hash(model.exit(layer)) for layer in thresholds},
        "backbone": backbone_hashes(model.backbone),
        "measure": "probability", "max_pending": 5, "max_new_tokens": NEW, "data": "",
    }  # fmt: skip
    return Certificate(**(values | changes))


def generated(model, **changes):
    out = model.generate(
        torch.tensor([PROMPTS[0]]), **({"threshold": "calibrated", "max_new_tokens": NEW} | changes)
    )
    return out.sequences.tolist(), out.exit_layers.tolist()


def test_calibrated_is_the_certificates_thresholds_and_settings(calibrated, thresholds):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = generated(calibrated)
        (batch,) = calibrated.generate_batch(
            [PROMPTS[0]], threshold="calibrated", max_new_tokens=NEW, capacity=64
        )
    assert own == generated(calibrated, threshold=thresholds, max_pending=5)
    assert (batch[1].sequences.tolist(), batch[1].exit_layers.tolist()) == own
    assert min(own[1][0]) < DEPTH
    full = generated(calibrated, mode="full", threshold=0.5)
    assert generated(calibrated, mode="speculative")[0] == full[0]


@pytest.mark.parametrize(
    ("change", "asked", "reason"),
    [
        (
            {"dtype": "bfloat16"},
            {},
            "is of bfloat16, and the model is in float32 \\(load it in bfloat16",
        ),
        ({"exits": {2: "other", 3: "other"}}, {}, "exit at layer 2 is another one"),
        ({"backbone": {"head": "other"}}, {}, "the embedding of the backbone is another one"),
        ({}, {"measure": "margin"}, "is of measure probability, now margin"),
        ({}, {"max_pending": 3}, "is of max_pending 5, now 3"),
        ({}, {"do_sample": True}, "greedy texts"),
        ({}, {"repetition_penalty": 1.2}, "greedy texts"),
    ],
)
def test_what_changed_voids_it_with_a_warning(calibrated, change, asked, reason):
    calibrated.calibration = replace(calibrated.calibration, **change)
    with pytest.warns(Notice, match=reason):
        _, layers = generated(calibrated, **asked)
    assert {*layers[0]} == {DEPTH}


@pytest.mark.parametrize("through_data", [False, True])  # as PEFT merges, with no new version
def test_an_exit_that_is_tuned_on_voids_it(calibrated, through_data):
    generated(calibrated)
    weight = calibrated.exit(3).norm.weight
    with torch.no_grad():
        weight = weight.data if through_data else weight
        weight += 1e-3
    with pytest.warns(Notice, match="exit at layer 3 is another one"):
        assert {*generated(calibrated)[1][0]} == {DEPTH}


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("layer", [2, DEPTH])  # of an exit, and behind all of them
def test_a_backbone_into_which_something_was_merged_voids_it(calibrated, layer, through_data):
    generated(calibrated)
    weight = calibrated.backbone.layers[layer - 1].self_attn.q_proj.weight
    before, down, up = weight.detach().clone(), torch.ones(2, weight.shape[1]), weight[:, :2]
    with torch.no_grad():
        target = weight.data if through_data else weight
        target += 0.1 * up @ down
    with pytest.warns(Notice, match=f"the layer {layer} of the backbone is another one"):
        assert {*generated(calibrated)[1][0]} == {DEPTH}
    with torch.no_grad():
        target.copy_(before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert min(generated(calibrated)[1][0]) < DEPTH


def test_prompts_that_come_together_are_of_one_look_at_the_weights(calibrated, monkeypatch):
    looks = []

    def look(backbone):
        looks.append(backbone)
        return backbone_hashes(backbone)

    monkeypatch.setattr("ee_tuning.decode.certified.backbone_hashes", look)
    calibrated.generate(torch.tensor([PROMPTS[0]] * 5), threshold="calibrated", max_new_tokens=NEW)
    assert len(looks) == 1
    size = {"max_new_tokens": NEW, "capacity": 64, "slots": 5}
    looks.clear()
    list(calibrated.generate_batch([PROMPTS[0]] * 5, threshold="calibrated", **size))
    assert len(looks) == 2  # one for the engine
    looks.clear()
    bound = {"input_ids": PROMPTS[0], "max_pending": 5}
    own = [bound | {"threshold": one} for one in ("calibrated", 0.5, 0.6)]
    found = dict(calibrated.generate_batch(own, threshold="calibrated", **size))
    assert len(looks) == 2
    for number, one in enumerate(own):
        alone = generated(calibrated, threshold=one["threshold"], max_pending=5)
        assert found[number].exit_layers.tolist() == alone[1]


@pytest.mark.parametrize("by", ["caller", "prompts"])
def test_weights_that_change_between_texts_void_it_for_those_that_follow(calibrated, by):
    weight = calibrated.exit(3).norm.weight.data

    def prompts():
        for number in range(4):
            if by == "prompts" and number == 1:
                weight.add_(1e-3)
            yield PROMPTS[0]

    given = [PROMPTS[0]] * 4 if by == "caller" else prompts()
    depths, size = {}, {"max_new_tokens": NEW, "capacity": 64, "slots": 2}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for number, out in calibrated.generate_batch(given, threshold="calibrated", **size):
            depths[number] = min(out.exit_layers[0].tolist())
            if by == "caller" and len(depths) == 1:
                weight.add_(1e-3)
    assert all("exit at layer 3 is another one" in str(one.message) for one in said)
    assert [depths[number] < DEPTH for number in range(4)] == [True, by == "caller", False, False]


def test_a_sampled_prompt_of_a_batch_goes_to_full_depth(calibrated):
    with pytest.warns(Notice, match="greedy texts"):
        (found,) = calibrated.generate_batch(
            [{"input_ids": PROMPTS[0], "do_sample": True}],
            threshold="calibrated", max_new_tokens=NEW, capacity=64,
        )  # fmt: skip
    assert {*found[1].exit_layers[0].tolist()} == {DEPTH}


def test_longer_texts_are_told_of(calibrated):
    with pytest.warns(Notice, match="up to 16 new tokens"):
        assert min(generated(calibrated, max_new_tokens=NEW + 1)[1][0]) < DEPTH


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"exit_layers": [2]}, r"of exits at \[2, 3\], and \[2\] are to be"),
        ({"min_depth": 3}, r"and \[3\] are to be"),
        ({"mode": "fixed"}, "for mode threshold and speculative, not fixed"),
    ],
)
def test_calibrated_settings_for_other_exits_are_refused(calibrated, asked, reason):
    with pytest.raises(UserError, match=reason):
        generated(calibrated, **asked)


def test_other_refusals(calibrated, thresholds):
    calibrated.calibration = replace(calibrated.calibration, thresholds=thresholds | {1: 0.5})
    with pytest.raises(UserError, match="calibrate these"):
        generated(calibrated)
    calibrated.calibration = None
    with pytest.raises(UserError, match="were not calibrated"):
        generated(calibrated)


def test_it_is_saved_with_its_exits_and_not_with_others(base, tmp_path):
    model = EarlyExitModel.from_base(base, ExitConfig([2, 3], arch="norm"))
    model.calibration = certificate(model, {2: 0.3, 3: 0.4})
    model.save_pretrained(tmp_path / "a")
    again = EarlyExitModel.from_pretrained(str(tmp_path / "a"))
    assert again.calibration == model.calibration
    again.exit(2).norm.weight.data[0] += 1
    again.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b" / "calibration.json").exists()
    (tmp_path / "a" / "calibration.json").write_text('{"thresholds": {}}')
    with pytest.raises(
        UserError, match=r"calibration\.json lacks .*: delete it, and calibrate again"
    ):
        EarlyExitModel.from_pretrained(str(tmp_path / "a"))


# -- the audit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_pending", [100, 2])
def test_an_audit_counts_the_risk_of_the_certificate(model, texts, seen, thresholds, max_pending):
    """Rejected drafts are the places where a token that leaves would be another one."""
    model = good_exit.__wrapped__("llama")
    model.calibration = certificate(model, thresholds, max_pending=max_pending)
    audit = Audit(model.calibration, every=1)
    outs = dict(
        model.generate_batch(
            PROMPTS, threshold="calibrated", max_new_tokens=NEW, capacity=64, slots=3, audit=audit
        )
    )
    for n, text in enumerate(texts):
        assert outs[n].sequences[0, len(PROMPTS[n]) :].tolist() == text
    # The last place of a text that ends by its length is none that anything drafts for.
    risk = Along(replace(seen, worse=None), max_pending)
    taken = risk.taken(thresholds, EVERY)
    wrong = ~risk._of(seen.right, taken, EVERY, True)
    ends = np.array([len(text) - (len(text) == NEW) for text in texts])
    losses = (wrong & (np.arange(NEW) < ends[:, None])).sum(1) / seen.lengths
    found = audit.found()
    assert found.texts == len(PROMPTS)
    assert found.risk == pytest.approx(losses.mean())
    assert found.risk > 0
    assert 0 <= found.low <= found.risk


def test_an_audit_looks_at_one_in_so_many(calibrated):
    audit = Audit(calibrated.calibration, every=4, seed=1)
    list(
        calibrated.generate_batch(
            PROMPTS * 4, threshold="calibrated", max_new_tokens=2, capacity=64, audit=audit
        )
    )
    assert 10 < audit.found().texts < 40
    before = audit.found().texts
    calibrated.generate(torch.tensor([PROMPTS[0]]), mode="full", max_new_tokens=2, audit=audit)
    assert audit.found().texts == before


def test_an_audit_sees_drift(calibrated):
    audit = Audit(calibrated.calibration, every=1)
    assert not audit.found().drifted
    audit._losses += [0.05] * 400
    assert not audit.found().drifted
    audit._losses += [0.5] * 400
    assert audit.found().drifted
    assert audit.found().low > audit.found().epsilon


def test_an_audit_needs_a_calibration_for_next_tokens(calibrated, model):
    with pytest.raises(UserError, match="were not calibrated"):
        Audit(model.calibration, every=1)
    calibrated.calibration = replace(calibrated.calibration, risk="nll")
    with pytest.raises(UserError, match="calibrated for nll"):
        Audit(calibrated.calibration, every=1)
    for every in (0, "a", 2.5, None):
        with pytest.raises(UserError, match=f"one text in {every!r} is not .* number from 1$"):
            Audit(calibrated.calibration, every=every)


# -- tasks ---------------------------------------------------------------------------------------


def sample_file(path, scores, **more):
    lines = [
        {"doc_id": n, "doc_hash": f"h{n}", "filter": "none", "metrics": ["acc"], "acc": score}
        | more
        for n, score in enumerate(scores)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_task_loses_what_its_metric_does(tmp_path):
    full = sample_file(tmp_path / "full.jsonl", [1.0, 1.0, 0.0, 0.5])
    low = sample_file(tmp_path / "low.jsonl", [1.0, 0.0, 1.0, 0.25])
    samples = [f"1={full}", f"0.9={full}", f"2:0.5,3:0.4={low}"]
    task, candidates, names = read_task(samples, "", [2, 3])
    assert candidates == [{2: 0.9, 3: 0.9}, {2: 0.5, 3: 0.4}]
    assert names == [f"{n} h{n}" for n in range(4)]
    assert task.measure(candidates[0], np.arange(4)).losses.tolist() == [0, 0, 0, 0]
    assert task.measure(candidates[1], np.arange(4)).losses.tolist() == [0, 1, 0, 0.25]


@pytest.mark.parametrize(
    ("lines", "metric", "reason"),
    [
        ('{"results": {"arc": {"acc": 0.5}}}', "", "no scores per sample"),
        ("no json", "", "no scores per sample"),
        ("", "", "no scores per sample"),
        ('{"doc_id": 0, "metrics": ["ppl"], "ppl": 7.5}', "", r"within \[0, 1\] of metric ppl"),
        ('{"doc_id": 0, "metrics": ["a", "b"], "a": 1, "b": 0}', "", "name one with --metric"),
        ('{"doc_id": 0, "metrics": ["a"], "a": 1}', "b", "of metric b"),
        ('{"doc_id": 0, "metrics": ["a"], "a": 1}\n' * 2, "", "a sample several times"),
        (
            '{"doc_id": 0, "metrics": ["a"], "a": 1, "filter": "x"}\n'
            '{"doc_id": 0, "metrics": ["a"], "a": 1, "filter": "y"}',
            "", "several filters",
        ),
    ],
)  # fmt: skip
def test_files_without_scores_per_sample_are_refused(tmp_path, lines, metric, reason):
    path = tmp_path / "samples.jsonl"
    path.write_text(lines)
    with pytest.raises(UserError, match=reason):
        read_scores(str(path), metric)


def test_tasks_that_are_not_understood_are_refused(tmp_path):
    full = sample_file(tmp_path / "full.jsonl", [1.0, 1.0])
    other = sample_file(tmp_path / "other.jsonl", [1.0])
    for samples, reason in (
        ([f"1={full}"], "at least one threshold"),
        ([f"0.9={full}", f"0.8={full}"], "samples of full depth"),
        ([f"1={full}", f"0.9={other}"], "other samples"),
        ([f"1={full}", full], "THRESHOLD=FILE"),
        ([f"1={full}", f"2:0.5={full}"], "each active exit"),
        ([f"1={full}", f"0.9={tmp_path}/no.jsonl"], "cannot be read"),
    ):
        with pytest.raises(UserError, match=reason):
            read_task(samples, "", [2, 3])
