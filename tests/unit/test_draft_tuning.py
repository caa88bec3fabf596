"""Tuning a draft exit, and exits for drafting, against what one graph or single steps give."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.families import tiny
from helpers.steps import exit_gradients
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning import losses as losses_module
from ee_tuning.costs import draft_cost, work
from ee_tuning.exits.draft import before
from ee_tuning.losses import Objective, cross_entropy, rejection
from ee_tuning.tune.drafts import measure_drafts
from ee_tuning.tune.fitted import fit
from ee_tuning.tune.optimizers import build_optimizers
from ee_tuning.tune.step import Tuner
from ee_tuning.tune_config import Schedule

STEPS, DECAY = 3, 0.9
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 0, 1, 2, 3, 4]])
KNOWN = torch.arange(3, 70)


def batches(number=2):
    generator, found = torch.Generator().manual_seed(3), []
    for unlabelled in (0, 4)[:number]:
        ids = torch.randint(3, 96, (2, 9), generator=generator)
        labels = ids.masked_fill(POSITIONS == 0, -100)
        labels[:, :unlabelled] = -100
        found.append({"input_ids": ids, "labels": labels, "position_ids": POSITIONS})
    return found


def drafting(family="llama", layers="", arch="draft", head="own", known=None, **overrides):
    """A draft exit with every weight random, to be unrolled."""
    base = tiny(family, **overrides)
    model = EarlyExitModel.from_base(base, ExitConfig(layers, arch, head=head))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.draft.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    if known is not None:
        model.reduce_vocabulary(known)
    model.draft.steps, model.draft.decay = STEPS, DECAY
    return model


def singly(model, batch):
    """(step, row, place, features) of single calls, chain after chain, the keys of each handed on.

    Without a mask: what a step may not see is not among its keys.
    """
    draft, ids = model.draft, batch["input_ids"]
    for row in range(len(ids)):
        starts = [i for i, p in enumerate(POSITIONS[row].tolist()) if p == 0]
        for first, stop in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
            text = ids[row : row + 1, first:stop]
            places = torch.arange(stop - first)[None]
            states = torch.cat(model.chain.descend(text).to(0).sources, dim=-1)
            shifted = before(states, places)
            for start in range(stop - first):
                # All settled tokens' first steps at once, as the window of a round is read.
                cache = DynamicCache(config=model.config)
                seen = slice(0, start + 1)
                given = text[:, seen], shifted[:, seen], places[:, seen]
                h = draft.first_step(*given, cache)[:, -1:]
                for step in range(STEPS):
                    place = start + step
                    yield step, row, first + place, draft.norm(h)[0, 0]
                    if step + 1 == STEPS or place + 1 == stop - first:
                        break
                    at = slice(place + 1, place + 2)
                    h = draft.later_step(text[:, at], h, places[:, at], cache)


def twin_loss(model, objective):
    """The mean loss over all labelled tokens, single step after single step, in one graph."""
    shares = torch.tensor([DECAY**step for step in range(STEPS)])
    shares, total, count = shares / shares.sum(), 0.0, 0
    for batch in batches():
        labels = batch["labels"]
        places = labels if model.vocabulary is None else model.vocabulary.to_places(labels)
        count += int((places[:, 1:] != -100).sum())
        with torch.no_grad():
            rows = [model(batch["input_ids"], None, POSITIONS, output_logits=True).logits]
        for step, row, place, features in singly(model, batch):
            if place + 1 == labels.shape[1] or places[row, place + 1] == -100:
                continue
            logits = model.draft.output.known_logits(features[None, None]).expand(-1, 2, -1)
            target = torch.tensor([[-100, places[row, place + 1]]])
            teacher = rows[0][row, place].log_softmax(-1)
            teacher = teacher if model.vocabulary is None else teacher[model.vocabulary.tokens]
            given = logits, target, teacher.expand(1, 2, -1)
            total = total + shares[step] * objective(*given).total
    return total / count


@pytest.mark.parametrize("objective", [Objective(), Objective("acceptance")])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"head": "shared", "known": KNOWN}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {"known": KNOWN}),
        ("gemma3", {}),
        ("gpt2", {"head": "shared"}),
        ("opt", {}),
    ],
)
def test_gradients_are_those_of_single_steps(family, settings, objective):
    """Tolerance: one graph against another, sums in another order."""
    model = drafting(family, **settings)
    means = exit_gradients(model, batches(), objective)
    ours = {name: p.grad.clone() for name, p in model.exits.named_parameters()}
    model.zero_grad()
    expected = twin_loss(model, objective)
    expected.backward()
    torch.testing.assert_close(means[0], expected.detach(), rtol=1e-4, atol=1e-5)
    for name, p in model.exits.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=2e-3, atol=2e-5, msg=name)
    assert all(p.grad is None for p in model.model.parameters())


def tuned(layers, arch, objective=None, steps=3, **settings):
    model = drafting(layers=layers, arch=arch, **settings)
    tuner = Tuner(model, build_optimizers(model, Schedule(lr=1e-2)), objective, clip=0.05)
    for _ in range(steps):
        tuner.step(batches(), dict.fromkeys(model.exit_layers, 1.0))
    return model.exit_state()


@pytest.mark.parametrize("objective", [Objective(), Objective("acceptance")])
def test_a_draft_tuned_beside_others_is_the_draft_tuned_alone(objective):
    """Bit for bit, and so are they."""
    together = tuned("0,1,3", "draft,mlp,layer", objective)
    alone = tuned("", "draft", objective)
    assert all(torch.equal(together[name], p) for name, p in alone.items())
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("1,3", "mlp,layer"))
    tuner = Tuner(model, build_optimizers(model, Schedule(lr=1e-2)), objective, clip=0.05)
    for _ in range(3):
        tuner.step(batches(), {1: 1.0, 3: 1.0})
    assert all(torch.equal(together[name], p) for name, p in model.exit_state().items())


def test_chunks_of_tokens_give_the_same_loss_and_gradients(monkeypatch):
    found = []
    for size in (losses_module.LOGITS, 2 * 2 * 96):
        monkeypatch.setattr(losses_module, "LOGITS", size)
        model = drafting()
        loss = exit_gradients(model, batches(), Objective("acceptance"))[0]
        found.append([loss, *(p.grad for p in model.exits.parameters())])
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-6)


def test_drafts_get_better():
    model = drafting()
    tuner = Tuner(model, build_optimizers(model, Schedule(lr=3e-2)), Objective("acceptance"))
    before_it = measure_drafts(tuner, batches(), STEPS).agreement
    losses = [tuner.step(batches(), {0: 1.0}).losses[0].item() for _ in range(40)]
    assert losses[-1] < losses[0]
    after = measure_drafts(tuner, batches(), STEPS).agreement
    assert all(after[step] > max(0.5, before_it[step]) for step in after)


@pytest.mark.parametrize("known", [None, KNOWN])
def test_what_is_measured_is_what_single_steps_say(known):
    model = drafting(known=known)
    found = measure_drafts(Tuner(model, {}), batches(), STEPS)
    agree, losses = {}, {}
    with torch.no_grad():
        for batch in batches():
            final = model(batch["input_ids"], None, POSITIONS, output_logits=True).logits
            for step, row, place, features in singly(model, batch):
                label = batch["labels"][row, place + 1] if place < 8 else -100
                if label == -100:
                    continue
                logits = model.draft.logits(features[None, None])[0, 0]
                hit = bool(logits.argmax() == final[row, place].argmax())
                agree.setdefault(step + 1, []).append(hit)
                if known is None or label in known:
                    losses.setdefault(step + 1, []).append(F.cross_entropy(logits, label))
    for number in range(1, STEPS + 1):
        assert found.agreement[number] == sum(agree[number]) / len(agree[number])
        expected = torch.stack(losses[number]).mean().item()
        assert found.loss[number] == pytest.approx(expected, rel=1e-4)


def test_the_held_out_loss_is_the_mean_over_drafts():
    model = drafting()
    model.draft.decay = 1.0
    found = Tuner(model, {}).mean_losses(batches())[0]
    assert found == pytest.approx(twin_loss_without_decay(model), rel=1e-4)


def twin_loss_without_decay(model):
    with torch.no_grad():
        total, count = 0.0, 0
        for batch in batches():
            count += int((batch["labels"][:, 1:] != -100).sum())
            for _, row, place, features in singly(model, batch):
                if place < 8 and batch["labels"][row, place + 1] != -100:
                    logits = model.draft.logits(features[None, None])[0, 0]
                    total += F.cross_entropy(logits, batch["labels"][row, place + 1]).item()
    return total / count / STEPS


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_fitted_maps_are_those_of_least_squares(family):
    """Row after row, from transformers' own hidden states; tolerance: products in fp32."""
    model = EarlyExitModel.from_base(tiny(family), ExitConfig("", "draft", init="fitted"))
    draft, size = model.draft, 32
    fit(Tuner(model, {}), batches())
    for linear in (draft.first, draft.later):
        read, wanted = [], []
        for batch in batches():
            ids, labels = batch["input_ids"], batch["labels"]
            for row, first, stop in ((0, 0, 9), (1, 0, 4), (1, 4, 9)):
                text = ids[row : row + 1, first:stop]
                places = torch.arange(stop - first)[None]
                with torch.no_grad():
                    found = model.chain.descend(text).to(0).sources
                    states = before(torch.cat(found, dim=-1), places)
                    enters = model.model(text, output_hidden_states=True).hidden_states[3]
                    x = draft.first_input(text, states, places)
                    if linear is draft.later:
                        h = before(draft.first_step(text, states, places), places)
                        x = draft.later_input(text, h, places)
                for place in range(stop - first - 1):
                    if labels[row, first + place + 1] != -100:
                        read.append(x[0, place])
                        wanted.append(enters[0, place])
        x, y = torch.stack(read).double(), torch.stack(wanted).double()
        scale = x.square().mean(-1, keepdim=True).sqrt()
        x, y = x / scale, y / scale
        x = torch.cat([x, torch.diag((1e-3 * x.square().sum(0)).sqrt())])
        y = torch.cat([y, torch.zeros(x.shape[1], size)])
        expected = torch.linalg.lstsq(x, y).solution.T.float()
        torch.testing.assert_close(linear.weight.data, expected, rtol=1e-2, atol=2e-3)


def test_a_fitted_start_is_better_than_a_copied_one():
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("", "draft"))
    tuner = Tuner(model, {})
    copied = measure_drafts(tuner, batches(), 1).agreement[1]
    fit(tuner, batches())
    assert measure_drafts(tuner, batches(), 1).agreement[1] > copied + 0.3


# -- the loss that aims at acceptance --------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
def test_rejection_is_what_speculative_sampling_rejects(weight):
    """By drawing: a draft from q is kept with probability min(1, p / q)."""
    draw = torch.Generator().manual_seed(0)
    logits, final = (2 * torch.randn(1, 2, 5, generator=draw) for _ in range(2))
    labels = torch.tensor([[-100, 3]])
    found = rejection(logits, final.log_softmax(-1), labels, weight)
    q, p = logits[0, 0].softmax(-1), final[0, 0].softmax(-1)
    kept = sum(float(q[v]) * min(1.0, float(p[v] / q[v])) for v in range(5))
    surprise = float(-(p * q.log()).sum())
    assert found.total.item() == pytest.approx(weight * (1 - kept) + (1 - weight) * surprise)
    assert found.count == 1


def test_tokens_that_exits_do_not_know_are_rejected():
    """p is of the whole vocabulary: what is not known is not made up for among what is."""
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("2", "norm"))
    model.reduce_vocabulary(KNOWN)
    batch = batches(1)[0]
    found = exit_gradients(model, [batch], Objective("acceptance", acceptance_weight=1.0))[2]
    out = model(**batch, output_exit_logits=True, output_logits=True)
    shared = torch.minimum(out.logits.softmax(-1), out.exit_logits[2].softmax(-1)).sum(-1)[:, :-1]
    labelled = model.known_labels(batch["labels"])[:, 1:] != -100
    assert found.item() == pytest.approx((1 - shared)[labelled].mean().item(), rel=1e-4)


@pytest.mark.parametrize("known", [None, KNOWN])
@pytest.mark.parametrize("arch", ["embedding", "norm", "mlp", "layer"])
def test_acceptance_and_its_gradients_are_the_formulas(arch, known, monkeypatch):
    """Chunk by chunk; weight · (1 − Σ min(p, q)) − (1 − weight) · Σ p log q, p over all tokens."""
    monkeypatch.setattr(losses_module, "LOGITS", 2 * 2 * 70)
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("2", arch))
    if known is not None:
        model.reduce_vocabulary(known)
    found = exit_gradients(model, batches(), Objective("acceptance", acceptance_weight=0.6))[2]
    ours = {name: p.grad.clone() for name, p in model.exits.named_parameters()}
    model.zero_grad()
    total, count = 0.0, 0
    for batch in batches():
        out = model(**batch, output_exit_logits=True, output_logits=True)
        labelled = model.known_labels(batch["labels"])[:, 1:] != -100
        p, q = out.logits.softmax(-1)[:, :-1], out.exit_logits[2].softmax(-1)[:, :-1]
        log_q = torch.where(q > 0, q, 1).log()
        losses = 0.6 * (1 - torch.minimum(p, q).sum(-1)) - 0.4 * (p * log_q).sum(-1)
        total, count = total + losses[labelled].sum(), count + int(labelled.sum())
    (total / count).backward()
    torch.testing.assert_close(found, (total / count).detach(), rtol=1e-5, atol=1e-6)
    for name, p in model.exits.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("arch", ["embedding", "norm", "mlp", "layer", "draft"])
def test_every_architecture_is_tuned_for_acceptance(arch):
    layers = "" if arch == "draft" else "2"
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig(layers, arch, head="own"))
    tuner = Tuner(model, build_optimizers(model, Schedule(lr=1e-2)), Objective("acceptance"))
    weights = dict.fromkeys(model.exit_layers, 1.0)
    losses = [sum(tuner.step(batches(), weights).losses.values()).item() for _ in range(10)]
    assert losses[-1] < losses[0]


# -- what it costs, and what is refused ----------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2", "mixtral"])
@pytest.mark.parametrize(("head", "known"), [("own", None), ("shared", KNOWN)])
def test_unrolled_steps_are_counted_as_torch_counts_them(steps, family, head, known):
    """The layers up to the last source, and of attention the whole square: see test_costs."""
    wide = {"sliding_window": 64} if family == "gemma3" else {}
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = drafting(family, head=head, known=known, **eager, **wide)
    model.draft.steps = steps
    ids = torch.arange(32).reshape(2, 16) + 3
    with FlopCounterMode(display=False) as counter:
        state = model.chain.descend(ids, torch.arange(16).expand(2, -1)).to(0)
        predictions = model.draft.predictions(state)
        losses = [
            cross_entropy(model.draft.output.known_logits(features), ids % 50).total
            for features in predictions
        ]
        sum(losses).backward()
    expected = work(model, 32, drafts=steps)
    assert counter.get_total_flops() / 32 == pytest.approx(sum(expected.tuning()), rel=1e-3)
    values = sum(p.numel() for p in model.exits.parameters() if p.requires_grad)
    assert expected.exits[0].whole.values == values


def test_a_draft_costs_its_map_its_layer_and_its_head():
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("", "draft"))
    layer, head = 3 * 32 * 32 + 3 * 32 * 48, 96 * 32
    assert draft_cost(model, 0) == (5 * 32 * 32 + layer + head) / (4 * layer + head)


def test_a_draft_is_pickled():
    model = drafting()
    copied = pickle.loads(pickle.dumps(model))
    a, b = (exit_gradients(one, batches())[0] for one in (model, copied))
    assert torch.equal(a, b)
