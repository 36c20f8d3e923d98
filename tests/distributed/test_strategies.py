"""Clipping and skipping in real Trainer fits under every strategy, against the same fit in one process."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import distributed

if not (distributed.is_available() and distributed.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

import fits
import ranks
from fits import ADAPTIVE, Answer, Fit

from lightning_gradhealth import Chain, HealthSession, LayerwiseClip, NormClip, UnitwiseClip, ValueClip, guard
from lightning_gradhealth.session import ALWAYS_PROBED

Answers = list[dict[str, Answer]]

CLOSE = 1e-6
CLIPS = {
    "norm": Fit({"clip": NormClip(1.0)}),
    "adaptive": ADAPTIVE,
    "layerwise": Fit({"clip": LayerwiseClip(warmup=5)}),
    "unitwise": Fit({"clip": UnitwiseClip(0.1)}),
    "chain": Fit({"clip": Chain([ValueClip(0.1), NormClip(0.5)])}),
    "watched": Fit(steps=fits.COUNTED),
    "bare": Fit(None, steps=fits.COUNTED),
    "adam": Fit(optimizer=torch.optim.Adam, steps=1),
}
CLIPPED = {2: ["ddp", "fsdp2", "tp", "sp", "fsdp1"], 4: ["hsdp", "fsdp2_tp"]}
SPARED = {
    *((2, kind, "chain") for kind in ("ddp", "tp", "sp", "fsdp1")),  # time
    *((4, kind, clip) for kind in CLIPPED[4] for clip in ("layerwise", "chain", "adam")),
    *((2, "tp", "layerwise"), (2, "tp", "adam"), (4, "fsdp2_tp", "adaptive"), (2, "ddp", "unitwise")),
    (2, "fsdp1", "unitwise"),  # cannot be
}
ALIKE = [(world, kind, clip) for world, kinds in CLIPPED.items() for kind in kinds for clip in CLIPS]
ALIKE = [each for each in ALIKE if each not in SPARED]
MEASURED = [each for each in ALIKE if each[2] not in ("bare", "watched")]

ADAMW = {"foreach": {"foreach": True}, "fused": {"fused": True}, "loop": {"foreach": False}}
BAD = (3, 7)
SKIPS = {how: Fit({"on_non_finite": "skip"}, torch.optim.AdamW, 0.01, more, 10, bad=BAD) for how, more in ADAMW.items()}
SKIPS["clipped"] = Fit({"on_non_finite": "skip", "clip": "adaptive"}, steps=10, bad=BAD)
SKIPS["nan"] = Fit({"on_non_finite": "skip"}, steps=10, nan=BAD)
SKIPPED = [(2, kind, how) for kind in ("ddp", "fsdp2", "fsdp1") for how in ("foreach", "fused")]
SKIPPED += [(2, "tp", "loop"), (2, "fsdp2", "clipped"), (2, "ddp", "nan"), (4, "hsdp", "foreach")]

TOP = Fit({"clip": NormClip(1.0)}, options={"gradient_clip_val": 0.5})
REST = {
    "flat unitwise": ("fsdp1", Fit({"clip": UnitwiseClip(0.1)}, steps=2)),
    "trainer's on top": ("ddp", TOP),
    "late": ("ddp", Fit({"on_non_finite": "skip"}, steps=6, late=(3,))),
    "poisoned": ("fsdp2", Fit({"on_non_finite": "raise"}, steps=6, poisoned=3)),
    "raised": ("fsdp2", Fit({"on_non_finite": "raise"}, steps=6, bad=(3,))),
    "stopped": ("ddp", Fit({"on_non_finite": "stop"}, steps=6, bad=(3,))),
}


def resumed(kind: str, clip: Any, folder: Path) -> dict[str, tuple[str, Fit]]:
    """Twice as long, in one piece and in two."""
    path, how = str(folder / f"{kind}.ckpt"), {"spikes": (4, 9), "optimizer": torch.optim.Adam}
    return {
        f"{kind} unbroken": (kind, Fit({"clip": clip}, steps=12, **how)),
        f"{kind} first": (kind, Fit({"clip": clip}, options={"max_steps": 6}, steps=12, save=path, **how)),
        f"{kind} second": (kind, Fit({"clip": clip}, steps=12, resume=path, **how)),
    }


def once(name: str, make: Callable[[], Any], factory: pytest.TempPathFactory) -> Any:
    """What `make()` returns, made once, though several workers of pytest-xdist may ask for it."""
    folder = factory.getbasetemp()
    path = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / f"{name}.pt"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            torch.save(make(), path)
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """The fits in one process."""
    every = {name: ("one", fit) for name, fit in {**CLIPS, **SKIPS, "trainer's on top": TOP}.items()}
    return once("one", lambda: fits.run_all(every), tmp_path_factory)


def launch(world: int, more: dict[str, tuple[str, Fit]]) -> Answers:
    every = {f"{kind} {clip}": (kind, CLIPS[clip]) for there, kind, clip in ALIKE if there == world}
    every |= {f"{kind} skips {how}": (kind, SKIPS[how]) for there, kind, how in SKIPPED if there == world}
    return ranks.run(fits.run_all, world, {**every, **more}, timeout=240.0)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder = tmp_path_factory.mktemp("checkpoints")
    more = {**REST, **resumed("ddp", "adaptive", folder), **resumed("fsdp2", LayerwiseClip(warmup=3), folder)}
    return once("two", lambda: launch(2, more), tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return once("four", lambda: launch(4, {}), tmp_path_factory)


@pytest.fixture
def every(request: pytest.FixtureRequest) -> tuple[list[Answer], Answer]:
    """What each rank says of one fit, and what one process says."""
    world, kind, name = request.param
    skips = "skips " if name in SKIPS else ""
    answers = request.getfixturevalue({2: "two", 4: "four"}[world])
    return [rank[f"{kind} {skips}{name}"] for rank in answers], request.getfixturevalue("one")[name]


def over(cases: list[tuple[int, str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("every", cases, indirect=True, ids=[f"{k}-{n}-{w}" for w, k, n in cases])


def agree(answers: list[Answer]) -> None:
    """All ranks have done and seen the same, bit for bit; only losses are each rank's own."""
    first = answers[0]
    for other in answers[1:]:
        for mine, theirs in zip(first["steps"], other["steps"], strict=True):
            assert repr({**mine, "loss": None}) == repr({**theirs, "loss": None})
        assert repr(first["layers"]) == repr(other["layers"])
        assert repr(first["clippers"]) == repr(other["clippers"])
        assert all(torch.equal(weight, other["weights"][name]) for name, weight in first["weights"].items())


def near(found: float | None, expected: float | None) -> bool:
    return str(found) == str(expected) or found == pytest.approx(expected, rel=CLOSE)


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Greatest distance between the weights of a module, beside their norm."""
    modules: dict[str, list[str]] = {}
    for name in expected:
        modules.setdefault(name.rpartition(".")[0], []).append(name)

    def size(tensors: list[torch.Tensor]) -> float:
        return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))

    return max(
        size([found[name] - expected[name] for name in names]) / size([expected[name] for name in names])
        for names in modules.values()
    )


def same_as(answer: Answer, expected: Answer) -> None:
    """Norms of every layer, and what was done, at every step, and the weights at the end."""
    assert [step["step"] for step in answer["steps"]] == [step["step"] for step in expected["steps"]]
    for mine, theirs in zip(answer["steps"], expected["steps"], strict=True):
        assert near(mine["total_norm"], theirs["total_norm"])
        assert near(mine["clip_coefficient"], theirs["clip_coefficient"])
        assert near(mine["applied_norm"], theirs["applied_norm"])
        assert [mine[key] for key in ("clipped", "armed", "skipped")] == [
            theirs[key] for key in ("clipped", "armed", "skipped")
        ]
    for mine, theirs in zip(answer["layers"], expected["layers"], strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            for value in ("grad_norm", "applied_norm", "weight_norm"):
                assert near(mine[name][value], theirs[name][value])


# --- clipping ---


def test_one_process_is_right(one: dict[str, Answer]) -> None:
    """The fits that all others are held against, against a loop that spells it all out."""
    norms, weights = fits.plain_loop(CLIPS["norm"], 1.0)
    answer = one["norm"]
    assert [step["total_norm"] for step in answer["steps"]] == pytest.approx(norms, rel=CLOSE)
    coefficients = [min(1.0, 1.0 / norm) for norm in norms]
    assert [step["clip_coefficient"] for step in answer["steps"]] == pytest.approx(coefficients, rel=CLOSE)
    assert apart(answer["weights"], weights) < CLOSE
    assert sum(coefficient < 1 for coefficient in coefficients) > 15


def test_the_fits_are_what_they_claim(one: dict[str, Answer]) -> None:
    for clip in ("norm", "layerwise", "unitwise", "chain"):
        assert sum(step["clipped"] for step in one[clip]["steps"]) > 15
    assert [step["armed"] for step in one["adaptive"]["steps"]] == [False] * 22 + [True, False]
    assert one["adaptive"]["steps"][22]["clip_coefficient"] < 0.01
    assert all(len(one[clip]["steps"]) == CLIPS[clip].steps for clip in CLIPS if clip != "bare")


@over(ALIKE)
def test_ranks_agree_bit_for_bit(every: tuple[list[Answer], Answer]) -> None:
    answers, expected = every
    for answer in answers:
        assert not answer["error"]
        assert len(answer["steps"]) == len(expected["steps"])
        assert not answer.get("report", {}).get("aside")
    if "report" in answers[0]:
        agree(answers)


@over(MEASURED)
def test_norms_and_coefficients_are_those_of_one_process(every: tuple[list[Answer], Answer]) -> None:
    same_as(every[0][0], every[1])


@over([each for each in MEASURED if each[2] != "adam"])
def test_weights_are_those_of_one_process(every: tuple[list[Answer], Answer]) -> None:
    answers, expected = every
    assert apart(answers[0]["weights"], expected["weights"]) < CLOSE


@pytest.mark.parametrize(("world", "kind"), [(world, kind) for world in CLIPPED for kind in CLIPPED[world]])
def test_to_watch_changes_nothing(world: int, kind: str, request: pytest.FixtureRequest) -> None:
    for rank in request.getfixturevalue({2: "two", 4: "four"}[world]):
        watched, bare = (rank[f"{kind} {how}"]["weights"] for how in ("watched", "bare"))
        assert watched
        assert all(torch.equal(weight, bare[name]) for name, weight in watched.items())


# Summands (here two gradients) take a collective each at every look at them. A clipper adds them up once for all; then
# the optimizer, which would have done it too, need not.
# Norms of units that ranks share take one each, for the gradient and for the weight, over each dimension of the mesh
# that splits them: vectors under FSDP, rows and vectors under TP. One for all says whether anything was clipped.
EXTRA = {
    "sp watched": 2,
    "fsdp2 unitwise": 1 + 2 * 6,
    "hsdp unitwise": 1 + 2 * 6,
    "fsdp2_tp unitwise": 1 + 2 * 8,
    "tp unitwise": 1 + 2 * 2,
    "sp unitwise": 1 + 2 * 3,
    "fsdp2 chain": 2,
}


AGREEMENT = 2  # at the first probe the ranks exchange the names of what they measure: how long they are, and they


@over([each for each in ALIKE if each[2] not in ("bare", "adam")])
def test_one_collective_a_step(every: tuple[list[Answer], Answer], request: pytest.FixtureRequest) -> None:
    world, kind, clip = request.node.callspec.params["every"]
    for rank in request.getfixturevalue({2: "two", 4: "four"}[world]):
        mine, bare = (rank[f"{kind} {how}"]["collectives"] for how in (clip, "bare"))
        usual = 0 if kind == "ddp" else 1
        for step, (count, without) in enumerate(zip(mine, bare, strict=True)):
            expected = usual + EXTRA.get(f"{kind} {clip}", 0)
            if step in ALWAYS_PROBED or step % fits.PROBES == fits.PROBES - 1:
                expected += usual + (EXTRA["sp watched"] if (kind, clip) == ("sp", "watched") else 0)
            expected += 1 if step else 1 + AGREEMENT  # signals: first steps, until units have had samples enough
            expected += kind == "fsdp1" and step == 0  # the sizes of the whole parameters
            assert count - without == expected


def test_flat_shards_cannot_be_clipped_by_row(two: Answers) -> None:
    for rank in two:
        assert (
            "GradHealthError: UnitwiseClip needs whole rows, but FSDP's flat shards" in rank["flat unitwise"]["error"]
        )
        assert "ModelParallelStrategy" in rank["flat unitwise"]["error"]


def test_the_trainers_own_clipping_comes_after(two: Answers, one: dict[str, Answer]) -> None:
    name = "trainer's on top"
    agree([rank[name] for rank in two])
    same_as(two[0][name], one[name])
    assert apart(two[0][name]["weights"], one[name]["weights"]) < CLOSE
    applied = [step["applied_norm"] for step in two[0][name]["steps"] if step["applied_norm"] is not None]
    assert applied == pytest.approx([0.5] * len(applied), rel=1e-5)  # torch adds 1e-6 to the norm
    assert any("gradient_clip_val=0.5" in note for note in two[0][name]["report"]["notes"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_resumed_fit_clips_as_the_unbroken_one(kind: str, two: Answers) -> None:
    for rank in two:
        whole, first, second = (rank[f"{kind} {part}"] for part in ("unbroken", "first", "second"))
        assert repr([*first["steps"], *second["steps"]]) == repr(whole["steps"])
        assert repr(second["clippers"]) == repr(whole["clippers"])
        assert any(step["clipped"] for step in second["steps"])
        assert all(torch.equal(weight, second["weights"][name]) for name, weight in whole["weights"].items())


# --- NaN and Inf ---


@over(SKIPPED)
def test_a_skipped_step_leaves_everything_as_it_was(every: tuple[list[Answer], Answer]) -> None:
    answers, expected = every
    agree(answers)
    for answer in answers:
        assert answer["unchanged"] == dict.fromkeys(BAD, True)
        assert [step["step"] for step in answer["steps"] if step["skipped"]] == list(BAD)
        assert (answer["report"]["steps"], answer["report"]["skipped_steps"]) == (10, 2)
        assert not answer["report"]["aside"]
    assert apart(answers[0]["weights"], expected["weights"]) < CLOSE  # training has gone on
    assert expected["unchanged"] == dict.fromkeys(BAD, True)


@over(SKIPPED)
def test_rank_zero_names_the_origin_on_another(
    every: tuple[list[Answer], Answer], request: pytest.FixtureRequest
) -> None:
    world, _, how = request.node.callspec.params["every"]
    answer = every[0][0]
    where = "the batch is not finite" if how == "nan" else "the first output that is not finite is that of net.power"
    first, second = (step["origin"] for step in answer["steps"] if step["skipped"])
    last = 0 if request.node.callspec.params["every"][1] == "tp" else world - 1  # every rank has the whole batch
    for origin in (second,) if how == "fused" else (first, second):  # of a fused optimizer's the first goes unread
        assert where in origin
        assert origin.endswith(f"on rank {last}")
    assert where in answer["findings"]["non_finite"]


def test_a_backward_that_talks_to_other_ranks_runs_on_all_or_none(two: Answers) -> None:
    """Rank zero's forward was finite; its backward pass alone would wait for the other rank's."""
    agree([rank["late"] for rank in two])
    for rank in two:
        (origin,) = [step["origin"] for step in rank["late"]["steps"] if step["skipped"]]
        assert "the loss of Module is not finite" in origin
        assert origin.endswith("on rank 1")
        assert rank["late"]["unchanged"] == {3: True}


def test_a_shard_that_is_nan_on_one_rank(two: Answers) -> None:
    """The search ends at once on that rank, while the other gathers the weights."""
    for rank in two:
        assert "NonFiniteGradientError" in rank["poisoned"]["error"]
        assert "net.up (" in rank["poisoned"]["error"]  # its weights, or to the other rank its output


def test_all_ranks_end_together(two: Answers) -> None:
    for rank in two:
        assert "step 3" in rank["raised"]["error"]
        assert "net.power" in rank["raised"]["error"]
        assert not rank["stopped"]["error"]
        assert rank["stopped"]["stopped"]
        assert len(rank["stopped"]["steps"]) == 4


@pytest.mark.parametrize("health", [{"clip": "adaptive"}, {"on_non_finite": "skip"}, {"stop_on": "non_finite"}, {}])
def test_no_rank_steps_aside_alone(health: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Others would go on clipping, or wait for it forever; where it only watches, training goes on."""

    def fails(_: HealthSession) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(HealthSession, "flush", fails)
    monkeypatch.setattr(guard, "world_size", lambda: 2)
    answer = fits.run("one", Fit(health, steps=6))
    if health:
        assert "GradHealthError: GradHealth cannot step aside on one rank alone" in answer["error"]
        assert "the disk is full" in answer["error"]
    else:
        assert not answer["error"]
        assert "the disk is full" in answer["report"]["aside"]


# --- ddp_spawn ---


@pytest.mark.slow
def test_spawned(tmp_path: Path, one: dict[str, Answer]) -> None:
    """GradHealth is pickled on its way to the processes; what they have seen comes back by files."""
    script = Path(__file__).with_name("spawned.py")
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2])}
    with subprocess.Popen([sys.executable, script, tmp_path], env=environment, start_new_session=True) as process:
        try:
            assert process.wait(timeout=120) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and the processes that it has started
    answers = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    agree(answers)
    same_as(answers[0], one["adaptive"])
    assert apart(answers[0]["weights"], one["adaptive"]["weights"]) < CLOSE
