"""What exits cost in quality and bring in speed: `exits` and `speed` measure, `report` draws."""

from ee_tuning.evaluate.exits import measure_exits, unknown_text
from ee_tuning.evaluate.report import write_report
from ee_tuning.evaluate.speed import measure_thresholds, take_prompts

__all__ = ["measure_exits", "measure_thresholds", "take_prompts", "unknown_text", "write_report"]
