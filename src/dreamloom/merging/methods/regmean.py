"""RegMean on LoRAs: the update that answers each adapter's inputs most nearly as it does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dreamloom.merging.activation_inputs import JOINT_SHARE, PROMPTS, STEPS, UNSEEN, name_down, take
from dreamloom.merging.factors import Factors, stack
from dreamloom.merging.method import Context, LayerPart, MergeMethod, Option


def regress_updates(parts: Sequence[LayerPart], context: Context) -> Factors:
    """Answer what each adapter is asked as that adapter alone would, as nearly as a matrix can.

    The least squares solution keeps every ``up`` and weights the inputs of every ``down``:

        ΔW = Σ wₖ upₖ (downₖ Gₖ (Σ G)⁻¹)

    so it is a LoRA whose rank is that of the parts together; see `InputShares`, by which they are
    prepared. A layer that one adapter alone changes takes its weighted update.

    Source:
        Jin et al., RegMean (arXiv:2212.09849), Eq. 2 and section 3.2, on updates; that factors do
        is ours.

    Raises:
        ConfigError: If the layer was not listened to.
    """
    if len(parts) == 1:
        return stack([(part.factors, part.weight) for part in parts])
    shared = [take(context, name_down(part.number)).to(part.factors.down) for part in parts]
    return stack(
        [
            (Factors(part.factors.up, down), part.weight)
            for part, down in zip(parts, shared, strict=True)
        ]
    )


class InputShares:
    """How much of a layer's inputs each adapter answers.

        downₖ' = downₖ (G̃ₖ + η G̃_joint + λ S) (Σ G̃ + η G̃_joint + λ I)⁻¹

    Prompts that ask for all adapters at once shall be answered by the plain sum, so as η grows
    every downₖ' becomes downₖ.

    Args:
        grams: The mean of x xᵀ over the layer's inputs on each adapter's prompts.
        joint: η times that of prompts that ask for all.
        shrink: In [0, 1]: what entries off the diagonal are multiplied by, since few prompts tell
            little of how inputs go together. At 1 the solution is exact for these inputs, at 0
            each input is weighted by itself.
        ridge: λ as a share of the mean of the diagonal; above 0.
        keeps_unseen: Whether S is I: inputs that are never seen are answered by the plain sum. If
            not, S is 0, and they are not answered.

    Source:
        RegMean (arXiv:2212.09849), Eq. 2; the shrinking is its section 3.2. S and the joint term
        are ours.
    """

    def __init__(
        self,
        grams: Sequence[Float[Tensor, "inputs inputs"]],
        joint: Float[Tensor, "inputs inputs"] | None = None,
        *,
        shrink: float,
        ridge: float,
        keeps_unseen: bool,
    ) -> None:
        self._grams, self._joint, self._shrink = grams, joint, shrink
        total = torch.zeros_like(grams[0], dtype=torch.float64)
        for gram in grams if joint is None else [*grams, joint]:
            total += gram
        diagonal = total.diagonal().clone()
        scale = ridge * (float(diagonal.mean()) or 1.0)
        total *= shrink
        total.diagonal().copy_(diagonal + scale)
        self._factor = torch.linalg.cholesky(total)
        self._kept = scale if keeps_unseen else 0.0

    def share(
        self, adapter: int, down: Float[Tensor, "rank inputs"]
    ) -> Float[Tensor, "rank inputs"]:
        """Weight the inputs of a factor of the adapter in that place of the Gram matrices."""
        exact = down.to(self._factor)
        seen = self._times(exact, self._grams[adapter]) + self._kept * exact
        if self._joint is not None:
            seen += self._times(exact, self._joint)
        solved: Tensor = torch.cholesky_solve(seen.T, self._factor)
        return solved.T.to(down)

    def _times(self, rows: Tensor, gram: Tensor) -> Tensor:
        """Rows times a shrunk matrix, which is never made."""
        gram = gram.to(rows)
        product: Tensor = self._shrink * (rows @ gram)
        return product + (1 - self._shrink) * rows * gram.diagonal()


METHODS = (
    MergeMethod(
        name="regmean",
        summary="Regression: the update that answers each adapter's inputs most nearly as it does.",
        formula="ΔW = Σ wₖ ΔWₖ Gₖ (Σ G)⁻¹ with Gₖ the mean of x xᵀ, shrunk off the diagonal",
        source="Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models "
        "(arXiv:2212.09849), Eq. 2",
        merge=regress_updates,
        needs="activations",
        options=(
            Option(
                "shrink",
                0.9,
                "What entries off the diagonal of the inputs' Gram matrix are multiplied by.",
                low=0.0,
                high=1.0,
            ),
            JOINT_SHARE,
            Option("ridge", 1e-6, "λ, as a share of the mean input; above 0.", low=1e-12),
            UNSEEN,
            PROMPTS,
            STEPS,
        ),
    ),
)
