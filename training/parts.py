"""The parts of the model that are trained apart: what is frozen, learning rates, LoRA."""

import re
from collections import defaultdict

import torch
from torch import nn

# A part is the first pattern that a parameter's name matches.
PARTS = {
    "merger": re.compile(r"(^|\.)visual\.merger\."),
    "vision": re.compile(r"(^|\.)visual\."),
    "gates": re.compile(r"\.self_attn\.g_proj_[12]\."),
    "language": re.compile(r""),
}
LORA_TARGETS = r".*\blanguage_model\.layers\.\d+\..*\b(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def part_of(name: str) -> str:
    """The part, a key of `PARTS`, to which the parameter of that name belongs."""
    return next(part for part, pattern in PARTS.items() if pattern.search(name))


def freeze_parts(model: nn.Module, frozen: set[str]) -> None:
    """Train all parameters but those of the given parts.

    Raises:
        ValueError: nothing would be left.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"`freeze` = {sorted(frozen)} leaves nothing to train")


def add_lora(model: nn.Module, *, rank: int, alpha: float | None, dropout: float, train_gates: bool) -> nn.Module:
    """Adapters on all linear layers of the language model's decoder; everything else is frozen, but for the gates.

    Args:
        alpha: defaults to twice the rank.
        train_gates: train the gates in full: a converted checkpoint has untrained ones.
    Returns:
        the `PeftModel`; its trained parameters are float32.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=LORA_TARGETS,
        modules_to_save=["g_proj_1", "g_proj_2"] if train_gates else None,
    )
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return model


def parameter_groups(
    model: nn.Module, decayed: set[str], *, weight_decay: float, learning_rates: dict[str, float]
) -> list[dict]:
    """Groups for an optimizer: by part, and by whether weights decay.

    Args:
        decayed: names of the parameters that decay.
        learning_rates: of the parts, each a key of `PARTS`.
    """
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[part_of(name), name in decayed].append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rates[part],
            "weight_decay": weight_decay if decays else 0.0,
            "part": part,
        }
        for (part, decays), parameters in groups.items()
    ]
