"""The session: one base model a process, chosen and loaded as the settings say, and kept."""

import pytest

from dreamloom.core.config.loading import load_config
from dreamloom.core.device import pick_runtime
from dreamloom.core.errors import BaseModelError
from dreamloom.models.base import MemoryOptions
from dreamloom.models.session import open_base
from dreamloom.pipeline.session import choose_base, open_session
from tiny import make_tiny_sdxl

CPU = pick_runtime("cpu")


def settings(base, **overrides):
    return load_config(overrides={"base": str(base), "device": "cpu", **overrides})


def test_a_base_is_loaded_once_and_another_takes_its_place(tiny_sdxl, tmp_path):
    first = open_base(str(tiny_sdxl), CPU)
    assert open_base(str(tiny_sdxl), CPU) is first
    other = open_base(str(make_tiny_sdxl(tmp_path / "other", seed=3)), CPU)
    assert other.identity.fingerprint != first.identity.fingerprint
    assert open_base(str(tiny_sdxl), CPU) is not first


def test_the_same_base_with_other_memory_options_is_another(tiny_sdxl):
    whole = open_base(str(tiny_sdxl), CPU)
    small = open_base(str(tiny_sdxl), CPU, MemoryOptions("int8"))
    assert (whole.memory_options.quantization, small.memory_options.quantization) == (
        "whole",
        "int8",
    )


def test_what_cannot_be_loaded_is_not_kept(tmp_path):
    for _ in range(2):
        with pytest.raises(BaseModelError):
            open_base(str(tmp_path / "nowhere"), CPU)


def test_a_session_is_what_the_settings_ask_for(tiny_sdxl):
    asked = settings(tiny_sdxl, **{"memory.base_quantization": "int8"})
    model, config = open_session(asked)
    assert model.memory_options == MemoryOptions("int8")
    assert (config.train.learning_rate, config.photos.resolution_px) == (
        model.advice.learning_rate,
        model.advice.resolution_px,
    )
    again, same = open_session(config)
    assert again is model
    assert same == config


@pytest.mark.parametrize(
    ("asked", "headers", "base"),
    [
        ({}, [{}, {"dreamloom.base": "a"}, {"dreamloom.base": "b"}], "a"),
        ({"base": "sdxl"}, [{"dreamloom.base": "a"}], "sdxl"),
        ({}, [{}], "picturebook"),
        ({}, [], "picturebook"),
    ],
)
def test_the_base_is_the_one_asked_for_or_else_the_adapters(asked, headers, base):
    assert choose_base(load_config(overrides=asked), headers).base == base
