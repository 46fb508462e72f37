"""NP-LoRA: the null space of one adapter, whose directions are taken out of the others."""

from __future__ import annotations

from collections.abc import Sequence

from dreamloom.core.errors import ConfigError
from dreamloom.merging.factors import Factors, find_spectrum, stack
from dreamloom.merging.method import Context, LayerPart, MergeMethod, Option
from dreamloom.merging.ranks import keep_energy


def project_others(parts: Sequence[LayerPart], context: Context) -> Factors:
    """Add updates after taking the protected one's directions out of all others.

    The protected adapter, as a rule the style, reads its input directions alone (``hard``), or the
    others keep 1 / (1 + μ) of what they say there (``soft``): ΔW (I - κ V Vᵀ) with orthonormal V,
    and (I - κ U Uᵀ) ΔW on the side of outputs. μ = 0 is the plain sum. Where no
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
    left, right = spectrum.left_vectors()[:, :count], spectrum.right_vectors()[:count]
    added = []
    for part in parts:
        up, down = part.factors.up, part.factors.down
        if part.number != protected and side in ("input", "both"):
            exact = down.double()
            down = (exact - share * (exact @ right.T) @ right).to(down.dtype)
        if part.number != protected and side in ("output", "both"):
            exact = up.double()
            up = (exact - share * left @ (left.T @ exact)).to(up.dtype)
        added.append((Factors(up, down), part.weight))
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
        merge=project_others,
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
