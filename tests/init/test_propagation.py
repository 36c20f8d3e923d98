"""The signal keeps the size that the report promises, at every depth, measured by a twin that knows no tracer."""

import math
import time

import pytest
import torch
from measure import output_gradients, output_variances, rectifier_log_growth
from samples_deep import DEEP, DeepRectifier
from torch import nn

import lightning_gradhealth as gh

# Zero padding eats the signal away at the borders, which no formula of a single layer sees: for `calibrate`.
NEEDS_CALIBRATION = ("cnn_zeros", "cnn_zeros_deep")


def made(name, seed):
    torch.manual_seed(seed)
    return DEEP[name].make(), DEEP[name].inputs()


def ratios(model, inputs, report):
    """Measured over promised variance, by weight in order of use."""
    promised = {point.name: point.target**2 for point in report.depth if point.target}
    measured = output_variances(model, inputs)
    assert set(measured) <= set(promised), "a weight without a promise"
    return {name: measured[name] / promised[name] for name in promised if name in measured}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name in DEEP if name not in NEEDS_CALIBRATION])
def test_every_weight_gives_what_was_promised(name, seed):
    model, inputs = made(name, seed)
    report = gh.init_weights(model, inputs, seed=seed)
    found = ratios(model, inputs, report)
    assert {key: ratio for key, ratio in found.items() if not 0.5 <= ratio <= 2} == {}


@pytest.mark.parametrize("name", DEEP)
def test_gradients_are_of_the_predicted_size(name):
    """Within a factor of 3 over the whole depth, by plain autograd: the far end of the net, where errors add up."""
    model, inputs = made(name, 0)
    report = gh.init_weights(model, inputs, seed=0)
    measured = output_gradients(model, inputs)
    predicted = {point.name: point.backward for point in report.depth if point.name in measured}
    assert set(predicted) == set(measured)
    last = measured[list(predicted)[-1]]
    found = {key: measured[key] / last / size for key, size in predicted.items()}
    assert {key: ratio for key, ratio in found.items() if not 1 / 3 <= ratio <= 3} == {}


@pytest.mark.parametrize("name", DEEP)
def test_calibrated_within_two_percent(name):
    model, inputs = made(name, 0)
    report = gh.init_weights(model, inputs, seed=0, calibrate=inputs)
    for point in report.depth:  # of four blocks without a norm, each adds an eighth of the variance
        ends_branch = name == "resnet" and ".conv2." in point.name
        assert point.target == pytest.approx(8**-0.5 if ends_branch else 1)
    found = ratios(model, inputs, report)
    assert {key: ratio for key, ratio in found.items() if not 0.98 <= ratio <= 1.02} == {}


@pytest.mark.parametrize("name", ["mlp_relu", "cnn_zeros_deep", "weight_normed", "mixer"])
def test_calibration_tells_what_it_measured(name):
    model, inputs = made(name, 0)
    plain = gh.init_weights(model, inputs, seed=0)
    uncalibrated = output_variances(model, inputs)
    report = gh.init_weights(model, inputs, seed=0, calibrate=inputs)
    measured = output_variances(model, inputs)
    assert all(point.before is None and point.after is None for point in plain.depth)
    points = {point.name: point for point in report.depth}
    first = next(iter(points))
    assert points[first].before == pytest.approx(math.sqrt(uncalibrated[first]), rel=1e-3)
    for key, value in measured.items():
        assert points[key].after == pytest.approx(math.sqrt(value), rel=0.01), key


def test_twin_sees_what_another_scheme_loses():
    """Weights of gain 1 lose half the signal at every rectifier, and the twin sees it."""
    model, inputs = made("mlp_relu", 0)
    gh.init_weights(model, scheme="lecun", seed=0)
    measured = list(output_variances(model, inputs).values())
    assert measured[0] == pytest.approx(1, rel=0.1)
    for depth, value in enumerate(measured):
        assert 0.3 < value * 2**depth < 3
    assert measured[-1] < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("width", [100, 256, 512])
def test_thirty_rectifier_layers_grow_as_theory_says(width):
    """log(mean square behind / before), its mean over 50 seeds, is within 3 standard errors of the exact one.

    No bound on the average of the mean square itself would be as sharp: it has the wide tail of a product of 30
    random factors, and its logarithm a mean below 0 (`measure.rectifier_log_growth`).
    """
    depth, seeds = 30, 50
    mean, variance = (depth * number for number in rectifier_log_growth(width))
    model = DeepRectifier(width, depth)
    logs = []
    for seed in range(seeds):
        x = torch.randn(width, generator=torch.Generator().manual_seed(seed))
        gh.init_weights(model, x[None], seed=seed)
        with torch.no_grad():
            logs.append(math.log(model.body(x).square().mean() / x.square().mean()))
    deviation = sum(logs) / seeds - mean
    assert abs(deviation) < 3 * math.sqrt(variance / seeds)
    # The theory of the spread, by the law of a sum of squares: within 4 standard errors for 49 degrees of freedom.
    spread = sum((value - sum(logs) / seeds) ** 2 for value in logs) / (seeds - 1)
    assert abs(spread / variance - 1) < 4 * math.sqrt(2 / (seeds - 1))


def test_theory_of_a_rectifier_layer_agrees_with_simulation():
    """One layer of width 8, where the chances of few active units matter, drawn 40,000 times in float64."""
    width, draws = 8, 40_000
    weight = torch.randn(draws, width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.arange(1.0, width + 1, dtype=torch.float64)
    behind = (weight * math.sqrt(2 / width) @ x).relu().square().mean(1)
    logs = torch.log(behind[behind > 0] / x.square().mean())
    mean, variance = rectifier_log_growth(width)
    chance = 1 - 2.0**-width  # that a unit is active: the theory leaves out the rest
    assert logs.mean().item() == pytest.approx(mean / chance, abs=3 * math.sqrt(variance / draws))
    assert rectifier_log_growth(10_000)[0] == pytest.approx(-2.5 / 10_000, rel=0.01)


class Monotonic(nn.Linear):
    """A linear layer that grows in all that it reads."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.abs(), self.bias)


@pytest.mark.parametrize("activation", [nn.Identity, nn.Tanh, nn.ELU, nn.ReLU])
def test_weights_of_one_sign_add_up_in_amplitude(activation):
    """A layer that reads what another gives, or what a rectifier gives; the first one reads independent numbers."""
    torch.manual_seed(0)
    layers = [part for _ in range(6) for part in (activation(), Monotonic(64, 64))]
    model, x = nn.Sequential(Monotonic(16, 64), *layers), torch.randn(256, 16)
    gh.init_weights(model, x, seed=0)
    with torch.no_grad():
        sizes = [float(model[: 2 * depth + 1](x).square().mean().sqrt()) for depth in range(7)]
    assert 0.5 < sizes[0] < 1.5, "in variance: xavier, lecun, he"
    assert all(0.2 < size < 5 for size in sizes), sizes


def test_three_hundred_layers_in_seconds():
    """The time of this process alone: the machine may be busy with other things."""
    model = nn.Sequential(*(module for _ in range(300) for module in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 4))
    x = torch.randn(8, 64)
    start = time.process_time()
    report = gh.init_weights(model, x, seed=0)
    assert time.process_time() - start < 10
    assert len(report.depth) == 301
