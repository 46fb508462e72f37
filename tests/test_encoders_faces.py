"""Faces are found, aligned and told apart; who has none says so. Weights stand in, OpenCV is real.

YuNet's stand-in takes pure red for a face, SFace's gives a face's mean colour: both through the
shapes and names of the real ones, so that OpenCV reads them as it reads those.
"""

import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from dreamloom.core.errors import EvaluationError
from dreamloom.evaluation.encoders.base import FaceExtractor
from dreamloom.evaluation.encoders.catalogue import DLIB
from dreamloom.evaluation.encoders.face_boxes import Found, keep_separate, list_halves, to_bgr
from dreamloom.evaluation.encoders.faces import DlibFaceEncoder, FaceEncoder, judge_size, stack_rows
from dreamloom.evaluation.encoders.store import Kept, find_kept

CELL = 32  # a stand-in face is three cells of the coarsest grid wide


def save(nodes, inputs, outputs, constants, path):
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)])
    model.ir_version = 6
    onnx.save(model, path)
    return path


def value(name, shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def make_yunet(path, side=640):
    """Sure of a face wherever a cell is all red; its box and its points lie around the cell."""
    red = np.float32([[-1, -1, 1]]).reshape(1, 3, 1, 1) / 255  # OpenCV gives blue, green, red
    constants = [numpy_helper.from_array(red, "red")]
    nodes = [
        helper.make_node("Conv", ["input", "red"], ["excess"]),
        helper.make_node("Relu", ["excess"], ["redness"]),
    ]
    outputs = []
    points = [-0.5, -0.5, 0.5, -0.5, 0, 0, -0.4, 0.6, 0.4, 0.6]
    for stride in (8, 16, 32):
        grid = f"grid{stride}"
        nodes.append(
            helper.make_node(
                "AveragePool",
                ["redness"],
                [grid],
                kernel_shape=[stride, stride],
                strides=[stride, stride],
            )
        )
        heads = {"cls": None, "obj": None, "bbox": [0, 0, np.log(3), np.log(3)], "kps": points}
        for head, constant in heads.items():
            width = len(constant) if constant else 1
            name = f"{head}_{stride}"
            scale = np.full((width, 1, 1, 1), float(not constant and stride == CELL), np.float32)
            shift = np.float32(constant or [0])
            shape = np.int64([1, -1, width])
            constants += [
                numpy_helper.from_array(array, f"{part}_{name}")
                for part, array in (("scale", scale), ("shift", shift), ("shape", shape))
            ]
            nodes += [
                helper.make_node("Conv", [grid, f"scale_{name}", f"shift_{name}"], [f"map_{name}"]),
                helper.make_node("Transpose", [f"map_{name}"], [f"last_{name}"], perm=[0, 2, 3, 1]),
                helper.make_node("Reshape", [f"last_{name}", f"shape_{name}"], [name]),
            ]
            outputs.append(value(name, [1, (side // stride) ** 2, width]))
    return save(nodes, [value("input", [1, 3, side, side])], outputs, constants, path)


def make_sface(path):
    nodes = [
        helper.make_node("GlobalAveragePool", ["data"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["fc1"]),
    ]
    return save(nodes, [value("data", [1, 3, 112, 112])], [value("fc1", [1, 3])], [], path)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    detector, recogniser = make_yunet(folder / "yunet.onnx"), make_sface(folder / "sface.onnx")
    return FaceEncoder(detector, recogniser, "sface@1+yunet@1")


def scene(size=(300, 260), face=(96, 64), colour=(255, 0, 0), paper=(0, 0, 0)):
    """A picture with one red cell of the coarsest grid: a stand-in face around it."""
    image = Image.new("RGB", size, paper)
    if face:
        left, top = face
        image.paste(colour, (left, top, left + CELL, top + CELL))
    return image


def test_a_face_is_found_where_it_is(faces):
    (reading,) = faces.find([scene()])
    assert (reading.status, reading.count) == ("scored", 1)
    # The box is centred on the cell's corner, as YuNet's are, and three cells wide.
    assert reading.box == pytest.approx((96 - 48, 64 - 48, 96, 96), abs=0.5)
    points = [(80, 48), (112, 48), (96, 64), (83.2, 83.2), (108.8, 83.2)]
    assert np.allclose(reading.landmarks, points, atol=0.5)
    assert reading.score == pytest.approx(1, abs=0.01)
    assert reading.features.norm() == pytest.approx(1, abs=1e-6)


def test_colours_arrive_in_the_models_order(faces):
    # The detector's stand-in sees red only where OpenCV expects it, the recogniser's gives back
    # the colours of the aligned face: red, and what the paper has of green.
    assert [one.status for one in faces.find([scene(colour=(0, 0, 255))])] == ["no_face"]
    (reading,) = faces.find([scene(paper=(0, 60, 0))])
    red, green, blue = reading.features.tolist()
    assert green > 0.3
    assert red > 0.1
    assert blue == pytest.approx(0, abs=1e-6)


def test_bgr_is_rgb_backwards():
    assert to_bgr(Image.new("RGB", (2, 3), (1, 2, 3))).tolist() == [[[3, 2, 1]] * 2] * 3
    assert to_bgr(Image.new("RGB", (2, 3))).flags.c_contiguous


def test_who_has_no_face_gets_a_row_of_nan(faces):
    found = faces.embed([scene(), scene(face=None), scene()])
    assert found.shape == (3, faces.width)
    assert found.isnan().all(dim=1).tolist() == [False, True, False]
    assert torch.equal(found[0], found[2])
    assert faces.may_miss
    assert faces.embed([]).shape == (0, faces.width)


def test_a_large_face_is_found_in_a_small_copy(faces):
    # No cell of the full-size picture sees more than red, so that it alone would name many faces;
    # the large one that holds them all is the picture's face.
    image = scene((1280, 1280), None)
    image.paste((255, 0, 0), (512, 512, 640, 640))
    (reading,) = faces.find([image])
    assert reading.status == "scored"
    assert reading.box[2] >= 4 * 96 - 1
    assert reading.count == 1


def test_scales_reach_down_to_the_largest_face_that_the_detector_knows():
    assert list_halves((224, 224)) == [1]
    assert list_halves((1024, 1024)) == [1, 2, 4]
    assert list_halves((3000, 4000)) == [1, 2, 4, 8, 16]


def test_the_largest_of_several_faces_counts(faces):
    image = scene((640, 300), (96, 96))
    image.paste((255, 0, 0), (448, 96, 480, 128))
    (reading,) = faces.find([image])
    assert reading.count == 2


def face(left, top, side, score=0.95):
    return Found((float(left), float(top), float(side), float(side)), (), score)


def test_what_lies_inside_a_face_is_no_face():
    large, eye, twin, other = face(0, 0, 100), face(20, 20, 20), face(3, 2, 98), face(150, 0, 60)
    for order in ([large, eye, twin, other], [other, twin, eye, large]):
        assert keep_separate(order) == [large, other]
    assert keep_separate([]) == []


@pytest.mark.parametrize(
    ("side", "eyes", "status"),
    [(64, 20, "scored"), (63, 30, "too_small"), (80, 19, "too_small"), (300, 120, "scored")],
)
def test_small_faces_are_told_apart_from_none(side, eyes, status):
    side, left, right = float(side), (10.0, 10.0), (10.0 + eyes, 10.0)
    assert judge_size((0.0, 0.0, side, 90.0), left, right) == status
    assert judge_size((0.0, 0.0, 90.0, side), left, right) == status


def test_a_face_too_small_to_be_told_has_no_features(faces, monkeypatch):
    monkeypatch.setattr("dreamloom.evaluation.encoders.faces.SMALLEST_BOX_PX", 97)
    (reading,) = faces.find([scene()])
    assert (reading.status, reading.count, reading.features) == ("too_small", 1, None)
    assert stack_rows([reading], 3).isnan().all()


def test_only_rgb_pictures_are_looked_at(faces):
    with pytest.raises(ValueError, match="must be 8-bit RGB, got L"):
        faces.find([scene().convert("L")])


def test_the_key_names_both_models(faces):
    assert faces.key == "sface@1+yunet@1/aligned-112"
    assert isinstance(faces, FaceExtractor)


def test_damaged_models_are_explained(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(EvaluationError, match=r"OpenCV cannot read broken\.onnx"):
        FaceEncoder(tmp_path / "broken.onnx", tmp_path / "broken.onnx", "x")
    with pytest.raises(EvaluationError, match="there is no file"):
        FaceEncoder(tmp_path / "absent.onnx", tmp_path / "absent.onnx", "x")


class Rectangle:
    """As dlib gives one."""

    def __init__(self, left, top, side):
        self._numbers = {"left": left, "top": top, "width": side, "height": side}
        self._area = side * side

    def __getattr__(self, name):
        return lambda: self._numbers[name]

    def area(self):
        return self._area


class Spot:
    def __init__(self, x, y):
        self.x, self.y = x, y


class StandInDlib:
    """dlib's interface, for machines without it; see docs/encoders.md for a run of the real one."""

    eyes = 40

    @classmethod
    def get_frontal_face_detector(cls):
        return cls()

    def run(self, rgb, upsample, threshold):
        is_red = (rgb[0, 0] == (255, 0, 0)).all()
        return (
            ([Rectangle(5, 6, 70), Rectangle(100, 9, 90)], [0.5, 0.7], [0, 0])
            if is_red
            else (
                [],
                [],
                [],
            )
        )

    def shape_predictor(self, path):
        def predict(rgb, box):
            left = box.left()
            right = [Spot(left + self.eyes, 30), Spot(left + self.eyes + 10, 30)]
            return type(
                "Shape",
                (),
                {
                    "parts": lambda _: [
                        *right,
                        Spot(left, 30),
                        Spot(left + 10, 30),
                        Spot(left + 25, 60),
                    ]
                },
            )()

        return predict

    def face_recognition_model_v1(self, path):
        describe = type("Model", (), {"compute_face_descriptor": lambda _, rgb, shape: [3.0] * 128})
        return describe()


def test_dlib_takes_the_largest_face_and_its_eyes(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "dlib", StandInDlib())
    encoder = DlibFaceEncoder(tmp_path, "dlib@1")
    pictures = [Image.new("RGB", (200, 120), colour) for colour in ("red", "black")]
    found, none = encoder.find(pictures)
    assert (found.status, found.count, found.box) == ("scored", 2, (100.0, 9.0, 90.0, 90.0))
    assert (none.status, none.count) == ("no_face", 0)
    assert encoder.embed(pictures)[0].norm() == pytest.approx(1, abs=1e-6)
    monkeypatch.setattr(StandInDlib, "eyes", 15)
    assert encoder.find(pictures[:1])[0].status == "too_small"


def test_dlib_itself_reads_its_pinned_weights():
    pytest.importorskip("dlib", reason="needs dreamloom[dlib]")
    kept = find_kept(DLIB)
    if not isinstance(kept, Kept):
        pytest.skip(kept.reason)
    encoder = DlibFaceEncoder(kept.folder, kept.name)
    assert encoder.key.startswith("dlib_face_recognition_resnet_model_v1.dat@55533b28a958/")
    (reading,) = encoder.find([Image.new("RGB", (200, 200), "grey")])
    assert reading.status == "no_face"
