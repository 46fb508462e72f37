"""How strongly adapters are worn over a drawing: curves, turns, and layers shared out."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreamloom.core.errors import AdapterError
from dreamloom.lora.adapter import Adapter, Layer, PeftState
from dreamloom.models.lora_schedule import (
    START,
    TOGETHER,
    Composition,
    Curve,
    LayerShare,
    LoraSchedule,
    Moment,
    Turn,
    describe_lora_schedules,
    parse_composition,
    parse_curve,
    set_lora_schedules,
    share_layers,
)

PROGRESS = st.floats(0, 1)
WEIGHTS = st.floats(-3, 3)
POINTS = st.lists(st.tuples(PROGRESS, WEIGHTS), min_size=1, max_size=5).map(
    lambda points: tuple(sorted(points, key=lambda point: point[0]))
)


def make_layer(inputs: int, outputs: int, rank: int, seed: int, *kernel: int) -> Layer:
    rng = torch.Generator().manual_seed(seed)
    ones = [1] * len(kernel)
    return Layer(
        torch.randn(rank, inputs, *kernel, generator=rng),
        torch.randn(outputs, rank, *ones, generator=rng) * (1 + seed % 3),
    )


def make_pair() -> tuple[Adapter, Adapter]:
    """Two adapters of mixed ranks, with a convolution, a text encoder, and layers of their own."""
    shapes = {f"unet.layer{i}": (6 + i, 9 - i) for i in range(5)}
    subject = {
        name: make_layer(*shape, 2, 10 + i) for i, (name, shape) in enumerate(shapes.items())
    }
    style = {name: make_layer(*shape, 3, 30 + i) for i, (name, shape) in enumerate(shapes.items())}
    subject["unet.conv"], style["unet.conv"] = (
        make_layer(4, 5, 2, 50, 3, 3),
        make_layer(4, 5, 1, 51, 3, 3),
    )
    subject["unet.mine"], style["unet.theirs"] = make_layer(5, 5, 2, 60), make_layer(5, 5, 2, 61)
    subject["text_encoder.x"] = style["text_encoder.x"] = make_layer(5, 5, 2, 62)
    return Adapter(subject), Adapter(style)


def test_progress_goes_from_0_to_1() -> None:
    assert [Moment(step, 5).progress for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert Moment(0, 1).progress == START.progress == 0


@given(POINTS, PROGRESS)
def test_a_curve_stays_between_its_points(
    points: tuple[tuple[float, float], ...], progress: float
) -> None:
    curve = Curve(points)
    weights = [weight for _, weight in points]
    assert min(weights) - 1e-9 <= curve.weight(progress) <= max(weights) + 1e-9
    assert curve.weight(0.0) == weights[0] or points[0][0] == 0
    assert abs(curve.strongest) == max(map(abs, weights))


def test_a_curve_is_straight_between_points_and_level_outside() -> None:
    curve = Curve(((0.2, 1.0), (0.6, 0.0), (0.8, -1.0)))
    found = [round(curve.weight(place / 10), 12) for place in range(11)]
    assert found == [1, 1, 1, 0.75, 0.5, 0.25, 0, -0.5, -1, -1, -1]


def test_two_points_at_one_place_make_a_jump() -> None:
    curve = parse_curve("1@0,1@0.5,0@0.5,0.25@1")
    assert curve.weight(0.499999) == 1
    assert curve.weight(0.5) == 0
    assert curve.weight(1.0) == 0.25


@given(WEIGHTS, PROGRESS)
def test_a_constant_curve_is_exact(weight: float, progress: float) -> None:
    assert Curve.constant(weight).weight(progress) == weight
    assert Curve(((0.0, weight), (0.3, weight), (1.0, weight))).weight(progress) == weight


@given(POINTS)
def test_a_curve_is_typed_as_it_is_told(points: tuple[tuple[float, float], ...]) -> None:
    assert parse_curve(str(Curve(points))) == Curve(points)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1", "'1' is no WEIGHT@PROGRESS"),
        ("1@", "'1@' is no WEIGHT@PROGRESS"),
        ("1@0,,0@1", "'' is no WEIGHT@PROGRESS"),
        ("one@0", "'one@0' is no WEIGHT@PROGRESS"),
        ("1@0@1", "'1@0@1' is no WEIGHT@PROGRESS"),
        ("1@1.5", "the progress 1.5 is not between 0 and 1"),
        ("1@nan", "the progress nan is not between 0 and 1"),
        ("inf@0", "the weight inf is not finite"),
        ("1@0.5,0@0.4", "the progress falls from 0.5 to 0.4"),
    ],
)
def test_a_curve_that_is_none_is_explained(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        parse_curve(text)
    with pytest.raises(ValueError, match="needs a point"):
        Curve(())


@pytest.mark.parametrize(("adapters", "every"), [(2, 1), (2, 3), (3, 2)])
def test_at_each_step_one_adapter_has_its_turn(adapters: int, every: int) -> None:
    turns = [Turn(place, adapters, every) for place in range(adapters)]
    moments = [Moment(step, 20) for step in range(20)]
    open_at = [[turn.place for turn in turns if turn.is_open("any", m)] for m in moments]
    expected = itertools.cycle([place for place in range(adapters) for _ in range(every)])
    assert open_at == [[place] for place in itertools.islice(expected, 20)]


def pick_by_the_paper(
    subject: Adapter, style: Adapter, alpha: float, beta: float, progress: float
) -> dict[str, str]:
    """K-LoRA as it is defined: compare the sums of the largest entries anew, at one progress."""

    def entries(layer: Layer) -> list[float]:
        wide = layer.up.flatten(1).double() @ layer.down.flatten(1).double()
        return sorted(wide.abs().flatten().tolist(), reverse=True)

    shared = [f"unet.layer{i}" for i in range(5)] + ["unet.conv"]
    gamma = sum(sum(entries(subject.layers[n])) for n in shared) / sum(
        sum(entries(style.layers[n])) for n in shared
    )
    scale = alpha * progress + beta
    picked = {}
    for name in shared:
        ours, theirs = subject.layers[name], style.layers[name]
        count = ours.rank * theirs.rank
        s_c, s_s = sum(entries(ours)[:count]), sum(entries(theirs)[:count])
        picked[name] = "subject" if s_c >= s_s * gamma * scale else "style"
    return picked


@pytest.mark.parametrize(("alpha", "beta"), [(1.5, 0.5), (0.6, 0.8), (3.0, 0.0)])
def test_the_table_of_k_lora_picks_what_its_comparison_picks_at_every_step(
    alpha: float, beta: float
) -> None:
    subject, style = make_pair()
    table = share_layers(subject, style, alpha, beta)
    ours, theirs = (
        LayerShare("subject", table, alpha, beta),
        LayerShare("style", table, alpha, beta),
    )
    seen = set()
    for moment in [Moment(step, 41) for step in range(41)]:
        picked = pick_by_the_paper(subject, style, alpha, beta, moment.progress)
        seen |= set(picked.values())
        for name, role in picked.items():
            assert ours.is_open(name, moment) == (role == "subject")
            assert theirs.is_open(name, moment) == (role == "style")
    assert seen == {"subject", "style"}


def test_the_largest_entries_of_a_large_layer_are_found_wherever_they_are() -> None:
    """A sample says where to look; where it misleads, everything is looked at."""
    even = make_layer(700, 600, 10, 1)
    # All large entries are among the sampled ones, every 7th here, and too few of them are kept.
    columns = torch.where(torch.arange(700) % 7 == 0, 5 + torch.arange(700) / 700, 1.0)
    down, up = torch.zeros(10, 700), torch.zeros(600, 10)
    down[0], up[:, 0] = columns, 1 + torch.arange(600) / 1000
    odd = Layer(down, up)
    table = share_layers(
        Adapter({"unet.a": even, "unet.b": odd}), Adapter({"unet.a": odd, "unet.b": even})
    )
    largest = [
        float(layer.update().double().abs().flatten().sort(descending=True).values[:100].sum())
        for layer in (even, odd)
    ]
    # Both adapters hold the same two layers, so γ is 1.
    assert table["unet.a"] == pytest.approx((largest[0] / largest[1] - 0.5) / 1.5, rel=1e-5)
    assert table["unet.b"] == pytest.approx((largest[1] / largest[0] - 0.5) / 1.5, rel=1e-5)


def test_layers_of_one_adapter_and_of_text_encoders_are_not_shared_out() -> None:
    subject, style = make_pair()
    ours, theirs = set_lora_schedules([subject, style], [1.0, 0.5], Composition("k-lora"))
    assert isinstance(ours, LoraSchedule)
    assert isinstance(theirs, LoraSchedule)
    for moment in (START, Moment(4, 5)):
        assert ours.weight("unet.mine", moment) == ours.weight("text_encoder.x", moment) == 1
        assert (
            theirs.weight("unet.theirs", moment) == theirs.weight("text_encoder.x", moment) == 0.5
        )


def test_neither_the_scale_of_an_adapter_nor_its_factors_matter_to_k_lora() -> None:
    subject, style = make_pair()
    mix = torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def rewrite(layer: Layer) -> Layer:
        down = torch.linalg.solve(mix, layer.down.flatten(1).double()).view(layer.down.shape)
        up = (layer.up.flatten(1).double() @ mix).view(layer.up.shape)
        return Layer(7 * down.float(), up.float())

    rewritten = Adapter({name: rewrite(layer) for name, layer in subject.layers.items()})
    found = share_layers(rewritten, style)
    for name, switch in share_layers(subject, style).items():
        assert found[name] == pytest.approx(switch, abs=1e-4)


def test_a_layer_without_any_change_goes_to_the_other_adapter() -> None:
    full, none = make_layer(4, 4, 2, 1), Layer(torch.zeros(2, 4), torch.zeros(4, 2))
    subject = Adapter({"unet.a": full, "unet.b": none, "unet.c": none, "unet.d": full})
    style = Adapter({"unet.a": none, "unet.b": full, "unet.c": none, "unet.d": full})
    table = share_layers(subject, style)
    assert table["unet.a"] == math.inf
    assert table["unet.b"] < 0
    assert table["unet.c"] == math.inf
    assert table["unet.d"] == pytest.approx((1 - 0.5) / 1.5)
    empty = Adapter({"unet.a": none})
    assert share_layers(empty, Adapter({"unet.a": full}))["unet.a"] < 0


def test_k_lora_takes_loras_only() -> None:
    subject, _ = make_pair()
    other = Adapter({}, peft=PeftState("loha", {}, {}))
    with pytest.raises(
        AdapterError, match=r"The second adapter is a LoHa; only a LoRA can be worn"
    ):
        set_lora_schedules([subject, other], [1.0, 1.0], Composition("k-lora"))


def test_a_plain_weight_stays_one_where_nothing_moves_it() -> None:
    subject, style = make_pair()
    curve = parse_curve("1@0,0@1")
    assert set_lora_schedules([subject, style], [0.8, 1.0]) == [0.8, 1.0]
    assert set_lora_schedules([subject, style], [curve, 1.0]) == [LoraSchedule(curve), 1.0]
    only = Composition(conditional_only=True)
    assert set_lora_schedules([subject], [0.8], only) == [
        LoraSchedule(Curve.constant(0.8), conditional_only=True)
    ]


def test_lora_schedules_are_told_without_being_computed() -> None:
    curve = parse_curve("1@0,0@1")
    assert describe_lora_schedules([curve, 1.0]) == ["1@0,0@1", ""]
    assert describe_lora_schedules([]) == []
    adapters = make_pair()
    for composition in (
        TOGETHER,
        Composition("switch", 3),
        Composition("k-lora"),
        Composition(conditional_only=True),
    ):
        settled = set_lora_schedules(adapters, [curve, 0.5], composition)
        told = [
            str(lora_schedule) if isinstance(lora_schedule, LoraSchedule) else ""
            for lora_schedule in settled
        ]
        assert describe_lora_schedules([curve, 0.5], composition) == told


def test_turns_and_curves_multiply() -> None:
    subject, style = make_pair()
    curve = parse_curve("1@0,0@1")
    ours, theirs = set_lora_schedules([subject, style], [curve, 0.5], Composition("switch"))
    moments = [Moment(step, 5) for step in range(5)]
    assert isinstance(ours, LoraSchedule)
    assert isinstance(theirs, LoraSchedule)
    assert [ours.weight("unet.x", moment) for moment in moments] == [1, 0, 0.5, 0, 0]
    assert [theirs.weight("unet.x", moment) for moment in moments] == [0, 0.5, 0, 0.5, 0]


def test_text_encoders_take_the_strongest_weight_whatever_the_moment() -> None:
    lora_schedule = LoraSchedule(parse_curve("0@0,-0.8@0.5,0.3@1"), Turn(1, 2, 1))
    for moment in (START, Moment(2, 5), Moment(4, 5)):
        assert lora_schedule.weight("text_encoder_2.layers.0.q_proj", moment) == -0.8


def test_a_lora_schedule_is_told_completely() -> None:
    lora_schedule = LoraSchedule(parse_curve("1@0,0@1"), Turn(0, 2, 3), conditional_only=True)
    assert str(lora_schedule) == "1@0,0@1; turn 1 of 2, 3 steps each; conditional only"
    share = LayerShare("style", {}, 1.5, 0.5)
    assert str(LoraSchedule(Curve.constant(1.0), share)) == "1@0; k-lora style, alpha 1.5, beta 0.5"


@pytest.mark.parametrize(
    ("text", "composition"),
    [
        ("sum", TOGETHER),
        ("switch", Composition("switch")),
        ("switch:3", Composition("switch", every=3)),
        ("k-lora", Composition("k-lora")),
        ("k-lora:2,0.25", Composition("k-lora", alpha=2.0, beta=0.25)),
    ],
)
def test_a_composition_is_read_as_typed(text: str, composition: Composition) -> None:
    assert parse_composition(text) == composition
    assert parse_composition(text, conditional_only=True).conditional_only


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("swich", "'swich' is none of sum, switch, switch:STEPS, k-lora"),
        ("sum:2", "'sum:2' is none of"),
        ("switch:often", "'switch:often' is none of"),
        ("switch:1.5", "'switch:1.5' is none of"),
        ("switch:inf", "'switch:inf' is none of"),
        ("k-lora:1.5", "'k-lora:1.5' is none of"),
        ("switch:0", "a turn of 0 steps is none"),
        ("k-lora:0,0.5", "alpha must be above 0"),
        ("k-lora:1,nan", "beta must be 0 or more"),
    ],
)
def test_a_composition_that_is_none_is_explained(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        parse_composition(text)


@pytest.mark.parametrize(
    ("composition", "count", "complaint"),
    [
        (Composition("switch"), 1, "two adapters or more, not 1"),
        (Composition("k-lora"), 3, "two adapters, subject and style, not 3"),
        (Composition(conditional_only=True), 0, "without an adapter"),
    ],
)
def test_too_few_or_too_many_adapters_are_refused(
    composition: Composition, count: int, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        set_lora_schedules([Adapter({})] * count, [1.0] * count, composition)
