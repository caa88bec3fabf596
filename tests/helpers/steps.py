"""What a tuning step computes, without the optimizers' part."""

from ee_tuning.tune.step import Tuner


def exit_gradients(model, batches, objective=None, weights=None, autocast=None):
    """Mean losses by exit layer; the gradients stay at the exits."""
    weights = weights or dict.fromkeys(model.exit_layers, 1.0)
    return Tuner(model, {}, objective, autocast=autocast).step(batches, weights).losses
