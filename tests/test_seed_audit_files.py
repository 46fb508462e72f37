"""Scoring as the seed's script did: the right end is what `dreamloom evaluate` says."""

import json
import random
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from dreamloom.cli.main import main
from dreamloom.core.config.loading import load_config
from dreamloom.core.errors import EvaluationError
from dreamloom.core.manifests import MANIFEST, ImageSet, Picture, write_manifest
from dreamloom.experiments.seed_audit import Audit
from dreamloom.experiments.seed_audit_files import score_as_seed
from dreamloom.picturebook.world import Drawing, sample_drawing, vary
from dreamloom.pipeline.score import score
from tools.picturebook.drawing import draw

SMALL = {"device": "cpu", "evaluate.resamples": 100}


def figure(seed: int, name: str) -> Drawing:
    rng = random.Random(name)
    who = sample_drawing(9_200_000 + seed, kind="person").identity
    return vary(who, rng, medium="photo", view="front", glasses="none", hat="none")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos as a phone writes them, one of them on its side."""
    folder = tmp_path_factory.mktemp("photos")
    for place in range(3):
        image = Image.new("RGB", (400, 300), "white")
        image.paste(draw(figure(0, f"photo {place}"), 300), (60 * place, 0))
        exif = Image.Exif()
        if place == 2:
            image = image.transpose(Image.Transpose.ROTATE_90)
            exif[0x0112] = 6
        image.save(folder / f"IMG_{place}.png", exif=exif)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two prompts, of which one has fewer, and one noise with two samplers."""
    folder = tmp_path_factory.mktemp("pictures")
    plan = [("a photo of rraj person", seed, 25) for seed in (1, 2, 3)]
    plan += [("a photo of rraj person", 3, 50), ("a painting of rraj person", 1, 25)]
    listed = []
    for place, (prompt, seed, steps) in enumerate(plan):
        draw(figure(place, "picture"), 128).save(folder / f"{place}.png")
        drawn = {"seed": seed, "scheduler": "ddim", "steps": steps, "guidance": 4.0}
        listed.append(Picture(file=f"{place}.png", prompt=prompt, **drawn))
    images = ImageSet(
        folder=folder,
        base={"name": "picturebook"},
        subject="rraj person",
        class_noun="person",
        resolution_px=128,
        pictures=tuple(listed),
    )
    write_manifest(images)
    return folder


@pytest.fixture(scope="module")
def audit(pictures: Path, photos: Path) -> Audit:
    return score_as_seed(pictures, photos, load_config(overrides=SMALL))


def test_the_right_end_is_what_evaluate_says(audit: Audit, pictures: Path, photos: Path) -> None:
    card = score(pictures, photos, load_config(overrides=SMALL))
    right = audit.rows[-1].scores
    assert right.clip_i == pytest.approx(card.scores["clip_i"].value, abs=1e-6)
    assert right.clip_t == pytest.approx(card.scores["clip_t"].value, abs=1e-6)
    assert right.photos == pytest.approx(card.ceilings["clip_i"].value, abs=1e-6)
    assert audit.key == card.scores["clip_i"].key
    faulty = audit.rows[0].scores
    assert abs(faulty.clip_i - right.clip_i) > 0.01
    assert abs(faulty.clip_t - right.clip_t) > 0.01


def test_the_target_text_is_the_scripts_unless_told(
    audit: Audit, pictures: Path, photos: Path
) -> None:
    assert audit.faulty_text == "A photo of a rraj person"
    assert audit.right_texts == ("a photo of person", "a painting of person")
    told = score_as_seed(pictures, photos, load_config(overrides=SMALL), "a dog at night")
    assert told.faulty_text == "a dog at night"
    assert told.rows[0].scores.clip_t != audit.rows[0].scores.clip_t
    assert told.rows[-1].scores == audit.rows[-1].scores


def test_an_empty_manifest_holds_nothing_to_score(
    pictures: Path, photos: Path, tmp_path: Path
) -> None:
    listed = json.loads((pictures / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**listed, "pictures": []}))
    with pytest.raises(EvaluationError, match="no picture to score"):
        score_as_seed(tmp_path, photos, load_config(overrides=SMALL))


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in ("--quiet", "evaluate", *words)])


def test_the_command_prints_the_table_and_writes_it(
    audit: Audit, pictures: Path, photos: Path, tmp_path: Path
) -> None:
    told = tmp_path / "audit.json"
    words = (pictures, "--photos", photos, "--as-seed", "--floor", pictures, "--device", "cpu")
    shown = run(*words, "--json", told)
    assert shown.exit_code == 0, shown.output
    found = Audit.model_validate(json.loads(told.read_text()))
    assert [row.says for row in found.rows] == [row.says for row in audit.rows]
    for row in (*found.rows, *found.alone):
        assert row.says in shown.output
    printed = found.rows[0].scores
    assert f"CLIP-I {printed.clip_i:.4f}" in shown.output
    assert "floor" in shown.output
    assert "floor" not in run(*words[:4], "--device", "cpu").output


def test_a_folder_without_a_manifest_is_audited_with_one_text(
    pictures: Path, photos: Path, tmp_path: Path
) -> None:
    for path in pictures.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert not (tmp_path / MANIFEST).exists()
    config = load_config(overrides={**SMALL, "evaluate.encoders": "picturebook"})
    found = score_as_seed(tmp_path, photos, config)
    assert found.rows[-1].fault == "named"
    assert found.right_texts == ("A photo of a person",)


def test_a_target_text_without_the_audit_is_refused(pictures: Path, photos: Path) -> None:
    refused = run(pictures, "--photos", photos, "--target-text", "a dog")
    assert refused.exit_code == 2
    assert "--as-seed" in refused.output
