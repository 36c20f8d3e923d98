"""The first module that makes a NaN or Inf is named, for real nets and real faults; nothing else is touched."""

from __future__ import annotations

import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Classifier, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_gradhealth.isolation import RandomState
from lightning_gradhealth.origin import Origin, find_origin


class Apply(nn.Module):
    """Any function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def log_of_zero(x: Tensor) -> Tensor:
    return (x * 0).log()


def sqrt_of_zero(x: Tensor) -> Tensor:
    return (x * 0).sqrt()


def where(origin: Origin) -> tuple[str, str, str]:
    return origin.module, origin.kind, origin.phase


def search(net: nn.Module, *inputs: Any, **options: Any) -> Origin:
    return find_origin(net, lambda: net(*(inputs or (torch.ones(4, 8),))).sum(), **options)


def chain(*modules: nn.Module | Callable[..., Any]) -> nn.Sequential:
    return nn.Sequential(*(m if isinstance(m, nn.Module) else Apply(m) for m in modules))


class Net(nn.Module):
    """Two layers with `between` in the code of the net itself."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)
        self.between = [between]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between[0](self.act(self.first(x))))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


# --- forward ---


def test_log_of_zero_in_one_layer() -> None:
    net = chain(mlp(outputs=8), nn.Linear(8, 8), log_of_zero, nn.Linear(8, 1))
    assert search(net) == Origin("2", "Apply", "forward", ("0.5", "0.6", "1"))


def test_in_the_code_of_a_container() -> None:
    net = chain(nn.Linear(8, 8), Net(log_of_zero), nn.Linear(8, 8))
    assert search(net) == Origin("1", "Net", "forward", ("0", "1.first", "1.act"))
    assert search(Net(log_of_zero)) == Origin("Net", "Net", "forward", ("first", "act"))


def test_in_the_code_after_the_last_child() -> None:
    class After(Net):
        def forward(self, x: Tensor) -> Tensor:
            return log_of_zero(super().forward(x))

    assert search(chain(After(lambda x: x))) == Origin("0", "After", "forward", ("0.first", "0.act", "0.second"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_input(value: float) -> None:
    x = torch.ones(4, 8)
    x[1, 2] = value
    net = chain(nn.BatchNorm1d(8), mlp())
    net(x)  # has written into the running statistics by now
    assert where(search(net, x)) == ("Sequential", "Sequential", "input")
    model = Classifier()
    batch = [x, torch.zeros(4, dtype=torch.long)]
    assert where(find_origin(model, lambda: model.training_step(batch, 0))) == ("Classifier", "Classifier", "input")


def test_a_batch_tells_input_from_code() -> None:
    class Own(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step([log_of_zero(batch[0]), batch[1]], batch_idx)

    model = Own()
    batch = [torch.ones(4, 8), torch.zeros(4, dtype=torch.long)]
    found = find_origin(model, lambda: model.training_step(batch, 0), batch=batch)
    assert where(found) == ("Own", "Own", "forward")
    batch[0][0] = torch.nan
    assert find_origin(model, lambda: model.training_step(batch, 0), batch=batch).phase == "input"


@pytest.mark.parametrize("name", ["0.weight", "4.bias"])
def test_weight(name: str) -> None:
    net = mlp()
    net.get_parameter(name).data.view(-1)[0] = torch.nan
    assert search(net) == Origin(name[0], "Linear", "parameters", ())


def test_buffer_that_is_used() -> None:
    net = chain(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    net[1].running_var.fill_(torch.nan)
    assert search(net).phase == ""  # training does not use it
    assert search(net.eval()) == Origin("1", "BatchNorm1d", "parameters", ("0",))


def test_overflow_under_autocast() -> None:
    net = chain(nn.Linear(8, 8), lambda x: x * 1e4, nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.constant_(net[2].weight, 30.0)

    def rerun() -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16):
            return net(torch.ones(4, 8)).float().sum()

    nn.init.constant_(net[0].weight, 0.1)
    assert find_origin(net, rerun) == Origin("2", "Linear", "forward", ("0", "1"))
    assert search(net).phase == ""  # in fp32 there is none


def test_dropout_mask_decides() -> None:
    """The fault needs this very mask: one unit of many is dropped, and then its log is taken."""
    net = chain(nn.Linear(8, 16), lambda x: x * 0 + 1, nn.Dropout(0.02), lambda x: x.log(), nn.Linear(16, 1))
    while True:
        random = RandomState.now()
        if not net(torch.ones(1, 8)).isfinite().all():
            break
    found = Origin("3", "Apply", "forward", ("0", "1", "2"))
    others = []
    for _ in range(20):
        assert search(net, torch.ones(1, 8), random=random) == found
        others.append(search(net, torch.ones(1, 8)))
        torch.rand(7)  # the next mask would be another one
    assert any(other.phase == "" for other in others)


# --- loss ---


def test_division_in_the_loss() -> None:
    net = mlp()
    found = find_origin(net, lambda: net(torch.ones(4, 8)).sum() / torch.zeros(()))
    assert found == Origin("Sequential", "Sequential", "loss", ("4", "5", "6"))
    found = find_origin(net, lambda: {"loss": net(torch.ones(4, 8)).sum() / torch.zeros(()), "x": 1})
    assert found.phase == "loss"


def test_loss_module_and_bad_target() -> None:
    class Regressor(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.loss = nn.MSELoss()

        def training_step(self, batch: list[Tensor], batch_idx: int = 0) -> Tensor:
            return self.loss(self(batch[0]), batch[1])

    model = Regressor()
    batch = [torch.ones(4, 8), torch.full((4, 3), torch.nan)]
    found = find_origin(model, lambda: model.training_step(batch), batch=batch)
    assert where(found) == ("Regressor", "Regressor", "input")
    assert found.healthy == ("net.4", "net.5", "net.6")
    huge = [torch.ones(4, 8), torch.full((4, 3), 1e30)]
    assert where(find_origin(model, lambda: model.training_step(huge), batch=huge)) == ("loss", "MSELoss", "forward")


# --- backward ---


def test_sqrt_of_zero_backward() -> None:
    net = chain(nn.Linear(8, 8), nn.ReLU(), sqrt_of_zero, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    found = search(net)
    assert found == Origin("2", "Apply", "backward", ("5", "4", "3"), operation="Sqrt")
    assert search(net, backward=False) == Origin("", "", "", ())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_backward_in_the_code_of_a_container() -> None:
    assert where(search(chain(nn.Linear(8, 8), Net(sqrt_of_zero)))) == ("1", "Net", "backward")


def test_backward_in_the_loss() -> None:
    net = mlp()
    found = find_origin(net, lambda: sqrt_of_zero(net(torch.ones(4, 8))).sum())
    assert found == Origin("Sequential", "Sequential", "backward", (), operation="Sqrt")


def test_backward_on_one_of_two_branches() -> None:
    """What two modules take in has one gradient; the one that spoils it is named, not the one beside it."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.bad, self.good = nn.Linear(8, 8), Apply(sqrt_of_zero), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.bad(x) + self.good(x)

    assert where(search(Two())) == ("bad", "Apply", "backward")


def test_backward_of_a_parameter_only() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.power = nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.power.sqrt()

    assert where(search(chain(nn.Linear(8, 8), Scale(), nn.Linear(8, 8)))) == ("1", "Scale", "backward")


def test_sum_of_finite_gradients_overflows() -> None:
    shared = nn.Parameter(torch.zeros(()))
    net = nn.Module()
    net.shared = shared
    assert where(find_origin(net, lambda: shared * 3e38 + shared * 3e38)) == ("Module", "Module", "backward")


def test_bad_gradients_that_are_masked_do_no_harm() -> None:
    net = chain(nn.Linear(8, 8), lambda x: torch.where(x * 0 > 1, sqrt_of_zero(x.detach()), x))
    assert search(net).phase == ""


def test_where_trap() -> None:
    """The known trap: the branch that is not taken has a NaN gradient."""
    net = chain(nn.Linear(8, 8), lambda x: torch.where(x > 1e9, (x * 0).sqrt(), x), nn.Linear(8, 8))
    assert search(net) == Origin("1", "Apply", "backward", ("2",), operation="Sqrt")


# --- what nets are made of ---


class Outputs(nn.Module):
    """Returns what real modules return."""

    @dataclasses.dataclass
    class Data:
        x: Tensor
        n: int = 0

    def __init__(self, form: str, bad: bool) -> None:
        super().__init__()
        self.form, self.layer, self.bad = form, nn.Linear(8, 8), bad

    def forward(self, x: Tensor) -> Any:
        x = self.layer(x)
        spoiled = log_of_zero(x) if self.bad else x
        return {"dict": {"a": [1, None, (spoiled,)]}, "tuple": (torch.arange(3), spoiled)}.get(
            self.form, self.Data(spoiled)
        )


@pytest.mark.parametrize("form", ["dict", "tuple", "data"])
def test_nested_outputs(form: str) -> None:
    take = {"dict": lambda o: o["a"][2][0], "tuple": lambda o: o[1], "data": lambda o: o.x}[form]
    assert search(chain(Outputs(form, True), take)) == Origin("0", "Outputs", "forward", ("0.layer",))
    assert where(search(chain(Outputs(form, False), take, sqrt_of_zero))) == ("2", "Apply", "backward")


@pytest.mark.parametrize(("fault", "phase"), [(log_of_zero, "forward"), (sqrt_of_zero, "backward")])
@pytest.mark.parametrize("reentrant", [None, False])
def test_around_the_fault(fault: Callable[[Tensor], Tensor], phase: str, reentrant: bool | None) -> None:
    """In-place activations, dropout, batch norm, shared modules, residuals, checkpoints, no_grad and views."""
    shared = nn.Linear(8, 8)
    block = chain(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Dropout(0.3), Residual(nn.Linear(8, 8)))
    net = chain(
        shared,
        nn.BatchNorm1d(8),
        nn.ReLU(inplace=True),
        lambda x: x + torch.no_grad()(nn.functional.softmax)(x, 1),
        (lambda x: checkpoint(block, x, use_reentrant=reentrant)) if reentrant is not None else block,
        shared,
        lambda x: x.view(-1).view_as(x).mul_(2),
        fault,
        lambda x: x + 0,
        nn.LeakyReLU(inplace=True),
        block,
    )
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(4, 8)
    found = search(net, x)
    assert where(found) == ("7", "Apply", phase)
    if phase == "forward":
        assert found.healthy[1:] == ("0", "6")
    net[7].function = lambda x: x
    assert search(net, x) == Origin("", "", "", ())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_checkpoint_with_the_fault_inside() -> None:
    inner = chain(nn.Linear(8, 8), sqrt_of_zero, nn.Linear(8, 8))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.reentrant = inner, False

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=self.reentrant)

    net = chain(nn.Linear(8, 8), Outer())
    assert where(search(net)) == ("1.inner.1", "Apply", "backward")
    net[1].reentrant = True
    found = search(net)
    assert found.phase == ""
    assert "the backward pass could not be run again" in str(found)
    inner[1].function = log_of_zero
    assert where(search(net)) == ("1.inner.1", "Apply", "forward")


def test_recurrent_embedding_and_attention() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 8, sparse=True)
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = Apply(lambda x: x)

        def forward(self, words: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1])
            return self.head(self.encoder(self.lstm(self.table(words))[0], mask=mask))

    net, words = Text(), torch.randint(10, (2, 5))
    assert search(net, words) == Origin("", "", "", ())  # masks of -inf are no fault
    net.head.function = log_of_zero
    assert where(search(net, words)) == ("head", "Apply", "forward")
    net.head.function = sqrt_of_zero
    assert where(search(net, words)) == ("head", "Apply", "backward")
    net.lstm.register_forward_hook(lambda m, args, out: (out[0] / 0, out[1]))
    assert where(search(net, words)) == ("lstm", "LSTM", "forward")


def test_row_that_is_masked_out_altogether() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask, self.soft, self.out = Apply(lambda x: x - torch.inf), nn.Softmax(-1), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.soft(self.mask(x)))

    assert where(search(chain(nn.Linear(8, 8), Attention()))) == ("1.mask", "Apply", "forward")


def test_minus_infinity_on_purpose() -> None:
    """Masked scores are absorbed by the softmax after them; the fault is further on."""
    masked = chain(nn.Linear(8, 8), lambda x: x.masked_fill(torch.eye(8).bool()[:4], -torch.inf), nn.Softmax(-1))
    assert where(search(chain(masked, log_of_zero))) == ("1", "Apply", "forward")
    assert search(masked).phase == ""


def test_module_that_catches_its_own_errors() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bad, self.good = chain(Apply(lambda x: 1 // 0)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.bad(x)
            except ZeroDivisionError:
                return log_of_zero(self.good(x))

    assert search(chain(Careful())) == Origin("0", "Careful", "forward", ("0.good",))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("way", ["wrap", "method"])
def test_compiled_parts_are_looked_at_from_outside(way: str) -> None:
    def part(*modules: Any) -> nn.Module:
        net = chain(*modules)
        if way == "wrap":
            return torch.compile(net, backend="eager")  # type: ignore[return-value]
        net.compile(backend="eager")
        return net

    net = chain(
        nn.Linear(8, 8), part(nn.Linear(8, 8), nn.ReLU()), part(lambda x: -log_of_zero(x), nn.ReLU()), nn.Linear(8, 8)
    )
    net(torch.ones(4, 8))
    calls = [module.__dict__.get("_compiled_call_impl") for module in net.modules()]
    assert search(net) == Origin("2", "Sequential", "forward", ("0", "1"))
    assert calls == [module.__dict__.get("_compiled_call_impl") for module in net.modules()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_parts() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 0).log()

    net = chain(nn.Linear(8, 8), torch.jit.script(nn.Sequential(nn.Linear(8, 8), Log())), nn.Linear(8, 8))
    assert search(net) == Origin("1", "Sequential", "forward", ("0",))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning")
def test_hidden_altogether() -> None:
    """Where nothing inside can be seen, the whole is named, and the loss is not blamed."""

    class Whole(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int = 0) -> Tensor:
            return log_of_zero(super().training_step(batch, batch_idx))

    model = Whole()
    model._compiler_ctx = {}  # as Lightning notes it on trainer.fit(torch.compile(model))
    step = torch.compile(model.training_step, backend="eager")
    batch = [torch.ones(4, 8), torch.zeros(4, dtype=torch.long)]
    assert where(find_origin(model, lambda: step(batch), batch=batch)) == ("Whole", "Whole", "forward")


def test_function_transforms() -> None:
    """What runs under vmap or grad cannot be looked at; the module around it can."""

    class Transformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            weights = dict(self.layer.named_parameters())
            slope = torch.func.grad(lambda w: torch.func.functional_call(self.layer, w, (x,)).sum())(weights)
            return log_of_zero(torch.func.vmap(self.layer)(x)) + slope["bias"]

    net = chain(nn.Linear(8, 8), Transformed())
    assert where(search(net)) == ("1", "Transformed", "forward")


def test_gradient_penalty() -> None:
    class Penalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(outputs=1)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
            return (slope * 0).square().sum(1).sqrt()

    assert search(Penalty()) == Origin("Penalty", "Penalty", "backward", (), operation="Sqrt")


def test_complex_sparse_integer_and_low_precision_tensors() -> None:
    odd = chain(
        nn.Linear(8, 8),
        lambda x: (x, x.to(torch.float8_e4m3fn), x.to(torch.complex64), x.long(), x[:0], x.to_sparse(), torch.eye(2)),
        lambda t: t[0].bfloat16(),
    )
    assert search(odd).phase == ""
    bad = chain(odd, lambda x: torch.complex(x.float(), x.float() * torch.nan))
    assert where(find_origin(bad, lambda: bad(torch.ones(4, 8)).abs().sum())) == ("1", "Apply", "forward")


# --- manners ---


def test_not_reproduced() -> None:
    assert str(search(mlp())) == "origin unknown: the rerun was finite"
    net = mlp()
    for result in (None, 3, {}, {"loss": None}, torch.ones(())):
        assert find_origin(net, lambda result=result: result).phase == ""


def test_rerun_that_fails() -> None:
    net = mlp()
    found = find_origin(net, lambda: net(torch.ones(1, 9)))
    assert found.phase == ""
    assert str(found).startswith("origin unknown: the rerun failed: RuntimeError: mat1 and mat2")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_interrupt_goes_through() -> None:
    def rerun() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_origin(mlp(), rerun)


def test_in_a_context_without_gradients() -> None:
    """An optimizer's step, where a skipped update is decided, is such a context."""
    net = chain(nn.Linear(8, 8), sqrt_of_zero)
    with torch.no_grad():
        assert search(net).phase == "backward"
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("fault", [log_of_zero, sqrt_of_zero, lambda x: x])
def test_leaves_no_trace(fault: Callable[[Tensor], Tensor]) -> None:
    model = Classifier(chain(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), fault, nn.Linear(8, 3)))
    batch = [torch.randn(4, 8), torch.tensor([0, 1, 2, 0])]
    model.training_step(batch, 0).backward()
    before = [value.clone() for value in model.state_dict().values()]
    gradients = [parameter.grad for parameter in model.parameters()]
    copies = [gradient.clone() for gradient in gradients if gradient is not None]
    assert len(copies) == len(gradients)
    random = torch.get_rng_state()
    fired: list[int] = []
    for parameter in model.parameters():  # what DDP hangs its reducer on
        parameter.register_post_accumulate_grad_hook(lambda _: fired.append(1))
    find_origin(model, lambda: model.training_step(batch, 0), batch=batch)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(a is p.grad for a, p in zip(gradients, model.parameters(), strict=True))
    for copied, gradient in zip(copies, gradients, strict=True):
        torch.testing.assert_close(gradient, copied, rtol=0, atol=0, equal_nan=True)
    assert not fired
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_frees_what_it_ran() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def spy(x: Tensor) -> Tensor:
        y = x * 2
        seen.append(weakref.ref(y))
        return y

    net = chain(nn.Linear(8, 8), spy, sqrt_of_zero)
    gc.disable()
    try:
        search(net)
        assert seen[0]() is None  # without the help of the garbage collector
    finally:
        gc.enable()


def test_no_activation_is_kept_beyond_autograd() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def spy(x: Tensor) -> Tensor:
        y = x + 1  # no operation that follows saves it
        alive.append(weakref.ref(y))
        return y

    def last(x: Tensor) -> Tensor:
        assert alive[0]() is None
        return x

    net = chain(spy, lambda x: x + 1, lambda x: x + 1, last, nn.Linear(8, 8))
    assert str(search(net)) == "origin unknown: the rerun was finite"


def test_says_it_in_plain_english() -> None:
    assert str(Origin("net.1", "Exp", "backward", ("net.3", "net.2"), "Exp")) == (
        "the gradients turn non-finite in the backward pass of net.1 (Exp), at Exp; healthy before it: net.3, net.2"
    )
    assert str(Origin("Net", "Net", "input", ())) == "the batch is not finite before Net has done anything"
    assert str(Origin("0", "Linear", "parameters", ())) == (
        "weights or buffers of 0 (Linear) are not finite before the forward pass"
    )
    assert str(Origin("Net", "Net", "loss", ())) == (
        "the loss of Net is not finite, although the outputs of its modules are"
    )
    assert pickle.loads(pickle.dumps(Origin("a", "b", "loss", ()))) == Origin("a", "b", "loss", ())
