"""What each condition means, when it is found and what to do, whatever the run; a finding speaks of its own run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from lightning_gradhealth.records import Condition
from lightning_gradhealth.rules.base import Thresholds


@dataclass(frozen=True)
class Meaning:
    """A condition in words; figures stand in braces, under their names in `Thresholds`.

    Attributes:
        what: What it is, in a sentence.
        when: When it is found.
        remedy: What to do.
        source: Where to read on.

    Example:
        >>> MEANINGS[Condition.NO_GRADIENT].told().when[:68]
        'a parameter has had no gradient for some steps (no_gradient_steps 20'
        >>> MEANINGS[Condition.NO_GRADIENT].told(Thresholds(no_gradient_steps=7)).when[48:67]
        'no_gradient_steps 7'
    """

    what: str
    when: str
    remedy: str
    source: str

    def told(self, thresholds: Thresholds = Thresholds()) -> Meaning:  # noqa: B008  (frozen)
        """The same with the figures filled in.

        Args:
            thresholds: The figures.
        """
        figures = asdict(thresholds)
        named = {name: f"{name} {value:g}" for name, value in figures.items()}
        return Meaning(self.what, self.when.format(**named), self.remedy, self.source)


_INIT = "gh.init_weights(model, batch)"
_RATE = "a smaller learning rate (a tenth) or a warm-up of it"

MEANINGS: Mapping[Condition, Meaning] = {
    Condition.VANISHING_GRADIENTS: Meaning(
        "Gradients shrink by orders of magnitude on their way back, so that the first layers hardly learn.",
        "the backward signal of the first quarter of the layers is below a share of that of the last ({depth_ratio};"
        " critical below {depth_critical}), and the fitted gain per layer agrees, at several probes ({depth_probes} or"
        " more) in nets of some depth ({depth_layers} or more); the same through time in recurrent layers; one layer"
        " whose weights are"
        " tiny beside those of its neighbours ({swallowed_weights}) swallows the gradient; or the total norm has fallen"
        " by a factor ({time_ratio}) while the loss has not come down",
        f"{_INIT}; ReLU, GELU or SELU in place of sigmoid or tanh; a normalisation between the layers, or residual"
        " connections; LSTM or GRU in place of a plain RNN",
        "Bengio et al. 1994; Glorot and Bengio 2010; He et al. 2015",
    ),
    Condition.EXPLODING_GRADIENTS: Meaning(
        "Gradients grow by orders of magnitude, over depth or from one step to the next.",
        "the backward signal grows over depth by the inverse of {depth_ratio}, the fitted gain per layer agreeing, at"
        " several probes ({explosion_probes}); the same through time in recurrent layers; the total norm leaps to many"
        " times the"
        " median of the last steps ({time_ratio}, {time_window}); or gradients are never cleared and add up over the"
        " steps ({carried_over})",
        f'GradHealth(clip="adaptive") or Trainer(gradient_clip_val=1.0); {_RATE}; {_INIT}; a normalisation between the'
        " layers; optimizer.zero_grad() at every step",
        "Pascanu et al. 2013; He et al. 2015",
    ),
    Condition.NON_FINITE: Meaning(
        "A gradient or the loss is NaN or Inf; a step with it makes the weights NaN for good.",
        "at the first such step; skips of a loss scaler count only from a number in a row on ({overflow_steps})",
        'GradHealth(on_non_finite="skip") keeps the weights; look at the module that the finding names for log(0), 0/0,'
        f" sqrt(0) and exp() of large values, and at the batch; {_RATE} where the norms grew before",
        "Micikevicius et al. 2018, on loss scaling",
    ),
    Condition.GROWING_WEIGHTS: Meaning(
        "Weight norms grow exponentially: the training diverges.",
        "a weight norm grows by a factor ({growth}) in successive windows of steps ({growth_window}), at least this"
        " many times in"
        " a row ({growth_windows}) and none slower than the one before; an info where the loss comes down all the same",
        f"{_RATE}; weight decay (AdamW); a normalisation layer",
        "LeCun et al. 1998, Efficient BackProp, on rates that diverge",
    ),
    Condition.COLLAPSING_WEIGHTS: Meaning(
        "Weights go to zero, and the layer with them.",
        "a weight norm shrinks by a factor ({growth}) in successive windows of steps ({growth_window},"
        " {growth_windows}), down to a"
        " small share of its greatest ({collapsed})",
        "less weight decay (a tenth), and none for scales and biases; a smaller learning rate, which multiplies it",
        "Krogh and Hertz 1991; Loshchilov and Hutter 2019, on weight decay",
    ),
    Condition.OVERSIZED_UPDATES: Meaning(
        "One optimizer step changes the weights by about their own size, so that it replaces what was learned.",
        "one step changes at least this share of the layers ({update_share}) by more than this share of their size"
        " ({update_at_once}), or again and again by more than this ({update_repeated}); around 1e-3 is usual. An info"
        " where the loss falls to a fifth all the same",
        _RATE,
        "CS231n notes (Stanford), on the ratio of updates to weights",
    ),
    Condition.STALLED_LAYERS: Meaning(
        "Layers stand still while others move, or the whole network has never moved.",
        "a layer changes by less than this in one step ({stalled_update}) while another of the same optimizer changes"
        " by"
        " more ({moving_update}), for several probes ({stalled_probes}); or gradients are clipped while they are still"
        " multiplied by the loss scale",
        "a larger learning rate for these layers (parameter groups); see vanishing gradients first;"
        " scaler.unscale_(optimizer) before clipping; requires_grad_(False) where they are meant to stand still",
        "CS231n notes (Stanford), on the ratio of updates to weights",
    ),
    Condition.LOSS_SPIKE: Meaning(
        "The loss leaps far above the recent ones.",
        "a loss is many robust standard deviations above the median ({spike_sigmas}; on a logarithmic scale"
        " {spike_log_sigmas}), more than a multiple of it ({spike_median}), and by more than a share of its fall so far"
        " ({spike_fall}). A warning where three of five losses are high, else an info",
        f"look at the batch of that step; Trainer(gradient_clip_val=...) at the usual norm; {_RATE} where it stays"
        " high",
        "Chowdhery et al. 2022 (PaLM), on loss spikes",
    ),
    Condition.STALLED_LOSS: Meaning(
        "The loss has not come down since the start.",
        "after some steps at a rate that has stopped rising ({stalled_steps}), the fall of the loss, noise allowed for,"
        " is below a share of its start ({stalled_fall}). An info unless another finding supports it",
        "see the other findings first; else another learning rate (the Tuner's lr_find), and check that targets and"
        " loss"
        " belong together",
        "Karpathy 2019, A Recipe for Training Neural Networks",
    ),
    Condition.NO_GRADIENT: Meaning(
        "Trainable parameters in the optimizer never get a gradient.",
        "a parameter has had no gradient for some steps ({no_gradient_steps}); zero is a gradient, None is none",
        "use them in the forward pass, or parameter.requires_grad_(False); look for a detach() or no_grad() on the way;"
        " make the optimizer after the last layer is in its place",
        "PyTorch documentation, Autograd mechanics",
    ),
    Condition.NOT_IN_OPTIMIZER: Meaning(
        "Parameters get a gradient, but no optimizer steps them.",
        "such a parameter has not changed for some steps ({no_gradient_steps}): of layers in a Python list, or"
        " replaced,"
        " made or unfrozen after the optimizer; an info where the model has had it from the start, as where a head"
        " alone is trained",
        "give them to the optimizer: optimizer.add_param_group(...); keep layers in an nn.ModuleList; make the"
        " optimizer"
        " after the model is complete",
        "PyTorch documentation, torch.optim and nn.ModuleList",
    ),
    Condition.SQUASHED_LOGITS: Meaning(
        "A softmax or a sigmoid stands before a loss that takes logits and applies its own: the loss cannot come down.",
        "it is seen in the graph of the loss at a probed step",
        "leave the activation out: nn.CrossEntropyLoss and nn.BCEWithLogitsLoss take logits; or keep it and use"
        " nn.NLLLoss of its logarithm, or nn.BCELoss",
        "PyTorch documentation, nn.CrossEntropyLoss",
    ),
    Condition.VANISHING_ACTIVATIONS: Meaning(
        "The signal shrinks by orders of magnitude on its way to the loss: the last layers see next to nothing.",
        "the output of the last quarter of the layers is below a share of that of the first ({depth_ratio}), and the"
        " fitted gain per layer agrees, at several probes ({depth_probes} or more) in nets of some depth"
        " ({depth_layers} or more)",
        f"{_INIT}; a normalisation between the layers, or residual connections",
        "Glorot and Bengio 2010; He et al. 2015",
    ),
    Condition.EXPLODING_ACTIVATIONS: Meaning(
        "The signal grows by orders of magnitude on its way to the loss.",
        "the output grows over depth by the inverse of {depth_ratio}, beside the network's input too, the fitted gain"
        " agreeing, at several probes ({explosion_probes}); before training, inputs of a size ({input_rms}) that"
        " nothing"
        " normalises, or outputs that leap by a factor ({leap}) beside all before them, as behind exp()",
        f"{_INIT}; a normalisation between the layers; inputs of mean 0 and variance 1; a bound for what goes into"
        " exp()",
        "He et al. 2015; Schoenholz et al. 2017",
    ),
    Condition.DEAD_UNITS: Meaning(
        "ReLU-like units are never active: nothing goes through them, and they get no gradient.",
        "at least this share of a layer's units ({dead_units}) was active in none of at least 256 samples, and far"
        " fewer"
        " in all of them. An info where the loss comes down all the same, unless nearly all are dead ({dead_most})",
        f"nn.LeakyReLU(0.01) or nn.ELU() in place of nn.ReLU(); biases that start at 0; {_RATE}; {_INIT}",
        "Maas et al. 2013; Lu et al. 2020, Dying ReLU and Initialization",
    ),
    Condition.SATURATED_UNITS: Meaning(
        "Sigmoid- or tanh-like units are stuck where their derivative is tiny, or attention is nearly one-hot.",
        "at least this share of a layer's units ({saturated_units}) has a derivative below 5 % of its greatest on"
        " average, or as many heads of an attention look at one place only",
        f"{_INIT}; a normalisation before the activation, or ReLU in its place; inputs of mean 0 and variance 1; of"
        " attention: normalised queries and keys",
        "Glorot and Bengio 2010; Zhai et al. 2023, on attention",
    ),
    Condition.ADAPTIVE_CLIPPING: Meaning(
        'clip="adaptive" has met single spikes, or an outbreak that opened its gate.',
        "at the first; an info, a warning where half of the last steps were clipped ({clipped_window})",
        f"none while it is rare; else {_RATE}, a normalisation layer or {_INIT}",
        "Pascanu et al. 2013, on clipping",
    ),
}
