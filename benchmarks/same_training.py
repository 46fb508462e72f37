"""The same updates on both sides: what diffusers' script drew at random is fed to ours.

`train_vs_diffusers.py --check` starts it twice. The first run is the script's, unchanged; it writes
down the adapter's first and last weights and, for each update, the noise of the latents' sampling,
the noise, the timesteps and the pixels. The second run is ours: each update meets these, from these
first weights. It prints how far the two updates of the layers' weights, last minus first, lie
apart, as a share of their size, over all layers and for the worst of them.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from run_training import Clock, make_config, parse, prepare_ours, run_script
from safetensors.torch import load_file, save_file
from torch import Tensor

PARTS = ("unet", "text_encoder", "text_encoder_2")


def find_factors(components: dict[str, Any]) -> dict[str, Tensor]:
    """Copy the adapter's factors by layer: ``unet.….down`` and ``….up``."""
    found = {}
    for part, module in components.items():
        for name, weight in module.named_parameters():
            for spelled, ours in ((".lora_A.", "down"), (".lora_B.", "up")):
                if spelled in name:
                    layer = name.partition(spelled)[0]
                    found[f"{part}.{layer}.{ours}"] = weight.detach().clone()
    return found


# ------------------------------------------------------------------ the script


@contextmanager
def listening(told: dict[str, Tensor]) -> Iterator[None]:
    """Write down what the script draws, and which pixels it encodes."""
    from diffusers import AutoencoderKL
    from diffusers.models.autoencoders import vae

    counts: dict[str, int] = {}

    def note(kind: str, value: Tensor) -> Tensor:
        number = counts.get(kind, 0)
        counts[kind] = number + 1
        told[f"{kind}.{number}"] = value.detach().clone()
        return value

    randn, randn_like, randint = vae.randn_tensor, torch.randn_like, torch.randint
    encode = AutoencoderKL.encode

    def draw_steps(*args: Any, **options: Any) -> Tensor:
        drawn = randint(*args, **options)
        is_timesteps = len(args) == 3 and args[:2] == (0, 1000)
        return note("timesteps", drawn) if is_timesteps else drawn

    with (
        mock.patch.object(vae, "randn_tensor", lambda *a, **k: note("posterior", randn(*a, **k))),
        mock.patch.object(torch, "randn_like", lambda *a, **k: note("noise", randn_like(*a, **k))),
        mock.patch.object(torch, "randint", draw_steps),
        mock.patch.object(
            AutoencoderKL,
            "encode",
            lambda self, pixels, *a, **k: encode(self, note("pixels", pixels), *a, **k),
        ),
    ):
        yield


@contextmanager
def catching(components: dict[str, Any]) -> Iterator[None]:
    """Keep hold of the models that the script puts adapters on, in its order."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kinds = (UNet2DConditionModel, CLIPTextModel, CLIPTextModelWithProjection)
    with ExitStack() as stack:
        for part, kind in zip(PARTS, kinds, strict=True):
            add = kind.add_adapter

            def caught(self: Any, *args: Any, part: str = part, add: Any = add, **more: Any) -> Any:
                components[part] = self
                return add(self, *args, **more)

            stack.enter_context(mock.patch.object(kind, "add_adapter", caught))
        yield


def follow_script(given: argparse.Namespace, clock: Clock) -> None:
    """Run the script and write down everything that ours must meet."""
    told: dict[str, Tensor] = {}
    components: dict[str, Any] = {}

    def begin(optimizer: Any) -> None:
        del optimizer
        number = len(clock.times) - 1
        if number in (0, given.updates):
            kind = "first" if number == 0 else "last"
            told.update({f"{kind}.{k}": v for k, v in find_factors(components).items()})

    clock.on_step = begin
    with listening(told), catching(components):
        run_script(given, [])
    save_file({name: value.contiguous() for name, value in told.items()}, given.result)


# ------------------------------------------------------------------ ours


def follow_told(given: argparse.Namespace, clock: Clock) -> dict[str, float]:
    """Train on what the script met; return how far the two adapters lie apart."""
    told = load_file(given.result)
    found: dict[str, Tensor] = {}
    run, model, photos, priors = prepare_ours(given)
    attach = model.attach_adapter

    def attach_told(*args: Any, **options: Any) -> Any:
        weights = attach(*args, **options)
        with torch.no_grad():
            for name, weight in name_factors(model._components):
                # What the script does not teach stays as it is: without a change.
                if f"first.{name}" in told:
                    weight.copy_(told[f"first.{name}"])
                else:
                    weight.requires_grad_(False)
        return [
            type(one)(one.role, tuple(p for p in one.parameters if p.requires_grad))
            for one in weights
        ]

    def begin(optimizer: Any) -> None:
        del optimizer
        if len(clock.times) - 1 == given.updates:
            found.update(find_factors(model._components))

    clock.on_step = begin
    with (
        mock.patch.object(model, "attach_adapter", attach_told),
        dealing(told, given),
    ):
        from dreamloom.training.train import train_adapter

        train_adapter(run, model, photos, priors, make_config(given))
    return compare(told, found)


def name_factors(components: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Name the factors as `find_factors` does, themselves and not copies."""
    for part, module in components.items():
        for name, weight in module.named_parameters():
            for spelled, ours in ((".lora_A.", "down"), (".lora_B.", "up")):
                if spelled in name:
                    yield f"{part}.{name.partition(spelled)[0]}.{ours}", weight


@contextmanager
def dealing(told: dict[str, Tensor], given: argparse.Namespace) -> Iterator[None]:
    """Deal the pictures that the script met, and throw its dice."""
    from dreamloom.data.image_io import open_upright
    from dreamloom.data.tensors import to_tensor
    from dreamloom.training import batches as lessons
    from dreamloom.training import step as updates

    make_batches = lessons.TrainingBatches.draw_samples

    def find(pixels: Tensor, kind: str) -> int:
        files = sorted((given.pictures / kind).iterdir())
        apart = [
            float((to_tensor([open_upright(file)])[0] * 2 - 1 - pixels).abs().max())
            for file in files
        ]
        if min(apart) > 1e-6:
            raise ValueError(f"the script's pixels are those of none of {kind}")
        return apart.index(min(apart))

    def deal_told(self: Any, number: int, share: Any) -> Any:
        photo, prior = make_batches(self, number, share)
        pixels = told[f"pixels.{number}"]
        names = [self.photos[n].source for n in range(len(self.photos))]
        source = sorted(p.name for p in (given.pictures / "photos").iterdir())
        photo = type(photo)(
            photo.kind, names.index(source[find(pixels[0], "photos")]), (0, 0, False), photo.number
        )
        prior = type(prior)(prior.kind, find(pixels[1], "priors"), prior.place, prior.number)
        return [photo, prior]

    def draw(rng: Any, purpose: str, shape: Any) -> Tensor:
        del shape
        return told[f"{purpose}.{rng.update}"]

    with (
        mock.patch.object(lessons.TrainingBatches, "draw_samples", deal_told),
        mock.patch.object(updates, "draw_normal", draw),
        mock.patch.object(updates, "draw_noise", lambda rng, *_: told[f"noise.{rng.update}"]),
        mock.patch.object(
            updates, "draw_timesteps", lambda rng, *_, **__: told[f"timesteps.{rng.update}"]
        ),
    ):
        yield


def compare(told: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, float]:
    """Compare the two updates of each layer's weight, up times down, in float64."""
    layers = sorted(
        name.removeprefix("last.").removesuffix(".down")
        for name in told
        if name.startswith("last.") and name.endswith(".down")
    )
    apart, sizes, worst = 0.0, 0.0, 0.0
    for layer in layers:
        theirs = told[f"last.{layer}.up"].double() @ told[f"last.{layer}.down"].double()
        if not theirs.any():
            # The first encoder's last layer, which SDXL does not read.
            continue
        ours = found[f"{layer}.up"].double() @ found[f"{layer}.down"].double()
        apart += float((ours - theirs).square().sum())
        sizes += float(theirs.square().sum())
        worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
    return {"layers": len(layers), "apart": (apart / sizes) ** 0.5, "worst_layer": worst}


def main() -> None:
    """Follow the script, or what it told."""
    given, _ = parse()
    torch.set_num_threads(1)
    clock = Clock(given.updates)
    if given.who == "script":
        follow_script(given, clock)
    else:
        print(json.dumps(follow_told(given, clock)))


if __name__ == "__main__":
    main()
