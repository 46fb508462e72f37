"""Teaching adapters of every kind: they begin at zero, learn, are read, and leave no trace."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch.nn.functional import mse_loss

from dreamloom.core.device import Runtime, pick_runtime
from dreamloom.core.errors import AdapterError, ConfigError
from dreamloom.lora.adapter import Adapter, refuse_other_kinds
from dreamloom.lora.reading import read_adapter
from dreamloom.lora.writing import write_adapter
from dreamloom.merging.merging import MergeRequest, combine
from dreamloom.models.base import AdapterSpec, Framing, Sampler, Shot, TargetModules, WeightGroup
from dreamloom.models.families import load_model
from dreamloom.models.prompts import SDXLConditioning
from dreamloom.models.sdxl import SDXLModel
from dreamloom.models.target_modules import choose_layers
from looks import psnr_db

PLAIN = AdapterSpec(rank=2, alpha=2.0, target_modules="attention", seed=0)
# Linear layers and convolutions, narrow and wide, but few of them.
SOME = replace(PLAIN, target_modules="all", blocks="mid_block, up_blocks.0.resnets.0")
CASES = {
    "lora": PLAIN,
    "lora on everything": replace(PLAIN, target_modules="all"),
    "lora with text": replace(PLAIN, text_encoders=True),
    "rank stabilised": replace(PLAIN, use_rslora=True, alpha=3.0),
    "gaussian": replace(PLAIN, init="gaussian"),
    "orthogonal": replace(PLAIN, init="orthogonal"),
    "olora": replace(SOME, init="olora"),
    "pissa": replace(PLAIN, init="pissa", alpha=1.0, text_encoders=True),
    "pissa_niter_2": replace(PLAIN, init="pissa_niter_2"),
    "dora": replace(SOME, kind="dora", text_encoders=True),
    "dora from pissa": replace(SOME, kind="dora", init="pissa"),
    "loha": replace(SOME, kind="loha", alpha=4.0, text_encoders=True),
    "lokr": replace(SOME, kind="lokr", text_encoders=True),
    "oft": replace(SOME, kind="oft", rank=4, text_encoders=True),
    "ranks by pattern": replace(PLAIN, ranks={"mid_block": 4}, alphas={"attn2": 1.0}),
    "new word": replace(PLAIN, tokens={"<me>": "person"}),
}
# Other beginnings of the same kind: by default one that leaves the base alone, one that changes it.
SLOW = {"gaussian", "olora", "pissa_niter_2"}
PROMPT = "a photo of <me>"
FAST = Sampler("ddim", steps=2, guidance=3.0)
FASTEST = Sampler("ddim", steps=1, guidance=1.0)


@pytest.fixture(scope="module")
def tiny(tiny_sdxl: Path) -> SDXLModel:
    model = load_model(str(tiny_sdxl), pick_runtime("cpu"))
    assert isinstance(model, SDXLModel)
    return model


@pytest.fixture(scope="module")
def half(tiny_sdxl: Path) -> SDXLModel:
    model = load_model(str(tiny_sdxl), Runtime(torch.device("cpu"), torch.bfloat16))
    assert isinstance(model, SDXLModel)
    return model


@pytest.fixture(autouse=True)
def bare(tiny: SDXLModel, half: SDXLModel) -> Iterator[None]:
    """A test that fails must not leave its adapter to the next."""
    yield
    for model in (tiny, half):
        model.detach_adapter()


def weights_of(model: SDXLModel) -> dict[str, torch.Tensor]:
    return {
        f"{component}.{name}": value.clone()
        for component, module in model._components.items()
        for name, value in module.state_dict().items()
    }


def assert_untouched(model: SDXLModel, before: dict[str, torch.Tensor]) -> None:
    after = weights_of(model)
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not any(
        weight.requires_grad for m in model._components.values() for weight in m.parameters()
    )


def flat(groups: list[WeightGroup]) -> list[torch.nn.Parameter]:
    return [weight for group in groups for weight in group.parameters]


def predict(model: SDXLModel, prompt: str = PROMPT) -> torch.Tensor:
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    conditioning = model.encode_prompts([prompt])
    return model.predict(noisy, torch.tensor([400]), conditioning, [Framing((64, 64))]).float()


def teach(model: SDXLModel, groups: list[WeightGroup], updates: int = 10) -> tuple[float, float]:
    """Fit one small picture; return the loss before and after."""
    wanted = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    optimizer = torch.optim.AdamW(flat(groups), lr=5e-3)
    losses = []
    for _ in range(updates):
        loss = mse_loss(predict(model), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize(
    "case",
    [pytest.param(one, marks=pytest.mark.slow if one in SLOW else ()) for one in CASES],
)
def test_each_kind_begins_at_zero_learns_and_is_the_same_from_its_file(
    case: str, tiny: SDXLModel, tmp_path: Path
) -> None:
    spec, base = CASES[case], weights_of(tiny)
    prompt = PROMPT if not spec.tokens else "a photo of a person"
    with torch.no_grad():
        untaught = predict(tiny, prompt)
    groups = tiny.attach_adapter(spec)
    assert all(weight.dtype == torch.float32 and weight.requires_grad for weight in flat(groups))
    with torch.no_grad():
        torch.testing.assert_close(predict(tiny, prompt), untaught, rtol=1e-4, atol=1e-5)
        begun = predict(tiny)

    first, last = teach(tiny, groups)
    assert last < first
    with torch.no_grad():
        taught = predict(tiny)
        assert mse_loss(taught, begun) > 1e-6
        drawn = tiny.sample([Shot(PROMPT, 1)], FASTEST)[0]
        with tiny.disable_adapter():
            # Frozen weights are packed meanwhile: other kernels round otherwise.
            torch.testing.assert_close(predict(tiny, prompt), untaught, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(predict(tiny), taught, rtol=0, atol=0)
    adapter = tiny.read_adapter()
    assert adapter.kind == spec.kind
    tiny.detach_adapter()
    assert_untouched(tiny, base)

    write_adapter(tmp_path / "a.safetensors", adapter)
    again = read_adapter(tmp_path / "a.safetensors")
    assert again.kind == spec.kind
    assert again.parameters == adapter.parameters
    assert set(again.layer_names) == set(adapter.layer_names)
    with tiny.apply_adapters([(again, 1.0)]), torch.no_grad():
        torch.testing.assert_close(predict(tiny), taught, rtol=1e-3, atol=1e-4)
        assert psnr_db(tiny.sample([Shot(PROMPT, 1)], FASTEST)[0], drawn) > 45
    assert_untouched(tiny, base)


def strengthen(model: SDXLModel, spec: AdapterSpec, strength: float = 0.1) -> Adapter:
    """An adapter of this shape whose weights are random, read from the model."""
    rng = torch.Generator().manual_seed(1)
    for weight in flat(model.attach_adapter(spec)):
        noise = torch.randn(weight.shape, generator=rng)
        weight.data += strength * noise * (1.0 if weight.ndim > 1 else weight.data.mean())
    adapter = model.read_adapter()
    model.detach_adapter()
    return adapter


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "oft"])
def test_other_kinds_are_applied_at_weights_like_loras(kind: str, tiny: SDXLModel) -> None:
    adapter = strengthen(tiny, replace(SOME, kind=kind, rank=4, target_modules="linear"))
    name = adapter.layer_names[0]
    layer = tiny._components["unet"].get_submodule(name.removeprefix("unet."))
    original = layer.weight.clone()
    changes = []
    for weight in (1.0, 0.5, -1.0):
        with tiny.apply_adapters([(adapter, weight)]):
            changes.append((layer.weight - original) / weight)
    assert changes[0].abs().max() > 1e-3
    for change in changes[1:]:
        torch.testing.assert_close(change, changes[0], rtol=1e-3, atol=1e-6)
    with tiny.apply_adapters([(adapter, 0.5), (adapter, 0.5)]):
        torch.testing.assert_close(layer.weight - original, changes[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "oft"])
def test_a_half_precision_base_trains_in_float32_and_draws_what_was_trained(
    kind: str, half: SDXLModel
) -> None:
    """Fault 4 of other trainers: adapters in bfloat16, whose small steps vanish."""
    spec = replace(SOME, kind=kind, rank=4, alpha=4.0, text_encoders=True, tokens={"<me>": "dog"})
    base = weights_of(half)
    with torch.no_grad():
        untaught = predict(half, "a dog")
    groups = half.attach_adapter(spec)
    weights = flat(groups)
    assert {weight.dtype for weight in weights} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(predict(half, "a dog"), untaught, rtol=0, atol=2e-2)
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0)
    predict(half).square().mean().backward()
    optimizer.step()
    for weight, earlier in zip(weights, before, strict=True):
        assert weight.grad is not None
        moved = (weight != earlier)[weight.grad != 0]
        assert moved.float().mean() > 0.99 if moved.numel() else True
    teach(half, groups, updates=5)
    with torch.no_grad():
        taught = predict(half)
    adapter = half.read_adapter()
    half.detach_adapter()
    assert_untouched(half, base)
    with half.apply_adapters([(adapter, 1.0)]), torch.no_grad():
        active = predict(half)
    assert mse_loss(active, taught) < 0.05 * mse_loss(taught, untaught)
    assert_untouched(half, base)


def test_roles_tell_the_factors_and_the_parts_of_the_model_apart(tiny: SDXLModel) -> None:
    spec = replace(PLAIN, text_encoders=True, tokens={"<me>": "person"})
    groups = tiny.attach_adapter(spec)
    roles = [group.role for group in groups]
    assert roles == ["down", "up", "text down", "text up", "tokens"]
    sizes = {group.role: sum(weight.numel() for weight in group.parameters) for group in groups}
    adapter = tiny.read_adapter()
    assert sum(sizes.values()) == adapter.parameters
    assert sizes["tokens"] == 32 + 48
    tiny.detach_adapter()
    dora = tiny.attach_adapter(replace(PLAIN, kind="dora", text_encoders=True))
    assert [group.role for group in dora][-2:] == ["text up", "text other"]
    tiny.detach_adapter()
    assert [group.role for group in tiny.attach_adapter(replace(PLAIN, kind="oft", rank=4))] == [
        "other"
    ]


def test_only_trained_text_carries_gradients(tiny: SDXLModel) -> None:
    """Fault 17 of other trainers: gradients of the whole vocabulary, never used."""
    assert not tiny.trains_text
    assert not tiny.encode_prompts(["a dog"]).tokens.requires_grad
    groups = tiny.attach_adapter(PLAIN)
    assert not tiny.trains_text
    assert not tiny.encode_prompts(["a dog"]).tokens.requires_grad
    tiny.detach_adapter()
    groups = tiny.attach_adapter(replace(PLAIN, text_encoders=True, tokens={"<me>": "person"}))
    assert tiny.trains_text
    with torch.no_grad():
        assert not tiny.encode_prompts(["a dog"]).tokens.requires_grad
    predict(tiny).square().mean().backward()
    taught = {id(weight) for weight in flat(groups)}
    with_gradient = {
        id(weight)
        for module in tiny._components.values()
        for weight in module.parameters()
        if weight.grad is not None
    }
    assert with_gradient <= taught
    tokens = groups[-1].parameters
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in tokens)


def test_predicting_as_the_base_between_encoding_and_learning_keeps_gradients(
    tiny: SDXLModel,
) -> None:
    noisy, at, framing = torch.zeros(1, 4, 8, 8), torch.tensor([400]), [Framing((64, 64))]
    gradients = []
    for interrupted in (False, True):
        weights = flat(tiny.attach_adapter(replace(PLAIN, text_encoders=True)))
        conditioning = tiny.encode_prompts(["a dog"])
        if interrupted:
            with torch.no_grad(), tiny.disable_adapter():
                tiny.predict(noisy, at, tiny.encode_prompts(["a dog"]), framing)
        tiny.predict(noisy, at, conditioning, framing).square().mean().backward()
        assert all(weight.grad is not None for weight in weights)
        gradients.append([weight.grad for weight in weights])
        tiny.detach_adapter()
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("target_modules", ["attention", "linear"])
def test_target_modules_says_which_layers_of_the_text_encoders_change(
    tiny: SDXLModel, target_modules: TargetModules
) -> None:
    tiny.attach_adapter(replace(PLAIN, target_modules=target_modules, text_encoders=True))
    layers = tiny.read_adapter().layers
    tiny.detach_adapter()
    found = {name.rpartition(".")[2] for name in layers if name.startswith("text_encoder")}
    attention = {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert found == (attention if target_modules == "attention" else attention | {"fc1", "fc2"})


def test_trained_encoders_are_not_released(
    tiny: SDXLModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[str] = []
    for name in ("vae", "text_encoder", "text_encoder_2"):
        module = getattr(tiny._pipeline, name)
        monkeypatch.setattr(module, "to", lambda *_, name=name: released.append(name))
    tiny.release_encoders()
    assert released == ["vae", "text_encoder", "text_encoder_2"]
    tiny.attach_adapter(replace(PLAIN, text_encoders=True))
    side = tiny.advice.resolution_px
    tiny.encode_images(torch.zeros(1, 3, side, side))
    released.clear()
    tiny.release_encoders()
    assert released == ["vae"]
    released.clear()
    tiny.encode_prompts(["a dog"])
    assert "vae" not in released


# ------------------------------------------------------------------ which layers


@pytest.mark.parametrize(("preset", "place"), [("content", 0), ("style", 1)])
def test_b_lora_presets_are_one_block_each(preset: str, place: int, tiny: SDXLModel) -> None:
    chosen = choose_layers(tiny._components, replace(PLAIN, blocks=preset))["unet"]
    assert chosen
    assert all(name.startswith(f"up_blocks.0.attentions.{place}.") for name in chosen)


def test_blocks_are_chosen_by_whole_parts_of_names(tiny: SDXLModel) -> None:
    def choose(blocks: str) -> set[str]:
        return set(choose_layers(tiny._components, replace(PLAIN, blocks=blocks))["unet"])

    everything, middle, cross = choose("all"), choose("mid_block"), choose("attn2.to_k")
    assert middle < everything
    assert all(name.startswith("mid_block.") for name in middle)
    assert all(name.endswith("attn2.to_k") for name in cross)
    assert choose("mid_block, attn2.to_k") == middle | cross
    assert choose("unet.up_blocks.*.to_q") == {
        n for n in everything if n.startswith("up_blocks.") and n.endswith("to_q")
    }


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"blocks": "mid_blok"}, r"'mid_blok' matches no layer.*mid_block\.attentions\.0"),
        ({"blocks": "conv1"}, r"'conv1' matches no layer"),
        ({"blocks": " , "}, "name nothing"),
        ({"ranks": {"nowhere": 3}}, "'nowhere' of ranks matches no layer"),
        ({"alphas": {"text_encoder": 3.0}}, "'text_encoder' of alphas matches no layer"),
        ({"rank": 0}, "1 or more"),
        ({"init": "eva"}, "no initialisation 'eva'"),
        ({"init": "orthogonal", "rank": 3}, "even"),
        ({"kind": "loha", "init": "pissa"}, "loha begins by its own rule"),
        ({"kind": "lokr", "use_rslora": True}, "Only lora and dora"),
        ({"kind": "oft", "rank": 1}, "2 or more"),
        ({"kind": "oft", "ranks": {"mid_block": 4}}, "one block size"),
        ({"tokens": {"two words": "dog"}}, "no single word"),
        ({"tokens": {"dog": "person"}}, "known to the base model"),
        ({"tokens": {"<me>": " "}}, "must start from another word"),
    ],
)
def test_contradictions_are_refused_and_leave_the_base(
    change: dict, complaint: str, tiny: SDXLModel
) -> None:
    base = weights_of(tiny)
    with pytest.raises(ConfigError, match=complaint):
        tiny.attach_adapter(replace(PLAIN, **change))
    assert_untouched(tiny, base)


def test_a_base_without_the_style_block_says_what_it_has() -> None:
    unet = torch.nn.ModuleDict()
    unet.up_blocks = torch.nn.ModuleList([torch.nn.ModuleDict()])
    unet.up_blocks[0].attentions = torch.nn.ModuleList([torch.nn.ModuleDict()])
    unet.up_blocks[0].attentions[0].to_q = torch.nn.Linear(2, 2)
    choose_layers({"unet": unet}, replace(PLAIN, blocks="content"))
    with pytest.raises(
        ConfigError,
        match=r"'style' is unet\.up_blocks\.0\.attentions\.1.*: up_blocks\.0\.attentions\.0",
    ):
        choose_layers({"unet": unet}, replace(PLAIN, blocks="style"))


def test_ranks_and_alphas_by_pattern_reach_their_layers_alone(tiny: SDXLModel) -> None:
    spec = replace(
        PLAIN,
        ranks={"mid_block": 3, "text_encoder_2": 1},
        alphas={"attn2": 4.0},
        text_encoders=True,
    )
    groups = tiny.attach_adapter(spec)
    with torch.no_grad():
        for weight in flat(groups):
            weight.fill_(1.0)
    for name, layer in tiny.read_adapter().layers.items():
        rank = 3 if "mid_block" in name else 1 if name.startswith("text_encoder_2.") else 2
        assert layer.rank == rank
        assert layer.up.max() == pytest.approx((4.0 if ".attn2." in name else 2.0) / rank)


# ------------------------------------------------------------------ beside diffusers


@pytest.fixture
def plain(tiny_sdxl: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embed(pipeline: StableDiffusionXLPipeline, prompt: str) -> SDXLConditioning:
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(
            prompt, device="cpu", do_classifier_free_guidance=False
        )
    return SDXLConditioning(tokens, pooled)


@pytest.mark.parametrize(
    "spec",
    [
        replace(PLAIN, target_modules="all", text_encoders=True, ranks={"mid_block": 3, "fc1": 4}),
        replace(
            PLAIN, kind="dora", target_modules="all", text_encoders=True, ranks={"mid_block": 3}
        ),
    ],
    ids=["lora", "dora"],
)
def test_plain_diffusers_reads_text_and_picture_layers_alike(
    spec: AdapterSpec, tiny: SDXLModel, plain: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    adapter = strengthen(tiny, spec)
    write_adapter(tmp_path / "a.safetensors", adapter)
    untaught = embed(plain, "a photo of a dog")
    plain.load_lora_weights(tmp_path, weight_name="a.safetensors")
    theirs = embed(plain, "a photo of a dog")
    with tiny.apply_adapters([(adapter, 1.0)]):
        ours = tiny.encode_prompts(["a photo of a dog"])
        drawn = tiny.sample([Shot("a photo of a dog", 3)], FAST)[0]
    assert mse_loss(ours.tokens, untaught.tokens) > 1e-4
    torch.testing.assert_close(theirs.tokens, ours.tokens, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(theirs.pooled, ours.pooled, rtol=1e-3, atol=1e-4)
    from diffusers import DDIMScheduler

    plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config)
    picture = plain(
        "a photo of a dog",
        num_inference_steps=FAST.steps,
        guidance_scale=FAST.guidance,
        height=64,
        width=64,
        generator=torch.Generator("cpu").manual_seed(3),
    ).images[0]
    assert psnr_db(picture, drawn) > 45


def test_new_words_mean_in_diffusers_what_they_mean_here(
    tiny: SDXLModel, plain: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    spec = replace(PLAIN, tokens={"<me>": "person", "<it>": "a dog"})
    adapter = strengthen(tiny, spec)
    assert list(adapter.tokens) == ["<me>", "<it>"]
    write_adapter(tmp_path / "a.safetensors", adapter)
    plain.load_lora_weights(tmp_path, weight_name="a.safetensors")
    for word in ("me", "it"):
        vectors = load_file(tmp_path / "a-tokens" / f"{word}.safetensors")
        assert set(vectors) == {"clip_l", "clip_g"}
        for key, encoder, tokenizer in (
            ("clip_l", plain.text_encoder, plain.tokenizer),
            ("clip_g", plain.text_encoder_2, plain.tokenizer_2),
        ):
            plain.load_textual_inversion(
                vectors[key], f"<{word}>", text_encoder=encoder, tokenizer=tokenizer
            )
    prompt = "a photo of <me> in the snow, <it>"
    theirs = embed(plain, prompt)
    without = tiny.encode_prompts([prompt])
    with tiny.apply_adapters([(read_adapter(tmp_path / "a.safetensors"), 1.0)]):
        ours = tiny.encode_prompts([prompt])
    assert mse_loss(without.tokens, ours.tokens) > 1e-4
    torch.testing.assert_close(theirs.tokens, ours.tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs.pooled, ours.pooled, rtol=1e-4, atol=1e-5)


def test_a_new_word_begins_as_the_mean_of_its_words(tiny: SDXLModel) -> None:
    def row(word: str) -> torch.Tensor:
        token = tiny._pipeline.tokenizer(word, add_special_tokens=False).input_ids
        return tiny._pipeline.text_encoder.embeddings.token_embedding.weight[token].mean(dim=0)

    wanted = (row("person") + row("dog")) / 2
    tiny.attach_adapter(replace(PLAIN, tokens={"<me>": "person dog"}))
    found = tiny.read_adapter().tokens["<me>"]["text_encoder"]
    torch.testing.assert_close(found, wanted[None])


def test_words_are_known_only_while_applied(tiny: SDXLModel) -> None:
    adapter = strengthen(tiny, replace(PLAIN, tokens={"<me>": "person"}))
    tokenizer = tiny._pipeline.tokenizer
    size = len(tokenizer)
    with tiny.apply_adapters([(adapter, 0.5)]):
        assert len(tiny._pipeline.tokenizer) == size + 1
    assert tiny._pipeline.tokenizer is tokenizer
    assert len(tokenizer) == size
    with tiny.apply_adapters([(adapter, 0.0)]):
        assert tiny._pipeline.tokenizer is tokenizer


def test_words_that_contradict_each_other_are_refused(tiny: SDXLModel) -> None:
    one, two = (
        strengthen(tiny, replace(PLAIN, tokens={"<me>": start})) for start in ("dog", "person")
    )
    with (
        pytest.raises(AdapterError, match="teach the word <me>"),
        tiny.apply_adapters([(one, 1.0), (two, 1.0)]),
    ):
        pass
    with tiny.apply_adapters([(one, 0.5), (one, 0.5)]):
        pass
    narrow = {"<me>": {name: rows[:, :5] for name, rows in one.tokens["<me>"].items()}}
    base = weights_of(tiny)
    with (
        pytest.raises(AdapterError, match="does not fit the base"),
        tiny.apply_adapters([(replace(one, tokens=narrow), 1.0)]),
    ):
        pass
    assert_untouched(tiny, base)


def test_a_word_of_several_vectors_is_spelled_out_in_prompts(tiny: SDXLModel) -> None:
    rows = {"text_encoder": torch.randn(3, 32), "text_encoder_2": torch.randn(3, 48)}
    adapter = replace(strengthen(tiny, PLAIN), tokens={"<me>": rows})
    known = len(tiny._pipeline.tokenizer)
    with tiny.apply_adapters([(adapter, 1.0)]):
        tokenizer = tiny._pipeline.tokenizer
        prompt = tiny._pipeline.maybe_convert_prompt("a <me>", tokenizer)
        assert tokenizer(prompt).input_ids[-4:-1] == [known, known + 1, known + 2]


# ------------------------------------------------------------------ merging


def test_merging_refuses_other_kinds_by_name(tiny: SDXLModel) -> None:
    lora, dora = strengthen(tiny, PLAIN), strengthen(tiny, replace(PLAIN, kind="dora"))
    with pytest.raises(AdapterError, match="DoRA; only a LoRA"):
        combine([lora, dora], MergeRequest([1.0, 1.0]))
    with pytest.raises(AdapterError, match=r"x\.safetensors is a DoRA"):
        refuse_other_kinds(dora, "x.safetensors", "can be merged")
    with pytest.raises(AdapterError, match="norm"):
        dora.norm()


def test_a_merge_keeps_the_words_of_its_parts(tiny: SDXLModel) -> None:
    one = strengthen(tiny, replace(PLAIN, tokens={"<me>": "person"}))
    two = strengthen(tiny, replace(PLAIN, tokens={"<it>": "dog"}))
    assert list(combine([one, two], MergeRequest([1.0, 0.5])).adapter.tokens) == ["<me>", "<it>"]
    assert list(combine([one, two], MergeRequest([1.0, 0.0])).adapter.tokens) == ["<me>"]
    clash = replace(two, tokens={"<me>": two.tokens["<it>"]})
    with pytest.raises(AdapterError, match="<me>"):
        combine([one, clash], MergeRequest([1.0, 1.0]))


def test_an_adapter_that_cannot_be_attached_leaves_the_base(
    tiny: SDXLModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreamloom.models import peft_adapter as attach

    def fail(*_: object) -> None:
        raise MemoryError

    base = weights_of(tiny)
    monkeypatch.setattr(attach.AttachedAdapter, "_begin", fail)
    with pytest.raises(MemoryError):
        tiny.attach_adapter(replace(PLAIN, text_encoders=True))
    assert_untouched(tiny, base)
    assert not tiny.trains_text


@pytest.mark.parametrize("kind", ["loha", "oft"])
def test_an_adapter_of_another_base_is_refused_whatever_its_kind(
    kind: str, tiny: SDXLModel
) -> None:
    adapter = strengthen(tiny, replace(PLAIN, kind=kind, rank=4))
    assert adapter.peft is not None
    cut = {key: tensor[:, :1] for key, tensor in adapter.peft.tensors.items()}
    broken = replace(adapter, peft=replace(adapter.peft, tensors=cut))
    base = weights_of(tiny)
    with (
        pytest.raises(AdapterError, match="cannot be rebuilt"),
        tiny.apply_adapters([(broken, 1.0)]),
    ):
        pass
    assert_untouched(tiny, base)


def test_a_loaded_adapter_is_read_back_the_same(tiny: SDXLModel) -> None:
    """Factors, scales and embeddings of new words."""
    spec = replace(PLAIN, alpha=2 * PLAIN.rank, text_encoders=True, tokens={"<me>": "dog"})
    adapter = strengthen(tiny, spec)
    tiny.attach_adapter(replace(spec, seed=9))
    try:
        tiny.load_adapter(adapter)
        found = tiny.read_adapter()
    finally:
        tiny.detach_adapter()
    for name, layer in adapter.layers.items():
        assert torch.equal(found.layers[name].down, layer.down)
        assert torch.equal(found.layers[name].up, layer.up)
    for encoder, rows in adapter.tokens["<me>"].items():
        assert torch.equal(found.tokens["<me>"][encoder], rows)
