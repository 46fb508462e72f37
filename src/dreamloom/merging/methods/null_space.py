"""One adapter keeps its directions to itself: the others are taken out of them."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from dreamloom.core.errors import ConfigError
from dreamloom.merging.factors import Factors, find_spectrum, stack
from dreamloom.merging.method import Context, LayerPart, MergeMethod, Option
from dreamloom.merging.ranks import keep_energy


def project_inputs(
    factors: Factors, directions: Float[Tensor, "k inputs"], share: float
) -> Factors:
    """Take some input directions out of an update: ΔW (I - κ V Vᵀ).

    Args:
        factors: The update.
        directions: Vᵀ, orthonormal rows, in float64.
        share: κ, 0 (nothing) to 1 (all of them).
    """
    down = factors.down.double()
    down = down - share * (down @ directions.T) @ directions
    return Factors(factors.up, down.to(factors.down.dtype))


def project_outputs(
    factors: Factors, directions: Float[Tensor, "outputs k"], share: float
) -> Factors:
    """Take some output directions out of an update: (I - κ U Uᵀ) ΔW.

    Args:
        factors: The update.
        directions: U, orthonormal columns, in float64.
        share: κ, 0 (nothing) to 1 (all of them).
    """
    up = factors.up.double()
    up = up - share * directions @ (directions.T @ up)
    return Factors(up.to(factors.up.dtype), factors.down)


def add_beside(parts: Sequence[LayerPart], context: Context) -> Factors:
    """Add updates after taking the protected one's directions out of all others.

    The protected adapter, as a rule the style, reads its input directions alone (``hard``), or the
    others keep 1 / (1 + μ) of what they say there (``soft``). μ = 0 is the plain sum. Where no
    directions are shared, it is the plain sum, too, as in layers that only one adapter changes.
    The weights keep their meaning.

    Source:
        Chen et al., NP-LoRA (arXiv:2511.11051), Eq. 10 with κ = μ / (1 + μ). The projector stands
        on the right, for its directions are right singular vectors, k of them: as many as the
        adapter's rank there. Outputs, both sides, fewer directions by energy, and more than two
        adapters are our own.
    """
    protected = _find_protected(context)
    kept = next((part for part in parts if part.number == protected), None)
    if kept is None:
        return stack([(part.factors, part.weight) for part in parts])
    spectrum = find_spectrum(kept.factors)
    count = keep_energy(spectrum.values, context.number("energy"))
    mu, side = context.number("mu"), context.word("side")
    share = 1.0 if context.word("projection") == "hard" else mu / (1 + mu)
    context.notes["protected directions"] = float(count)
    added = []
    for part in parts:
        factors = part.factors
        if part.number != protected:
            if side in ("input", "both"):
                factors = project_inputs(factors, spectrum.right_vectors()[:count], share)
            if side in ("output", "both"):
                factors = project_outputs(factors, spectrum.left_vectors()[:, :count], share)
        added.append((factors, part.weight))
    return stack(added)


def _find_protected(context: Context) -> int:
    wanted = int(context.number("protected"))
    if wanted > context.adapters:
        raise ConfigError(
            f"Adapter {wanted} cannot be protected, for there are {context.adapters}.",
            f"Give a number from 1 to {context.adapters}, or 0 for the last.",
        )
    # An adapter of weight 0 counts as if it were not there.
    last = max(number for number, weight in enumerate(context.weights, 1) if weight != 0)
    return wanted or last


METHODS = (
    MergeMethod(
        name="np",
        summary="One adapter, as a rule the style, is kept whole; the others leave its directions.",
        formula="ΔW = wₛ ΔWₛ + Σ wᵢ ΔWᵢ (I - κ VₛVₛᵀ), κ = μ/(1+μ) or 1",
        source="Chen et al., NP-LoRA (arXiv:2511.11051), Eq. 10",
        merge=add_beside,
        options=(
            Option("projection", "soft", "soft: by mu, hard: wholly.", choices=("soft", "hard")),
            Option("mu", 0.5, "How much is taken out when soft: mu/(1 + mu).", low=0.0),
            Option("protected", 0, "The adapter kept whole, by number; 0 is the last.", low=0.0),
            Option(
                "side",
                "input",
                "Which of its directions are kept free: of the inputs, the outputs, or both.",
                choices=("input", "output", "both"),
            ),
            Option(
                "energy",
                1.0,
                "The share of the protected update that its directions must hold; 1 is all.",
                low=0.0,
                high=1.0,
            ),
        ),
    ),
)
