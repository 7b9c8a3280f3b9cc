"""Strided stores of latents: entries and attention are those of MTLA's authors, in chunks, steps and documents too."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import assert_decoding_is_the_forward, assert_documents_are_apart, build, small, tokens
from torch import Tensor, nn

from arch import ArchConfig, LatentConfig, LayoutError, StoreConfig, allocate, resolve
from arch.buffers import StateBuffer
from arch.compression.checks import check_method
from arch.compression.method import parse_method
from arch.config import MAX_WIDTH
from arch.footprint import kv_bytes
from arch.layers import rope_table
from arch.masks import SequenceBatch
from arch.strided_latent import StridedLatentBackend

HEADS, WIDTH, LATENT, ROPE = 8, 8, 32, 4


def layout(stride: int = 2, **keys: Any) -> ArchConfig:
    latent = LatentConfig(**{"dim": "4/1", "rope_dim": "1/2", **keys})
    return ArchConfig({"pooled": StoreConfig(latent=latent, stride=stride)}, ["new pooled", "reuse pooled"])


def model_of(stride: int, dtype: torch.dtype = torch.float64, **keys: Any) -> Any:
    """Two layers, one of which reads the other's store; biases and norms that no one would overlook."""
    model = build(small(layout(stride, **keys), num_layers=2, window=None), dtype)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "share" in name or "latent_norm" in name:
            nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.5, generator=generator)
    return model


class Authors:
    """The attention of D-Keqi/mtla (mtla/MTLA.py) by its formulas, of random weights: in training with a mask of every
    pair, and step by step over a cache. Its norm of latents is RMSNorm here, where theirs is LayerNorm."""

    def __init__(self, stride: int):
        generator = torch.Generator().manual_seed(stride)

        def weight(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3

        self.stride = stride
        self.wq, self.wo = weight(HEADS * (WIDTH + ROPE), 32), weight(32, HEADS * WIDTH)
        self.wkv_a, self.wkv_b = weight(LATENT + ROPE, 32), weight(HEADS * 2 * WIDTH, LATENT)
        self.kv_norm = 1 + weight(LATENT)
        self.fc_c, self.fc_p = ((weight(LATENT // 4, LATENT), weight(LATENT // 4)) for _ in range(2))

    def rotated(self, x: Tensor, position_T: Tensor) -> Tensor:
        """[T, ..., P] neighbouring channels as complex numbers, turned."""
        frequency = 10000.0 ** -(torch.arange(0, ROPE, 2, dtype=torch.float64) / ROPE)
        turn = torch.polar(torch.ones(len(x), ROPE // 2, dtype=torch.float64), position_T[:, None] * frequency)
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        turn = turn.view(len(x), *[1] * (x.ndim - 2), -1)
        return torch.view_as_real(pairs * turn).flatten(-2)

    def code(self, chunk_T: Tensor) -> Tensor:
        """[T, R] sines in even channels, cosines in odd ones."""
        period = torch.exp(torch.arange(0, LATENT, 2, dtype=torch.float64) * (-math.log(10000.0) / LATENT))
        code = torch.zeros(len(chunk_T), LATENT, dtype=torch.float64)
        code[:, 0::2], code[:, 1::2] = torch.sin(chunk_T[:, None] * period), torch.cos(chunk_T[:, None] * period)
        return code

    def project(self, x_TD: Tensor, position_T: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries of both parts, latents, and rotated keys."""
        q_TNH, q_rope_TNP = (x_TD @ self.wq.T).view(-1, HEADS, WIDTH + ROPE).split([WIDTH, ROPE], dim=-1)
        latent_TR, k_rope_TP = (x_TD @ self.wkv_a.T).split([LATENT, ROPE], dim=-1)
        latent_TR = latent_TR / (latent_TR.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.kv_norm
        return q_TNH, self.rotated(q_rope_TNP, position_T), latent_TR, self.rotated(k_rope_TP, position_T)

    def shares(self, chunk_T: Tensor, latent_SR: Tensor) -> Tensor:
        """[T, S] shares in the chunk of each row."""
        one, other = (nn.functional.linear(x, *w) for x, w in ((self.code(chunk_T), self.fc_c), (latent_SR, self.fc_p)))
        return torch.sigmoid(one @ other.T)

    def attend(self, q_TNH: Tensor, q_rope_TNP: Tensor, entry_SR: Tensor, k_rope_SP: Tensor, bias: Tensor) -> Tensor:
        up_NHR = self.wkv_b.view(HEADS, 2 * WIDTH, LATENT)
        absorbed = torch.einsum("thd,hdc->thc", q_TNH, up_NHR[:, :WIDTH])
        scores = torch.einsum("thc,sc->ths", absorbed, entry_SR) + torch.einsum("thr,sr->ths", q_rope_TNP, k_rope_SP)
        weights = (scores * (WIDTH + ROPE) ** -0.5 + bias[:, None]).softmax(dim=-1)
        read = torch.einsum("ths,sc->thc", weights, entry_SR)
        return torch.einsum("thc,hdc->thd", read, up_NHR[:, -WIDTH:]).flatten(1) @ self.wo.T

    def in_training(self, x_TD: Tensor) -> Tensor:
        place, m = torch.arange(len(x_TD)), self.stride
        q, q_rope, latent, k_rope = self.project(x_TD, place)
        same = (place[:, None] // m == place // m) & (place[:, None] % m >= place % m)
        entries = (self.shares(place // m, latent) * same) @ latent
        visible = ((place <= place[:, None]) & ((place + 1) % m == 0)) | (place == place[:, None])
        return self.attend(q, q_rope, entries, k_rope, torch.where(visible, 0.0, -1e9))

    def by_steps(self, x_TD: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Outputs, and the entries in the end."""
        entries: list[Tensor] = []
        keys: list[Tensor] = []
        out = []
        for t, x_D in enumerate(x_TD):
            q, q_rope, latent, k_rope = self.project(x_D[None], torch.tensor([t]))
            part = self.shares(torch.tensor([math.ceil((t + 1) / self.stride) - 1]), latent) * latent
            if (t + 1) % self.stride == 1 or self.stride == 1:
                entries, keys = [*entries, part], [*keys, k_rope]
            else:
                entries[-1], keys[-1] = entries[-1] + part, k_rope
            seen = torch.cat(entries), torch.cat(keys)
            out.append(self.attend(q, q_rope, *seen, torch.zeros(1, len(entries))))
        return torch.cat(out), entries

    def copy_to(self, block: Any) -> None:
        """Give a layer of ours these weights: the halves of a rotary key are their even and odd channels."""
        order = torch.cat((torch.arange(0, ROPE, 2), torch.arange(1, ROPE, 2)))
        heads = torch.cat((torch.arange(WIDTH), WIDTH + order)) + torch.arange(HEADS)[:, None] * (WIDTH + ROPE)
        weights = {
            block.reader.q_proj.weight: self.wq[heads.flatten()],
            block.reader.kv_up_proj.weight: self.wkv_b,
            block.reader.o_proj.weight: self.wo,
            block.writer.kv_down_proj.weight: self.wkv_a[torch.cat((torch.arange(LATENT), LATENT + order))],
            block.writer.latent_norm.weight: self.kv_norm,
            block.writer.share.code_proj.weight: self.fc_c[0],
            block.writer.share.code_proj.bias: self.fc_c[1],
            block.writer.share.latent_proj.weight: self.fc_p[0],
            block.writer.share.latent_proj.bias: self.fc_p[1],
        }
        for parameter, value in weights.items():
            parameter.data.copy_(value)


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_the_layer_is_that_of_mtla(stride: int) -> None:
    """Without a cache, and over ours in a prompt, chunks and steps: the layer's output for every token, and entries."""
    model, authors, length = model_of(stride), Authors(stride), 17
    block, store = model.layers[0], model.plan.stores[0]
    x = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        authors.copy_to(block)
        expected = torch.stack([authors.in_training(row) for row in x])
        stepped, entries = zip(*map(authors.by_steps, x), strict=True)
        torch.testing.assert_close(torch.stack(stepped), expected, rtol=0, atol=1e-10)
        sequences = SequenceBatch(2, length, None, x.device)
        positions = StridedLatentBackend("sdpa", "", stride, LATENT).mask(sequences, None, x.dtype)
        rope = rope_table(torch.arange(length), *store.rope_key)
        ours = block.reader(x, block.writer(x, rope, positions), rope, positions)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)

        outputs: list[Tensor] = []
        block.reader.register_forward_hook(lambda _, inputs, out: outputs.append(out.view(2, -1, 32)))
        block.attn_norm = nn.Identity()
        cache = allocate(model.plan, 2, length, dtype=torch.float64)
        for begin, end in pairwise([0, 4, 9, 10, 14, *range(15, length + 1)]):
            model.run(x[:, begin:end], cache)
        torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-5)
        kept = torch.stack([torch.cat(row) for row in entries])
        torch.testing.assert_close(cache.buffers[0].tensors[0], kept, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("stride", "rope_dim", "starts"),
    [(2, "1/2", [0, 5, 11]), (3, 0, [0, 4, 8]), (5, "1/2", None), (1, "1/2", [0, 1, 2])],
)
def test_decoding_is_the_forward(stride: int, rope_dim: Any, starts: list[int] | None) -> None:
    """Rows of different lengths, in chunks that end anywhere, plain steps and static steps."""
    assert_decoding_is_the_forward(model_of(stride, rope_dim=rope_dim), starts)


@pytest.mark.parametrize("stride", [2, 3, 5])
def test_nothing_is_pooled_across_documents(stride: int) -> None:
    """A document gives the logits that it has alone, wherever chunks would begin in the row."""
    assert_documents_are_apart(model_of(stride, rope_dim=0))


def test_bytes_by_hand() -> None:
    """A latent of 32 and a rotary key of 4 for each three tokens, begun ones too; both layers read all of it."""
    plan = resolve(small(layout(3), num_layers=2, window=None))
    for context, entries in ((1, 1), (3, 1), (4, 2), (48, 16), (49, 17)):
        kv = kv_bytes(plan, context, 2)
        assert (kv.stored, kv.read) == (entries * 36 * 2, 2 * entries * 36 * 2)
        assert allocate(plan, 5, context, dtype=torch.bfloat16).nbytes == 5 * kv.stored
    assert kv.per_token == 36 * 2 / 3 and kv.constant == 0
    assert type(plan).from_dict(plan.to_dict()) == plan


def test_a_step_that_is_rehearsed_is_put_back() -> None:
    """The sum in the newest slot is a state: a capture, which runs steps before the one that counts, restores it."""
    model, batch = model_of(3), tokens(2, 5)
    cache = allocate(model.plan, 2, 6, dtype=torch.float64)
    (buffer,) = cache.buffers
    assert isinstance(buffer, StateBuffer)
    with torch.no_grad():
        model(batch[:, :4], cache)
        saved = [tensor.clone() for tensor in buffer.tensors]
        x_BD = model.embed(batch[:, 4])
        first, wrong = model.step(x_BD, cache), model.step(x_BD, cache)
        assert not torch.allclose(first, wrong)
        for tensor, value in zip(buffer.tensors, saved, strict=True):
            tensor.copy_(value)
        assert torch.equal(model.step(x_BD, cache), first)


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ({"stride": 0}, "stride is 0; an entry pools at least 1 position"),
        ({"stride": MAX_WIDTH + 1}, "stride is 16777217; it must be at most 16,777,216"),
        ({"stride": 2, "window": 4}, "window is 4; entries of latents are of all positions"),
        ({"stride": 2, "chunk": 4}, "chunk is 4; entries of latents are of all positions"),
        ({"stride": 2, "latent": LatentConfig(heads=2)}, "latent.heads is 2; an entry is of one latent"),
        ({"stride": 2, "latent": LatentConfig(dim=7)}, "latent.dim comes to 7; with stride, chunks have a code"),
        ({"stride": 2, "latent": LatentConfig(dim=2)}, "latent.dim comes to 2; with stride, chunks have a code"),
        ({"stride": 2, "kv_heads": 2}, "needs either kv_heads or latent, and not both"),
        ({"stride": 2, "slots": 4, "rule": "gated"}, "slots cannot hold a latent"),
        ({"stride": 2, "rule": "gated"}, "rule gated needs slots"),
        ({"stride": 2, "tied": "vector"}, "tied is vector; the store pools latents"),
        ({"stride": 2, "rope": "none"}, "write latent.rope_dim, 0 for none"),
    ],
)
def test_refusals(store: dict[str, Any], message: str) -> None:
    config = small(ArchConfig({"kv": StoreConfig(**{"latent": LatentConfig(), **store})}, ["new kv"]), num_layers=1)
    with pytest.raises(LayoutError, match=message):
        resolve(config)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("int8", "every store pools latents, and codecs act on tokens that are kept apart, and on matrices per head$"),
        ("h2o@6", "no store grows with the context but by entries that pool positions, so that h2o has nothing"),
        ("think", "no store grows with the context but by entries that pool positions, so that think has nothing"),
    ],
)
def test_compression_is_refused_with_the_reason(method: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_method(resolve(small("mtla")), parse_method(method))


def test_a_layer_has_no_window_of_its_own() -> None:
    with pytest.raises(LayoutError, match="pooled pools latents, of which a layer reads all; leave window=4 out"):
        resolve(small(ArchConfig(layout().stores, ["new pooled window=4"]), num_layers=1, window=None))


def test_both_decoders_of_a_block_transformer_take_strided_latents() -> None:
    config = small("block")
    for part in (config.arch, config.arch.block.token):
        part.stores, part.pattern = layout(2).stores, ["new pooled"]
    model, batch = build(config), tokens(2, 15)
    with torch.no_grad():
        cache = model.allocate_cache(2, 15)
        for end in range(4, 15):
            new = batch[:, end - 1 : end] if end > 4 else batch[:, :4]
            whole = model.next_token_logits(batch[:, :end])[:, -1:]
            torch.testing.assert_close(model(new, cache, last_only=True), whole, rtol=0, atol=1e-10)
