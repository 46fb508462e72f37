"""The judges: small networks, trained on drawings only, that say what a picture shows.

They exist to measure the base model and what is taught to it, and are trained apart from it. An
identity encoder tells whether two pictures show the same figure, an attribute reader names what
it sees, how familiar a picture looks and how alike two are made, and a CLIP compares pictures with
words.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PICTURE_PX = 128
_STEM_CHANNELS = 32
# (channels, residual blocks) at 32, 16 and 8 px.
_STAGES = ((48, 1), (96, 2), (160, 2))
_GROUPS = 8
FEATURES = 2 * _STAGES[-1][0]
STATISTICS = 2 * sum(channels for channels, _ in _STAGES)
_EMBEDDING = 64
_WEIGHTS_FILE = "model.safetensors"
_CONFIG_FILE = "config.json"
_BATCH = 64

Pixels = Float[Tensor, "n 3 h w"]


class _Block(nn.Module):
    """A residual block of two normalised 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(_GROUPS, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        inner = self.conv1(nn.functional.silu(self.norm1(x)))
        result: Tensor = x + self.conv2(nn.functional.silu(self.norm2(inner)))
        return result


class Trunk(nn.Module):
    """The convolutional network beneath the identity encoder and the attribute reader."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, _STEM_CHANNELS, 5, stride=2, padding=2)
        stages: list[nn.Module] = []
        before = _STEM_CHANNELS
        for channels, blocks in _STAGES:
            down = nn.Conv2d(before, channels, 3, stride=2, padding=1)
            stages.append(
                nn.Sequential(
                    nn.GroupNorm(_GROUPS, before),
                    nn.SiLU(),
                    down,
                    *(_Block(channels) for _ in range(blocks)),
                )
            )
            before = channels
        self.stages = nn.ModuleList(stages)
        self.norm = nn.GroupNorm(_GROUPS, before)

    def maps(self, pixels: Pixels) -> list[Float[Tensor, "n c h w"]]:
        """Return the feature maps at 32, 16 and 8 px."""
        x = self.stem(pixels * 2 - 1)
        maps: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, pixels: Pixels) -> Float[Tensor, "n features"]:
        """Return each picture's features: every channel's mean and maximum."""
        last = nn.functional.silu(self.norm(self.maps(pixels)[-1]))
        return torch.cat([last.mean(dim=(2, 3)), last.amax(dim=(2, 3))], dim=1)

    def statistics(self, pixels: Pixels) -> Float[Tensor, "n statistics"]:
        """Return the mean and the spread of every feature at every scale: what it is made of."""
        maps = self.maps(pixels)
        means = [m.mean(dim=(2, 3)) for m in maps]
        spreads = [m.std(dim=(2, 3)) for m in maps]
        return torch.cat([*means, *spreads], dim=1)


class IdentityEncoder(nn.Module):
    """Tells who is drawn, whatever the scene, the view, the clothes and the medium."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.head = nn.Linear(FEATURES, _EMBEDDING)
        self.key = "picturebook-identity@untrained"

    def forward(self, pixels: Pixels) -> Float[Tensor, "n d"]:
        """Return unit vectors, for pictures of the size trained on."""
        return nn.functional.normalize(self.head(self.trunk(pixels)), dim=1)

    @torch.no_grad()
    def embed(self, pixels: Pixels) -> Float[Tensor, "n d"]:
        """Return one unit vector per picture; the same figure's point in similar directions.

        Args:
            pixels: Pictures of any size with values in [0, 1].
        """
        return torch.cat([self(fit(part)) for part in pixels.split(_BATCH)])

    def save(self, folder: Path) -> None:
        """Write the weights in half precision."""
        _save(self, folder, {"kind": "identity"})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read weights written by `save`.

        Raises:
            FileNotFoundError: If the folder holds none.
        """
        encoder = cls()
        encoder.key = f"picturebook-identity@{_load(encoder, folder)}"
        return encoder


class AttributeReader(nn.Module):
    """Names what a drawing shows: kind, scene, medium, view, hair, glasses, hat and others.

    Args:
        vocabulary: Every attribute with its possible values. An empty value means that the
            attribute cannot be seen, such as hair colour in a pencil sketch.
    """

    familiar_mean: Float[Tensor, " statistics"]
    familiar_whitening: Float[Tensor, "statistics statistics"]
    familiar_limit: Float[Tensor, ""]
    style_mean: Float[Tensor, " statistics"]
    style_whitening: Float[Tensor, "statistics statistics"]

    def __init__(self, vocabulary: dict[str, list[str]]) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.trunk = Trunk()
        self.head = nn.Linear(FEATURES, sum(len(values) for values in vocabulary.values()))
        self.register_buffer("familiar_mean", torch.zeros(STATISTICS))
        self.register_buffer("familiar_whitening", torch.eye(STATISTICS))
        self.register_buffer("familiar_limit", torch.tensor(1.0))
        self.register_buffer("style_mean", torch.zeros(STATISTICS))
        self.register_buffer("style_whitening", torch.eye(STATISTICS))
        self.key = "picturebook-reader@untrained"

    def forward(self, pixels: Pixels) -> list[Float[Tensor, "n values"]]:
        """Return each attribute's logits, in the vocabulary's order."""
        sizes = [len(values) for values in self.vocabulary.values()]
        return list(self.head(self.trunk(pixels)).split(sizes, dim=1))

    @torch.no_grad()
    def read(self, pixels: Pixels) -> list[dict[str, str]]:
        """Name what each picture shows, in the words of `captions.attributes`.

        Args:
            pixels: Pictures of any size with values in [0, 1].

        Returns:
            One dictionary per picture, without the attributes that cannot be seen in it.
        """
        readings: list[dict[str, str]] = []
        for part in pixels.split(_BATCH):
            choices = [logits.argmax(dim=1).tolist() for logits in self(fit(part))]
            for row in zip(*choices, strict=True):
                values = zip(self.vocabulary.items(), row, strict=True)
                named = {name: options[choice] for (name, options), choice in values}
                readings.append({name: value for name, value in named.items() if value})
        return readings

    @torch.no_grad()
    def unfamiliarity(self, pixels: Pixels) -> Float[Tensor, " n"]:
        """Measure how far pictures lie outside the drawn world.

        The Mahalanobis distance of a picture's feature statistics from those of drawings, in
        units of the limit that one held-out drawing in two hundred exceeds.

        Args:
            pixels: Pictures of any size with values in [0, 1].

        Returns:
            One number per picture: up to about 1 for drawings; far above it, the judges'
            readings mean nothing.
        """
        distances = [self._distance(fit(part)) for part in pixels.split(_BATCH)]
        return torch.cat(distances) / self.familiar_limit

    def is_familiar(self, pixels: Pixels) -> list[bool]:
        """Tell for each picture whether it looks drawn in this world; real photos do not.

        Only the coarsest features decide: what a picture shows. The finer ones tell what it is
        made of, and a style that is taught, or an adapter that shifts the colours, moves these far
        without leaving the drawn world. The root mean square of the features' whitened deviations
        is about 1 for drawings; see `_FAMILIAR_STRAY`.
        """
        return (self._stray(pixels) <= _FAMILIAR_STRAY).tolist()

    @torch.no_grad()
    def _stray(self, pixels: Pixels) -> Float[Tensor, " n"]:
        scale = torch.linalg.inv(self.familiar_whitening)
        covariance = (scale @ scale.T)[_COARSEST][:, _COARSEST]
        factor = torch.linalg.cholesky(covariance)
        centred = (self._measure_statistics(pixels) - self.familiar_mean)[:, _COARSEST]
        whitened = torch.linalg.solve_triangular(factor, centred.T, upper=False)
        stray: Tensor = whitened.square().mean(dim=0).sqrt()
        return stray

    @torch.no_grad()
    def learn_familiar(self, drawings: Pixels, held_out: Pixels) -> None:
        """Fit what drawings look like, and set the limit on others held out from the fit."""
        statistics = self._measure_statistics(drawings)
        self.familiar_mean.copy_(statistics.mean(dim=0))
        self.familiar_whitening.copy_(_whiten(statistics.T.cov()))
        distances = torch.cat([self._distance(part) for part in held_out.split(_BATCH)])
        self.familiar_limit.copy_(distances.quantile(0.995))

    @torch.no_grad()
    def embed_style(self, pixels: Pixels) -> Float[Tensor, "n statistics"]:
        """Return one unit vector per picture; pictures made alike point in similar directions.

        What a picture is made of is told by the mean and spread of its features over the picture
        (Huang and Belongie, arXiv:1703.06868, section 5). Scaled by how much they vary from drawing
        to drawing of the same medium, as in a linear discriminant analysis, what is shown counts
        little and how it is made counts much, in media that no drawing has, too.

        Args:
            pixels: Pictures of any size with values in [0, 1].
        """
        centred = self._measure_statistics(pixels) - self.style_mean
        return nn.functional.normalize(centred @ self.style_whitening.T, dim=1)

    @torch.no_grad()
    def learn_style(self, drawings: Sequence[Pixels]) -> None:
        """Fit how drawings of one medium differ from each other.

        Args:
            drawings: Those of each medium.
        """
        measured = [self._measure_statistics(pixels) for pixels in drawings]
        means = torch.stack([statistics.mean(dim=0) for statistics in measured])
        within = [part - mean for part, mean in zip(measured, means, strict=True)]
        # Each medium counts as one, however many drawings show it.
        self.style_mean.copy_(means.mean(dim=0))
        covariances = [part.T @ part / (len(part) - 1) for part in within]
        self.style_whitening.copy_(_whiten(torch.stack(covariances).mean(dim=0)))

    def _measure_statistics(self, pixels: Pixels) -> Float[Tensor, "n statistics"]:
        return torch.cat([self.trunk.statistics(fit(part)) for part in pixels.split(_BATCH)])

    def _distance(self, pixels: Pixels) -> Float[Tensor, " n"]:
        centred = self.trunk.statistics(pixels) - self.familiar_mean
        distance: Tensor = (centred @ self.familiar_whitening.T).norm(dim=1)
        return distance

    def save(self, folder: Path) -> None:
        """Write the weights in half precision, and the vocabulary."""
        _save(self, folder, {"kind": "reader", "vocabulary": self.vocabulary})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read weights written by `save`.

        Raises:
            FileNotFoundError: If the folder holds none.
        """
        config = json.loads((folder / _CONFIG_FILE).read_text())
        reader = cls(config["vocabulary"])
        reader.key = f"picturebook-reader@{_load(reader, folder)}"
        return reader


class PicturebookStyleEncoder:
    """Tells how pictures are made, whatever they show: a reader's eye for style.

    Args:
        reader: Whose trunk it looks with.
    """

    def __init__(self, reader: AttributeReader) -> None:
        self._reader = reader
        self.key = reader.key.replace("reader", "style", 1)

    def embed(self, pixels: Pixels) -> Float[Tensor, "n statistics"]:
        """Return unit vectors; see `AttributeReader.embed_style`."""
        return self._reader.embed_style(pixels)


# Of what adapters and merges draw one picture in thirty lies beyond; of photographs four in five or
# more, of every kind that was tried.
_FAMILIAR_STRAY = 1.4
_DEEPEST = _STAGES[-1][0]
# The deepest stage's means end the first half of the statistics, its spreads the second.
_COARSEST = [*range(STATISTICS // 2 - _DEEPEST, STATISTICS // 2)]
_COARSEST += range(STATISTICS - _DEEPEST, STATISTICS)


def fit(pixels: Pixels) -> Pixels:
    """Scale pictures to the size that the judges were trained on."""
    if pixels.shape[-2:] == (PICTURE_PX, PICTURE_PX):
        return pixels.float()
    scaled: Tensor = nn.functional.interpolate(
        pixels.float(), (PICTURE_PX, PICTURE_PX), mode="bilinear", antialias=True
    )
    return scaled


def judges_folder() -> Path:
    """Return the folder that holds the shipped judges' weights."""
    return Path(__file__).parent / "weights" / "judges"


def clip_folder() -> Path:
    """Return the folder of the CLIP, for transformers' `from_pretrained`."""
    return judges_folder() / "clip"


def clip_key() -> str:
    """Name the CLIP and its revision."""
    return f"picturebook-clip@{_revision(clip_folder())}"


@cache
def load_identity_encoder() -> IdentityEncoder:
    """Load the shipped identity encoder, once per process."""
    return IdentityEncoder.load(judges_folder() / "identity").eval().requires_grad_(False)


@cache
def load_attribute_reader() -> AttributeReader:
    """Load the shipped attribute reader, once per process."""
    return AttributeReader.load(judges_folder() / "reader").eval().requires_grad_(False)


def load_style_encoder() -> PicturebookStyleEncoder:
    """Load the shipped encoder of styles: it looks with the attribute reader's eyes."""
    return PicturebookStyleEncoder(load_attribute_reader())


def vocabulary_of(stated: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """List every attribute's values; the empty one, first, stands for "cannot be seen"."""
    names = sorted({name for attributes in stated for name in attributes})
    return {
        name: ["", *sorted({attributes[name] for attributes in stated if name in attributes})]
        for name in names
    }


def _whiten(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Return W with W C Wᵀ = 1."""
    # A little of the mean variance keeps directions that drawings never vary in finite.
    ridge = 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance))
    whitening: Tensor = torch.linalg.inv(torch.linalg.cholesky(covariance + ridge))
    return whitening


def _save(judge: nn.Module, folder: Path, config: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    halves = {name: tensor.half().contiguous() for name, tensor in judge.state_dict().items()}
    save_file(halves, folder / _WEIGHTS_FILE, {"format": "pt"})
    (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")


def _load(judge: nn.Module, folder: Path) -> str:
    judge.load_state_dict(
        {name: tensor.float() for name, tensor in load_file(folder / _WEIGHTS_FILE).items()}
    )
    return _revision(folder)


def _revision(folder: Path) -> str:
    """Return eight hexadecimal digits that change with the weights."""
    return hashlib.sha256((folder / _WEIGHTS_FILE).read_bytes()).hexdigest()[:8]
