"""What a tuning run will take, from the shapes alone: memory by part, time, layouts of many GPUs.

`gpus` has what GPUs can do, `memory` and `time` count, `layouts` searches with the schedule that
`simulate` has, `advice` says what would fit, and `check` refuses what cannot work.
`tests/unit/test_plan.py` holds memory and time against the measured runs in `benchmarks/results`.
"""
