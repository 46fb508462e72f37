"""What a merge keeps of its parts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreamloom.core.config.loading import load_config
from dreamloom.core.errors import EvaluationError
from dreamloom.core.manifests import ImageSet, Photo, PhotoSet, Picture, write_manifest
from dreamloom.core.run_folder import RunFolder
from dreamloom.evaluation.encoders.base import Encoders
from dreamloom.evaluation.encoders.store import Missing
from dreamloom.evaluation.metrics.scorecard import Score
from dreamloom.evaluation.retention import (
    MergeSets,
    Retention,
    evaluate_merge,
    measure_retention,
)
from dreamloom.evaluation.scoring import EvaluationOptions
from dreamloom.evaluation.stats import intervals
from dreamloom.evaluation.stats.means import harmonic_mean
from dreamloom.pipeline.score_merge import score_merge


def features(*, towards: torch.Tensor, share: float, n: int = 12) -> torch.Tensor:
    """Vectors whose similarity to a reference is near a share, each a little different."""
    rng = torch.Generator().manual_seed(round(1000 * share))
    shares = share + 0.02 * torch.randn(n, 1, generator=rng)
    across = torch.nn.functional.normalize(torch.randn(n, 8, generator=rng), dim=1)
    across = across - (across @ towards)[:, None] * towards
    across = torch.nn.functional.normalize(across, dim=1)
    return shares * towards + (1 - shares.square()).clamp(min=0).sqrt() * across


TOWARDS = torch.nn.functional.normalize(torch.ones(8), dim=0)
REFERENCES = TOWARDS.repeat(6, 1)


def retain(merged: float, none: float, full: float) -> Score:
    return measure_retention(
        merged=features(towards=TOWARDS, share=merged),
        none=features(towards=TOWARDS, share=none),
        full=features(towards=TOWARDS, share=full),
        references=REFERENCES,
        draws=intervals.draw(["a", "b", "c", "d"] * 3, 6, resamples=500),
        key="test",
    )


def test_retention_is_the_share_of_the_way():
    found = retain(0.5, 0.2, 0.8)
    assert found.value == pytest.approx(0.5, abs=0.05)
    assert found.interval[0] < found.value < found.interval[1]
    assert (found.n, found.key) == (12, "test")
    assert retain(0.2, 0.2, 0.8).value == pytest.approx(0)
    assert retain(0.8, 0.2, 0.8).value == pytest.approx(1)
    assert retain(0.1, 0.2, 0.8).value < 0


def test_where_the_part_changes_nothing_retention_means_nothing():
    found = retain(0.5, 0.3, 0.3)
    assert found.value is None
    assert "does not differ clearly" in found.note


def test_a_reference_earns_nothing_by_being_the_same_picture():
    """The part alone drew the references: against itself it must not be as like as can be."""
    full, none = (features(towards=TOWARDS, share=share) for share in (0.5, 0.1))
    prompts = ["a", "b", "c", "d"] * 3
    comparable = torch.tensor([[one != other for other in prompts] for one in prompts])
    found = measure_retention(
        merged=features(towards=TOWARDS, share=0.501),
        none=none,
        full=full,
        references=full,
        draws=intervals.draw(prompts, resamples=500),
        key="test",
        comparable=comparable,
    )
    assert found.value == pytest.approx(1, abs=0.1)
    with_itself = measure_retention(
        merged=features(towards=TOWARDS, share=0.501),
        none=none,
        full=full,
        references=full,
        draws=intervals.draw(prompts, len(full), resamples=500),
        key="test",
    )
    assert with_itself.value < found.value - 0.1


def test_neither_makes_up_for_the_other():
    assert harmonic_mean([1.0, 1.0]) == 1
    assert harmonic_mean([0.0, 1.0]) == harmonic_mean([0.0, 0.0]) == 0
    assert harmonic_mean([-3.0, 1.0]) == 0
    assert harmonic_mean([9.0, 0.5]) == pytest.approx(2 / 3)
    assert harmonic_mean([0.3]) == 0.3
    assert harmonic_mean([0.2, 0.5, 0.9]) == pytest.approx(3 / (1 / 0.2 + 1 / 0.5 + 1 / 0.9))


class Colours:
    """Sees a picture's mean colour: TEST."""

    key = "colours@TEST"

    def embed(self, images):
        rows = torch.tensor([image.resize((1, 1)).getpixel((0, 0)) for image in images])
        return torch.nn.functional.normalize(rows.float(), dim=1)


def draw_set(folder: Path, reds: dict[int, int]) -> ImageSet:
    """One picture for each seed, as red as is said."""
    folder.mkdir()
    pictures = []
    for seed, red in reds.items():
        Image.new("RGB", (8, 8), (red, 90, 60 + 5 * seed)).save(folder / f"{seed}.png")
        pictures.append(
            Picture(
                file=f"{seed}.png", prompt="a", seed=seed, scheduler="ddim", steps=1, guidance=1
            )
        )
    return ImageSet(folder=folder, base={}, resolution_px=8, pictures=tuple(pictures))


def test_only_what_all_have_drawn_is_compared(tmp_path):
    absent = Missing("it is not here")
    encoders = Encoders("standard", identity=Colours(), clip=absent, dino=absent)
    seeds = (range(9), reversed(range(1, 9)), range(1, 12), (20, *range(1, 9)))
    sets = [
        draw_set(tmp_path / str(place), {seed: red + seed for seed in own})
        for place, (red, own) in enumerate(zip((30, 200, 30, 120), seeds, strict=True))
    ]
    photo = Photo(file="1.png", source="", source_sha256="", original_px=(8, 8), scaled_px=(8, 8))
    photos = PhotoSet(folder=sets[1].folder, resolution_px=8, photos=(photo,) * 3)
    options = EvaluationOptions(resamples=100)
    kept = evaluate_merge(MergeSets(*sets), photos, None, encoders, options)
    assert kept.identity.n == 8
    assert 0 < kept.identity.value < 1
    # The same pictures in another order: what belongs together is found by prompt and seed.
    turned = [one.model_copy(update={"pictures": one.pictures[::-1]}) for one in sets]
    again = evaluate_merge(MergeSets(*turned), photos, None, encoders, options)
    assert again.identity.value == pytest.approx(kept.identity.value)
    assert (kept.style.value, kept.both) == (None, None)
    sets[3] = sets[3].model_copy(update={"pictures": sets[3].pictures[:1]})
    with pytest.raises(EvaluationError, match="no picture of the same prompt"):
        evaluate_merge(MergeSets(*sets), photos, None, encoders, options)


def test_what_a_merge_in_a_run_kept_stays_in_the_run_for_its_report(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    run.records.mkdir(parents=True)
    rng = np.random.default_rng(0)
    folders = {}
    for name in ("base", "subject", "style", "merged"):
        folder = run.images / name
        folder.mkdir(parents=True)
        pictures = []
        for seed in range(8):
            pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).resize((128, 128)).save(folder / f"{seed}.png")
            one = Picture(
                file=f"{seed}.png",
                prompt="a photo",
                seed=seed,
                scheduler="ddim",
                steps=5,
                guidance=4,
            )
            pictures.append(one)
        write_manifest(
            ImageSet(
                folder=folder,
                base={"name": "picturebook"},
                resolution_px=128,
                pictures=tuple(pictures),
            )
        )
        folders[name] = folder
    photos = Path(__file__).parents[1] / "examples" / "rraj"
    config = load_config("quick", overrides={"evaluate.resamples": 100})
    found = score_merge(folders, photos, None, config)
    record = run.read_record("retention-merged")
    assert record is not None
    assert Retention.model_validate(record.results) == found
    # Elsewhere nothing is left behind.
    loose = tmp_path / "loose"
    loose.mkdir()
    for name, folder in folders.items():
        folders[name] = folder.rename(loose / name)
    score_merge(folders, photos, None, config)
    assert sorted(path.name for path in loose.iterdir()) == sorted(folders)
