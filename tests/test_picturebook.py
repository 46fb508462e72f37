"""The embedded base model: its data, its training steps, its weights and its judges."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionXLPipeline,
)
from PIL import Image
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

from dreamloom.picturebook import weights_folder
from dreamloom.picturebook.judges import (
    IdentityEncoder,
    clip_folder,
    clip_key,
    load_attribute_reader,
    load_identity_encoder,
    load_style_encoder,
)
from dreamloom.picturebook.world import (
    JUDGING_SEED_START,
    MEDIA,
    Medium,
    known_person,
    sample_drawing,
    vary,
)
from tools.picturebook.dataset import (
    DRAWINGS_PER_IDENTITY,
    PICTURE_PX,
    PLAIN,
    PictureStore,
    cut,
    draw_ahead,
    draw_framed,
    record,
)
from tools.picturebook.export import read_averages, unpack_weights
from tools.picturebook.measurements import (
    distinct_captions,
    draw_and_read,
    equal_error_rate,
    likeness_above,
    prompts_asking,
    share_at_least,
    to_unit,
)
from tools.picturebook.models import (
    LATENT_PX,
    build_autoencoder,
    build_noise_schedule,
    build_text_encoders,
    build_unet,
)
from tools.picturebook.pretrain_autoencoder import (
    encode_means,
    fold_latent_statistics,
    reconstruction_loss,
    train_autoencoder,
)
from tools.picturebook.pretrain_clip import contrastive_loss
from tools.picturebook.pretrain_denoiser import (
    encode_ahead,
    mix_portraits,
    snr_weights,
    train_denoiser,
)
from tools.picturebook.pretrain_judges import contrast_identities
from tools.picturebook.tokenizer import MAX_TOKENS
from tools.picturebook.training import AveragedWeights, Run, Schedule

SIZE_LIMIT_MIB = 60


# --- training pictures -------------------------------------------------------------------


def test_records_are_functions_of_their_index_and_of_training_seeds_only():
    assert record("pictures", 7) == record("pictures", 7) == sample_drawing(7)
    first, second = (record("people", DRAWINGS_PER_IDENTITY * 3 + i) for i in (0, 1))
    assert first.identity == second.identity
    assert first != second
    assert record("people", DRAWINGS_PER_IDENTITY * 4).identity != first.identity


def test_pixel_art_is_left_out_of_the_base_models_pictures():
    assert all(record("pictures", i).medium != "pixel art" for i in range(300))
    assert any(record("people", i).medium == "pixel art" for i in range(60))


def test_portraits_are_photos_each_of_another_person():
    drawn = [record("portraits", i) for i in range(40)]
    assert {one.medium for one in drawn} == {"photo"}
    assert {one.identity.kind for one in drawn} == {"person"}
    assert len({one.identity for one in drawn}) == 40


def test_framings_say_how_a_picture_was_cut():
    gradient = np.arange(200, dtype=np.uint8)[None, :, None].repeat(128, 0).repeat(3, 2)
    picture, framing = cut(Image.fromarray(gradient), random.Random(0))
    assert picture.size == (PICTURE_PX, PICTURE_PX)
    assert (framing.original_height, framing.original_width) == (128, 200)
    assert framing.crop_top == 0
    assert np.asarray(picture)[0, 0, 0] == framing.crop_left
    assert framing.time_ids() == (128, 200, 0, framing.crop_left, 128, 128)


def test_half_of_the_pictures_are_plain_squares():
    framings = [
        draw_framed(sample_drawing(i, medium="photo"), random.Random(i))[1] for i in range(60)
    ]
    plain = sum(framing == PLAIN for framing in framings)
    assert 20 <= plain <= 45
    assert any(framing.crop_left > 0 for framing in framings)
    assert any(framing.original_height < PICTURE_PX for framing in framings)


def test_drawing_ahead_continues_and_does_not_depend_on_processes(tmp_path: Path):
    seen: list[int] = []
    draw_ahead(tmp_path, "people", 130, 1, seen.append)
    assert seen == [128, 130]
    draw_ahead(tmp_path, "people", 130, 1, seen.append)
    assert seen == [128, 130]
    store = PictureStore(tmp_path, "people")
    assert len(store) == store.capacity == 130
    expected, framing = draw_framed(record("people", 129), random.Random("framing people 129"))
    assert np.array_equal(store.pixels(np.array([129]))[0].permute(1, 2, 0), np.asarray(expected))
    assert store.time_ids(np.array([129])).tolist() == [list(framing.time_ids())]
    with pytest.raises(ValueError, match="delete it to redraw"):
        draw_ahead(tmp_path, "people", 200, 1, seen.append)


# --- training steps ----------------------------------------------------------------------


def test_schedule_rises_holds_and_falls():
    schedule = Schedule(1.0, updates=100, warmup_updates=10, decay_share=0.2)
    rates = [schedule.rate(i) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert rates[80:] == sorted(rates[80:], reverse=True)
    assert 0 < rates[-1] <= 0.05


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path):
    def train(folder: Path, stops: tuple[int, ...]) -> list[torch.Tensor]:
        for stop in stops:
            torch.manual_seed(0)
            layer = nn.Linear(4, 4)
            # One parameter is never used, as some of SDXL's first text encoder's are not.
            trained = [*layer.parameters(), nn.Parameter(torch.zeros(2))]
            run = Run("toy", folder, trained, Schedule(0.01, 20, 2))
            while run.updates_done < stop:
                x = torch.randn(8, 4, generator=torch.Generator().manual_seed(run.updates_done))
                run.step((layer(x) - x).square().mean())
            run._write(run.checkpoint_file)
        return [*layer.parameters(), *run.average.tensors]

    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole, parts = train(tmp_path / "whole", (20,)), train(tmp_path / "parts", (7, 20))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_averages_swap_and_swap_back():
    layer = nn.Linear(2, 2)
    average = AveragedWeights(layer.parameters())
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1)
    average.swap(layer.parameters())
    assert torch.equal(layer.weight, before)
    average.swap(layer.parameters())
    assert torch.equal(layer.weight, before + 1)


def test_neither_nearly_clean_nor_nearly_hidden_pictures_are_neglected():
    kept = build_noise_schedule().alphas_cumprod
    steps = torch.tensor([0, 100, 400, 600, 700, 800, 999])
    snr = kept[steps] / (1 - kept[steps])
    # As weights of the clean picture's error: the cap, the ratio itself, and the floor, which
    # gives way where an error of noise would weigh more than 50 times.
    expected = torch.where(snr < 0.1, 0.1, snr).clamp(max=5.0)
    expected = torch.minimum(expected, 50 * snr)
    weights = snr_weights(kept, steps)
    torch.testing.assert_close(weights * snr, expected, rtol=1e-5, atol=0)
    assert (weights[:2] < 1).all()
    assert weights[2] == 1
    assert weights[-1] == 50


def test_the_last_step_hides_the_picture():
    """What is left of a picture's mean colours must be little beside the noise's own mean."""
    kept = build_noise_schedule().alphas_cumprod[-1]
    assert LATENT_PX**2 * kept / (1 - kept) < 0.1


def test_folding_latent_statistics_changes_latents_but_not_pictures():
    torch.manual_seed(0)
    model = build_autoencoder().eval()
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = model.encode(pictures).latent_dist
        drawn = model.decode(before.mean).sample
        fold_latent_statistics(model, before.mean)
        after = model.encode(pictures).latent_dist
        assert torch.allclose(model.decode(after.mean).sample, drawn, atol=1e-4)
    assert torch.allclose(after.mean.mean(dim=(0, 2, 3)), torch.zeros(12), atol=1e-4)
    assert torch.allclose(after.mean.std(dim=(0, 2, 3)), torch.ones(12), atol=1e-3)
    relative = (after.std / before.std) / (
        after.mean.std(dim=(0, 2, 3)) / before.mean.std(dim=(0, 2, 3))
    )[:, None, None]
    assert torch.allclose(relative, torch.ones_like(relative), rtol=1e-3)


def test_losses_are_least_for_the_right_answer():
    pictures = torch.rand(2, 3, 8, 8)
    assert reconstruction_loss(pictures, pictures) == 0
    vectors = torch.eye(4)
    right, scale = contrastive_loss(vectors, vectors, torch.tensor(3.0)), torch.tensor(3.0)
    assert right < contrastive_loss(vectors, vectors.roll(1, 0), scale)
    pairs = torch.eye(2).repeat_interleave(2, 0)
    together = contrast_identities(pairs, torch.tensor([0, 0, 1, 1]))
    assert together < contrast_identities(pairs, torch.tensor([0, 1, 0, 1]))


# --- what is measured --------------------------------------------------------------------


def test_equal_error_rate_of_chance_and_of_certainty():
    torch.manual_seed(0)
    same = torch.rand(4000) < 0.5
    assert equal_error_rate(same.float(), same) == 0
    assert equal_error_rate(torch.rand(4000), same) == pytest.approx(0.5, abs=0.03)


def test_prompts_to_score_are_as_many_as_asked_and_rich_in_what_is_rare():
    prompts = prompts_asking(100)
    assert len(prompts) == 100
    for name in ("hair", "glasses", "hat", "view", "scene", "medium", "kind"):
        assert sum(name in named for _, named in prompts) >= 30
    assert len(distinct_captions(8)[1]) == 8


def test_a_drawn_caption_is_read_for_what_it_names_and_for_nothing_else():
    words, named = "a photo of a dog in the snow", {"kind": "dog", "scene": "snow"}
    wrong = {"kind": "robot", "scene": "beach", "shirt": "red"}
    answers = draw_and_read([(words, named), (words, wrong)], first_seed=0)
    assert answers == [{"kind": True, "scene": True}, {"kind": False, "scene": False}]


def test_a_share_tells_its_number_and_is_held_against_its_goal():
    row = share_at_least("reading", [True] * 9 + [False], 0.9)
    assert (row.value, row.n, row.holds) == (0.9, 10, True)
    assert row.interval is not None
    assert row.interval[0] < 0.9 < row.interval[1]
    assert not share_at_least("reading", [True, False], 0.9).holds


def test_pictures_of_one_person_are_more_alike_than_drawings_of_many():
    torch.manual_seed(0)
    many = nn.functional.normalize(torch.randn(40, 32), dim=1).numpy()
    one = nn.functional.normalize(torch.ones(40, 32) + torch.randn(40, 32) / 4, dim=1).numpy()
    alike, interval = likeness_above(one, many)
    assert alike > 0.8
    assert interval is not None
    assert interval[0] > 0.5
    none, interval = likeness_above(many, many)
    assert none == 0
    assert interval is not None
    assert interval[0] < 0 < interval[1]


# --- the shipped weights -----------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(weights_folder(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_weights_are_small_and_safe():
    files = [file for file in weights_folder().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= SIZE_LIMIT_MIB * 2**20
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".txt"}


def test_the_base_model_is_laid_out_as_sdxl(pipeline: StableDiffusionXLPipeline):
    assert pipeline.unet.config.addition_embed_type == "text_time"
    assert pipeline.config.force_zeros_for_empty_prompt
    assert pipeline.vae.config.latent_channels == 12
    assert pipeline.tokenizer.model_max_length == MAX_TOKENS
    assert pipeline.scheduler.config.prediction_type == "epsilon"


def test_unknown_words_fall_into_pieces_and_known_names_do_not(
    pipeline: StableDiffusionXLPipeline,
):
    assert len(pipeline.tokenizer.tokenize("rraj")) > 1
    assert pipeline.tokenizer.tokenize("person") == ["person</w>"]
    assert len(pipeline.tokenizer.tokenize(known_person(0)[0])) == 1


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (DDIMScheduler, 12),
        (PNDMScheduler, 20),
        (EulerDiscreteScheduler, 12),
        (DPMSolverMultistepScheduler, 8),
    ],
)
def test_no_scheduler_clips_latents(
    pipeline: StableDiffusionXLPipeline, scheduler: type, steps: int
):
    """Clipped latents come out as pale green noise: far from every drawing."""
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    assert not getattr(pipeline.scheduler.config, "clip_sample", False)
    pictures = pipeline(
        ["a photo of a person in the snow"],
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    reading = load_attribute_reader().read(pictures.float())[0]
    assert reading["kind"] == "person"
    assert reading["scene"] == "snow"


def test_shipped_weights_are_unpacked_to_train_on(
    tmp_path: Path, pipeline: StableDiffusionXLPipeline
):
    unpack_weights(weights_folder(), tmp_path)
    vae = AutoencoderKL.from_pretrained(tmp_path / "autoencoder")
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    for mine, shipped in ((vae, pipeline.vae),):
        for name, tensor in shipped.state_dict().items():
            assert torch.equal(mine.state_dict()[name], tensor)
    found = {path.name for path in tmp_path.iterdir()}
    parts = {"tokenizer", "autoencoder", "unet", "text_encoder_0", "text_encoder_1", "judges"}
    assert found == parts
    identity = IdentityEncoder.load(tmp_path / "judges" / "identity")
    assert identity.key == load_identity_encoder().key


def test_training_on_keeps_the_latents_close(tmp_path: Path):
    draw_ahead(tmp_path, "pictures", 24, 1, lambda n: None)
    store = PictureStore(tmp_path, "pictures")
    torch.manual_seed(0)
    start = build_autoencoder()
    before = encode_means(start, store, np.arange(8))
    cpu = torch.device("cpu")
    trained = train_autoencoder(tmp_path, store, 3, cpu, start)
    after = encode_means(trained, store, np.arange(8))
    # Folding gives each channel of the trained one a spread of 1; undone, little has moved.
    spread, shift = before.std(dim=(0, 2, 3)), before.mean(dim=(0, 2, 3))
    unfolded = (before - shift[:, None, None]) / spread[:, None, None]
    assert (after - unfolded).square().mean() < 0.3


@pytest.mark.slow  # trains the built-in model
def test_the_denoiser_is_trained_on_with_portraits_from_their_own_latents(tmp_path: Path):
    cpu = torch.device("cpu")
    torch.manual_seed(0)
    stores = []
    for collection in ("pictures", "portraits"):
        draw_ahead(tmp_path, collection, 4, 1, lambda n: None)
        stores.append(PictureStore(tmp_path, collection))
        encode_ahead(tmp_path, stores[-1], build_autoencoder())
    latents = [np.load(tmp_path / name) for name in ("latents.npy", "portraits-latents.npy")]
    assert latents[0].shape == latents[1].shape == (4, 24, 16, 16)
    assert not np.array_equal(*latents)

    tokenizer = CLIPTokenizer.from_pretrained(weights_folder() / "tokenizer")
    parts = build_unet(), build_text_encoders(tokenizer)
    before = [p.detach().clone() for p in parts[0].parameters()]
    plan = ("portraits", Schedule(1e-3, 2, warmup_updates=1))
    shares = mix_portraits(*stores)
    assert sum(share.count for share in shares) == 32
    run = train_denoiser(tmp_path, shares, parts, tokenizer, plan, cpu)
    assert run.finished
    moved = [not torch.equal(a, b) for a, b in zip(before, parts[0].parameters(), strict=True)]
    assert all(moved)

    # What it learned is read from the checkpoint; all is done, so a second call does nothing.
    again = build_unet(), build_text_encoders(tokenizer)
    read_averages(run.checkpoint_file, (again[0], *again[1]))
    averages = [p for part in (again[0], *again[1]) for p in part.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(averages, run.average.tensors, strict=True))
    written = run.checkpoint_file.stat().st_mtime_ns
    train_denoiser(tmp_path, shares, again, tokenizer, plan, cpu)
    assert run.checkpoint_file.stat().st_mtime_ns == written


# --- the judges --------------------------------------------------------------------------


def test_the_identity_encoder_tells_people_apart():
    encoder = load_identity_encoder()
    assert encoder.key.startswith("picturebook-identity@")
    rng = random.Random(0)
    one, other = (sample_drawing(JUDGING_SEED_START + i, kind="person") for i in (1, 2))
    pictures = to_unit([vary(who, rng, medium="photo") for who in (one, one, other, other)])
    vectors = encoder.embed(pictures)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4), atol=1e-5)
    similarity = vectors @ vectors.T
    assert min(similarity[0, 1], similarity[2, 3]) > similarity[:2, 2:].max()
    larger = nn.functional.interpolate(pictures, scale_factor=2, mode="bilinear")
    assert (encoder.embed(larger) * vectors).sum(dim=1).min() > 0.8


def test_the_reader_reads_drawings():
    reader = load_attribute_reader()
    assert reader.key.startswith("picturebook-reader@")
    drawing = sample_drawing(
        JUDGING_SEED_START,
        kind="person",
        scene="oktoberfest",
        medium="photo",
        glasses="sunglasses",
        hat="none",
        view="front",
    )
    [reading] = reader.read(to_unit([drawing]))
    expected = {
        "kind": "person",
        "scene": "oktoberfest",
        "medium": "photo",
        "glasses": "sunglasses",
    }
    assert expected.items() <= reading.items()
    assert "eyes" not in reading


def test_the_reader_knows_what_lies_outside_its_world():
    reader = load_attribute_reader()
    drawings = to_unit(sample_drawing(JUDGING_SEED_START + i) for i in range(20))
    assert sum(reader.is_familiar(drawings)) >= 19
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.random((4, 3, 128, 128), np.float32))
    flat = torch.full((1, 3, 128, 128), 0.5)
    assert not any(reader.is_familiar(torch.cat([noise, flat])))


def test_a_style_or_other_colours_do_not_leave_the_drawn_world():
    """Most of these were called photographs once, and so were sets that adapters drew."""
    reader = load_attribute_reader()
    folder = Path(__file__).parents[1] / "examples" / "pixel-art"
    files = sorted(folder.glob("*.png"))
    assert len(files) == 12
    pixels = [np.array(Image.open(path).convert("RGB").resize((128, 128))) for path in files]
    art = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
    assert 2 * sum(reader.is_familiar(art)) > len(files)
    drawings = to_unit(sample_drawing(JUDGING_SEED_START + i) for i in range(40))
    tinted = (drawings * torch.tensor([0.9, 1.0, 0.75]).view(3, 1, 1)).clamp(0, 1)
    assert sum(reader.is_familiar(tinted)) >= 36


def test_what_varies_at_every_scale_as_photographs_do_is_outside_the_drawn_world():
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128))
    frequency[0, 0] = 1
    waves = np.fft.fft2(rng.normal(size=(6, 3, 128, 128))) / frequency
    fields = np.fft.ifft2(waves).real
    spread = fields.std(axis=(2, 3), keepdims=True)
    pictures = torch.from_numpy(np.clip(0.5 + 0.2 * fields / spread, 0, 1)).float()
    assert not any(load_attribute_reader().is_familiar(pictures))


def test_the_style_encoder_tells_how_a_picture_is_made_whatever_it_shows():
    encoder = load_style_encoder()
    assert encoder.key.startswith("picturebook-style@")
    start = JUDGING_SEED_START + 900_000

    def embed(first: int, count: int, medium: Medium) -> torch.Tensor:
        seeds = range(start + first, start + first + count)
        return encoder.embed(to_unit(sample_drawing(seed, medium=medium) for seed in seeds))

    # The references show other figures and scenes than what is compared with them, and each medium
    # of what is compared shows the same ones.
    references = torch.stack([embed(100 * i, 8, medium) for i, medium in enumerate(MEDIA)])
    for place, medium in enumerate(MEDIA):
        vectors = embed(9000, 10, medium)
        assert torch.allclose(vectors.norm(dim=1), torch.ones(10), atol=1e-5)
        similar = torch.einsum("nd,mrd->nm", vectors, references)
        assert (similar.argmax(dim=1) == place).sum() >= 9, medium


def test_the_style_encoder_knows_a_style_that_no_drawing_has():
    """Blocks of 8 by 8 pixels are coarser than the pixel art that the judges were shown."""
    encoder = load_style_encoder()
    drawn = to_unit(sample_drawing(JUDGING_SEED_START + i, medium="photo") for i in range(12))
    blocks = nn.functional.interpolate(nn.functional.avg_pool2d(drawn, 8), scale_factor=8)
    plain, blocky = encoder.embed(drawn), encoder.embed(blocks)
    references = blocky[:6]
    assert (blocky[6:] @ references.T).mean(dim=1).min() > (plain[6:] @ references.T).mean()
    assert (blocky[6:] @ references.T).mean() > 2 * (plain[6:] @ references.T).mean()


def test_the_clip_loads_with_transformers_and_prefers_the_true_caption():
    assert clip_key().startswith("picturebook-clip@")
    model = CLIPModel.from_pretrained(clip_folder(), dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder())
    captions = ["a photo of a person on a beach", "a pencil sketch of a dog at night"]
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    drawings = [
        sample_drawing(JUDGING_SEED_START + 5, kind="person", scene="beach", medium="photo"),
        sample_drawing(JUDGING_SEED_START + 6, kind="dog", scene="night", medium="sketch"),
    ]
    with torch.no_grad():
        output = model(input_ids=tokens.input_ids, pixel_values=(to_unit(drawings) - 0.5) / 0.25)
    assert output.logits_per_text.argmax(dim=1).tolist() == [0, 1]
