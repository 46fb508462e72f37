"""ZipLoRA and ZipRank: learned weights for every input, or every direction, of each LoRA."""

from __future__ import annotations

from collections.abc import Sequence

from dreamloom.merging.activation_inputs import LEARNING, take_mask
from dreamloom.merging.factors import Factors, find_spectrum, stack
from dreamloom.merging.method import Context, LayerPart, MergeMethod


def zip_columns(parts: Sequence[LayerPart], context: Context) -> Factors:
    """Add updates whose columns are masked: ΔW = Σ wₖ ΔWₖ diag(mₖ).

    A column is what a layer does with one of its inputs. Masking the columns of up · down masks
    those of down, so the result is a LoRA again, exactly, whose rank is that of the parts
    together. The masks are prepared: they are learned with the base model, so that the merge says
    on each adapter's prompts what that adapter says alone.

    Source:
        Shah et al., ZipLoRA (arXiv:2311.13600), section 3.3; the factored form is ours.

    Raises:
        ConfigError: If nothing was learned for the layer.
    """
    if len(parts) == 1:
        return stack([(part.factors, part.weight) for part in parts])
    zipped = []
    for part in parts:
        up, down = part.factors.up, part.factors.down
        mask = take_mask(part, context, down.shape[1])
        zipped.append((Factors(up, down * mask.to(down)), part.weight))
    return stack(zipped)


def zip_directions(parts: Sequence[LayerPart], context: Context) -> Factors:
    """Add updates whose singular directions are masked: ΔW = Σ wₖ Uₖ diag(mₖ) Σₖ Vₖᵀ.

    Directions between two factors mean nothing by themselves: another way to split the update has
    others. Its singular directions are its own. There are far fewer of them than inputs, so there
    is less to learn than for ZipLoRA. The masks are prepared with the base model.

    Source:
        Roy et al., DuoLoRA (arXiv:2504.13206): masks on the rank axis. That they stand on the
        singular values is what makes them independent of the split.

    Raises:
        ConfigError: If nothing was learned for the layer.
    """
    if len(parts) == 1:
        return stack([(part.factors, part.weight) for part in parts])
    zipped = []
    for part in parts:
        directions = split_directions(part.factors)
        mask = take_mask(part, context, directions.rank).to(directions.up)
        zipped.append((Factors(directions.up * mask, directions.down), part.weight))
    return stack(zipped)


def split_directions(factors: Factors) -> Factors:
    """Split an update into its singular directions, the strongest first."""
    spectrum = find_spectrum(factors)
    return spectrum.truncate(len(spectrum.values))


METHODS = (
    MergeMethod(
        name="ziplora",
        summary="A learned weight for every input of every layer, so that each adapter's prompts "
        "are answered as by it alone.",
        formula="ΔW = Σ wₖ ΔWₖ diag(mₖ), m by gradient descent on ‖ε_merged − εₖ‖² + λ |mᵢ·mⱼ|",
        source="Shah et al., ZipLoRA: Any Subject in Any Style by Effectively Merging LoRAs "
        "(arXiv:2311.13600), section 3.3",
        merge=zip_columns,
        needs="training",
        options=LEARNING,
    ),
    MergeMethod(
        name="ziprank",
        summary="A learned weight for every direction of every update, so that each adapter's "
        "prompts are answered as by it alone.",
        formula="ΔW = Σ wₖ Uₖ diag(mₖ) Σₖ Vₖᵀ, m by descent on ‖ε_merged − εₖ‖² + λ overlap",
        source="Roy et al., DuoLoRA: Cycle-consistent and Rank-disentangled Content-Style "
        "Personalization (arXiv:2504.13206), its ZipRank without layer priors and cycle loss",
        merge=zip_directions,
        needs="training",
        options=LEARNING,
    ),
)
