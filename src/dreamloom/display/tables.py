"""What is found, as tables and lines: scores, comparisons, studies, photos, prompts, models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.markup import escape

from dreamloom.display.layout import aside, table

if TYPE_CHECKING:
    from dreamloom.data.photos.check import PhotoCheck
    from dreamloom.data.photos.faces import FaceBox
    from dreamloom.data.prompts.packs import Pack
    from dreamloom.evaluation.compare import Comparison
    from dreamloom.evaluation.encoders.store import Listed
    from dreamloom.evaluation.metrics.scorecard import Group, Scorecard
    from dreamloom.evaluation.retention import Retention
    from dreamloom.experiments.seed_audit import Audit, AuditScores
    from dreamloom.experiments.study.findings import StudyFindings

_SCORE_HEAD = ("value", "n", "interval", "floor", "ceiling", "lift")


def render_photo_check(check: PhotoCheck) -> Iterator[RenderableType]:
    """Lay out what was found about a folder of photos."""
    for photo in check.photos:
        size = "{1} × {0}".format(*photo.original_px) if photo.original_px else "unreadable"
        yield f"[bold]{escape(photo.file)}[/bold]  {size}"
        for text in filter(None, (photo.unreadable, *photo.issues)):
            yield f"  [yellow]{escape(text)}[/yellow]"
        beside = [f"caption: {photo.caption}"] if photo.caption else []
        beside += [f"mask: {photo.mask}"] if photo.mask else []
        beside += ["box: in metadata"] if photo.has_box else []
        beside += _tell_faces(photo.faces or ())
        for text in (*photo.remarks, *beside):
            yield f"  [dim]{escape(text)}[/dim]"
    yield f"{escape(check.understood)}."
    for text in check.notes:
        yield escape(text)
    if check.faces_unknown:
        yield escape(f"Faces were not looked for: {check.faces_unknown}.")
    for text in check.to_add:
        yield f"[bold]To do:[/bold] {escape(text)}"
    if check.usable and not check.to_add:
        yield "[green]These photos can be used as they are.[/green]"


def _tell_faces(faces: Sequence[FaceBox]) -> list[str]:
    """Say where a photo's faces are: left, top, right and bottom."""
    boxes = ["[{}, {}, {}, {}]".format(*face) for face in faces]
    return [f"{'face' if len(boxes) == 1 else 'faces'}: {', '.join(boxes)}"] if boxes else []


def render_models(listed: Sequence[Listed]) -> Iterator[RenderableType]:
    """Lay out the models that evaluation uses, and what to do about those that are not here."""
    for line in listed:
        model = line.model
        facts = [model.licence]
        if model.size_mib:
            facts.append(f"{model.size_mib:.0f} MiB" if model.size_mib >= 1 else "under 1 MiB")
        if model.files:
            facts.append("hashes known" if model.hashes_known else "hashes taken when fetched")
        colour = "green" if line.state in {"here", "embedded"} else "yellow"
        known = escape("; ".join(facts))
        yield f"[bold]{model.name}[/bold]  [{colour}]{line.state}[/{colour}]  {known}"
        for text in dict.fromkeys(filter(None, (model.purpose, line.why, model.note))):
            yield f"    [dim]{escape(text)}[/dim]"


def render_packs(packs: Sequence[Pack]) -> Iterator[RenderableType]:
    """Lay out what each prompt pack is for."""
    rows = [(pack.name, str(len(pack.prompts)), escape(pack.about)) for pack in packs]
    yield table(("pack", "prompts", "what for"), rows)
    yield from aside("'dreamloom packs NAME' shows a pack's prompts.")


def render_pack(pack: Pack) -> Iterator[RenderableType]:
    """Lay out a pack's prompts with what each may change, and whose work they are."""
    yield f"[bold]{pack.name}[/bold]  {escape(pack.about)}"
    rows = []
    for prompt in pack.prompts:
        text = f"{prompt.text} (persons only)" if prompt.for_persons else prompt.text
        asked = f"\n[dim]{escape(prompt.check)}[/dim]" if prompt.check else ""
        may_change = ", ".join(prompt.may_change) or "–"
        cells = (prompt.category, prompt.style, prompt.face, may_change)
        rows.append((escape(text) + asked, *cells))
    yield table(("prompt", "category", "style", "face", "may change"), rows)
    yield from aside(pack.attribution)


def render_scorecard(card: Scorecard) -> Iterator[RenderableType]:
    """Lay out the scores with everything that belongs beside them."""
    if card.warning:
        yield f"[bold yellow]{escape(card.warning)}[/bold yellow]"
    for text in card.alarms:
        yield f"[yellow]{escape(text)}[/yellow]"
    for text in card.findings:
        yield escape(text)
    rows = [(name, *score.cells()) for name, score in card.all_scores.items()]
    yield table(("score", *_SCORE_HEAD), rows)
    for name, score in card.all_scores.items():
        if score.value is None and score.note:
            yield from aside(f"{name} is not measured: {score.note.removeprefix('not measured: ')}")
        elif score.note:
            yield from aside(f"{name}: {score.note}")
    for flags in card.flags.values():
        yield f"[bold]{escape(flags.label)}[/bold]: {escape(flags.told)}"
    keys = sorted({score.key for score in card.scores.values() if score.key})
    yield from aside(*keys, *card.notes)


def render_groups(groups: Sequence[Group], measures: Sequence[str]) -> Iterator[RenderableType]:
    """Lay out scores of parts of a set, a row for each part and score."""
    rows = []
    for group in groups:
        sampler = f"{group.scheduler}, {group.steps} steps" if group.scheduler else ""
        named = escape(group.prompt or group.category or sampler)
        for name in measures:
            score = group.scores.get(name)
            cells = score.cells() if score else ["not measured", *5 * [""]]
            rows.append((named, name, *cells))
    yield table(("pictures", "score", *_SCORE_HEAD), rows)


def render_findings(findings: StudyFindings) -> Iterator[RenderableType]:
    """Lay out each arm's measures and, last, the answer to what was asked."""
    rows = [
        (escape(arm.name), name, *score.cells())
        for arm in findings.arms
        for name, score in arm.measures().items()
    ]
    yield table(("arm", "score", *_SCORE_HEAD), rows)
    yield from aside(*findings.notes)
    yield f"[bold]{escape(findings.study.question)}[/bold] {escape(findings.answer)}"


def render_comparisons(compared: Sequence[Comparison]) -> Iterator[RenderableType]:
    """Lay out what changed in each score, and a sentence each on what that rests on."""
    from dreamloom.evaluation.compare import tell_comparison, tell_outcome

    rows = []
    for one in compared:
        gap = "–" if one.difference is None else f"{one.difference:+.3f}"
        between = "–" if one.interval is None else "{:+.3f} to {:+.3f}".format(*one.interval)
        p = "–" if one.p_corrected is None else f"{one.p_corrected:.3f}"
        rows.append((one.measure, tell_outcome(one), gap, between, p, str(one.pairs)))
    head = ("score", "B against A", "difference", "95 % interval", "p", "pairs")
    yield table(head, rows)
    for one in compared:
        yield escape(tell_comparison(one))
    yield from aside(*sorted({one.key for one in compared if one.key}))


def render_audit(audit: Audit) -> Iterator[RenderableType]:
    """Lay out what faults do to CLIP-I and CLIP-T: mended one after the other, and each alone."""
    if audit.warning:
        yield f"[bold yellow]{escape(audit.warning)}[/bold yellow]"
    first, last = audit.rows[0].scores, audit.rows[-1].scores
    yield (
        f"{audit.pictures} pictures against {audit.photos} photos, as the script would print it: "
        f"CLIP-I {first.clip_i:.4f}, CLIP-T {first.clip_t:.4f}"
    )
    names = ("CLIP-I", "CLIP-T", "photos", "mosaics", *(["floor"] if audit.has_floor else []))
    rows = [(row.says, *(_number(row.scores, name) for name in names)) for row in audit.rows]
    yield table(("one fault mended after the other", *names), rows)
    alone = []
    for row in audit.alone:
        changes = row.scores.clip_i - last.clip_i, row.scores.clip_t - last.clip_t
        alone.append((row.says, *(f"{change:+.4f}" for change in changes)))
    yield table(("each fault alone, against the right way", "CLIP-I", "CLIP-T"), alone)
    yield escape(audit.verdict)
    texts = "; ".join(audit.right_texts[:3]) + (" …" if len(audit.right_texts) > 3 else "")
    yield from aside(
        "photos: the photos among themselves, none with itself. mosaics: pictures of nothing, "
        "against the photos.",
        f"The faulty text: {audit.faulty_text}. The right one: {texts}",
        audit.key,
    )


def _number(scores: AuditScores, column: str) -> str:
    value = getattr(scores, column.lower().replace("-", "_"))
    return "–" if value is None else f"{value:.3f}"


def render_retention(found: Retention) -> Iterator[RenderableType]:
    """Lay out what a merge has kept of its parts."""
    parts = (("subject", found.identity), ("style", found.style))
    rows = [(name, *score.cells()[:3]) for name, score in parts]
    yield table(("kept", *_SCORE_HEAD[:3]), rows)
    if found.both is not None:
        yield f"both together, by their harmonic mean: {found.both:.3f}"
    yield from aside(f"style is compared with {found.style_reference}")
    for score in (found.identity, found.style):
        yield from aside(score.note, score.key)
