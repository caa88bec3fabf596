"""The model card written beside saved exits."""

from __future__ import annotations

from typing import Any

from jinja2 import Template

CARD = Template(
    """\
---
library_name: ee-tuning
{%- if base %}
base_model: {{ base }}
{%- endif %}
tags: [early-exit, ee-tuning]
---

# Early exits{% if base %} for `{{ base }}`{% endif %}

Exits after {{ exits | length }} of the backbone's {{ depth }} layers, made with EE-Tuning
(arXiv 2402.00518). The backbone is {% if here %}in here, too,{% else %}not in here{% endif %}
and is not changed by them.

| exit layer | architecture | head |
|---|---|---|
{%- for layer, arch, head in exits %}
| {{ layer }} | {{ arch }} | {{ head }} |
{%- endfor %}

```python
from ee_tuning import EarlyExitModel

model = EarlyExitModel.from_pretrained("path-or-hub-id-of-these-exits")
out = model.generate(input_ids, mode="threshold", threshold=0.8, max_new_tokens=64)
```

A token leaves at the first exit whose largest softmax probability is at least the threshold;
threshold 1 gives the backbone's own text.
"""
)


def model_card(saved_config: dict[str, Any], here: bool = False) -> str:
    """Markdown for the contents of an ``exit_config.json``. here: the backbone is beside it."""
    return (
        CARD.render(
            base="" if here else saved_config["base_model"],
            here=here,
            depth=saved_config["backbone"]["config"]["num_hidden_layers"],
            exits=list(zip(*(saved_config[k] for k in ("layers", "arch", "head")), strict=True)),
        )
        + "\n"
    )
