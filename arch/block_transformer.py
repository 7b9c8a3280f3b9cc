"""The Block Transformer (Ho et al. 2024): a decoder over blocks of tokens, and one within a block.

A block's tokens become one vector, the block decoder turns the vectors so far into a context of the next block, and the
token decoder says that block's tokens from the context and from the block's tokens so far, nothing else.

Shapes: B batch, T tokens, N blocks, L block length, C vectors of an expanded context, D model, E token embedding of the
embedder, O vectors of it that stand for a block, V vocabulary; M: blocks of all rows, B N.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from .block_plan import BlockPlan, block_config, embed_dim, embedded, has_encoder, resolve_block, split_config
from .cache import Cache, allocate
from .config import ModelConfig
from .decoder import Decoder, Stack
from .encoder import Encoder
from .init import initialise


class Embedder(nn.Module):
    """One vector per block: its tokens' embeddings end to end, and a linear map of them where they are projected.

    The `lookup` embedder of the paper's 2.2, and its widened form for uptraining; with an encoder before the linear
    map, the `encoder` and `cls` embedders of its F.1. Padding counts like any token, but no token of an encoder looks
    at it.
    """

    def __init__(self, config: ModelConfig, backend: str = "auto"):
        super().__init__()
        block, size, width = block_config(config), config.size, embed_dim(config)
        cls_tokens = embedded(block) if block.embedder == "cls" else 0
        self.length = block.length
        self.embed = nn.Embedding(size.vocab_size, width)
        self.encoder = None
        if has_encoder(block):
            self.encoder = Encoder(block.encoder, block.length, cls_tokens, size.norm_eps, backend)
        self.proj = None if block.embedder == "lookup" else nn.Linear(embedded(block) * width, size.d_model)

    def forward(self, tokens_BT: Tensor, real_BT: Tensor | None = None) -> Tensor:
        """[B, N, D]. `real_BT` is False at padding."""
        x_MOE: Tensor = self.embed(tokens_BT.reshape(-1, self.length))
        if self.encoder is not None:
            x_MOE = self.encoder(x_MOE, None if real_BT is None else real_BT.reshape(-1, self.length))
        x_BND = rearrange(x_MOE, "(b n) o e -> b n (o e)", b=len(tokens_BT))
        if self.proj is not None:
            x_BND = self.proj(x_BND)
        return x_BND


@dataclass
class BlockCache:
    """`blocks` has a slot for each complete block; `tokens` has the block being said, which the next one overwrites."""

    blocks: Cache
    tokens: Cache

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + self.tokens.nbytes


class BlockTransformer(nn.Module):
    """A language model of the layout in `config.arch`, which has a section `block`, at the size in `config`.

    Raises LayoutError where it is impossible; `backend` and `device_type` as for a Decoder. Parameters are
    uninitialised until `init_weights`.
    """

    def __init__(self, config: ModelConfig, backend: str = "auto", device_type: str = "cpu"):
        super().__init__()
        coarse, fine = split_config(config)
        self.config = config
        self.plan: BlockPlan = resolve_block(config)
        self.kind = block_config(config).token.kind
        self.bos_token = block_config(config).token.bos_token
        self.embedder = Embedder(config, backend)
        self.start = nn.Parameter(torch.empty(coarse.size.d_model)) if block_config(config).start else None
        bounded = [any(store.num_slots for store in plan.stores) for plan in (self.plan.block, self.plan.token)]
        of_blocks = "auto" if backend == "fla" and bounded == [False, True] else backend
        self.block_decoder = Stack(coarse, of_blocks, device_type)
        self.expansion = nn.Linear(coarse.size.d_model, self.plan.num_context_vectors * fine.size.d_model)
        # Other kernels fill a tile of 128 with each block, and not all take so many rows: in_parts is for sdpa alone.
        within = backend if backend == "reference" or (backend == "fla" and bounded[1]) else "sdpa"
        self.token_decoder = Decoder(fine, within, device_type, cross=self.plan.cross)

    @property
    def stacks(self) -> tuple[Stack | Encoder, ...]:
        """The stacks that the model is made of."""
        decoders = self.block_decoder, self.token_decoder
        return decoders if self.embedder.encoder is None else (self.embedder.encoder, *decoders)

    def attention(self, documents: bool = False) -> str:
        """As Decoder.attention. ValueError with `documents`: a block may belong to two."""
        if documents:
            raise ValueError("a Block Transformer cannot keep packed documents apart, blocks cross their borders")
        return f"blocks: {self.block_decoder.attention()}; within a block: {self.token_decoder.attention()}"

    def forward(
        self, tokens_BT: Tensor, head: Callable[[Tensor, Tensor], Tensor] = F.linear, real_BT: Tensor | None = None
    ) -> Tensor:
        """Logits [B, T - L, V] of tokens L to T - 1; with a start context [B, T, V], of all of them.

        They are logits of the tokens themselves, not of the next ones: `predicted(tokens_BT)` are their targets.
        T is a multiple of L. `head` as in Decoder.forward. `real_BT` is False at padding, which is then no key of the
        token decoder, nor of an encoder in the embedder, nor, where a block is nothing else, of the block decoder.
        """
        length = self.plan.block_length
        if tokens_BT.shape[1] % length or tokens_BT.shape[1] < length * (1 if self.start is not None else 2):
            raise ValueError(
                f"{tokens_BT.shape[1]} tokens per row; give a multiple of the block length {length}, and at least one "
                "block to predict"
            )
        real_context_BT = None if real_BT is None else real_BT[:, :-length]
        context_BND = self.encode(tokens_BT[:, :-length], real_BT=real_context_BT)
        if self.start is not None:
            start_B1D = repeat(self.start.to(context_BND.dtype), "d -> b 1 d", b=len(tokens_BT))
            context_BND = torch.cat((start_B1D, context_BND), dim=1)
        context_MCD = self.expand(context_BND.flatten(0, 1))
        tokens_ML = self.predicted(tokens_BT).reshape(-1, length)
        x_MSD = self.token_inputs(context_MCD, tokens_ML[:, :-1])
        real_MS = None
        if real_BT is not None:
            real_MS = self.predicted(real_BT).reshape(-1, length)[:, :-1]
            real_MS = F.pad(real_MS, (x_MSD.shape[1] - length + 1, 0), value=True)
        out_MSD = self.token_decoder.run(x_MSD, real_BT=real_MS, context_BCD=self.outside(context_MCD))
        x_MLD = self.token_decoder.norm(out_MSD[:, -length:])
        x_BTD = rearrange(x_MLD, "(b n) l d -> b (n l) d", b=len(tokens_BT))
        return head(x_BTD, self.token_decoder.output_weight)

    def predicted(self, of_tokens_BT: Tensor) -> Tensor:
        """What `forward` predicts of its tokens, or the same part of anything else there is of each token."""
        return of_tokens_BT[:, 0 if self.start is not None else self.plan.block_length :]

    def encode(self, tokens_BT: Tensor, cache: Cache | None = None, real_BT: Tensor | None = None) -> Tensor:
        """After each block of `tokens_BT` the context [B, N, D] of the next one. The cache's tokens are blocks.

        `real_BT` as in `forward`; with a cache, blocks that are nothing but padding are those before its `start_B`.
        """
        x_BND: Tensor = self.embedder(tokens_BT, real_BT)
        if not x_BND.shape[1]:
            return x_BND
        real_BN = None
        if real_BT is not None and cache is None:
            real_BN = rearrange(real_BT, "b (n l) -> b n l", l=self.plan.block_length).any(dim=-1)
        out: Tensor = self.block_decoder.norm(self.block_decoder.run(x_BND, cache, real_BT=real_BN))
        return out

    def expand(self, context_MD: Tensor) -> Tensor:
        """The context as C vectors of the token decoder's width, [M, C, D]."""
        context_MCD: Tensor = rearrange(self.expansion(context_MD), "m (c d) -> m c d", c=self.plan.num_context_vectors)
        return context_MCD

    def token_inputs(self, context_MCD: Tensor, tokens_ML: Tensor) -> Tensor:
        """Inputs of the token decoder from the beginning of a block: context or start token, and its first tokens."""
        if self.kind == "prefix":
            return torch.cat((context_MCD, self.token_decoder.embed(tokens_ML).to(context_MCD.dtype)), dim=1)
        x_MLD: Tensor = self.token_decoder.embed(F.pad(tokens_ML, (1, 0), value=self.bos_token))
        return context_MCD[:, : x_MLD.shape[1]] + x_MLD if self.kind == "summation" else x_MLD

    def outside(self, context_MCD: Tensor) -> Tensor | None:
        """What the layers of the token decoder attend to outside of its inputs."""
        return context_MCD if self.plan.cross else None

    def begin(self, context_MCD: Tensor, tokens_ML: Tensor, cache: Cache) -> Tensor:
        """Logits [M, V] of the token after `tokens_ML`, the first ones of a block, of which there may be none.

        What the cache held of another block is overwritten.
        """
        cache.length = 0
        return self._say(self.token_inputs(context_MCD, tokens_ML), cache, self.outside(context_MCD))

    def step(self, context_MCD: Tensor, tokens_ML: Tensor, before: int, cache: Cache) -> Tensor:
        """Logits [M, V] of the token after `tokens_ML`, which follow `before` tokens of their block."""
        x_MLD = self.token_decoder.embed(tokens_ML)
        if self.kind == "summation":
            x_MLD = x_MLD + context_MCD[:, before + 1 : before + 1 + tokens_ML.shape[1]]
        return self._say(x_MLD, cache)

    def _say(self, x_MLD: Tensor, cache: Cache, context_MCD: Tensor | None = None) -> Tensor:
        x_MD = self.token_decoder.norm(self.token_decoder.run(x_MLD, cache, context_BCD=context_MCD)[:, -1])
        return F.linear(x_MD, self.token_decoder.output_weight)

    def init_weights(self, seed: int = 0) -> None:
        """As `initialise`; the maps from one decoder to the other keep the scale of what they are given."""
        own = {"expansion.weight": self.config.size.d_model**-0.5}
        if self.embedder.proj is not None:
            own["embedder.proj.weight"] = float(self.embedder.proj.in_features) ** -0.5
        initialise(self, self.config.size.init_std, seed, own)


def allocate_blocks(
    plan: BlockPlan,
    batch: int,
    capacity: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    start_B: Tensor | None = None,
) -> BlockCache:
    """An empty cache for `batch` sequences of up to `capacity` tokens, `footprint.allocated_bytes` in all.

    Only complete blocks take room that grows. `start_B`: row b is padding before block `start_B[b]`.
    """
    blocks = allocate(plan.block, batch, capacity // plan.block_length, dtype=dtype, device=device, start_B=start_B)
    context = plan.num_context_vectors if plan.cross else 0
    return BlockCache(
        blocks, allocate(plan.token, batch, plan.num_positions, dtype=dtype, device=device, context=context)
    )
