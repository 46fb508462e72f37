"""The audit: each switch is the fault that it is named after, and nothing else."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from dreamloom.core.errors import EvaluationError
from dreamloom.evaluation.encoders.clip import ClipEncoder
from dreamloom.evaluation.encoders.preprocessing import CLIP_PREPROCESSING, Preprocessing
from dreamloom.evaluation.encoders.store import Missing
from dreamloom.experiments.seed_audit import (
    EVERY_FAULT,
    FAULT_WORDS,
    AuditedImage,
    Faults,
    Wording,
    audit_faults,
    bare_clip,
    count_rows,
    draw_mosaics,
    prepare_pixels,
    score_with_faults,
)
from dreamloom.picturebook import judges
from dreamloom.picturebook.world import sample_drawing
from tools.picturebook.drawing import draw

SMALL = Preprocessing(32, 24, (0.5, 0.4, 0.3), (0.25, 0.3, 0.35))
NAMES = [switch.name for switch in fields(Faults)]
TARGET = "A photo of a rraj person"
SIDEWAYS = 6  # EXIF: the file must be turned by 90 degrees


def noise(width=90, height=60, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def clip():
    return ClipEncoder(judges.clip_folder(), judges.clip_key())


def paint(folder, name, seeds, orientation=None, size_px=128, who=None):
    found = []
    for seed in seeds:
        path = folder / f"{name}{seed}.png"
        exif = Image.Exif()
        if orientation:
            exif[0x0112] = orientation
        drawing = sample_drawing(9_100_000 + seed, kind="person")
        drawing = replace(drawing, identity=who, name="") if who else drawing
        draw(drawing, size_px).save(path, exif=exif)
        found.append(path)
    return found


def prepared(paths, folder):
    """Copies of photos as an evaluation prepares them: upright and of the pictures' size."""
    sources = []
    for path in paths:
        with Image.open(path) as file:
            turned = file.convert("RGB")
            if file.getexif().get(0x0112) == SIDEWAYS:
                turned = turned.transpose(Image.Transpose.ROTATE_270)
        turned.resize((128, 128), Image.Resampling.LANCZOS).save(folder / f"copy-{path.name}")
        sources.append(AuditedImage(path, folder / f"copy-{path.name}"))
    return sources


@pytest.fixture(scope="module")
def scene(tmp_path_factory, clip):
    """Four pictures of two prompts; three photos of somebody, one of them stored on its side."""
    who = sample_drawing(9_100_100, kind="person").identity
    folder = tmp_path_factory.mktemp("scene")
    pictures = [AuditedImage(path, path) for path in paint(folder, "drawn", range(4))]
    photos = [
        *paint(folder, "photo", (10, 11), size_px=200, who=who),
        *paint(folder, "side", (12,), SIDEWAYS, size_px=200, who=who),
    ]
    prompts = ("a photo of rraj person",) * 3 + ("a photo of rraj person in the snow",)
    wording = Wording(
        TARGET,
        "A photo of a person",
        prompts,
        tuple(prompt.replace("rraj ", "") for prompt in prompts),
        (0, 1, 2, 0),
    )
    return pictures, prepared(photos, folder), wording


@pytest.fixture(scope="module")
def audit(scene, clip):
    return audit_faults(*scene[:2], clip, scene[2])


@pytest.mark.parametrize("preprocessing", [SMALL, CLIP_PREPROCESSING], ids=["small", "clip"])
@pytest.mark.parametrize("jagged", [False, True])
def test_the_scale_fault_is_the_affine_image_of_what_is_right(preprocessing, jagged):
    right = prepare_pixels(noise(), Faults(jagged=jagged), preprocessing).double()
    wrong = prepare_pixels(noise(), Faults(bright=True, jagged=jagged), preprocessing).double()
    mean = torch.tensor(preprocessing.mean).double()[:, None, None]
    deviation = torch.tensor(preprocessing.deviation).double()[:, None, None]
    expected = 127.5 * right + (126.5 * mean + 0.5) / deviation
    torch.testing.assert_close(wrong, expected, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize(
    ("level", "values"),
    [(0, (0.07, 0.16, 0.33)), (128, (238.0, 245.0, 232.0)), (255, (475.0, 488.0, 463.0))],
)
def test_a_plain_picture_reaches_clip_at_the_published_scale_or_far_above(level, values):
    plain = Image.new("RGB", (300, 300), (level, level, level))
    wrong = prepare_pixels(plain, EVERY_FAULT, CLIP_PREPROCESSING)
    assert wrong.shape == (3, 224, 224)
    expected = torch.tensor(values)[:, None, None].expand_as(wrong)
    torch.testing.assert_close(wrong, expected, rtol=2e-3, atol=5e-3)
    assert prepare_pixels(plain, Faults(), CLIP_PREPROCESSING).abs().max() < 2.2


def test_without_faults_pixels_are_those_of_the_preprocessing():
    square = noise(60, 60)
    right = prepare_pixels(square, Faults(), SMALL)
    torch.testing.assert_close(right, SMALL([square])[0], rtol=0, atol=1e-6)


def test_switches_that_do_not_concern_pixels_leave_them():
    others = {name: True for name in NAMES if name not in ("bright", "squashed", "jagged")}
    right = prepare_pixels(noise(), Faults(), SMALL)
    assert torch.equal(prepare_pixels(noise(), Faults(**others), SMALL), right)
    for name in ("bright", "squashed", "jagged"):
        assert not torch.equal(prepare_pixels(noise(), Faults(**{name: True}), SMALL), right)


def test_squashing_changes_proportions_and_the_other_resize_does_not():
    # A disc in a wide picture stays a disc unless the picture is squashed.
    wide = Image.new("RGB", (400, 200), "black")
    wide.paste("white", (150, 50, 250, 150))
    for faults, width_of_height in ((Faults(), 1.0), (Faults(jagged=True), 1.0)):
        bright = prepare_pixels(wide, faults, SMALL)[0] > 0.5
        assert bright.any(0).sum() == pytest.approx(width_of_height * bright.any(1).sum(), abs=1)
    squashed = prepare_pixels(wide, Faults(squashed=True), SMALL)[0] > 0.5
    assert squashed.any(0).sum() == pytest.approx(0.5 * squashed.any(1).sum(), abs=1)


def test_shrinking_without_antialias_keeps_the_noise_that_smoothing_averages():
    fine = noise(512, 512)
    smooth, jagged = (
        prepare_pixels(fine, Faults(jagged=jagged), SMALL) for jagged in (False, True)
    )
    # Each value stands for 16 × 16 pixels; only four by four of them are looked at.
    assert jagged[0].std() > 5 * smooth[0].std()
    assert jagged[0].mean() == pytest.approx(float(smooth[0].mean()), abs=0.1)


def test_every_fault_is_mended_in_turn_and_tried_alone(audit, scene):
    assert [row.fault for row in audit.rows] == ["", *NAMES]
    assert [row.fault for row in audit.alone] == NAMES == list(FAULT_WORDS)
    assert count_rows(scene[2]) == len(audit.rows) + len(audit.alone)
    assert (audit.pictures, audit.photos, audit.faulty_text) == (4, 3, TARGET)
    assert audit.right_texts == ("a photo of person", "a photo of person in the snow")
    assert audit.warning is None


ALL_SCORES = {"clip_i", "clip_t", "photos", "mosaics"}
OF_PHOTOS = {"clip_i", "photos", "mosaics"}
CHANGES = {
    "half": ALL_SCORES,
    "bright": ALL_SCORES,
    "sideways": OF_PHOTOS,
    "squashed": ALL_SCORES,
    # Pictures of the encoder's own size are not resized.
    "jagged": OF_PHOTOS,
    "full_size": OF_PHOTOS,
    "swapped": {"clip_t"},
    "named": {"clip_t"},
    # Prompts no longer count alike.
    "one_text": {"clip_i", "clip_t"},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_switch_changes_what_it_should_and_nothing_else(name, scene, clip):
    # Copies of the pictures' size are not resized either, so the resize is tried without them.
    right = Faults(full_size=name == "jagged")
    before, after = (
        score_with_faults(*scene[:2], clip, scene[2], faults)
        for faults in (right, replace(right, **{name: True}))
    )
    changed = {one for one in ALL_SCORES if getattr(before, one) != getattr(after, one)}
    assert changed == CHANGES[name]


def test_faults_scores_are_as_if_computed_by_hand(scene, clip, audit):
    """All faults at once, written out plainly for one text: the slow reference."""
    pictures, photos, _ = scene

    def embed(paths):
        pixels = []
        for path in paths:
            array = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
            stack = torch.from_numpy(array).permute(2, 0, 1)[None]
            big = torch.nn.functional.interpolate(stack, (1024, 1024), mode="bilinear").round()
            small = torch.nn.functional.interpolate((big + 1) / 2, (128, 128), mode="bicubic")
            pixels.append((small[0] - 0.5) / 0.25)
        return clip.embed_pixels(torch.stack(pixels)).double()

    drawn, shown = (embed([one.original for one in some]) for some in (pictures, photos))
    text = clip.embed_texts([TARGET]).double()
    faulty = audit.rows[1].scores
    assert faulty.clip_i == pytest.approx(float((drawn @ shown.T).mean()), abs=1e-6)
    assert faulty.clip_t == pytest.approx(float((shown @ text.T).mean()), abs=1e-6)
    pairs = shown @ shown.T
    ceiling = (pairs.sum() - pairs.trace()) / 6
    assert faulty.photos == pytest.approx(float(ceiling), abs=1e-6)


def test_swapped_arguments_give_the_same_clip_t_for_different_folders(scene, clip, audit, tmp_path):
    _, photos, _ = scene
    others = [AuditedImage(path, path) for path in paint(tmp_path, "other", range(20, 22))]
    texts = ("a painting of rraj person",) * 2
    wording = Wording(TARGET, "A photo of a person", texts, texts, (0, 1))
    found = audit_faults(others, photos, clip, wording)
    for row in ("half", "bright", "sideways", "squashed", "jagged", "full_size"):
        ours, theirs = (
            next(one.scores for one in table.rows if one.fault == row) for table in (audit, found)
        )
        assert ours.clip_t == theirs.clip_t
        assert ours.clip_i != theirs.clip_i
    after = [
        next(one.scores.clip_t for one in table.rows if one.fault == "swapped")
        for table in (audit, found)
    ]
    assert after[0] != after[1]


def test_printed_figures_lie_on_the_grid_of_half_precision(audit):
    printed, exact = audit.rows[0].scores, audit.rows[1].scores
    for name in ("clip_i", "clip_t", "photos", "mosaics"):
        value = getattr(printed, name)
        assert value == float(torch.tensor(value, dtype=torch.float16))
        assert value == pytest.approx(getattr(exact, name), rel=5e-4)
    assert 0.5 < printed.clip_i < 1
    assert (printed.clip_i * 2048).is_integer()


def test_the_faults_push_impostors_towards_the_photos(audit):
    right, faulty = audit.rows[-1].scores, audit.rows[0].scores
    assert right.clip_i < right.photos
    assert faulty.clip_i - right.clip_i > 0.2
    assert faulty.photos - faulty.clip_i < right.photos - right.clip_i
    assert f"score {faulty.mosaics:.3f} with every fault and {right.mosaics:.3f}" in audit.verdict


def test_unknown_prompts_are_replaced_by_the_text_without_the_word(scene, clip):
    pictures, photos, _ = scene
    wording = Wording(TARGET, "A photo of a person", (), (), ())
    found = audit_faults(pictures[:1], photos[:1], clip, wording)
    assert "one_text" not in {row.fault for row in (*found.rows, *found.alone)}
    assert found.right_texts == ("A photo of a person",)
    assert found.rows[-1].scores.photos is None
    assert "no ceiling" in found.verdict


def test_a_floor_gets_its_column_and_strange_pictures_a_warning(scene, clip, audit):
    pictures, photos, _ = scene
    wording = Wording(TARGET, "A photo of a person", (), (), ())
    found = audit_faults(
        pictures[:1],
        photos[:2],
        clip,
        wording,
        floor=pictures[:1],
        familiar=lambda images: [len(images) == 2] * len(images),
    )
    assert not audit.has_floor
    assert found.has_floor
    assert found.rows[1].scores.floor == found.rows[1].scores.clip_i
    assert "the floor with every fault" in found.verdict
    assert "These pictures are outside picturebook's world" in str(found.warning)


def test_every_prompt_counts_alike_and_every_noise_of_it():
    prompts = ("a", "a", "a", "b")
    wording = Wording(TARGET, TARGET, prompts, prompts, (0, 0, 1, 0))
    assert wording.weights(Faults(), 4).tolist() == [0.125, 0.125, 0.25, 0.5]
    assert wording.weights(Faults(one_text=True), 4).tolist() == [0.25] * 4


def test_mosaics_are_the_same_every_time():
    first, again = draw_mosaics(64), draw_mosaics(64)
    assert [one.tobytes() for one in first] == [one.tobytes() for one in again]
    assert len({one.tobytes() for one in first}) == len(first)


def test_an_absent_clip_is_named_with_its_reason(clip):
    assert bare_clip(clip) is clip
    with pytest.raises(EvaluationError, match="needs CLIP: the weights of X are not here"):
        bare_clip(Missing("the weights of X are not here"))
