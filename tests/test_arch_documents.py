"""Packed documents: each is computed as if it were alone."""

from dataclasses import replace

import pytest
import torch
from conftest import build, small, tokens

from arch import Decoder, allocate
from arch.attend import BACKENDS, Needs, select_backend
from arch.masks import SequenceBatch, blocks, dense, packed, segment_starts

# Two rows, cut at different places; windows are 6 tokens, so documents are longer and shorter than that.
DOCUMENTS = torch.tensor([[7] * 3 + [2] * 9 + [4] + [5] * 4, [1] * 17])


def spans(row: torch.Tensor) -> list[slice]:
    ends = [*(row[1:] != row[:-1]).nonzero().flatten().add(1).tolist(), len(row)]
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_packed_documents_are_separate_forwards(arch: str, backend: str) -> None:
    model, batch = build(small(arch), backend=backend), tokens(2, 17)
    with torch.no_grad():
        together = model(batch, segment_ids_BT=DOCUMENTS)
        for row in range(2):
            for span in spans(DOCUMENTS[row]):
                alone = model(batch[row : row + 1, span])
                # Cosines and sines are fp32: the same distance elsewhere in the row is another rounding.
                torch.testing.assert_close(together[row : row + 1, span], alone, rtol=0, atol=2e-5)


def test_gradients_stay_in_their_document(arch: str) -> None:
    model, batch = build(small(arch)), tokens(2, 17)
    embedded = []
    model.embed.register_forward_hook(lambda module, inputs, output: embedded.append(output) or output.retain_grad())
    model(batch, segment_ids_BT=DOCUMENTS)[0, 3:12].square().sum().backward()
    gradient = embedded[0].grad.abs().amax(dim=-1)
    assert (gradient[0, 3:12] > 0).all()
    gradient[0, 3:12] = 0
    assert (gradient == 0).all()


def test_one_document_is_no_mask(arch: str) -> None:
    model, batch = build(small(arch)), tokens(2, 17)
    with torch.no_grad():
        torch.testing.assert_close(
            model(batch, segment_ids_BT=torch.zeros_like(batch)), model(batch), rtol=0, atol=1e-11
        )


def test_documents_that_cannot_be_honoured_are_refused() -> None:
    model, batch = build(small("cla2")), tokens(2, 17)
    with torch.no_grad():
        cache = allocate(model.plan, 2, 20, dtype=torch.float64)
        with pytest.raises(ValueError, match="cannot be given with a cache"):
            model(batch, cache, segment_ids_BT=DOCUMENTS)
        assert cache.length == 0
        with pytest.raises(ValueError, match=r"shape \(2, 16\), the tokens \(2, 17\)"):
            model(batch, segment_ids_BT=DOCUMENTS[:, 1:])


def test_a_backend_without_documents_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    poor = BACKENDS["sdpa"].__class__("poor", BACKENDS["sdpa"].kernel, dense, "", documents=False)
    monkeypatch.setitem(BACKENDS, "poor", poor)
    model, batch = build(small("mha"), backend="poor"), tokens(2, 17)
    with torch.no_grad():
        model(batch)
        with pytest.raises(ValueError, match="poor lacks documents"):
            model(batch, segment_ids_BT=DOCUMENTS)
    with pytest.raises(ValueError, match="poor lacks documents"):
        model.attention(documents=True)


def test_checkpointed_training_with_documents() -> None:
    model, batch = build(small("mixattention"), torch.float32).train(), tokens(2, 17)
    results = []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        model(batch, segment_ids_BT=DOCUMENTS).square().sum().backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_starts_are_those_of_runs() -> None:
    assert segment_starts(DOCUMENTS)[0].tolist() == [0] * 3 + [3] * 9 + [12] + [13] * 4
    again = torch.tensor([[1, 1, 2, 1]])  # a number that comes back is another document
    assert segment_starts(again).tolist() == [[0, 0, 2, 3]]
    assert dense(SequenceBatch(1, 4, again, again.device), None).allowed[0, 0, 3].tolist() == [
        False,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("window", [None, 1, 5, 128, 129, 300, 1000])
@pytest.mark.parametrize("length", [1, 127, 128, 300, 520])
@pytest.mark.parametrize("cut", [False, True])
def test_blocks_are_those_torch_finds(cut: bool, length: int, window: int | None) -> None:
    """torch evaluates the mask of every pair; ours comes from its edges."""
    from torch.nn.attention.flex_attention import create_block_mask

    generator = torch.Generator().manual_seed(length)
    documents = (torch.rand(3, length, generator=generator) < 0.01).cumsum(1) if cut else None
    sequences = SequenceBatch(3, length, documents, torch.device("cpu"))
    ours, visible = blocks(sequences, window), dense(sequences, window)
    theirs = create_block_mask(ours.mask_mod, 3 if cut else 1, 1, length, length, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for kind in ("kv", "full_kv", "q", "full_q"):
        assert torch.equal(getattr(ours, f"{kind}_num_blocks"), getattr(theirs, f"{kind}_num_blocks")), kind
    index = torch.arange(length)
    row = torch.arange(3 if cut else 1)[:, None, None]
    pairs = ours.mask_mod(row, 0, index[:, None], index).squeeze()
    assert torch.equal(pairs, (index <= index[:, None] if visible.causal else visible.allowed).squeeze())


def test_bounds_of_packed_sequences() -> None:
    device = torch.device("cpu")
    with_documents = packed(SequenceBatch(2, 17, DOCUMENTS, device), 6)
    assert with_documents.bounds.tolist() == [0, 3, 12, 13, 17, 34, 34, 34, 34]
    assert (with_documents.longest, with_documents.window) == (17, 6)
    rows = packed(SequenceBatch(3, 17, None, device), 17)
    assert (rows.bounds.tolist(), rows.longest, rows.window) == ([0, 17, 34, 51, 51], 17, None)


def test_auto_for_documents() -> None:
    assert select_backend("auto", Needs(frozenset({"documents"}), (64,)), "cpu").name == "sdpa"
    assert select_backend("auto", Needs(frozenset({"documents"}), (64,)), "cuda").name == "flex"
    assert select_backend("auto", Needs(frozenset({"documents"}), (8,)), "cuda").name == "sdpa"  # too narrow for flex
    model = Decoder(small("mixattention", head_dim=16), "auto", "cuda")
    assert model.attention().startswith("global: sdpa (")
    assert "local: flex (" in model.attention()
    assert model.attention(documents=True).startswith("global, local: flex (")


@pytest.mark.parametrize("with_documents", [False, True])
def test_the_masks_of_a_new_batch_compile_nothing(with_documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's masks are functions made anew for each batch: a compiled block must not tell them apart."""
    monkeypatch.setitem(BACKENDS, "flex", replace(BACKENDS["flex"], devices=frozenset()))
    model = build(small("swa", num_layers=2, head_dim=16, window=150), torch.float32, "flex")
    torch._dynamo.reset()
    for block in model.layers:
        block.compile(backend="eager")

    def run(length: int, seed: int) -> None:
        cut = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.02
        with torch.no_grad():
            model(tokens(2, length), segment_ids_BT=cut.cumsum(1) if with_documents else None)

    run(300, seed=0)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(300, seed=1)
        with pytest.raises(RuntimeError, match="recompile"):
            run(310, seed=2)
