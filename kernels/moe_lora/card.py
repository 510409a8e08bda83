"""The model card beside saved experts."""

from pathlib import Path

from moe_lora.config import GateConfig, MoELoRAConfig

_CARD = """---
library_name: moe_lora
tags:
- moe-lora
{base_tag}---

# LoRA experts{of_base}

{num_experts} experts of rank {rank}, alpha {alpha:g}, {top_k} for each instance, on {targets}; {trains:,d} parameters.
{gate}

```python
import moe_lora

model = moe_lora.load(base_model, "this folder")
{use}
```
"""


def write_card(folder: Path, config: MoELoRAConfig, gate: GateConfig | None, base: str, trains: int) -> None:
    """Writes README.md, unless there is one: its owner may have edited it."""
    path = folder / "README.md"
    if path.exists():
        return
    targets = config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules)
    text = _CARD.format(
        base_tag=f"base_model: {base}\n" if base else "",
        of_base=f" of {base}" if base else "",
        num_experts=config.num_experts,
        rank=config.rank,
        alpha=config.alpha,
        top_k=config.top_k,
        targets=targets,
        trains=trains,
        gate="The model is routed from outside, by `moe_lora.route`."
        if gate is None
        else f"The gate is inside (mode {gate.mode}): the model routes itself by the question in each call.",
        use="with moe_lora.route(model, routing):\n    model(...)" if gate is None else "model.generate(...)",
    )
    path.write_text(text, encoding="utf-8")
