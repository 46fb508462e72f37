import json

import pytest
from click.testing import CliRunner

from dreamloom.cli.main import main
from dreamloom.core.config.loading import load_config
from dreamloom.core.errors import ConfigError
from dreamloom.memory import device_memory
from dreamloom.memory.device_memory import DeviceMemory, describe_host, read_memory
from dreamloom.memory.host import HostMemory
from dreamloom.memory.plan import apply_plan, plan_run
from dreamloom.memory.plan_drawing import plan_drawing

GIB = 2**30
SDXL = {"base": "sdxl"}


def config(*sets: str):
    return load_config(sets=["train.batch_photos=1", "train.batch_priors=1", *sets], overrides=SDXL)


@pytest.mark.parametrize(
    ("text", "nbytes", "said"),
    [
        ("12GiB", 12 * GIB, "12 GiB"),
        ("12 gib", 12 * GIB, "12 GiB"),
        ("12", 12 * GIB, "12 GiB"),
        ("12GB", 12 * 10**9, "12GB (11.18 GiB)"),
        ("8192MiB", 8 * GIB, "8 GiB"),
        ("11.5G", 11.5 * GIB, "11.5 GiB"),
    ],
)
def test_sizes_of_memory_are_read_and_told_with_their_unit(text, nbytes, said):
    assert read_memory(text) == DeviceMemory(int(nbytes), said)


@pytest.mark.parametrize("text", ["", "much", "12TiB", "-3GiB", "GiB", "1e3", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="is no size of memory"):
        read_memory(text)


def test_a_size_without_its_unit_that_no_gpu_has_is_refused():
    with pytest.raises(ConfigError, match="less than any GPU has"):
        read_memory("12MB")


def test_a_plan_says_what_it_chose_and_why():
    plan = plan_run(config("adapter.text_encoders=true"), read_memory("12GiB"), rate_tflops=25)
    text = "\n".join(plan.lines())
    for said in (
        "sdxl at 1024 px, rank 16, both text encoders, in 12 GiB",
        "class images",
        "the lowest level of the U-Net is recomputed",
        "high would need",
        "1 image a pass, 2 passes an update of 2",
        "PFLOP in all",
        "at 25 TFLOP/s no less than",
    ):
        assert said in text, said
    assert plan.least_seconds == pytest.approx(sum(plan.flops.values()) / 25e12)


def test_a_plan_fills_in_what_is_left_open_and_nothing_else():
    asked = config("memory.gradient_checkpointing=full", "adapter.text_encoders=true")
    plan = plan_run(asked, read_memory("24GiB"))
    settled = apply_plan(asked, plan)
    assert settled.memory.gradient_checkpointing == "full"
    assert settled.memory.base_quantization == "whole"
    assert isinstance(settled.memory.micro_batch_size, int)
    assert settled.memory.cpu_offload in (True, False)
    assert settled.train == asked.train
    assert settled.photos == asked.photos


def test_the_limit_in_the_settings_goes_before_the_devices_memory():
    plan = plan_run(config("memory.limit=12GB"), read_memory("80GiB"))
    assert plan.memory.said == "12GB (11.18 GiB)"
    assert plan.choice.memory_use.peak_bytes < 12 * 10**9


def test_work_grows_with_what_is_asked():
    few = plan_run(config("train.steps=100", "priors.kind=none"), read_memory("24GiB"))
    many = plan_run(config("train.steps=200", "priors.kind=none"), read_memory("24GiB"))
    assert many.flops["training"] == pytest.approx(2 * few.flops["training"])
    assert few.flops["class images"] == 0
    assert few.choice.setting.passes == 1


def test_where_nothing_fits_the_error_says_by_how_much_and_what_to_do():
    with pytest.raises(ConfigError, match="Nothing fits in 3 GiB") as caught:
        plan_run(config("adapter.text_encoders=true"), read_memory("3GiB"))
    assert "GiB more than the" in caught.value.problem
    assert "--set photos.resolution_px=512" in caught.value.hint
    assert "--set adapter.text_encoders=false" in caught.value.hint


def test_where_a_given_setting_is_in_the_way_it_is_named():
    with pytest.raises(ConfigError) as caught:
        plan_run(
            config("memory.base_quantization=whole", "memory.gradient_checkpointing=none"),
            read_memory("6GiB"),
        )
    assert "--set memory.base_quantization=auto" in caught.value.hint
    assert "--set memory.gradient_checkpointing=auto" in caught.value.hint


def test_a_resolution_off_the_grid_of_latents_is_refused():
    with pytest.raises(ConfigError, match="is no multiple of 8") as caught:
        plan_run(config("photos.resolution_px=1021"), read_memory("24GiB"))
    assert caught.value.hint == "Take 1024."


def test_initialisations_that_take_a_part_of_the_base_keep_it_whole():
    plan = plan_run(config("adapter.init_lora_weights=pissa"), read_memory("9GiB"))
    assert plan.choice.setting.quantization == "whole"
    with pytest.raises(ConfigError, match="Nothing fits"):
        plan_run(config("adapter.init_lora_weights=pissa"), read_memory("5GiB"))


def test_drawing_is_planned_as_well():
    roomy, tight = (plan_drawing(config(), read_memory(size)).setting for size in ("24GiB", "8GiB"))
    assert (roomy.quantization, roomy.cpu_offload, roomy.drawn_at_once) == ("whole", False, 8)
    assert (tight.quantization, tight.cpu_offload) == ("whole", True)
    with pytest.raises(ConfigError, match="to draw one picture"):
        plan_drawing(config(), read_memory("2GiB"))


def test_the_command_prints_words_or_json():
    plain = ["plan", "--base", "sdxl", "--gpu-memory", "12GB"]
    said = CliRunner().invoke(main, plain)
    assert said.exit_code == 0, said.output
    assert "in 12GB (11.18 GiB)" in said.output
    told = json.loads(CliRunner().invoke(main, [*plain, "--json"]).output)
    assert told["fits"] is True
    assert set(told["settings"]) >= {"memory.gradient_checkpointing", "memory.base_quantization"}
    assert told["peak_gib"] == max(told["phases_gib"].values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu-memory", "much"], "is no size of memory"),
        (["--gpu-memory", "2GiB"], "Nothing fits in 2 GiB"),
    ],
)
def test_the_command_says_what_is_wrong_in_a_sentence(arguments, said):
    result = CliRunner().invoke(main, ["plan", "--base", "sdxl", *arguments])
    assert result.exit_code != 0
    assert said in result.output


# ------------------------------------------------------------------ on a processor


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> bool:
    """Whether the processor multiplies in bf16 itself."""
    has = getattr(request, "param", False)
    for module in ("work", "telling"):
        monkeypatch.setattr(f"dreamloom.memory.{module}.has_bf16_units", lambda: has)
    return has


def host(gib: float) -> DeviceMemory:
    return DeviceMemory(round(gib * GIB), f"{gib} GiB", is_host=True)


@pytest.mark.parametrize(
    ("gib", "quantization", "recomputed", "waits"),
    [(64, "whole", "none", False), (16, "whole", "low", True), (11, "bf16", "low", True)],
)
@pytest.mark.usefixtures("units")
def test_a_processor_without_units_for_bf16_keeps_the_base_in_it_for_want_of_room_alone(
    gib, quantization, recomputed, waits
):
    plan = plan_run(config(), host(gib))
    setting = plan.choice.setting
    assert (setting.quantization, setting.gradient_checkpointing) == (quantization, recomputed)
    assert setting.cpu_offload is waits
    assert apply_plan(config(), plan).precision == "fp32"
    assert plan.choice.memory_use.peak_bytes <= host(gib).usable_bytes
    assert plan.as_dict()["settings"]["precision"] == "fp32"


@pytest.mark.parametrize("units", [True], indirect=True)
@pytest.mark.usefixtures("units")
def test_a_processor_with_units_for_bf16_computes_in_it():
    assert plan_run(config(), host(64)).choice.setting.precision == "bf16"
    assert "for which it has matrix units" in "\n".join(plan_run(config(), host(64)).lines())
    assert plan_run(config("precision=fp32"), host(64)).choice.setting.precision == "fp32"


@pytest.mark.usefixtures("units")
def test_a_plan_for_a_processor_says_what_a_whole_base_would_have_needed():
    text = "\n".join(plan_run(config(), host(11)).lines())
    assert "in fp32: it has no matrix units for bf16" in text
    assert "kept in bf16 and widened for each use (whole would need" in text
    # `auto` compiles on GPUs alone.
    assert text.splitlines()[-2].endswith("repeated blocks not compiled")


@pytest.mark.usefixtures("units")
def test_what_fits_no_computer_is_refused_with_what_would_fit():
    with pytest.raises(ConfigError, match="Nothing fits in 13 GiB") as caught:
        plan_run(config("memory.base_quantization=whole"), host(13))
    assert "--set memory.base_quantization=auto" in caught.value.hint
    assert "resolution" not in caught.value.hint  # it would not help
    with pytest.raises(ConfigError, match="in its phase 'loading'") as caught:
        plan_run(config("adapter.text_encoders=true"), host(5))
    assert caught.value.hint == "Close other programs, or take a computer with more memory."
    with pytest.raises(ConfigError, match="to draw one picture") as caught:
        plan_drawing(config(), host(3))
    assert "close other programs" in caught.value.hint


@pytest.mark.usefixtures("units")
def test_a_processors_drawing_is_planned_as_well():
    plan = plan_drawing(config(), host(24))
    assert (plan.setting.precision, plan.setting.cpu_offload) == ("fp32", False)
    assert any("picture" in line and "drawn at a time" in line for line in plan.lines())
    assert plan_drawing(config(), host(10)).setting.quantization == "bf16"


def test_a_limit_of_a_container_is_named(monkeypatch: pytest.MonkeyPatch):
    limited = HostMemory(8 * GIB, 10 * GIB, is_limited=True)
    monkeypatch.setattr(device_memory, "read_host_memory", lambda: limited)
    found = describe_host()
    assert "that this container has free, of 10.0" in found.said
    # What this process holds already is not somebody else's.
    assert 8 * GIB < found.nbytes <= 10 * GIB
    said = CliRunner().invoke(main, ["plan", "--base", "sdxl", "--device", "cpu"])
    assert "this container has free" in said.output


def test_the_limit_in_the_settings_holds_on_a_processor():
    plan = plan_run(config("memory.limit=9GiB"), host(64))
    assert plan.memory.is_host
    assert plan.choice.memory_use.peak_bytes < 9 * GIB
    with pytest.raises(ConfigError, match="Nothing fits in 3 GiB") as caught:
        plan_run(config("memory.limit=3GiB"), host(64))
    assert "et memory.limit higher" in caught.value.hint
