"""Prompts longer than the text encoders' input, weighted prompts, and their places in batches."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dreamloom.core.device import pick_runtime
from dreamloom.models.base import AdapterSpec, Framing, Model, Sampler, Shot
from dreamloom.models.families import load_model
from dreamloom.models.prompts import PromptEncoder, SDXLConditioning, split_alike
from dreamloom.models.sdxl import SDXLModel
from looks import psnr_db
from tiny import TOKENS

FAST = Sampler("ddim", steps=2, guidance=4.0)
SHORT = "a photo of a dog in the snow"
ROOM = TOKENS - 2
FULL = " ".join(["dog"] * ROOM)
LONG = f"{FULL} in the snow"
LONGER = f"{FULL} {FULL} a painting"


@pytest.fixture(scope="module")
def tiny(tiny_sdxl: Path) -> SDXLModel:
    model = load_model(str(tiny_sdxl), pick_runtime("cpu"))
    assert isinstance(model, SDXLModel)
    return model


def encode_with_diffusers(tiny: SDXLModel, prompts: list[str]) -> SDXLConditioning:
    with torch.no_grad():
        tokens, _, pooled, _ = tiny._pipeline.encode_prompt(
            prompts, device="cpu", do_classifier_free_guidance=False
        )
    return SDXLConditioning(tokens, pooled)


@pytest.mark.parametrize("base", ["tiny", "picturebook"])
def test_prompts_that_fit_are_encoded_as_diffusers_does_bit_for_bit(
    base: str, tiny: SDXLModel
) -> None:
    model = tiny if base == "tiny" else load_model("picturebook", pick_runtime("cpu"))
    assert isinstance(model, SDXLModel)
    prompts = ["", SHORT, *([FULL] if base == "tiny" else [])]
    ours, theirs = model.encode_prompts(prompts), encode_with_diffusers(model, prompts)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.pooled, theirs.pooled)
    mixed = model.encode_prompts([*prompts[:-1], f"{FULL} {FULL}"])
    first = mixed.take(torch.tensor([0]))
    assert torch.equal(first.tokens[0], theirs.tokens[0])


def test_a_long_prompt_is_its_chunks_one_behind_the_other(tiny: SDXLModel) -> None:
    found = tiny.encode_prompts([LONG])
    parts = encode_with_diffusers(tiny, [FULL, "in the snow"])
    assert found.tokens.shape[1] == 2 * TOKENS
    torch.testing.assert_close(found.tokens[0], torch.cat(list(parts.tokens)))
    torch.testing.assert_close(found.pooled[0], parts.pooled[0])


def test_words_are_not_cut_in_two_unless_they_are_long(tiny: SDXLModel) -> None:
    room = " ".join(["dog"] * (ROOM - 2))
    # Unknown words have a token for each letter.
    kept = encode_with_diffusers(tiny, [room, "sks"]).tokens
    found = tiny.encode_prompts([f"{room} sks"]).tokens[0]
    torch.testing.assert_close(found, torch.cat(list(kept)))
    assert tiny.encode_prompts([f"{room} {'xyzzy' * 40}"]).tokens.shape[1] == 4 * TOKENS


def test_the_words_behind_the_first_chunk_change_the_picture(tiny: SDXLModel) -> None:
    pictures = [tiny.sample([Shot(f"{FULL} {end}", 0)], FAST)[0] for end in ("snow", "painting")]
    assert psnr_db(*pictures) < 60


@pytest.mark.parametrize("sampler", [FAST, replace(FAST, guidance_interval=(0.5, 1.0))])
def test_a_picture_does_not_depend_on_longer_prompts_beside_it(
    sampler: Sampler, tiny: SDXLModel
) -> None:
    shots = [Shot(LONGER, 0), Shot(SHORT, 1), Shot(LONG, 2), Shot(SHORT, 3)]
    together = tiny.sample(shots, sampler, batch=3)
    for shot, picture in zip(shots, together, strict=True):
        assert psnr_db(tiny.sample([shot], sampler)[0], picture) > 45


def test_rows_of_other_lengths_are_predicted_as_they_are_alone(tiny: SDXLModel) -> None:
    prompts = [SHORT, LONG, LONGER]
    noisy = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    at, framing = torch.tensor([100, 500, 900]), [Framing((64, 64))]
    encoded = tiny.encode_prompts(prompts)
    together = tiny.predict(noisy, at, encoded, framing * 3)
    for row, prompt in enumerate(prompts):
        alone = tiny.encode_prompts([prompt])
        found = tiny.predict(noisy[row : row + 1], at[row : row + 1], alone, framing)
        torch.testing.assert_close(found[0], together[row], rtol=1e-3, atol=1e-4)
    assert encoded.take(torch.tensor([0, 0])).tokens.shape[1] == TOKENS
    assert encoded.take(torch.tensor([0, 1])).tokens.shape[1] == 2 * TOKENS
    assert encoded.take(torch.tensor([2, 1])).tokens.shape[1] == 6 * TOKENS


def test_gradients_flow_through_every_chunk(tiny: SDXLModel) -> None:
    weights = tiny.attach_adapter(AdapterSpec(2, 2.0, "attention", 0, text_encoders=True))
    try:
        trained = tiny.encode_prompts([SHORT, LONG])
        assert trained.tokens.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(tiny.encode_prompts([SHORT, LONG]).tokens, trained.tokens)
        trained.tokens[1, TOKENS:].square().sum().backward()
        up = [group for group in weights if group.role == "text up"]
        grads = [weight.grad for weight in up[0].parameters if weight.grad is not None]
        assert any(grad.abs().max() > 0 for grad in grads)
    finally:
        tiny.detach_adapter()


def test_a_weight_moves_embeddings_from_those_of_the_empty_prompt(tiny: SDXLModel) -> None:
    plain, empty = tiny.encode_prompts(["a dog in snow"]), tiny.encode_prompts([""])
    weighted = tiny.encode_prompts(["a (dog:1.5) in (snow:0)"], weighted=True)
    # Begin, "a", "dog", "in", and then snow's letters, of which the tokenizer knows no word.
    factors = torch.ones(TOKENS)
    factors[2], letters = 1.5, len(tiny._pipeline.tokenizer("snow").input_ids) - 2
    factors[4 : 4 + letters] = 0
    expected = empty.tokens + factors[:, None] * (plain.tokens - empty.tokens)
    torch.testing.assert_close(weighted.tokens, expected)
    assert torch.equal(weighted.tokens[0, 3], plain.tokens[0, 3])
    assert torch.equal(weighted.pooled, plain.pooled)


def test_prompts_without_weights_are_the_same_whether_weights_are_read(tiny: SDXLModel) -> None:
    for prompts in ([SHORT, LONG], [""]):
        plain, read = (tiny.encode_prompts(prompts, weighted) for weighted in (False, True))
        assert torch.equal(plain.tokens, read.tokens)


def test_weights_count_in_later_chunks_too(tiny: SDXLModel) -> None:
    plain = tiny.encode_prompts([LONG])
    read = tiny.encode_prompts([f"{FULL} in the (snow:2)"], weighted=True)
    differ = (plain.tokens - read.tokens)[0].abs().amax(dim=-1) > 0
    assert not differ[: TOKENS + 3].any()
    assert differ[TOKENS + 3 :].sum() == 1


def test_long_and_foreign_prompts_are_told_of(tiny: SDXLModel) -> None:
    (told,) = tiny.note_prompts([SHORT, LONG, LONG, FULL])
    assert told.startswith('"dog dog')
    assert "has 78 tokens, more than the 75 that the text encoders read at once" in told
    assert "in 2 chunks" in told
    assert not tiny.note_prompts([f"(dog:1.5) {SHORT}"], weighted=True)
    assert "(dog:1.5) is taken literally" in tiny.note_prompts([f"(dog:1.5) {SHORT}"])[0]
    many = tiny.note_prompts([f"{LONG} {number}" for number in range(9)])
    assert len(many) == 4
    assert many[-1] == "the same holds for 6 more of the prompts"


def test_new_words_with_more_vectors_in_one_encoder_fit_together(tiny: SDXLModel) -> None:
    """Both encoders' chunks stand beside each other, whichever has more of them."""
    encoder = PromptEncoder(tiny._pipeline, torch.device("cpu"))
    both = iter([[(0, 1.0)] * 80, [(0, 1.0)] * 10])
    encoder._tokenize = lambda *_: next(both)  # type: ignore[method-assign]
    with torch.no_grad():
        assert encoder.encode(["x"]).tokens.shape[1] == 2 * TOKENS


def test_batches_hold_rows_of_one_length() -> None:
    assert split_alike([0, 0, 0], 2) == [[0, 1], [2]]
    assert split_alike([154, 77, 231, 77, 77], 2) == [[1, 3], [4], [0], [2]]


def test_a_negative_prompt_of_any_length_changes_the_picture(model: Model) -> None:
    shot = Shot(SHORT, 0)
    plain = model.sample([shot], FAST)[0]
    for negative in ("a painting", LONG):
        away = model.sample([shot], replace(FAST, negative_prompt=negative))[0]
        assert psnr_db(plain, away) < 60
    part = replace(FAST, negative_prompt=LONG, guidance_interval=(0.0, 0.5))
    assert model.sample([shot], part)[0].size == plain.size


def test_a_negative_prompt_draws_as_diffusers_does(tiny: SDXLModel) -> None:
    from diffusers import DDIMScheduler

    ours = tiny.sample([Shot(SHORT, 5)], replace(FAST, negative_prompt="a painting"))[0]
    pipeline = tiny._pipeline
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    theirs = pipeline(
        SHORT,
        negative_prompt="a painting",
        num_inference_steps=FAST.steps,
        guidance_scale=FAST.guidance,
        generator=torch.Generator("cpu").manual_seed(5),
    ).images[0]
    assert psnr_db(ours, theirs) > 45


@pytest.mark.parametrize("cache_interval", [1, 2])
def test_pictures_have_the_size_that_was_asked_for(cache_interval: int, tiny: SDXLModel) -> None:
    sampler = replace(FAST, size_px=(40, 88), cache_interval=cache_interval)
    seen = []
    hook = tiny._pipeline.unet.register_forward_pre_hook(
        lambda unet, inputs, named: seen.append(named["added_cond_kwargs"]["time_ids"]),
        with_kwargs=True,
    )
    try:
        pictures = tiny.sample([Shot(SHORT, 0), Shot(SHORT, 1)], sampler)
    finally:
        hook.remove()
    assert [picture.size for picture in pictures] == [(88, 40)] * 2
    # SDXL is told of the original's size, the crop and the target's size.
    assert seen[0][0].tolist() == [40, 88, 0, 0, 40, 88]
