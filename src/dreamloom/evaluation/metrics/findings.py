"""What scores say of an adapter's side effects, in one sentence each."""

from __future__ import annotations

from collections.abc import Mapping

from dreamloom.evaluation.metrics.scorecard import Score


def tell_findings(scores: Mapping[str, Score], class_noun: str) -> list[str]:
    """Say what the scores show of leakage and of drift.

    Args:
        scores: By name.
        class_noun: What other members of the class are called.
    """
    told = [
        _tell_leakage(scores[name], class_noun, words)
        for name, words in (("leakage", ""), ("pres", ", by DINO"))
        if name in scores
    ]
    told.append(_tell_drift(scores["drift"]) if "drift" in scores else "")
    return [text for text in told if text]


def _tell_leakage(score: Score, class_noun: str, words: str) -> str:
    """Compare the class with what the base model draws for it, on the way to the subject."""
    if score.value is None or score.floor is None:
        return ""
    embeddings = (
        f"pictures of another {class_noun} have a likeness of {score.value:.3f} to the subject, "
        f"the base model's {score.floor:.3f} (n = {score.n}{words})."
    )
    if score.lift_interval is None:
        return f"Leakage cannot be judged: {embeddings}"
    low, high = score.lift_interval
    if low > 0:
        share = f"{score.lift:.0%} of the way to the photos" if score.lift is not None else ""
        return f"Leakage found: {embeddings[:-1]}: {share}."
    if high < 0:
        return f"No leakage: the class has moved away from the subject; {embeddings}"
    return f"No leakage detected: {embeddings}"


def _tell_drift(score: Score) -> str:
    if score.value is None:
        return ""
    between = f" ({score.interval[0]:.3f} to {score.interval[1]:.3f})" if score.interval else ""
    return (
        f"Drift: beside the subject, pictures have moved by {score.value:.3f}{between} on a scale "
        f"from 0, nothing changed, to 1 (n = {score.n})."
    )
