"""How the results were made: losses, time, memory, settings, fingerprints and the command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from pydantic import ValidationError

from dreamloom.core.config.loading import PRESETS, load_config
from dreamloom.core.config.settings import LoomConfig
from dreamloom.core.errors import DreamLoomError
from dreamloom.core.run_folder import Record, file_sha256
from dreamloom.evaluation.retention import Retention
from dreamloom.lora.reading import read_adapter
from dreamloom.merging.files.certificate import read_certificate
from dreamloom.report.plots import loss_chart, smoothing_window
from dreamloom.report.story import Facts, Story, label_run, order_of
from dreamloom.report.verdicts import tell

_TAKES_MANY = ("generate", "evaluate")
"""Stages that run once for each set of pictures: their times are added up."""


def curves(story: Story) -> list[tuple[str, Markup, str]]:
    """Draw the losses of each training, all on one scale: heading, drawing and what it shows."""
    losses = story.losses()
    values = [
        value
        for loss in losses.values()
        for line in loss.lines.values()
        for value in line
        if value is not None
    ]
    drawn = []
    for name, loss in losses.items():
        label = label_run(name) or story.subject
        chart = loss_chart(
            loss.updates, loss.lines, highest=max(values), title=f"Loss of {label} by update"
        )
        told = (
            f"{len(loss.updates)} updates; the mean covers {smoothing_window(len(loss.updates))}."
        )
        if "prior" not in loss.lines:
            told += " Without class images the subject’s loss is all there is."
        drawn.append((label, Markup(chart), told))
    return drawn


def times(story: Story) -> list[tuple[str, float, str]]:
    """Say how long each stage took: its name, its share of the longest, and the time in words."""
    told = story.summary.get("seconds")
    seconds: dict[str, float] = {}
    counts: dict[str, int] = {}
    if isinstance(told, dict):
        pairs = [(str(name), value) for name, value in told.items()]
    else:
        pairs = [
            (f"{record.stage}-{run}" if run else record.stage, record.seconds)
            for run, record in story.records
        ]
    for name, value in pairs:
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        stage, _, part = name.partition("-")
        label = stage if stage in _TAKES_MANY or not part else f"{stage}, {label_run(part)}"
        seconds[label] = seconds.get(label, 0.0) + float(value)
        counts[label] = counts.get(label, 0) + 1
    longest = max(seconds.values(), default=0.0) or 1.0
    return [
        (
            f"{label}, {counts[label]} sets" if counts[label] > 1 else label,
            value / longest,
            tell_seconds(value),
        )
        for label, value in sorted(seconds.items(), key=lambda item: _stage_order(item[0]))
    ]


def _stage_order(label: str) -> tuple[int, tuple[int, str]]:
    stages = ("photos", "priors", "train", "merge", "generate", "evaluate", "report")
    stage, _, part = label.partition(", ")
    place = stages.index(stage) if stage in stages else len(stages)
    return place, order_of(part.replace(" ", "_"))


def tell_seconds(seconds: float) -> str:
    """Write a time as a person would: ``0.4 s``, ``48 s``, ``2 min 05 s``, ``1 h 10 min``.

    Example:
        >>> tell_seconds(125.2), tell_seconds(4200)
        ('2 min 05 s', '1 h 10 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def peak(story: Story) -> str:
    """Say how much memory was needed at most, and for what."""
    known = [(record.peak_mib, run, record) for run, record in story.records if record.peak_mib > 0]
    if not known:
        return "Peak memory was not measured."
    most, run, record = max(known, key=lambda entry: entry[0])
    where = f" on {record.runtime}" if record.runtime else ""
    return f"Peak memory: {most / 1024:.2f} GiB, in {_stage_of(run, record)}{where}."


def merge_facts(story: Story) -> Facts:
    """Say how the merge was made, as far as its record tells."""
    record = next((r for _, r in story.records if r.stage == "merge"), None)
    if record is None:
        return [*_certificate_facts(story), *_retention_facts(story)]
    settings, results = record.settings, record.results
    files, weights = settings.get("files"), settings.get("weights")
    facts: Facts = []
    if isinstance(files, list) and isinstance(weights, list) and len(files) == len(weights):
        parts = [f"{weight} × {file}" for file, weight in zip(files, weights, strict=True)]
        facts.append(("Parts", " + ".join(parts)))
        settings = {k: v for k, v in settings.items() if k not in {"files", "weights"}}
    for name, value in [*settings.items(), *results.items()]:
        facts.append((name.replace("_", " ").capitalize(), _plain(value)))
    facts += _retention_facts(story)
    facts += [(f"SHA-256 of {name}", digest) for name, digest in record.outputs.items()]
    return facts


def _certificate_facts(story: Story) -> Facts:
    """Say how merged files that lie in the folder were made, as they say it themselves."""
    facts: Facts = []
    for path in sorted(story.folder.glob("*.safetensors")):
        try:
            adapter = read_adapter(path)
            recipe = read_certificate(path, adapter).recipe
        except DreamLoomError:
            continue  # an adapter that was taught, or another file
        parts = " + ".join(f"{part.weight:g} × {part.file}" for part in recipe.parts)
        facts.append((f"Parts of {path.name}", parts))
        facts.append(("Method", f"{recipe.method}, rank {recipe.rank}"))
        facts.append((f"SHA-256 of {path.name}", file_sha256(path)))
    return facts


def _retention_facts(story: Story) -> Facts:
    """Say what the merge has kept of its parts, where that was measured."""
    record = next((r for _, r in story.records if r.stage.startswith("retention-")), None)
    if record is None:
        return []
    try:
        kept = Retention.model_validate(record.results)
    except ValidationError:
        return []
    facts = []
    for score, label, ends in (
        (
            *(kept.identity, "Subject kept"),
            "0 as the base model, 1 as the subject’s adapter alone",
        ),
        (
            *(kept.style, "Style kept"),
            "0 as the subject’s adapter alone, 1 as the style’s alone",
        ),
    ):
        told = f"{tell(score)}: {ends}"
        if not score.measured:
            told = f"not measured: {score.reason}" if score.reason else "not measured"
        facts.append((label, told))
    if kept.both is not None:
        facts.append(("Both together", f"{kept.both:.3f}, their harmonic mean"))
    return facts


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_plain(inner)}" for name, inner in value.items())
    return str(value)


def command(story: Story) -> str:
    """Write the command that repeats the work; paths of photos and results are left to the user."""
    if "command" in story.summary:
        return str(story.summary["command"])
    config = story.config
    if not story.is_single and story.summary.get("kind", "demo") != "demo":
        return f"dreamloom {story.summary['kind']} FILE.toml"
    if not story.is_single:
        preset = str(story.summary.get("preset") or (config.preset if config else "quick"))
        extra = _changed(config, ("subject.", "base", "preset")) if config else []
        return shlex.join(["dreamloom", "demo", "--preset", preset, *extra])
    if config is None:
        return "Not recorded: the folder has no readable loom.toml."
    words = ["dreamloom", "train", "PHOTOS", "--base", config.base]
    words += ["--subject", config.subject.phrase, "--class-noun", config.subject.class_noun]
    kind = config.priors.kind
    words += ["--prior", config.priors.folder if kind == "folder" else kind]
    words += ["--preset", config.preset, "--out", "RUN"]
    named = (
        "base",
        "preset",
        "subject.phrase",
        "subject.class_noun",
        "priors.kind",
        "priors.folder",
    )
    return shlex.join([*words, *_changed(config, named)])


def _changed(config: LoomConfig, left_out: tuple[str, ...]) -> list[str]:
    """Name every setting that differs from its preset, as ``--set`` takes it.

    What the preset leaves to the base model is left to it again.
    """
    try:
        usual = load_config(preset=config.preset if config.preset in PRESETS else "standard")
    except DreamLoomError:
        return []
    before, after = usual.flat(), config.flat()
    words = []
    for name, value in after.items():
        same = value == before.get(name) or before.get(name) == "auto"
        if same or name.startswith(left_out):
            continue
        if isinstance(value, list | tuple):
            told = "[" + ", ".join(f'"{v}"' if isinstance(v, str) else str(v) for v in value) + "]"
        elif isinstance(value, bool):
            told = str(value).lower()
        else:
            told = "none" if value is None else str(value)
        words += ["--set", f"{name}={told}"]
    return words


def record_rows(story: Story) -> list[tuple[str, ...]]:
    """One row for each record: stage, time, peak memory, seed, device and when it finished."""
    return [
        (
            _stage_of(run, record),
            tell_seconds(record.seconds) if record.seconds else "–",
            f"{record.peak_mib:,.0f} MiB" if record.peak_mib else "–",
            "–" if record.seed is None else str(record.seed),
            record.runtime or "–",
            record.finished_at,
        )
        for run, record in story.records
    ]


def _stage_of(run: str, record: Record) -> str:
    return f"{record.stage}, {label_run(run)}" if run else record.stage


def hash_facts(story: Story) -> Facts:
    """Name the fingerprints of the base model, the photos and the adapters."""
    facts: Facts = []
    for _, record in story.records:
        for name in ("fingerprint", "revision"):
            if record.base.get(name):
                facts.append(
                    (f"base model {record.base.get('name', '')}, {name}", record.base[name])
                )
        if "photos" in record.inputs:
            told = "" if record.stage == "train" else f", {record.stage}"
            facts.append((f"photos{told}", record.inputs["photos"]))
    adapters = [(name, run.adapter) for name, run in story.runs.items()]
    adapters += [("", story.folder / "merged.safetensors")]
    for name, path in adapters:
        if path.is_file():
            facts.append((f"{name}/{path.name}" if name else path.name, file_sha256(path)))
    first: dict[str, str] = {}  # each value once, by the first name that it had
    for name, value in facts:
        first.setdefault(value, name)
    return [(name, value) for value, name in first.items()]


def version_facts(story: Story) -> Facts:
    """Name the versions of the libraries; several where the records differ."""
    found: dict[str, set[str]] = {}
    told = story.summary.get("versions")
    sources = [told] if isinstance(told, dict) else []
    for versions in [*sources, *(record.versions for _, record in story.records)]:
        for name, version in versions.items():
            found.setdefault(str(name), set()).add(str(version))
    return [(name, ", ".join(sorted(versions))) for name, versions in found.items()]
