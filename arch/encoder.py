"""A bidirectional encoder of short sequences, after RoBERTa, for the embedder of a Block Transformer (paper, F.1).

Shapes: M sequences, L tokens of one, S positions, CLS tokens and L, E width, O outputs, N heads, H head.
"""

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attend import Mask, attend, dense_backend
from .config import EncoderConfig
from .layers import GeluMLP, LayerNorm, compute_dtype
from .masks import Dense


class EncoderLayer(nn.Module):
    """Attention and GELU MLP, each followed by a LayerNorm of the sum, with biases."""

    def __init__(self, config: EncoderConfig, norm_eps: float):
        super().__init__()
        width = config.d_model
        self.num_heads = config.num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.attn_norm = LayerNorm(width, norm_eps)
        self.mlp = GeluMLP(width, config.d_ff, bias=True)
        self.mlp_norm = LayerNorm(width, norm_eps)

    def forward(self, x_MSE: Tensor, mask: Mask) -> Tensor:
        q_MSNH, k_MSNH, v_MSNH = (
            rearrange(proj(x_MSE), "m s (n h) -> m s n h", n=self.num_heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_MSNH = attend(q_MSNH, k_MSNH, v_MSNH, mask, q_MSNH.shape[-1] ** -0.5, None)
        x_MSE = self.attn_norm(x_MSE + self.o_proj(rearrange(out_MSNH, "m s n h -> m s (n h)")))
        out: Tensor = self.mlp_norm(x_MSE + self.mlp(x_MSE))
        return out


class Encoder(nn.Module):
    """Outputs at the tokens of short sequences of `length`, or with `cls_tokens` at that many CLS tokens before them.

    Positions are learned, and padding takes one. All sequences have one length, so the learned positions include what
    RoBERTa adds to each: its only token type, and the embedding of the CLS token. There is no dropout.
    `activation_checkpointing` recomputes each layer in the backward pass.
    """

    def __init__(self, config: EncoderConfig, length: int, cls_tokens: int, norm_eps: float, backend: str = "auto"):
        super().__init__()
        self.cls_tokens = cls_tokens
        self.kernel = dense_backend(backend).kernel
        self.activation_checkpointing = False
        self.position = nn.Embedding(cls_tokens + length, config.d_model)
        self.norm = LayerNorm(config.d_model, norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config, norm_eps) for _ in range(config.layers))

    def forward(self, x_MLE: Tensor, is_token_ML: Tensor | None = None) -> Tensor:
        """Encode embedded tokens [M, L, E] and return the outputs [M, O, E].

        `is_token_ML` is False at padding, which no token sees, unless the sequence has nothing else.
        """
        x_MSE = self.norm(F.pad(x_MLE, (0, 0, self.cls_tokens, 0)) + self.position.weight)
        x_MSE = x_MSE.to(compute_dtype(x_MSE))  # as in Stack.run, and as it is where FSDP casts the embedding
        mask = Mask(
            self.kernel, Dense(causal=False, allowed=None if is_token_ML is None else self.visible(is_token_ML))
        )
        for layer in self.layers:
            if self.activation_checkpointing and self.training:
                x_MSE = checkpoint(layer, x_MSE, mask, use_reentrant=False)
            else:
                x_MSE = layer(x_MSE, mask)
        out_MOE: Tensor = x_MSE[:, : self.cls_tokens or None]
        return out_MOE

    def visible(self, is_token_ML: Tensor) -> Tensor:
        """Mask [M, 1, S, S] of the positions that are no padding."""
        is_token_MS = F.pad(is_token_ML, (self.cls_tokens, 0), value=True)
        visible_MS = is_token_MS | ~is_token_MS.any(dim=-1, keepdim=True)
        return visible_MS[:, None, None].expand(-1, 1, is_token_MS.shape[1], -1)
