"""The Block Transformer (Ho et al. 2024): a decoder over blocks of tokens, and one within a block.

The embedder turns a block's tokens into one vector, the block decoder turns the vectors so far into a context for the
next block, and the token decoder predicts that block's tokens from the context and the block's earlier tokens only.

Shapes: B batch, T tokens, N blocks, L block length, C vectors of an expanded context, D model, E token embedding of the
embedder, O vectors of it that stand for a block, V vocabulary; M: blocks of all rows, B N.
"""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import check_own_kernel, has_own_kernel
from .block_plan import (
    BlockPlan,
    block_config,
    embed_dim,
    has_encoder,
    num_embedded_vectors,
    resolve_block,
    split_config,
)
from .buffers import repeat_row
from .cache import Cache, allocate
from .config import ModelConfig
from .decoder import Decoder, Stack, check_segments
from .encoder import Encoder
from .language_model import Head, LanguageModel
from .static_step import StaticBlockStep

NO_DOCUMENTS = "a Block Transformer cannot keep packed documents apart, blocks cross their borders"


class Embedder(nn.Module):
    """Map each block to one vector: its tokens' embeddings end to end, with a linear map if they are projected.

    The `lookup` embedder of the paper's 2.2, and its widened form for uptraining; with an encoder before the linear
    map, the `encoder` and `cls` embedders of its F.1. Padding counts like any token, but no token of an encoder sees
    it.
    """

    def __init__(self, config: ModelConfig, backend: str = "auto"):
        super().__init__()
        block, size, width = block_config(config), config.size, embed_dim(config)
        cls_tokens = num_embedded_vectors(block) if block.embedder == "cls" else 0
        self.length = block.length
        self.embed = nn.Embedding(size.vocab_size, width)
        self.encoder = None
        if has_encoder(block):
            self.encoder = Encoder(block.encoder, block.length, cls_tokens, size.norm_eps, backend)
        self.proj = None if block.embedder == "lookup" else nn.Linear(num_embedded_vectors(block) * width, size.d_model)

    def forward(self, tokens_BT: Tensor, segment_ids_BT: Tensor | None = None) -> Tensor:
        """Embed the blocks of `tokens_BT`, [B, N, D]. `segment_ids_BT` is negative at padding."""
        x_MOE: Tensor = self.embed(tokens_BT.reshape(-1, self.length))
        if self.encoder is not None:
            x_MOE = self.encoder(
                x_MOE, None if segment_ids_BT is None else segment_ids_BT.reshape(-1, self.length) >= 0
            )
        x_BND = rearrange(x_MOE, "(b n) o e -> b n (o e)", b=len(tokens_BT))
        if self.proj is not None:
            x_BND = self.proj(x_BND)
        return x_BND


@dataclass
class BlockCache:
    """Caches of both decoders, and the partial block of the sequences.

    blocks       a slot for each complete block
    tokens       the positions of the partial block, overwritten by the next block
    partial_BL   tokens of the partial block, fewer than L
    context_BCD  expanded context of the partial block; None before the first tokens
    """

    blocks: Cache
    tokens: Cache
    partial_BL: Tensor
    context_BCD: Tensor | None = None

    @property
    def stacks(self) -> tuple[Cache, Cache]:
        """The cache of each decoder, that of the blocks first."""
        return self.blocks, self.tokens

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + self.tokens.nbytes

    @property
    def takes_rows(self) -> bool:
        """True if no block is partial."""
        return not self.partial_BL.shape[1]

    @property
    def takes_static_steps(self) -> bool:
        """True if both caches take them."""
        return all(cache.takes_static_steps for cache in self.stacks)

    def repeat(self, rows: int) -> "BlockCache":
        """A cache of `rows` copies of the only sequence in this one."""
        context_BCD = None if self.context_BCD is None else repeat_row(self.context_BCD, rows)
        blocks, tokens = (cache.repeat(rows) for cache in self.stacks)
        return BlockCache(blocks, tokens, repeat_row(self.partial_BL, rows), context_BCD)

    def take_row(self, row: int, other: "BlockCache") -> None:
        """Replace the blocks of row `row` by those of the only row of `other`, as Cache.take_row.

        Needs `takes_rows` here and there.
        """
        assert self.takes_rows and other.takes_rows and self.tokens.length == other.tokens.length
        assert self.context_BCD is not None and other.context_BCD is not None
        self.blocks.take_row(row, other.blocks)
        self.tokens.copy_row(row, other.tokens)
        self.context_BCD[row] = other.context_BCD[0]

    def pad_left(self, start_B: Tensor | None) -> None:
        """Set the block at which each row begins, as Cache.pad_left."""
        self.tokens.pad_left(None)  # not empty either while the first block is partial
        self.blocks.pad_left(start_B)


class BlockTransformer(LanguageModel):
    """A language model of the layout in `config.arch`, which has a section `block`, at the size in `config`.

    Raises LayoutError if it is impossible; `backend` and `device_type` as for a Decoder. Parameters are
    uninitialised until `init_weights`.
    """

    def __init__(self, config: ModelConfig, backend: str = "auto", device_type: str = "cpu"):
        super().__init__()
        configs = split_config(config)
        block_size, token_size = (part.size for part in configs)
        self.config = config
        self.plan: BlockPlan = resolve_block(config)
        self.kind = block_config(config).token.kind
        self.bos_token = block_config(config).token.bos_token
        self.embedder = Embedder(config, backend)
        self.start = nn.Parameter(torch.empty(block_size.d_model)) if block_config(config).start else None
        check_own_kernel(backend, self.plan.block, self.plan.token)
        own_kernel = [has_own_kernel(backend, plan) for plan in (self.plan.block, self.plan.token)]
        block_backend = "auto" if own_kernel == [False, True] else backend
        self.block_decoder = Stack(configs[0], block_backend, device_type)
        self.expansion = nn.Linear(block_size.d_model, self.plan.num_context_vectors * token_size.d_model)
        # On CUDA kernels fill a tile of 128 with each block, and not all take so many rows (attend.MAX_ROWS).
        token_backend = backend if own_kernel[1] or backend in ("reference", "sdpa") else "rows"
        self.token_decoder = Decoder(configs[1], token_backend, device_type, cross=self.plan.cross)

    @property
    def stacks(self) -> tuple[Stack | Encoder, ...]:
        """The stacks that the model is made of."""
        decoders = self.block_decoder, self.token_decoder
        return decoders if self.embedder.encoder is None else (self.embedder.encoder, *decoders)

    @property
    def decoder(self) -> Decoder:
        return self.token_decoder

    @property
    def output_weight(self) -> Tensor:
        """The output matrix [V, D] of the token decoder."""
        return self.token_decoder.output_weight

    def attention(self, documents: bool = False) -> str:
        """Name the attention backends of both decoders. Raises ValueError with `documents`: a block may be in two."""
        if documents:
            raise ValueError(NO_DOCUMENTS)
        return f"blocks: {self.block_decoder.attention()}; within a block: {self.token_decoder.attention()}"

    def forward(
        self,
        tokens_BT: Tensor,
        cache: BlockCache | None = None,
        last_only: bool = False,
        head: Head = F.linear,
        segment_ids_BT: Tensor | None = None,
        cache_only: bool = False,
    ) -> Tensor:
        """Return the logits [B, T - L, V] of tokens L to T - 1; with a start context [B, T, V], of all of them.

        The logits predict the tokens themselves: the targets are `select_targets(tokens_BT)`. `last_only` returns those
        of the last token. With `cache` and `last_only`, `tokens_BT` of any length continue the cache and are added to
        it, and the logits [B, 1, V] are those of the token after them; none with `cache_only`. `head` as in
        Decoder.forward. `segment_ids_BT`: 0, or negative at padding, which neither the token decoder nor an encoder in
        the embedder sees, nor the block decoder if a block is all padding.

        Raises ValueError unless T is a number of whole blocks and one of them is predicted, with more than one segment,
        if the cache has no room, and with a cache but not `last_only`.
        """
        if segment_ids_BT is not None:
            check_segments(tokens_BT, segment_ids_BT)
            if bool((segment_ids_BT > 0).any()):  # waits for the device, in training with padding alone
                raise ValueError(NO_DOCUMENTS)
        if cache is not None:
            if not last_only:
                raise ValueError("over a cache, a Block Transformer has the logits of the next token; give last_only")
            logits_B1V = self.continue_cache(tokens_BT, cache, head, segment_ids_BT)
            return logits_B1V[:, :0] if cache_only else logits_B1V
        length = self.plan.block_length
        if tokens_BT.shape[1] % length or tokens_BT.shape[1] < length + self.plan.num_unpredicted:
            raise ValueError(
                f"{tokens_BT.shape[1]} tokens per row; give a multiple of the block length {length}, and at least one "
                "block to predict"
            )
        context_ids_BT = None if segment_ids_BT is None else segment_ids_BT[:, :-length]
        context_BND = self.encode(tokens_BT[:, :-length], segment_ids_BT=context_ids_BT)
        if self.start is not None:
            start_B1D = repeat(self.start.to(context_BND.dtype), "d -> b 1 d", b=len(tokens_BT))
            context_BND = torch.cat((start_B1D, context_BND), dim=1)
        context_MCD = self.expand(context_BND.flatten(0, 1))
        tokens_ML = self.select_targets(tokens_BT).reshape(-1, length)
        x_MSD = self.token_inputs(context_MCD, tokens_ML[:, :-1])
        masks = None
        if segment_ids_BT is not None:
            ids_ML = self.select_targets(segment_ids_BT).reshape(-1, length)[:, :-1]
            masks = self.token_decoder.padded_masks(F.pad(ids_ML, (x_MSD.shape[1] - length + 1, 0)))
        cross_MCD = context_MCD if self.plan.cross else None
        out_MSD = self.token_decoder.run(x_MSD, masks=masks, context_BCD=cross_MCD)
        x_MLD = self.token_decoder.norm(out_MSD[:, -length:])  # its result is without gaps, so that this is a view
        x_BTD = rearrange(x_MLD, "(b n) l d -> b (n l) d", b=len(tokens_BT))
        return head(x_BTD[:, -1:] if last_only else x_BTD, self.output_weight)

    def allocate_cache(
        self, batch: int, capacity: int, *, dtype: torch.dtype | None = None, start_B: Tensor | None = None
    ) -> BlockCache:
        weight = self.output_weight
        dtype = dtype or weight.dtype
        return allocate_blocks(self.plan, batch, capacity, dtype=dtype, device=weight.device, start_B=start_B)

    def static_step(self, cache: BlockCache, way: str) -> StaticBlockStep:
        return StaticBlockStep(self, cache, way)

    def by_token(self, x_MSD: Tensor, batch: int) -> Tensor:
        x_BTD: Tensor = rearrange(x_MSD[:, -self.plan.block_length :], "(b n) l d -> b (n l) d", b=batch)
        return x_BTD

    def continue_cache(
        self, tokens_BT: Tensor, cache: BlockCache, head: Head, segment_ids_BT: Tensor | None = None
    ) -> Tensor:
        """Add tokens to `cache` and return the logits [B, 1, V] of the next one.

        Every completed block is encoded; the remaining tokens start or continue the partial block.
        """
        length, num_partial = self.plan.block_length, cache.partial_BL.shape[1]
        assert segment_ids_BT is None or not num_partial
        all_BT = torch.cat((cache.partial_BL, tokens_BT), dim=1)
        end = all_BT.shape[1] // length * length
        if end or cache.context_BCD is None:
            context_ids_BT = None if segment_ids_BT is None else segment_ids_BT[:, :end]
            cache.context_BCD = self.expand(self.next_context(all_BT[:, :end], cache.blocks, context_ids_BT))
            logits_B1V = self.start_block(cache.context_BCD, all_BT[:, end:], cache.tokens, head)
        else:
            logits_B1V = self.continue_block(cache.context_BCD, tokens_BT, num_partial, cache.tokens, head)
        cache.partial_BL = all_BT[:, end:]
        return logits_B1V

    def next_context(self, tokens_BT: Tensor, cache: Cache, segment_ids_BT: Tensor | None) -> Tensor:
        """Encode complete blocks; return the context [B, D] after them, or the start context for a row without any."""
        if tokens_BT.shape[1]:
            context_BD = self.encode(tokens_BT, cache, segment_ids_BT, last_only=True)[:, -1]
            return self.or_start(context_BD, cache, cache.length)
        if self.start is None:
            raise ValueError(
                f"the first tokens are less than a block of {self.plan.block_length}; give a block or more"
            )
        return self.start.expand(len(tokens_BT), -1)

    def or_start(self, context_BD: Tensor, cache: Cache, length: int | Tensor) -> Tensor:
        """Use the start context for rows that have no block among the first `length`."""
        if self.start is None or cache.start_B is None:
            return context_BD
        return torch.where(cache.start_B[:, None] >= length, self.start.to(context_BD.dtype), context_BD)

    def encode(
        self,
        tokens_BT: Tensor,
        cache: Cache | None = None,
        segment_ids_BT: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Return after each block of `tokens_BT` the context [B, N, D] of the next one; with `last_only` after the last
        alone, [B, 1, D]. The cache's tokens are blocks.

        `segment_ids_BT` as in `forward`; over a cache, blocks of nothing but padding are those before its `start_B`.
        """
        x_BND: Tensor = self.embedder(tokens_BT, segment_ids_BT)
        if not x_BND.shape[1]:
            return x_BND
        masks = None
        if segment_ids_BT is not None and cache is None:
            ids_BN = rearrange(segment_ids_BT, "b (n l) -> b n l", l=self.plan.block_length).amax(dim=-1)
            masks = self.block_decoder.padded_masks(ids_BN)
        out_BND: Tensor = self.block_decoder.norm(
            self.block_decoder.run(x_BND, cache, masks, num_outputs=1 if last_only else None)
        )
        return out_BND

    def expand(self, context_MD: Tensor) -> Tensor:
        """Map contexts [M, D] to C vectors each of the token decoder's width, [M, C, D]."""
        context_MCD: Tensor = rearrange(self.expansion(context_MD), "m (c d) -> m c d", c=self.plan.num_context_vectors)
        return context_MCD

    def token_inputs(self, context_MCD: Tensor, tokens_ML: Tensor) -> Tensor:
        """Return the token decoder's inputs [M, S, D] for a block: its context or start token, and its first tokens."""
        if self.kind == "prefix":
            return torch.cat((context_MCD, self.token_decoder.embed(tokens_ML).to(context_MCD.dtype)), dim=1)
        x_MLD: Tensor = self.token_decoder.embed(F.pad(tokens_ML, (1, 0), value=self.bos_token))
        return context_MCD[:, : x_MLD.shape[1]] + x_MLD if self.kind == "summation" else x_MLD

    def start_block(self, context_MCD: Tensor, tokens_ML: Tensor, cache: Cache, head: Head = F.linear) -> Tensor:
        """Return the logits [M, 1, V] of the token after the first `tokens_ML` of a block, of which there may be none.

        They overwrite the block before in `cache`.
        """
        cache.length = 0
        x_MSD = self.token_inputs(context_MCD, tokens_ML)
        return self._last_logits(x_MSD, cache, head, context_MCD if self.plan.cross else None)

    def continue_block(
        self, context_MCD: Tensor, tokens_ML: Tensor, num_before: int, cache: Cache, head: Head = F.linear
    ) -> Tensor:
        """Return the logits [M, 1, V] of the token after `tokens_ML`, which follow `num_before` tokens of a block."""
        x_MLD = self.token_decoder.embed(tokens_ML)
        if self.kind == "summation":
            x_MLD = x_MLD + context_MCD[:, num_before + 1 : num_before + 1 + tokens_ML.shape[1]]
        return self._last_logits(x_MLD, cache, head)

    def _last_logits(self, x_MSD: Tensor, cache: Cache, head: Head, context_MCD: Tensor | None = None) -> Tensor:
        x_M1D = self.token_decoder.run(x_MSD, cache, context_BCD=context_MCD, num_outputs=1)
        return head(self.token_decoder.norm(x_M1D), self.output_weight)

    @property
    def init_stds(self) -> dict[str, float]:
        """Standard deviations for the maps between the decoders, which keep the scale of their inputs."""
        stds = {"expansion.weight": self.config.size.d_model**-0.5}
        if self.embedder.proj is not None:
            stds["embedder.proj.weight"] = float(self.embedder.proj.in_features) ** -0.5
        return stds


def allocate_blocks(
    plan: BlockPlan,
    batch: int,
    capacity: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    start_B: Tensor | None = None,
) -> BlockCache:
    """Allocate an empty cache for `batch` sequences of up to `capacity` tokens, `footprint.allocated_bytes` in all.

    Only the slots of complete blocks grow with the capacity. `start_B`: row b is padding before block `start_B[b]`.
    """
    blocks = allocate(plan.block, batch, capacity // plan.block_length, dtype=dtype, device=device, start_B=start_B)
    cross = plan.num_context_vectors if plan.cross else 0
    tokens = allocate(plan.token, batch, plan.num_positions, dtype=dtype, device=device, num_cross_vectors=cross)
    return BlockCache(blocks, tokens, torch.empty(batch, 0, dtype=torch.int64, device=device))
