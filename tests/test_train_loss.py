"""The chunked linear cross-entropy is the plain one, and never holds all logits."""

import pytest
import torch
from conftest import build, small, tokens
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train.loss
from data.batches import IGNORE
from train.loss import cross_entropy_sum, nll_and_gradient
from train.schema import LOSS_BYTES, LOSS_BYTES_ON_CUDA, LOSS_ROWS, loss_rows


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.loss, "loss_rows", lambda *_: 7)


@pytest.mark.parametrize(
    ("dtype", "compiled", "few"),
    [
        (torch.float64, False, False),
        (torch.float32, False, False),
        (torch.float32, False, True),
        pytest.param(torch.float32, True, False, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients(short_chunks: None, dtype: torch.dtype, compiled: bool, few: bool) -> None:
    """`few`: answers among much without a target, whose logits are not made."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 10, 16, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(23, 16, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(23, (3, 10), generator=generator)
    targets[0, 3:6] = IGNORE
    if few:
        targets[1:, ::2] = targets[:, 7:] = IGNORE
    plain = F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    expected = torch.autograd.grad(plain * 0.37, (x, weight))
    ours = cross_entropy_sum(targets, compiled, few)(x, weight)
    torch.testing.assert_close(ours.to(dtype), plain, rtol=1e-6, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy_sum(targets)(x, weight), ours, rtol=1e-6, atol=0)
    for gradient, exact in zip(torch.autograd.grad(ours * 0.37, (x, weight)), expected, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-5)


def test_compiled_code_has_the_same_gradient_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes the probabilities once, less one at the target, in place of a scatter."""
    logits, targets = torch.randn(30, 23), torch.randint(23, (30,))
    targets[::4] = IGNORE
    plain = nll_and_gradient(logits, targets)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert all(torch.equal(ours, exact) for ours, exact in zip(nll_and_gradient(logits, targets), plain, strict=True))


def test_chunks_are_of_one_size_within_their_bytes() -> None:
    for length, vocab, itemsize, on_cuda in (
        (32768, 50304, 2, True),
        (16 * 2044, 50304, 2, True),
        (32768, 8192, 4, False),
        (26611, 50304, 4, False),
        (5, 1 << 30, 2, False),
        (0, 9, 4, False),
    ):
        rows = loss_rows(length, vocab, itemsize, on_cuda)
        most = LOSS_BYTES_ON_CUDA if on_cuda else LOSS_BYTES
        assert rows * vocab * itemsize <= most or rows <= (1 if on_cuda else LOSS_ROWS)
        assert rows > 0 and (length % rows == 0 or length == 26611)  # a product of two primes, in no such number
    assert loss_rows(32768, 50304, 2, True) == 8192
    assert loss_rows(32768, 4096, 2, True) == 32768, "small vocabularies need no chunks"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weight_gradient_is_summed_without_rounding(short_chunks: None) -> None:
    x, targets = torch.randn(2, 20, 64, device="cuda").bfloat16(), torch.randint(96, (2, 20), device="cuda")
    weight = torch.randn(96, 64, device="cuda").bfloat16().float().requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        cross_entropy_sum(targets)(x, weight).backward()
    logits = (x.flatten(0, 1) @ weight.bfloat16().T).detach()
    exact = nll_and_gradient(logits, targets.flatten())[1].double().T @ x.flatten(0, 1).double()
    torch.testing.assert_close(weight.grad.double(), exact, rtol=1e-5, atol=1e-5)


def test_half_precision_keeps_fp32_weights_and_loss(short_chunks: None) -> None:
    x = torch.randn(2, 20, 64).bfloat16().requires_grad_()
    weight = torch.randn(100, 64).requires_grad_()
    targets = torch.randint(100, (2, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy_sum(targets)(x, weight)
    exact = F.cross_entropy((x.double() @ weight.double().T).flatten(0, 1), targets.flatten(), reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=5e-3)
    loss.backward()
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    exact_gradient = torch.autograd.grad(exact, weight)[0]
    assert (weight.grad - exact_gradient).norm() < 0.02 * exact_gradient.norm()


def test_everything_ignored_is_no_loss(short_chunks: None) -> None:
    x = torch.randn(1, 9, 4).requires_grad_()
    loss = cross_entropy_sum(torch.full((1, 9), IGNORE))(x, torch.randn(5, 4))
    loss.backward()
    assert loss.item() == 0
    assert (x.grad == 0).all()


class Largest(TorchDispatchMode):
    """Remembers the most elements with a last axis of `width` that any operation returned."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.elements = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == self.width:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("grad", [True, False])
def test_logits_are_never_held_whole(short_chunks: None, grad: bool) -> None:
    model = build(small("mixattention"), torch.float32)
    batch = tokens(4, 30)
    with Largest(61) as largest, torch.set_grad_enabled(grad):
        loss = model(batch[:, :-1], head=cross_entropy_sum(batch[:, 1:]))
        if grad:
            loss.backward()
    assert 7 * 61 <= largest.elements <= 32 * 61, "no more than the output matrix, transposed"
    whole = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)


def test_losses_of_fp64_are_of_fp64(short_chunks: None) -> None:
    """So that gradients can be compared with differences."""
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(cross_entropy_sum(torch.randint(7, (2, 3))), (x, weight))
