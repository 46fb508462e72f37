"""The page is judged by what it shows: a folder is built as the stages write it, and read back."""

import base64
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from dreamloom.core.config.loading import load_config, to_toml
from dreamloom.core.errors import RunFolderError
from dreamloom.core.events import LossLogged, Note, StageDone, StageStarted
from dreamloom.core.manifests import (
    AdapterEntry,
    ClassImageSet,
    ImageSet,
    Photo,
    PhotoSet,
    Picture,
    write_manifest,
)
from dreamloom.core.run_folder import Record, RunFolder, write_json, write_text
from dreamloom.evaluation.compare import Comparison
from dreamloom.evaluation.metrics.scorecard import Flags, Group, PictureScores, Score, Scorecard
from dreamloom.report.gallery import embed, split_by_prompts
from dreamloom.report.making import tell_seconds
from dreamloom.report.plots import Bar, loss_chart, score_bars, smooth, thin, ticks
from dreamloom.report.render import write_report
from dreamloom.report.story import read_story
from dreamloom.report.tables import heat_maps
from dreamloom.report.verdicts import (
    Change,
    indistinct_from_best,
    judge_change,
    judge_following,
    judge_likeness,
    tell,
)

KEY = "picturebook/judges@1f3a; 128 px"
PROMPTS = [
    ("a photo of rraj person", "photo"),
    ("a painting of rraj person at Oktoberfest", "scene"),
    ("a painting of rraj person in the style of Van Gogh", "style"),
    ("a painting of rraj person with blonde hair", "attribute"),
    ("a side view photo of rraj person", "view"),
    ("a photo of rraj person with sunglasses", "accessory"),
]
PIXEL = [("pixel, a photo of rraj person wearing sunglasses", "merge")]
SEEDS = range(4)
FAILURES = 4
"""Pictures of the main set that are shown a second time, before all: the least alike."""
VERSIONS = {"python": "3.11.2", "torch": "2.13.0"}
FINISHED = "2026-03-01T12:00:00+00:00"

Painter = Callable[[str, str, int], Image.Image]
"""Draws the picture of a set, a prompt and a seed."""


def plain(name: str, prompt: str, seed: int) -> Image.Image:
    shade = sum(map(ord, name + prompt)) + 37 * seed
    return Image.new("RGB", (32, 32), (shade % 256, shade * 3 % 256, shade * 7 % 256))


class Folder:
    """Builds what the stages write, with the classes that they write it with."""

    def __init__(self, path: Path, paint: Painter = plain, seeds: int = len(SEEDS)):
        self.run, self.paint, self.seeds = RunFolder(path), paint, range(seeds)
        path.mkdir(parents=True, exist_ok=True)

    def settings(self, **overrides: object):
        write_text(self.run.settings_file, to_toml(load_config("quick", overrides=overrides)))

    def photos(self, count: int = 6, notes: tuple[str, ...] = ()):
        self.run.photos.mkdir()
        photos = []
        for index in range(count):
            self.paint("photos", "", index).save(self.run.photos / f"{index}.png")
            issues = ("This photo is not sharp.",) if index == 2 else ()
            photos.append(
                Photo(
                    file=f"{index}.png",
                    source=f"IMG_{index}.jpeg",
                    source_sha256=f"{index:064d}",
                    original_px=(400, 300),
                    scaled_px=(32, 32),
                    issues=issues,
                )
            )
        write_manifest(
            PhotoSet(
                folder=self.run.photos, resolution_px=32, photos=tuple(photos), notes=tuple(notes)
            )
        )

    def priors(self, count: int = 5):
        self.run.priors.mkdir()
        files = tuple(f"{index:04d}.png" for index in range(count))
        for index, file in enumerate(files):
            self.paint("priors", "", index).save(self.run.priors / file)
        write_manifest(
            ClassImageSet(
                folder=self.run.priors,
                prompt="a photo of a person",
                resolution_px=32,
                files=files,
                made_from="0" * 64,
            )
        )

    def pictures(
        self,
        name: str,
        prompts: list[tuple[str, str]],
        samplers: tuple[tuple[str, int], ...] = (("ddim", 25),),
        active: tuple[tuple[str, float], ...] = (),
    ) -> ImageSet:
        folder = self.run.images / name
        folder.mkdir(parents=True)
        pictures = []
        for scheduler, steps in samplers:
            for prompt, category in prompts:
                for seed in self.seeds:
                    file = f"{len(pictures):04d}.png"
                    self.paint(f"{name}{scheduler}{steps}", prompt, seed).save(folder / file)
                    pictures.append(
                        Picture(
                            file=file,
                            prompt=prompt,
                            category=category,
                            seed=seed,
                            scheduler=scheduler,
                            steps=steps,
                            guidance=4.0,
                        )
                    )
        images = ImageSet(
            folder=folder,
            base={"name": "picturebook", "fingerprint": "f" * 64},
            adapters=tuple(AdapterEntry(file=f, sha256="e" * 64, weight=w) for f, w in active),
            resolution_px=32,
            pictures=tuple(pictures),
        )
        write_manifest(images)
        return images

    def record(self, stage: str, seconds: float = 1.0, **fields: object):
        self.run.records.mkdir(exist_ok=True)
        self.run.write_record(
            Record(
                stage=stage,
                seconds=seconds,
                peak_mib=512.0,
                seed=0,
                runtime="CPU, float32",
                finished_at=FINISHED,
                versions=VERSIONS,
                base={"name": "picturebook", "fingerprint": "f" * 64},
                **fields,
            )
        )

    def losses(self, updates: int = 120, prior: bool = True):
        observe = self.run.observer()
        for update in range(1, updates + 1):
            noise = 0.05 * math.sin(update * 2.3) * math.cos(update * 0.7)
            subject = 0.12 + 0.3 * math.exp(-update / 30) + noise
            other = 0.2 + 0.04 * math.cos(update * 1.7) if prior else None
            observe(LossLogged(update, subject + (other or 0.0), subject, other, 1e-3))

    def scores(self, cards: dict[str, Scorecard]):
        write_json(self.run.scores, cards)


def score(value: float, half: float = 0.03, n: int = 24, **fields: object) -> Score:
    filled = {"floor": 0.21, "ceiling": 0.78, "key": KEY, **fields}
    if filled["floor"] is not None and filled["ceiling"] is not None:
        lift = (value - filled["floor"]) / (filled["ceiling"] - filled["floor"])
        wide = half / (filled["ceiling"] - filled["floor"])
        filled |= {"lift": lift, "lift_interval": (lift - wide, lift + wide)}
    return Score(value=value, n=n, interval=(value - half, value + half), **filled)


def scores_at(level: float, n: int = 24) -> dict[str, Score]:
    return {
        "identity": score(0.21 + 0.5 * level, n=n),
        "clip_i": score(0.52 + 0.2 * level, n=n, floor=0.52, ceiling=0.83),
        "dino": Score(n=n, note="The encoder dino is not on this machine."),
        "clip_t": score(0.29 - 0.02 * level, 0.01, n=n, floor=0.29, ceiling=None),
        "variety": score(0.30 - 0.1 * level, 0.02, n=n, floor=0.3, ceiling=0.41),
    }


def scorecard(images: ImageSet, level: float, **fields: object) -> Scorecard:
    cells = {(p.scheduler, p.steps) for p in images.pictures}
    prompts = {p.prompt: p.category for p in images.pictures}
    return Scorecard(
        scores=scores_at(level, len(images.pictures)),
        floors={"clip_t": Score(value=0.29, n=24, interval=(0.275, 0.305), key=KEY)},
        by_category=tuple(
            Group(category=c, pictures=4, scores=scores_at(level, 4)) for c in prompts.values()
        ),
        by_prompt=tuple(
            Group(prompt=p, scored=p, category=c, pictures=4, scores=scores_at(level, 4))
            for p, c in prompts.items()
        ),
        by_cell=tuple(
            Group(
                scheduler=scheduler,
                steps=steps,
                pictures=4,
                scores=scores_at(level + 0.001 * steps + 0.1 * (scheduler == "ddim"), 4),
            )
            for scheduler, steps in sorted(cells)
        ),
        encoders="picturebook",
        photos=6,
        confidence=0.95,
        resamples=1000,
        pictures=tuple(
            PictureScores(
                file=p.file,
                prompt=p.prompt,
                category=p.category,
                seed=p.seed,
                scheduler=p.scheduler,
                steps=p.steps,
                values={
                    "identity": round(0.2 + 0.5 * level + 0.01 * i % 0.1, 4),
                    "clip_t": 0.28,
                },
            )
            for i, p in enumerate(images.pictures)
        ),
        **fields,
    )


def build_demo(path: Path, paint: Painter = plain, seeds: int = len(SEEDS)) -> Path:
    """Write a demo's folder with every part."""
    demo = Folder(path, paint, seeds)
    demo.settings()
    demo.photos(notes=("Two photos are alike.",))
    demo.priors(24 if paint is not plain else 5)
    demo.record("photos", 0.3)
    demo.record("priors", 19.2)
    for name, prior in (("without_prior", False), ("with_prior", True), ("style", False)):
        folder = Folder(path / name, paint)
        folder.settings(**{"priors.kind": "generated" if prior else "none"})
        folder.losses(prior=prior)
        folder.record("train", 61.0 if prior else 34.5, inputs={"photos": "a" * 64})
        folder.run.adapter.write_bytes(name.encode())
    Folder(path / "style", paint).photos(3)
    (path / "merged.safetensors").write_bytes(b"merged")
    demo.record(
        "merge",
        0.8,
        settings={"method": "sum", "weights": [1.0, 0.8], "files": ["subject.st", "style.st"]},
        results={"layers": 90, "ranks": [16, 32], "norm": 12.3456},
    )
    table = tuple((s, n) for s in ("ddim", "pndm") for n in (50, 80))
    subject, style = (("adapter.safetensors", 1.0),), (("style.safetensors", 0.8),)
    sets = {
        "base": demo.pictures("base", PROMPTS),
        "without_prior": demo.pictures("without_prior", PROMPTS, active=subject),
        "with_prior": demo.pictures("with_prior", PROMPTS, active=subject),
        "base_merged": demo.pictures("base_merged", PIXEL),
        "style": demo.pictures("style", PIXEL, active=style),
        "merged": demo.pictures("merged", PIXEL, active=(("merged.safetensors", 1.0),)),
        "table_base": demo.pictures("table_base", PROMPTS[:1], table),
        "table_without_prior": demo.pictures("table_without_prior", PROMPTS[:1], table),
        "table_with_prior": demo.pictures("table_with_prior", PROMPTS[:1], table),
    }
    levels = {"without_prior": 0.8, "with_prior": 0.78, "merged": 0.6}
    levels |= {"table_without_prior": 0.7, "table_with_prior": 0.5}
    cards = {name: scorecard(images, levels.get(name, 0.0)) for name, images in sets.items()}
    cards["without_prior"] = cards["without_prior"].model_copy(
        update={"alarms": ("The score lies above the photos' own ceiling.",)}
    )
    cards["merged"] = cards["merged"].model_copy(
        update={"warning": "Only 4 pictures were scored: a smoke test."}
    )
    demo.scores(cards)
    for name in sets:
        demo.record(f"generate-{name}", 8.0)
        demo.record(f"evaluate-{name}", 1.5)
    observe = demo.run.observer()
    observe(Note("evaluate-merged", "Only 4 pictures were scored: a smoke test.", warning=True))
    observe(Note("photos", "Photo 2 is not sharp.", warning=True))
    seconds = {"photos": 0.3, "priors": 19.2, "train-without_prior": 34.5, "train-with_prior": 61.0}
    seconds |= {"train-style": 30.0, "merge": 0.8}
    seconds |= {f"{stage}-{name}": 8.0 for stage in ("generate", "evaluate") for name in sets}
    write_json(
        path / "summary.json",
        {
            "kind": "demo",
            "preset": "quick",
            "subject": "rraj person",
            "class_noun": "person",
            "seed": 0,
            **{
                name: {key: one.model_dump() for key, one in scores_at(level, 4).items()}
                for name, level in (("base", 0.0), ("without_prior", 0.83), ("with_prior", 0.79))
            },
            "merged": {key: one.model_dump() for key, one in scores_at(0.61, 4).items()},
            "scores_on": {"merged": PIXEL[0][0], "base, without_prior, with_prior": PROMPTS[0][0]},
            "seconds": seconds,
            "versions": VERSIONS,
        },
    )
    return path


def build_run(path: Path, paint: Painter = plain) -> Path:
    """Write a single run's folder with two sets of pictures."""
    run = Folder(path, paint)
    run.settings(**{"train.rank": 32})
    run.photos()
    run.losses(40)
    run.run.adapter.write_bytes(b"adapter")
    run.record("train", 61.0, inputs={"photos": "a" * 64})
    base, drawn = run.pictures("base", PROMPTS[:2]), run.pictures("pictures", PROMPTS[:2])
    run.scores({"base": scorecard(base, 0.0), "pictures": scorecard(drawn, 0.7)})
    return path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_demo(tmp_path_factory.mktemp("runs") / "demo")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(demo: Path) -> str:
    return (demo / "report.html").read_text()


def visible(html: str) -> str:
    html = re.sub(r"<(style|script)\b.*?</\1>", " ", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", html)))


def section(html: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">.*?</section>', html, re.DOTALL)
    assert found, f"the page has no section {name}"
    return found[0]


def pictures_in(html: str) -> list[tuple[str, Image.Image]]:
    tags = re.findall(r'<img src="data:image/webp;base64,([^"]+)" alt="([^"]*)"', html)
    return [(unescape(alt), Image.open(io.BytesIO(base64.b64decode(d)))) for d, alt in tags]


def everything_shown(folder: Path) -> Iterator[Path]:
    for manifest in folder.rglob("manifest.json"):
        yield from manifest.parent.glob("*.png")


def test_the_page_loads_nothing(page: str):
    addresses = re.findall(r"""(?:src|href|action|data|poster)\s*=\s*["']([^"']*)""", page)
    addresses += re.findall(r"url\(([^)]*)\)", page)
    assert addresses
    assert all(re.match(r"data:|#", address) for address in addresses)
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert '<link rel="stylesheet' not in page


def test_every_picture_of_every_manifest_is_shown(demo: Path, page: str):
    shown = [alt for alt, _ in pictures_in(page)]
    assert len(shown) == len(list(everything_shown(demo))) + FAILURES
    for prompt, _ in PROMPTS[1:]:
        for seed in SEEDS:
            # Which model drew is told too: base, without and with class images.
            found = [alt for alt in shown if alt.startswith(f"{prompt}, seed {seed}, drawn by ")]
            assert len(set(found)) == 3


def test_pictures_keep_their_pixels_and_place(demo: Path, page: str):
    found = dict(pictures_in(section(page, "merge")))
    alt = f"{PIXEL[0][0]}, seed 3, drawn by base model, merge prompt"
    want = Image.open(demo / "images" / "base_merged" / "0003.png").getpixel((16, 16))
    got = found[alt].convert("RGB").getpixel((16, 16))
    assert all(abs(a - b) < 12 for a, b in zip(want, got, strict=True))
    assert found[alt].size == (32, 32)
    assert 'class="pixelated"' in section(page, "merge")


def test_columns_and_rows_of_the_gallery(page: str):
    pictures = section(page, "pictures")
    assert re.findall(r"<b>([^<]*)</b><small>", pictures) == [
        "base model",
        "without prior",
        "with prior",
    ]
    assert [unescape(p) for p in re.findall(r'data-prompt="([^"]*)"', pictures)] == [
        prompt for prompt, _ in PROMPTS
    ]
    assert re.findall(r'class="category">([^<]*)<', pictures) == [c for _, c in PROMPTS]
    assert re.findall(r"<b>([^<]*)</b><small>", section(page, "merge")) == [
        "base model, merge prompt",
        "style alone",
        "merge",
    ]


def test_badges_are_the_scorecards_own(demo: Path, page: str):
    card = json.loads((demo / "scores.json").read_text())["with_prior"]
    row = re.findall(r'<div class="row".*?</div>\s*</div>\s*</div>', page, re.DOTALL)[0]
    cell = row.split('<div class="shots">')[3]
    badges = re.findall(r'<span title="Identity">([^<]*)</span>', cell)
    assert badges == [f"{entry['values']['identity']:.2f}" for entry in card["pictures"][:4]]


def test_scores_equal_the_json(demo: Path, page: str):
    cards = json.loads((demo / "scores.json").read_text())
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", section(page, "scores"), re.DOTALL)
    told = [visible(row).strip() for row in rows]
    for name, label in (("with_prior", "with prior"), ("merged", "merge")):
        for measure in ("identity", "clip_t"):
            one = cards[name]["scores"][measure]
            low, high = one["interval"]
            start = f"{label} {one['value']:.3f} {low:.3f} to {high:.3f} {one['n']} "
            assert any(start in row for row in told), start
    identity = cards["with_prior"]["scores"]["identity"]
    low, high = identity["lift_interval"]
    tail = f"0.210 0.780 {identity['lift']:.3f} {low:.3f} to {high:.3f}"
    assert any(tail in row for row in told)
    assert any("all pictures not measured: The encoder dino is not on this" in row for row in told)
    assert KEY in visible(section(page, "scores"))


def test_the_summarys_scores_are_told_apart_from_those_of_all_prompts(page: str):
    text = visible(section(page, "scores"))
    assert f"As in summary.json (merged: {PIXEL[0][0]}; base, without_prior" in text
    assert tell(scores_at(0.79, 4)["identity"]) in text


def test_the_verdict_is_at_the_top(page: str):
    text = visible(section(page, "verdict"))
    with_prior = scores_at(0.78)["identity"]
    assert f"Is it the person? {with_prior.lift:.0%} of the way from the base model" in text
    assert "With prior: 0.600 (0.570 to 0.630, n = 24)." in text
    assert "Does it follow the prompts? No difference from the base model detected" in text
    # Two scores are asked of six prompts: by arithmetic no result could pass, and seven would do.
    assert "What did prior preservation change? Cannot be told from so few prompts" in text
    assert "−0.010 (−0.010 to −0.010), 24 pairs of 6 prompts; 6 prompts cannot tell 2" in text
    assert "from chance; 7 could" in text
    assert "this compares these two adapters, not the method" in text
    # Its scorecard warns, so nothing is concluded from it.
    assert "Is the person still there after the merge? Cannot be told: the scores mean no" in text
    assert page.index('id="verdict"') < page.index('id="pictures"') < page.index('id="table"')


def test_alarms_and_warnings_are_told_once(page: str):
    text = visible(section(page, "verdict"))
    assert text.count("Without prior: The score lies above the photos' own ceiling.") == 1
    assert text.count("Only 4 pictures were scored: a smoke test.") == 1
    assert "Photo 2 is not sharp." in text
    assert "No alarm" not in text


def test_the_table_of_schedulers_and_steps(demo: Path, page: str):
    cards = json.loads((demo / "scores.json").read_text())
    text = visible(section(page, "table"))
    assert "DDIM 50" in text
    assert "PNDM 80" in text
    for name in ("table_without_prior", "table_with_prior"):
        for group in cards[name]["by_cell"]:
            for measure in ("identity", "clip_i", "clip_t"):
                one = group["scores"][measure]
                low, high = one["interval"]
                assert f"{one['value']:.3f} {low:.3f} to {high:.3f} n = {one['n']}" in text
    shown = re.findall(r'class="map">.*?<h3>(.*?)</h3>', page, re.DOTALL)
    assert shown == ["Identity", "CLIP-I", "CLIP-T"]


def cells(*scored: tuple[str, int, float | None, float]) -> Scorecard:
    groups = []
    for scheduler, steps, value, half in scored:
        one = None
        if value is not None:
            one = Score(value=value, n=8, interval=(value - half, value + half), key=KEY)
        groups.append(
            Group(
                scheduler=scheduler,
                steps=steps or None,
                pictures=8,
                scores={"identity": one} if one else {},
            )
        )
    return Scorecard(
        scores={},
        by_cell=tuple(groups),
        encoders="picturebook",
        photos=6,
        confidence=0.95,
        resamples=100,
        pictures=(),
    )


def test_cells_like_the_best_are_marked():
    (heat,) = heat_maps(
        {
            "table_with_prior": cells(("ddim", 50, 0.7, 0.02), ("pndm", 50, 0.4, 0.02)),
            "table_without_prior": cells(("ddim", 50, 0.69, 0.02), ("pndm", 0, None, 0.0)),
            "table_base": cells(("ddim", 50, 0.9, 0.02)),
        }
    )
    assert heat.columns == ["without prior", "with prior"]
    assert [name for name, _ in heat.rows] == ["DDIM 50", "PNDM 0", "PNDM 50"]
    assert [c.mark for _, cells in heat.rows for c in cells] == ["like-best", "best"] + [""] * 4
    assert heat.told == "1 of 2 other cells cannot be told apart from the best."
    shades = [c.shade for _, cells in heat.rows for c in cells if c.score.measured]
    assert max(shades) == pytest.approx(1.0)
    assert min(shades) == pytest.approx(0.0)


def test_differences_within_the_intervals_look_small():
    (heat,) = heat_maps({"drawn": cells(("ddim", 50, 0.70, 0.2), ("ddim", 80, 0.71, 0.2))})
    shades = [c.shade for _, cells in heat.rows for c in cells]
    assert abs(shades[0] - shades[1]) < 0.05
    assert heat.told == "No cell can be told apart from the best: the table chooses none."


def test_losses_of_each_training_are_drawn(page: str):
    training = section(page, "training")
    assert re.findall(r"<h3>(.*?)</h3>", training) == ["without prior", "with prior", "style"]
    assert training.count('class="raw subject"') == 3
    assert training.count('class="raw total"') == 1
    assert training.count('class="raw prior"') == 1
    assert "120 updates" in visible(training)


def test_how_it_was_made(page: str):
    text = visible(page)
    assert "Parts 1.0 × subject.st + 0.8 × style.st" in text
    assert "Ranks 16, 32" in text
    assert "train, with prior 1 min 01 s" in text
    assert "generate, 9 sets 1 min 12 s" in text
    assert "Peak memory: 0.50 GiB" in text
    assert "dreamloom demo --preset quick" in text
    assert 'phrase = "rraj person"' in text
    assert "torch 2.13.0" in text
    assert f"The last stage finished at {FINISHED}." in text


def test_limits_are_told(page: str):
    text = visible(section(page, "limits"))
    assert "toy world" in text
    assert "rests on 4 to 24 pictures" in text
    assert "trained once" in text


def test_the_same_folder_gives_the_same_page(demo: Path, page: str):
    assert write_report(demo).read_text() == page


def test_observers_hear_of_it(demo: Path):
    heard: list[object] = []
    path = write_report(demo, heard.append)
    assert path == demo / "report.html"
    assert [type(event) for event in heard] == [StageStarted, StageDone]
    assert not list(demo.glob(".writing-*"))


def test_a_single_run(tmp_path: Path):
    html = write_report(build_run(tmp_path / "run")).read_text()
    text = visible(html)
    assert "Is it the person?" in text
    assert "What did prior preservation change" not in text
    assert len(pictures_in(html)) == 6 + 2 * 2 * 4 + FAILURES
    assert "40 updates" in text
    command = visible(section(html, "making"))
    assert "dreamloom train PHOTOS --base picturebook --subject 'rraj person'" in command
    assert "--set train.rank=32" in command
    assert 'id="merge"' not in html
    assert 'id="table"' not in html


def test_an_empty_run_says_what_was_not_measured(tmp_path: Path):
    RunFolder(tmp_path).records.mkdir()
    text = visible(write_report(tmp_path).read_text())
    assert text.count("Not measured") == 3
    assert "No pictures have been drawn" in text
    assert "holds neither photos nor class images" in text
    assert "No loss was logged" in text
    assert "Peak memory was not measured." in text
    assert "Nothing was scored here" in text


PARTS = {
    "summary": ["summary.json"],
    "records": ["scores.json", "events.jsonl", "records/merge.json", "with_prior/events.jsonl"],
    "pictures": ["photos/manifest.json", "images/base/manifest.json", "images/merged/0000.png"],
    "runs": ["loom.toml", "priors/manifest.json", "with_prior/loom.toml"],
}
PARTS["all"] = [file for files in PARTS.values() for file in files]


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo(tmp_path_factory.mktemp("small") / "demo", seeds=1)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("harm", ["missing", "cut off", "of another kind"])
def test_missing_and_damaged_parts_do_not_stop_it(small_demo: Path, part: str, harm: str):
    whole = {small_demo / name: (small_demo / name).read_bytes() for name in PARTS[part]}
    for path, content in whole.items():
        path.write_bytes(content[: len(content) // 2] if harm == "cut off" else b"[1, null]")
        if harm == "missing":
            path.unlink()
    text = visible(write_report(small_demo).read_text())
    for path, content in whole.items():
        path.write_bytes(content)
    assert "What this page cannot tell you" in text
    if part in ("records", "all"):
        assert "How the merge was made is not recorded" in text
        told = "Is the person still there after the merge? Measured; whether it differs"
        assert told in text or part == "all"
        assert ("scores.json cannot be read" in text) == (harm != "missing")
    if part in ("pictures", "all"):
        assert "Training pictures: style" in text
        assert ("The list of pictures in demo/photos is damaged" in text) == (harm != "missing")
    if part == "pictures":
        assert "0000.png is missing" in text


def test_prompts_cannot_write_into_the_page(tmp_path: Path):
    nasty = "<script>alert('x')</script>\"><img src=x>"
    run = Folder(tmp_path)
    run.record("train")
    images = run.pictures("drawn", [(nasty, "<b>bold</b>")])
    run.scores({"drawn": scorecard(images, 0.5, alarms=(nasty,))})
    run.run.observer()(Note("train", nasty + "!", warning=True))
    html = write_report(tmp_path).read_text()
    assert "<script>alert" not in html
    assert "<img src=x>" not in html
    assert "<b>bold" not in html
    assert html.count("<script>") == 1
    assert nasty in visible_text_of_headings(html)


def test_side_effects_faults_and_what_a_merge_kept_are_told(tmp_path: Path):
    run = Folder(tmp_path)
    run.record("merge", results={"layers": 3})
    kept = {"value": 0.81, "n": 8, "interval": [0.7, 0.9]}
    none = {"value": None, "note": "not measured: no style here"}
    results = {"identity": kept, "style": none, "both": 0.5, "style_reference": "6 pictures"}
    run.record("retention-merged", results=results)
    images = run.pictures("merged", [("a photo", "photo")])
    flags = Flags(
        label="teeth",
        n=4,
        judged=0,
        abstained={"art": 4},
        flagged=(),
        rate=None,
        interval=None,
        told="experimental; none judged",
    )
    card = scorecard(images, 0.5, findings=("Leakage found: much of it.",), flags={"teeth": flags})
    run.scores({"merged": card})
    html = write_report(tmp_path).read_text()
    assert "Merge: Leakage found: much of it." in visible(section(html, "verdict"))
    assert "Merge: teeth experimental; none judged" in visible(section(html, "scores"))
    merge = visible(section(html, "merge"))
    assert "Subject kept 0.810 (0.700 to 0.900, n = 8): 0 as the base model" in merge
    assert "Style kept not measured: no style here" in merge
    assert "Both together 0.500" in merge


def visible_text_of_headings(html: str) -> list[str]:
    return [unescape(text) for text in re.findall(r"<h4>(.*?)</h4>", html)]


@pytest.mark.parametrize("name", ["nowhere", "file", "other"])
def test_a_folder_of_another_kind_is_refused(tmp_path: Path, name: str):
    (tmp_path / "file").write_text("text")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("text")
    with pytest.raises(RunFolderError, match=name):
        write_report(tmp_path / name)
    assert not (tmp_path / name / "report.html").exists()


def test_pictures_lose_their_metadata_and_stand_upright(tmp_path: Path):
    image = Image.new("RGB", (60, 40), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8825)[1] = "N"
    image.save(tmp_path / "photo.jpg", exif=exif)
    source, size = embed(tmp_path / "photo.jpg")
    again = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert size == again.size == (40, 60)
    assert not again.getexif()


def test_large_pictures_are_made_smaller(tmp_path: Path):
    Image.new("RGB", (1024, 512), "red").save(tmp_path / "large.png")
    assert embed(tmp_path / "large.png")[1] == (320, 160)
    assert embed(tmp_path / "none.png") == ("", (0, 0))


def test_sets_that_share_no_prompt_are_not_laid_side_by_side(tmp_path: Path):
    folder = Folder(tmp_path)
    sets = {
        "a": folder.pictures("a", PROMPTS[:1]),
        "b": folder.pictures("b", PROMPTS[2:3]),
        "c": folder.pictures("c", PROMPTS[:2]),
    }
    assert [list(group) for group in split_by_prompts(sets)] == [["b"], ["a", "c"]]


def scored(value: float, half: float, n: int = 24, **fields: object) -> Score:
    return Score(value=value, n=n, interval=(value - half, value + half), key=KEY, **fields)


def compared(outcome: str) -> Comparison:
    return Comparison(
        measure="identity", outcome=outcome, difference=0.1, p_corrected=0.03, pairs=24, prompts=6
    )


@pytest.mark.parametrize(
    ("outcome", "answer", "tone"),
    [
        ("better", "Yes, more than the base model’s", "good"),
        ("worse", "Less than the base model’s", "bad"),
        ("no difference detected", "No difference from the base model detected", "same"),
        ("too few images", "Cannot be told from so few prompts", "unknown"),
        (
            "not measured",
            "Measured; whether it differs from the base model cannot be told",
            "unknown",
        ),
    ],
)
def test_likeness_is_what_the_comparison_with_the_base_model_says(
    outcome: str, answer: str, tone: str
):
    one = scored(0.5, 0.02, floor=0.4)
    verdict = judge_likeness("?", [("it", "with", one)], compared(outcome))
    assert (verdict.answer, verdict.tone) == (answer, tone)
    assert verdict.sentences[-1] == (
        "Compared with the base model picture by picture: +0.100, p = 0.030, 24 pairs of 6 prompts."
    )


def test_a_score_far_above_its_floor_says_nothing_without_the_base_models_pictures():
    far = scored(0.7, 0.01, floor=0.2, ceiling=0.8, lift=0.8, lift_interval=(0.7, 0.9))
    verdict = judge_likeness("?", [("it", "with", far)], None)
    assert verdict.answer == "Measured; whether it differs from the base model cannot be told"
    assert verdict.tone == "unknown"
    assert verdict.sentences[-1].startswith("To compare it with the base model takes scores of bo")


def test_who_is_no_nearer_than_impostors_is_not_the_subject():
    # The lift is paired with its floor, which may be strangers; so its own interval decides.
    one = scored(0.41, 0.02, floor=0.4, ceiling=0.8, lift=0.03, lift_interval=(-0.1, 0.2))
    verdict = judge_likeness("?", [("it", "with", one)], compared("better"))
    assert verdict.answer == "No difference from the base model detected"
    assert verdict.tone == "same"
    above = one.model_copy(update={"lift_interval": (0.01, 0.2)})
    assert judge_likeness("?", [("it", "with", above)], compared("better")).tone == "good"


def test_likeness_in_words():
    better = compared("better")
    near = judge_likeness(
        "?", [("it", "with", scored(0.75, 0.02, floor=0.2, ceiling=0.78))], better
    )
    assert near.answer == "Yes, as alike as the photos are to each other"
    # The interval reaches the ceiling, but begins far below it: few pictures prove no equality.
    wide = scored(0.75, 0.3, floor=0.2, ceiling=0.78, lift=0.95, lift_interval=(0.4, 1.4))
    assert judge_likeness("?", [("it", "with", wide)], better).answer.startswith("95% of the way")
    half = scored(0.5, 0.05, floor=0.2, ceiling=0.8, lift=0.5)
    assert judge_likeness("?", [("it", "with", half)], better).answer.startswith("50% of the way")
    absent = Score(note="The encoder is not here.")
    verdict = judge_likeness("?", [("it", "with", absent)], None)
    assert verdict.answer == "Not measured"
    assert verdict.sentences == ("The encoder is not here.",)


def test_following_is_judged_against_the_base_model():
    own, base = ("it", "with", scored(0.2, 0.01)), scored(0.3, 0.01)
    worse = judge_following("?", [own], compared("worse"), base)
    assert (worse.answer, worse.tone) == ("Worse than the base model", "bad")
    assert [label for label, _, _ in worse.bars] == ["base model", "it"]
    # That intervals lie apart tells nothing of the same prompts and seeds.
    alone = judge_following("?", [own], None, base)
    assert alone.answer == "Measured; whether it differs from the base model cannot be told"
    assert alone.tone == "unknown"


def change(label: str, outcome: str) -> Change:
    return Change(label, outcome, scored(0.5, 0.02), scored(0.7, 0.02), "+0.200")


@pytest.mark.parametrize(
    ("outcomes", "answer", "tone"),
    [
        (["better", "no difference detected", "higher"], "Better in A; higher in C", "good"),
        (["better", "better", "too few images"], "Better in A and B", "good"),
        (["worse", "higher"], "Worse in A; higher in B", "bad"),
        (["better", "worse"], "Better in A; worse in B", "same"),
        # More variety may be noise: it is neither good nor bad.
        (["lower", "too few images"], "Lower in A", "same"),
        (["no difference detected", "too few images"], "No difference detected", "same"),
        (["too few images", "not measured"], "Too few images to say", "unknown"),
        (["not measured"], "Not measured", "unknown"),
        ([], "Not measured", "unknown"),
    ],
)
def test_a_change_is_told_score_by_score(outcomes: list[str], answer: str, tone: str):
    changes = [change("ABC"[place], outcome) for place, outcome in enumerate(outcomes)]
    verdict = judge_change("?", changes, words=("without", "with"), caution="Mind.")
    assert (verdict.answer, verdict.tone) == (answer, tone)
    if answer != "Not measured":
        assert list(verdict.changes) == changes
        assert verdict.sentences == ("Mind.",)


def test_the_change_by_class_images_is_tested_pair_by_pair(tmp_path: Path):
    demo = Folder(tmp_path)
    prompts = [(f"a photo of rraj person, {number}", "photo") for number in range(10)]
    cards = {
        name: scorecard(demo.pictures(name, prompts), level)
        for name, level in (("without_prior", 0.7), ("with_prior", 0.74))
    }
    demo.scores(cards)
    write_json(tmp_path / "summary.json", {"kind": "demo"})
    text = visible(section(write_report(tmp_path).read_text(encoding="utf-8"), "verdict"))
    # The two intervals, 0.56 ± 0.03 and 0.58 ± 0.03, overlap; the pairs all differ by 0.02.
    assert (
        # Of all scores, identity and prompt following are asked about; p is corrected for two.
        "What did prior preservation change? Better in Identity" in text
    )
    assert "CLIP-I" not in text
    assert "better +0.020 (+0.020 to +0.020), p = 0.004, 40 pairs of 10 prompts" in text
    assert "dreamloom compare RUN:without_prior RUN:with_prior --score identity" in text
    cards["with_prior"] = cards["with_prior"].model_copy(update={"scores": {}})
    demo.scores(cards)
    text = visible(section(write_report(tmp_path).read_text(encoding="utf-8"), "verdict"))
    assert "What did prior preservation change? Not measured" in text


def test_the_best_and_what_is_like_it():
    scores = [scored(0.5, 0.1), Score(), scored(0.7, 0.15), scored(0.2, 0.1)]
    assert indistinct_from_best(scores) == (2, [True, False, False, False])
    assert indistinct_from_best([Score()]) == (None, [False])


@pytest.mark.parametrize("data", [{"value": None}, {"value": "nan"}, {"value": 1, "of": "else"}])
def test_what_is_no_score_in_the_summary_is_not_measured(tmp_path: Path, data: object):
    write_json(tmp_path / "summary.json", {"with_prior": {"identity": data, "clip_t": 0.5}})
    story = read_story(tmp_path)
    assert story.summary_scores() == {"with_prior": {"identity": Score()}}
    assert tell(Score()) == "not measured"
    assert tell(Score(value=1.0, n=3)) == "1.000 (n = 3)"


def test_scores_that_cannot_be_read_are_named_and_the_rest_is_shown(tmp_path: Path):
    run = Folder(tmp_path)
    run.record("train")
    images = run.pictures("drawn", PROMPTS[:2])
    write_json(run.run.scores, {"drawn": scorecard(images, 0.5), "other": {"scores": 3}})
    story = read_story(tmp_path)
    assert list(story.cards) == ["drawn"]
    assert story.damage == ["The scores of other are not as this version writes them."]


def test_bars_keep_scores_above_the_ceiling_visible():
    svg = score_bars([Bar("a <b>", 0.9, (0.8, 1.0)), Bar("c", 0.3)], 0.2, 0.6)
    assert "a &lt;b&gt;" in svg
    assert "floor 0.200" in svg
    assert "ceiling 0.600" in svg
    places = [float(x) for x in re.findall(r'cx="([\d.]+)"', svg)]
    assert places[1] < places[0] < 360
    with pytest.raises(ValueError, match="at least one"):
        score_bars([])


def test_a_chart_of_losses():
    svg = loss_chart([1, 2, 3], {"total": [0.3, None, 0.1], "prior": [None, None, None]})
    assert 'class="raw total"' in svg
    assert "raw prior" not in svg
    with pytest.raises(ValueError, match="as many values"):
        loss_chart([1, 2], {"total": [0.1]})


def test_the_moving_mean_keeps_a_constant_and_the_length():
    assert smooth([2.0] * 9, 5) == [2.0] * 9
    assert smooth([1.0], 7) == [1.0]


def test_thinning_keeps_peaks():
    points = [(float(i), 9.0 if i == 1234 else 0.5) for i in range(5000)]
    kept = thin(points, 400)
    assert len(kept) <= 400
    assert (1234.0, 9.0) in kept
    assert kept == sorted(kept)


def test_ticks_are_round():
    assert ticks(0.0, 0.37) == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert ticks(1.0, 120.0)[-1] >= 120


def test_seconds_in_words():
    assert [tell_seconds(s) for s in (0.42, 48.0, 125.2, 4200.0)] == [
        "0.4 s",
        "48 s",
        "2 min 05 s",
        "1 h 10 min",
    ]


def test_events_hold_what_the_page_reads():
    assert set(asdict(LossLogged(1, 1.0, 1.0, None, 0.1))) >= {
        "update",
        "total",
        "subject",
        "prior",
    }
