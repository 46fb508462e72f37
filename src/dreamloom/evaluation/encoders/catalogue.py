"""The models that encoders are made of: one list, pinned by revision and by hash.

A hash stands here only where a public record names it for these very bytes. Where none does it is
None; it is then taken when the model is fetched, kept in the lock file beside it, and compared
each time the model is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from dreamloom.core.errors import EvaluationError
from dreamloom.core.toml_files import offer

WeightsSource: TypeAlias = Literal["hub", "converted", "package", "embedded", "none"]

READABLE = (".safetensors", ".onnx", ".json")
"""Only such files are fetched: none of them can run code when it is read, as pickles can."""


@dataclass(frozen=True)
class ModelFile:
    """One file of a model.

    Args:
        name: As it is named where it comes from.
        sha256: Of its bytes, where a public record tells it.
        size: Its bytes, where a public record tells them.
    """

    name: str
    sha256: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class Pinned:
    """A model that encoders use: always the same bytes.

    Args:
        name: As users name it.
        purpose: What is measured with it.
        licence: What its authors allow.
        source: ``hub`` is fetched from the Hugging Face hub; ``converted`` is written by the user
            from its authors' pickle; ``package`` comes with a Python package; ``embedded`` with
            DreamLoom; ``none`` is not offered, and ``note`` says why.
        repository: Owner and name on the hub, or where its authors publish it.
        revision: The commit; None if no public record tells it, and its hashes identify it.
        files: What is read, its weights first.
        size_mib: About how much there is to fetch.
        extra: What must be installed with DreamLoom to read it.
        note: What else to know.
    """

    name: str
    purpose: str
    licence: str
    source: WeightsSource
    repository: str = ""
    revision: str | None = None
    files: tuple[ModelFile, ...] = ()
    size_mib: float | None = None
    extra: str = ""
    note: str = ""

    @property
    def can_be_fetched(self) -> bool:
        """Whether ``dreamloom models fetch`` knows how to get it, or to take it from a folder."""
        return self.source in {"hub", "converted"}

    @property
    def hashes_known(self) -> bool:
        """Whether each file's hash is known before it is fetched."""
        return bool(self.files) and all(file.sha256 for file in self.files)

    @property
    def wanted(self) -> str:
        """What a user can do to have it, as a clause."""
        if self.source == "hub":
            return f"fetch it with 'dreamloom models fetch {self.name}'"
        if self.source == "converted":
            return (
                f"its authors publish only a pickle; convert it as docs/encoders.md tells, then "
                f"'dreamloom models fetch {self.name} --from FILE'"
            )
        return f"install it with 'pip install \"dreamloom[{self.extra}]\"'"


# The hub's own conversion of OpenAI's weights to safetensors; the main branch has only a pickle.
CLIP_VIT_B_32 = Pinned(
    name="clip",
    purpose="what is shown (CLIP-I), and whether it is what the prompt says (CLIP-T)",
    licence="MIT",
    source="hub",
    repository="openai/clip-vit-base-patch32",
    revision="b33cedfd0df4e43b8238760678fcc89e1a0d38b3",
    files=(
        ModelFile(
            "model.safetensors",
            "99d28a652e6ec46629ab7047a0ac82c69b1fe11e0ce672c43af65d3a9a3fc05d",
            605_157_884,
        ),
        ModelFile(
            "config.json",
            "b575ef3c36f2a057fa19e221650105052d61cc9c1a972ec15019c6261ec98770",
            4_186,
        ),
        ModelFile(
            "tokenizer.json",
            "b556ac8c99757ffb677208af34bc8c6721572114111a6e0aaf5fa69ff0b8d842",
            2_224_041,
        ),
    ),
    size_mib=579.3,
)
# The DreamBooth paper's encoder. facebook/dino-vits16 holds a pickle; timm has the same weights in
# safetensors, under the names that DINO's authors gave them.
DINO_VIT_S_16 = Pinned(
    name="dino",
    purpose="how the subject looks in detail, as in the DreamBooth paper",
    licence="Apache-2.0",
    source="hub",
    repository="timm/vit_small_patch16_224.dino",
    files=(ModelFile("model.safetensors"),),
    size_mib=83.0,
)
DINOV2_VIT_S_14 = Pinned(
    name="dinov2",
    purpose="the same by a later and stronger encoder",
    licence="Apache-2.0",
    source="hub",
    repository="facebook/dinov2-small",
    revision="ed25f3a31f01632728cabb09d1542f84ab7b0056",
    files=(
        ModelFile(
            "model.safetensors",
            "ae1e99fcefd534ed978cdeb8326f08030c96e28b7a81ffcbc98a857c84d14be1",
            88_249_960,
        ),
        ModelFile(
            "config.json", "1809f83e3bdb1609a501a610ad4a742f4fd8ae44d72ca4aa0df52d1f2ac8628d", 547
        ),
    ),
    size_mib=84.2,
)
YUNET = Pinned(
    name="yunet",
    purpose="where the faces are",
    licence="MIT",
    source="hub",
    repository="opencv/face_detection_yunet",
    revision="3cc26e7f1014a5ee5d74a42acee58bafc9d0a310",
    files=(
        ModelFile(
            "face_detection_yunet_2023mar.onnx",
            "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
            232_589,
        ),
    ),
    size_mib=0.2,
    extra="faces",
    note="its authors trained it on WIDER FACE",
)
SFACE = Pinned(
    name="sface",
    purpose="whose face it is",
    licence="Apache-2.0",
    source="hub",
    repository="opencv/face_recognition_sface",
    revision="3d7082438a6e4551e840c9b2bb60b71e8da4b524",
    files=(
        ModelFile(
            "face_recognition_sface_2021dec.onnx",
            "0ba9fbfa01b5270c96627c4ef784da859931e02f04419c829e83484087c34e79",
            38_696_353,
        ),
    ),
    size_mib=36.9,
    extra="faces",
    note="needs yunet; its authors do not say what it was trained on",
)
DLIB = Pinned(
    name="dlib",
    purpose="whose face it is: a second opinion",
    licence="CC0-1.0 (weights), BSL-1.0 (dlib)",
    source="package",
    repository="face_recognition_models 0.3.0 on PyPI",
    files=(
        ModelFile(
            "dlib_face_recognition_resnet_model_v1.dat",
            "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
            22_466_066,
        ),
        ModelFile(
            "shape_predictor_5_face_landmarks.dat",
            "c4b1e9804792707d3a405c2c16a80a20269e6675021f64a41d30fffafbc41888",
            9_150_489,
        ),
    ),
    size_mib=95.5,
    extra="dlib",
    note="dlib's own binary format, which runs no code when it is read",
)
SSCD = Pinned(
    name="sscd",
    purpose="whether a picture is a copy of a photo",
    licence="MIT",
    source="converted",
    repository="github.com/facebookresearch/sscd-copy-detection",
    files=(ModelFile("model.safetensors"),),
    note="sscd_disc_mixup",
)
LPIPS = Pinned(
    name="lpips",
    purpose="how different pictures look (diversity)",
    licence="BSD-2-Clause",
    source="converted",
    repository="github.com/richzhang/PerceptualSimilarity",
    files=(ModelFile("model.safetensors"),),
    note="version 0.1 with AlexNet",
)
CSD = Pinned(
    name="csd",
    purpose="in which style a picture is made",
    licence="MIT",
    source="converted",
    repository="github.com/learn2phoenix/CSD",
    files=(ModelFile("model.safetensors"),),
    note="CSD-ViT-L; its authors say that these weights do not repeat their paper's figures",
)
PICTUREBOOK = Pinned(
    name="picturebook",
    purpose="the judges of the embedded model: who and what is drawn, and in which style",
    licence="as DreamLoom",
    source="embedded",
)
DREAMSIM = Pinned(
    name="dreamsim",
    purpose="whether a picture is a copy of a photo",
    licence="MIT",
    source="none",
    note="its authors publish only pickles; sscd answers the same question",
)
INSIGHTFACE = Pinned(
    name="insightface",
    purpose="whose face it is",
    licence="non-commercial research only (its packs of weights)",
    source="none",
    note="the licence of its weights does not let everybody use them; sface and dlib do",
)

MODELS: tuple[Pinned, ...] = (
    CLIP_VIT_B_32,
    DINO_VIT_S_16,
    DINOV2_VIT_S_14,
    YUNET,
    SFACE,
    DLIB,
    SSCD,
    LPIPS,
    CSD,
    PICTUREBOOK,
    DREAMSIM,
    INSIGHTFACE,
)


def find_model(name: str) -> Pinned:
    """Find a model of the list that can be fetched.

    Raises:
        EvaluationError: If there is none of that name, or it is not one to fetch.
    """
    allowed = [model.name for model in MODELS if model.can_be_fetched]
    known = {model.name: model for model in MODELS}
    model = known.get(name)
    hint = f"These can be fetched: {', '.join(allowed)}."
    if model is None:
        raise EvaluationError(f"There is no model named {name!r}.", offer(name, allowed))
    if model.source == "package":
        raise EvaluationError(f"{name} comes with a Python package: {model.wanted}.", hint)
    if model.source == "embedded":
        raise EvaluationError(f"{name} is embedded: there is nothing to fetch.", hint)
    if model.source == "none":
        raise EvaluationError(f"{name} is not offered: {model.note}.", hint)
    return model
