"""What is predicted of a run's memory, held to what is counted on the real modules."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dreamloom.core.device import Runtime
from dreamloom.memory.choose import EIGHT_BIT, Limits, Work, choose_setting
from dreamloom.memory.device_memory import DeviceMemory
from dreamloom.memory.measure import count_folder
from dreamloom.memory.phases import Case, Run, count_phases, counted_run
from dreamloom.memory.predict import GIB, PHASES, Setting, predict_memory_use
from dreamloom.memory.table import PICTUREBOOK_FILE, read_table
from dreamloom.memory.tensor_counter import MemoryCounter, tensors_of
from dreamloom.models import sdxl_configs
from dreamloom.models.attention import AttentionMaps
from dreamloom.models.base import AdapterSpec, MemoryOptions
from dreamloom.models.families import load_model
from dreamloom.models.sdxl import SDXLModel
from dreamloom.picturebook import weights_folder

TEXT = AdapterSpec(16, 16.0, "attention", 0, text_encoders=True)
# The bar: checkpointing, storage, and what the training may need at most.
BARS = (
    ("none", "whole", 13.5),
    ("low", "whole", 9.8),
    ("full", "whole", 8.0),
    ("full", "int8", 5.5),
    ("full", "nf4", 4.5),
)
TRAINED = Setting(1024, text_encoders=True, cpu_offload=True)


@pytest.mark.parametrize(("levels", "quantization", "at_most"), BARS)
def test_the_planned_peak_of_sdxl_keeps_the_bar(levels, quantization, at_most):
    setting = replace(TRAINED, gradient_checkpointing=levels, quantization=quantization)
    found = predict_memory_use(read_table(), setting)
    assert found.peak_bytes < at_most * GIB
    assert found.peak_phase == "training"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "setting"),
    [
        (Case(1024, TEXT), Setting(1024, text_encoders=True)),
        (
            Case(1024, TEXT, "low", MemoryOptions(cpu_offload=True), drawn_at_once=2),
            replace(TRAINED, gradient_checkpointing="low", drawn_at_once=2),
        ),
        (
            Case(1024, TEXT, "high", micro_batch_size=2, passes=1),
            Setting(
                1024,
                text_encoders=True,
                gradient_checkpointing="high",
                micro_batch_size=2,
                passes=1,
            ),
        ),
        (
            Case(1024, TEXT, "full", MemoryOptions("nf4", cpu_offload=True)),
            replace(TRAINED, gradient_checkpointing="full", quantization="nf4"),
        ),
        (
            Case(1024, TEXT, "full", MemoryOptions("int8", cpu_offload=True), micro_batch_size=4),
            replace(
                TRAINED, gradient_checkpointing="full", quantization="int8", micro_batch_size=4
            ),
        ),
        (
            Case(768, AdapterSpec(64, 64.0, "linear", 0), "none", micro_batch_size=2),
            Setting(768, rank=64, target_modules="linear", micro_batch_size=2),
        ),
    ],
)
def test_what_is_predicted_of_sdxl_is_what_is_counted(case, setting):
    counted = count_phases(case)
    predicted = predict_memory_use(read_table(), setting)
    assert predicted.peak_bytes == pytest.approx(max(counted.values()), rel=0.1)
    assert predicted.phases["training"] == pytest.approx(counted["training"], rel=0.1)


@pytest.mark.slow
def test_the_table_of_picturebook_is_what_is_counted_of_it():
    counted = count_folder(weights_folder())
    assert counted is not None
    assert replace(counted, made_by="") == replace(read_table(PICTUREBOOK_FILE), made_by="")


@pytest.fixture(scope="module")
def tiny_table(tiny_sdxl: Path):
    return count_folder(tiny_sdxl)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "setting"),
    [
        (Case(128, TEXT, micro_batch_size=4), Setting(128, text_encoders=True, micro_batch_size=4)),
        (Case(128, TEXT, "full"), Setting(128, text_encoders=True, gradient_checkpointing="full")),
    ],
)
def test_another_base_is_predicted_from_its_own_counts(tiny_sdxl, tiny_table, case, setting):
    counted = count_phases(replace(case, folder=tiny_sdxl))
    predicted = predict_memory_use(tiny_table, setting).phases
    for phase in ("class images", "caching", "training"):
        assert predicted[phase] == pytest.approx(counted[phase], rel=0.15), phase


@pytest.mark.slow
def test_a_base_is_counted_once(tiny_sdxl: Path, tiny_table):
    told: list[str] = []
    assert count_folder(tiny_sdxl, told.append) is tiny_table
    assert told == []


def test_sdxls_own_size_is_known_without_counting():
    assert count_folder(sdxl_configs.FOLDER) is None
    assert read_table().resolution_px == 1024


def test_a_pass_of_real_tensors_holds_what_is_counted_without_them(
    tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch
):
    # A GPU is what is counted for, and there an attention is several nodes.
    monkeypatch.setattr(AttentionMaps, "is_one_node", False)
    spec = AdapterSpec(16, 16.0, "attention", 0)
    with counted_run(Case(64, spec, folder=tiny_sdxl, dtype=torch.bfloat16)) as run:
        run.attach()
        predicted = run.needs(run.forward_backward)
    model = load_model(str(tiny_sdxl), Runtime(torch.device("cpu"), torch.bfloat16))
    assert isinstance(model, SDXLModel)
    with MemoryCounter() as counter:
        real = Run(Case(64, spec, dtype=torch.bfloat16), model, counter, {})
        real.attach()
        for part in model._offload.parts.values():
            counter.hold(tensors_of(part))
        assert real.needs(real.forward_backward) == pytest.approx(predicted, rel=0.01)


# ------------------------------------------------------------------ choosing

WORK = Work(Setting(1024, text_encoders=True), images_per_batch=2)
ANYTHING = Limits()


def usable_bytes(nbytes: int) -> int:
    return DeviceMemory(nbytes, "").usable_bytes


def choose(gib: float, limits: Limits = ANYTHING):
    return choose_setting(read_table(), WORK, usable_bytes(round(gib * GIB)), limits)


def test_less_memory_is_met_by_recomputing_first_and_fewer_bits_last():
    chosen = [choose(gib).setting for gib in (24, 16, 12, 8, 5.2)]
    assert [one.gradient_checkpointing for one in chosen[:3]] == ["none", "none", "low"]
    assert [one.micro_batch_size for one in chosen[:2]] == [2, 1]
    assert [one.quantization for one in chosen] == ["whole", "whole", "whole", "int8", "nf4"]
    assert chosen[-1].cpu_offload
    assert all(one.optimizer == "adamw" for one in chosen)


@pytest.mark.parametrize("gib", [5.2, 6, 7, 8, 10, 12, 14, 16, 20, 24, 40, 80])
def test_what_is_chosen_fits_and_its_end_needs_no_more_than_its_middle(gib):
    choice = choose(gib)
    assert choice.fits
    assert choice.memory_use.peak_bytes <= usable_bytes(round(gib * GIB))
    phases = choice.memory_use.phases
    assert set(phases) == set(PHASES)
    if choice.setting.cpu_offload:
        assert max(phases["sampling"], phases["saving"]) <= phases["training"]


def test_more_memory_never_chooses_a_slower_setting():
    def loss(gib: float) -> tuple[int, int, int]:
        one = choose(gib).setting
        return (
            ("whole", "int8", "nf4").index(one.quantization),
            ("none", "high", "low", "full").index(one.gradient_checkpointing),
            -one.micro_batch_size,
        )

    losses = [loss(gib) for gib in (5.2, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24)]
    assert losses == sorted(losses, reverse=True)


def test_what_is_given_is_kept():
    limits = Limits(gradient_checkpointing=("full",), quantization=("nf4",), micro_batch_size=1)
    setting = choose(80, limits).setting
    assert (setting.gradient_checkpointing, setting.quantization, setting.micro_batch_size) == (
        "full",
        "nf4",
        1,
    )


def test_states_in_8_bits_are_the_last_resort():
    whole = Limits(quantization=("nf4",), may_use_8_bit=True)
    sizes = [gib / 20 for gib in range(80, 120)]
    found = [(gib, choice) for gib in sizes if (choice := choose(gib, whole)).fits]
    optimizers = [choice.setting.optimizer for _, choice in found]
    assert optimizers[0] == EIGHT_BIT
    assert optimizers[-1] == "adamw"
    changes = sum(a != b for a, b in pairwise(optimizers))
    assert changes == 1


def test_where_nothing_fits_the_least_is_told():
    choice = choose(2)
    assert not choice.fits
    assert choice.memory_use.peak_bytes > usable_bytes(2 * GIB)
    assert (choice.setting.quantization, choice.setting.gradient_checkpointing) == ("nf4", "full")


def test_why_something_faster_was_not_chosen_is_told_with_its_need():
    choice = choose(12)
    refused = {(name, value): needed for name, value, needed in choice.refused}
    assert refused["gradient_checkpointing", "none"] > usable_bytes(12 * GIB)
    assert refused["gradient_checkpointing", "high"] > usable_bytes(12 * GIB)
