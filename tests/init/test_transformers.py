"""Models that nobody here wrote: initialised without failure, every parameter accounted for, and they train."""

import re
import warnings

import pytest
import torch
from hub import HUB, TASK

import lightning_gradhealth as gh

pytestmark = pytest.mark.xdist_group("transformers")  # the import takes seconds: once where workers group tests
every_model = pytest.mark.parametrize("name", HUB)

# What is no weight: it stays, bit for bit.
STATE = {
    "llama": r".*norm\.weight",
    "t5": r".*layer_norm\.weight",
    "vit": r".*(cls_token|position_embeddings)",
    "swin": r".*relative_position_bias_table",
    "convnext": r".*layer_scale_parameter",
    "mamba": r".*(A_log|mixer\.D|dt_proj\.bias)",
    "whisper": r"model\.encoder\.embed_positions\.weight",
    "clip": r"logit_scale|.*class_embedding",
    "wav2vec2": r".*masked_spec_embed",
}
UNUSED = {"wav2vec2": [r".*masked_spec_embed"]}  # only masked time steps read it, and nothing is masked here


@pytest.fixture(scope="module")
def library():
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    yield transformers
    patch.undo()


def made(library, name, task=False):
    make, inputs = HUB[name]
    torch.manual_seed(0)
    model = make(library).train()
    return model, {key: value for key, value in inputs().items() if task or key not in TASK}


def initialised(model, inputs, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # uncovered parameters, too
        return gh.init_weights(model, inputs, seed=0, skip=UNUSED.get(name, ()))


def signal(output):
    """The logits; of a model that compares, what it compares."""
    return output.logits_per_image if hasattr(output, "logits_per_image") else output.logits


@every_model
def test_every_parameter_is_accounted_for(library, name):
    model, inputs = made(library, name)
    report = initialised(model, inputs, name)
    assert report.source.startswith("trace")
    assert not report.uncovered
    names = {re.sub(r"\[.*\]$", "", entry.name) for entry in report.entries}
    assert names == {key for key, _ in model.named_parameters()}


@pytest.mark.parametrize("name", STATE)
def test_what_is_no_weight_stays(library, name):
    model, inputs = made(library, name)
    with torch.no_grad():  # so that zeros and ones would not do
        for key, parameter in model.named_parameters():
            if re.fullmatch(STATE[name], key):
                parameter.add_(torch.rand_like(parameter), alpha=0.01)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    initialised(model, inputs, name)
    stayed = [key for key, value in model.state_dict().items() if torch.equal(value, before[key])]
    assert (state := [key for key, _ in model.named_parameters() if re.fullmatch(STATE[name], key)])
    assert set(state) <= set(stayed)
    moved = set(before) - set(stayed)
    assert len(moved) > len(before) / 4, "hardly a weight was drawn"


@every_model
def test_outputs_are_of_order_1(library, name):
    """The root mean square over all logits, before any training, lies between 0.2 and 5."""
    model, inputs = made(library, name)
    initialised(model, inputs, name)
    with torch.no_grad():
        logits = signal(model(**inputs))
    assert logits.isfinite().all()
    assert 0.2 < logits.double().square().mean().sqrt().item() < 5


@every_model
def test_they_train(library, name):
    """Forty steps of Adam on one batch take a good part of the loss away."""
    model, inputs = made(library, name, task=True)
    initialised(model, {key: value for key, value in inputs.items() if key not in TASK}, name)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@every_model
def test_labels_among_the_sample_inputs_change_nothing(library, name):
    """The loss that such a model computes from labels is no layer."""
    states = []
    for task in (False, True):
        model, inputs = made(library, name, task)
        initialised(model, inputs, name)
        states.append(model.state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=0, msg=key)
