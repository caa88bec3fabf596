"""Exits in lm-evaluation-harness: `model` is one of its models, `scoring` its log-likelihoods.

``python -m ee_tuning.lm_eval`` is lm-eval's own command with the model ``ee-tuning`` and the tasks
of the folder ``tasks``, which need no hub.
"""
