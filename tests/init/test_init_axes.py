"""`gradhealth_axes`: what a class declares about its parameters, and who comes before whom."""

import pytest
import torch
from torch import nn

from lightning_gradhealth.init import Axes, init_weights, register_initializer

pytestmark = pytest.mark.usefixtures("own_registry")


class Fused(nn.Linear):
    """Queries of 96, keys and values of 32 each, in one matrix."""

    gradhealth_axes = {"weight": Axes(in_axes=1, out_axes=0, split=(0, (96, 32, 32)))}  # noqa: RUF012

    def __init__(self):
        super().__init__(64, 160)


class Raw(nn.Module):
    gradhealth_axes = {  # noqa: RUF012
        "qkv": Axes(in_axes=0, out_axes=-1, split=(1, 3)),
        "heads": Axes(in_axes=0, out_axes=(1, 2)),
        "absent": Axes(in_axes=0, out_axes=1),
        "experts": Axes(in_axes=1, out_axes=2, split=(0, 4)),
        "several": Axes(in_axes=0, out_axes=1),
        "named": Axes(in_axes=0, out_axes=1),
    }

    def __init__(self):
        super().__init__()
        self.qkv = nn.Parameter(torch.zeros(64, 96))
        self.heads = nn.Parameter(torch.zeros(512, 8, 64))
        self.absent = None
        self.experts = nn.Parameter(torch.zeros(4, 64, 128))
        self.several = nn.ParameterList([torch.zeros(32, 64), torch.zeros(128, 64)])
        self.named = nn.ParameterDict({"a": torch.zeros(16, 8)})


def test_blocks_of_a_linear_have_fans_of_their_own():
    report = init_weights(Fused(), scheme="xavier", seed=0)
    weight = [entry for entry in report.entries if entry.name.startswith("weight")]
    assert [(entry.name, entry.shape, entry.fan) for entry in weight] == [
        ("weight[0]", (96, 64), 80.0),
        ("weight[1]", (32, 64), 48.0),
        ("weight[2]", (32, 64), 48.0),
    ]
    assert {entry.rule for entry in weight} == {"Fused"}
    assert report.entries[-1].rule == "Linear"  # the bias is the base's affair
    for entry in weight:
        assert entry.measured_std == pytest.approx(entry.fan**-0.5, rel=0.05)


def test_blocks_along_the_first_axis_are_drawn_one_by_one():
    fused, plain = Fused(), nn.Linear(64, 160)
    for module in (fused, plain):
        init_weights(module, scheme="lecun", seed=0)
    first, second = fused.weight[96:128], fused.weight[128:]
    assert not torch.equal(first, second)
    assert not torch.equal(fused.weight, plain.weight)


def test_raw_parameters_lists_and_dicts():
    model = Raw()
    report = init_weights(model, scheme="lecun", seed=0, on_uncovered="raise")
    fans = {entry.name: entry.fan for entry in report.entries}
    assert fans["heads"] == 512
    assert [fans[f"qkv[{index}]"] for index in range(3)] == [64, 64, 64]
    assert fans["experts[3]"] == 64
    assert fans["several.0"] == 32
    assert fans["several.1"] == 128
    assert fans["named.a"] == 16


def test_keras_fans():
    class Kernel(nn.Module):
        gradhealth_axes = {"kernel": Axes(in_axes=(0, 1), out_axes=2)}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.zeros(512, 8, 64))

    (entry,) = init_weights(Kernel(), scheme="lecun", seed=0).entries
    assert entry.fan == 4096


def test_orthogonal_along_declared_axes():
    class Projection(nn.Module):
        gradhealth_axes = {"w": Axes(in_axes=0, out_axes=(1, 2))}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(12, 4, 5))

    model = Projection()
    (entry,) = init_weights(model, scheme="orthogonal", seed=0).entries
    values = torch.linalg.svdvals(model.w.detach().reshape(12, 20))
    torch.testing.assert_close(values, torch.ones(12), rtol=0, atol=1e-5)
    assert entry.target_std == pytest.approx(model.w.square().mean().sqrt().item(), rel=1e-4)


def test_a_registered_initializer_comes_before_the_axes_and_they_before_its_bases():
    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = (nn.Parameter(torch.zeros(8, 4)) for _ in range(3))

    class Derived(Base):
        gradhealth_axes = {name: Axes(in_axes=1, out_axes=0) for name in ("one", "two")}  # noqa: RUF012

    @register_initializer(Base)
    def base(module, context):
        for parameter in (module.one, module.two, module.three):
            context.constant_(parameter, 2.0)

    @register_initializer(Derived)
    def derived(module, context):
        context.constant_(module.one, 1.0)

    report = init_weights(Derived(), scheme="he", seed=0)
    assert [entry.rule for entry in report.entries] == ["derived", "Derived", "base"]


def test_a_subclass_inherits_axes_and_skip_holds():
    class Deeper(Fused):
        pass

    model = Deeper()
    before = model.weight.detach().clone()
    report = init_weights(model, scheme="he", skip="weight")
    assert torch.equal(model.weight, before)
    assert report.entries[0].rule == "skipped"
    assert init_weights(model, scheme="he").entries[0].rule == "Fused"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_axes": "a", "out_axes": 0}, TypeError, "in_axes must be an integer or several, got 'a'; write in_axes=0"),
        ({"in_axes": 0, "out_axes": [0, 1]}, ValueError, r"must be different axes, got \(0,\) and \(0, 1\); name each"),
        ({"in_axes": 0, "out_axes": 1, "split": 3}, TypeError, "split must be an axis and a count or sizes, got 3"),
        ({"in_axes": 0, "out_axes": 1, "split": (0, 0)}, ValueError, r"split must have blocks .*got \(0, 0\)"),
        ({"in_axes": 0, "out_axes": 1, "split": (0, [])}, ValueError, "split must have blocks of a size >= 1"),
        ({"in_axes": 0, "out_axes": 1, "split": (0, 1.5)}, TypeError, "split must be an integer or several, got 1.5"),
    ],
)
def test_errors_of_axes(arguments, error, message):
    with pytest.raises(error, match=message):
        Axes(**arguments)


@pytest.mark.parametrize(
    ("declared", "error", "message"),
    [
        ({"w": Axes(1, 2)}, ValueError, r"gradhealth_axes\['w'\] must name different axes of the shape \(6, 4\), got"),
        ({"w": Axes(1, -1)}, ValueError, r"gradhealth_axes\['w'\] must name different axes"),
        ({"w": Axes(1, 0, (2, 2))}, ValueError, r"gradhealth_axes\['w'\] must name different axes"),
        ({"w": Axes(1, 0, (0, 4))}, ValueError, r"must split the 6 of axis 0 without a rest.*sizes that add up to 6"),
        ({"w": Axes(1, 0, (0, (3, 4)))}, ValueError, "must split the 6 of axis 0 without a rest"),
        ({"v": Axes(1, 0)}, ValueError, r"gradhealth_axes of Own must name its parameters, got 'v'; see module"),
        ({"w": 3}, TypeError, r"gradhealth_axes of Own must be a dict of names to Axes, got \{'w': 3\}; write"),
        (3, TypeError, "gradhealth_axes of Own must be a dict of names to Axes, got 3"),
    ],
)
def test_errors_of_declarations(declared, error, message):
    class Own(nn.Module):
        gradhealth_axes = declared

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(6, 4))

    with pytest.raises(error, match=message):
        init_weights(Own(), scheme="he")
