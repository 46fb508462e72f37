"""Inputs of RegMean, SSR, ZipLoRA and ZipRank from the base model: names and shared options."""

from __future__ import annotations

from torch import Tensor

from dreamloom.core.errors import ConfigError
from dreamloom.merging.method import Context, LayerPart, Option

JOINT = 0
"""Stands for all adapters together where each has its number, from 1."""

PROMPTS = Option(
    "prompts", 8, "How many prompts each adapter is asked for, unless prompts are given.", low=1.0
)
STEPS = Option(
    "steps", 4, "Steps of each drawing; 1 looks at the first noise alone.", low=1.0, high=100.0
)
JOINT_SHARE = Option(
    "joint",
    0.0,
    "η: how much prompts that ask for all adapters at once draw the result to the plain sum.",
    low=0.0,
)
UNSEEN = Option(
    "unseen",
    "sum",
    "What becomes of directions that no prompt fills: sum adds them up, drop leaves them out.",
    choices=("sum", "drop"),
)
LEARNING_RATE = Option("learning_rate", 0.01, "Adam's; masks begin at 1.", low=1e-6, high=1.0)
LEARNING = (
    Option("updates", 100, "How often the masks are changed.", low=1.0),
    LEARNING_RATE,
    Option(
        "overlap", 0.01, "λ: how much it costs that masks let through the same of both.", low=0.0
    ),
    JOINT_SHARE,
    PROMPTS,
    STEPS,
)


def name_gram(number: int) -> str:
    """Name the mean of z zᵀ on one adapter's prompts; z = down · x of all adapters, stacked."""
    return f"gram.{number}"


def name_down(number: int) -> str:
    """Name the factor that stands for an adapter's own ``down``."""
    return f"down.{number}"


def name_mask(number: int) -> str:
    """Name what an adapter's directions or inputs are multiplied by."""
    return f"mask.{number}"


def take(context: Context, name: str) -> Tensor:
    """Take what was prepared for a layer.

    Raises:
        ConfigError: If it is not there.
    """
    if name not in context.prepared:
        raise ConfigError(
            f"This merge method asks the base model, and nothing was prepared for {context.layer}.",
            "Name the base model with --base.",
        )
    return context.prepared[name]


def take_mask(part: LayerPart, context: Context, length: int) -> Tensor:
    """Take an adapter's mask and see that it is as long as what it masks.

    Raises:
        ConfigError: If it is not there, or of another length.
    """
    mask = take(context, name_mask(part.number))
    if mask.shape != (length,):
        raise ConfigError(
            f"The mask of adapter {part.number} in {context.layer} has the shape "
            f"{tuple(mask.shape)}, not ({length},).",
            "It was learned for another adapter; prepare the merge again.",
        )
    return mask
