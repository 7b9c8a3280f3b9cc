"""Embeddings, norms, rotary embeddings, and MLPs.

Shapes: B batch, T tokens, D model, P rotary width; `*` any number of axes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import SizeConfig, style_of
from .precision import at_least_fp32
from .rope_scaling import RopeScaling
from .store_spec import gate_width, norm_width

# Cosines and sines, or a matrix that rotates.
Rope = tuple[Tensor, ...]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which matrix products of `x` are computed: that of autocast if it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in at least fp32. Single tokens are [B, D]."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x.dtype)
        if x.ndim == 2 and x.device.type == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            # F.rms_norm is made of a dozen operators there.
            x_BD = x if x.dtype == wide else x.to(wide)
            norm_B1: Tensor = torch.linalg.vector_norm(x_BD, dim=-1, keepdim=True)
            share_B1 = torch.full_like(norm_B1, self.eps).addcmul_(norm_B1, norm_B1, value=1 / x.shape[-1]).rsqrt_()
            out: Tensor = (x_BD * share_B1).mul_(self.weight)
            return out if x.dtype == wide else out.to(x.dtype)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias over the last axis, computed in at least fp32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x.dtype)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.weight.shape, weight, bias, self.eps).to(x.dtype)


def build_norm(size: SizeConfig) -> RMSNorm | LayerNorm:
    return (LayerNorm if style_of(size).norm == "layernorm" else RMSNorm)(size.d_model, size.norm_eps)


def build_head_norm(size: SizeConfig, heads: int, width: int) -> RMSNorm | None:
    """Build the norm of queries or keys of `heads` heads; None: they have none."""
    dim = norm_width(size, heads, width)
    return RMSNorm(dim, size.norm_eps) if dim else None


def norm_heads(norm: RMSNorm | None, x_BTNH: Tensor) -> Tensor:
    """Norm the heads [*, N, H], each by itself or all together, as `norm` was built."""
    if norm is None:
        return x_BTNH
    out: Tensor = norm(x_BTNH) if len(norm.weight) == x_BTNH.shape[-1] else norm(x_BTNH.flatten(-2)).view_as(x_BTNH)
    return out


def build_output_gate(size: SizeConfig, width: int) -> nn.Linear | None:
    """Build the projection to the output gates, `width` per head; None: there are none."""
    gates = gate_width(size, width)
    return nn.Linear(size.d_model, gates, bias=style_of(size).bias) if gates else None


def gate_output(gate: nn.Linear | None, x_BTD: Tensor, out_BTNH: Tensor) -> Tensor:
    """Multiply the outputs [*, N, H] of heads by the gates that the layer's input [*, D] gives."""
    if gate is None:
        return out_BTNH
    factors: Tensor = gate(x_BTD).sigmoid()
    return out_BTNH * factors.view(*out_BTNH.shape[:-1], -1)


def rope_table(positions: Tensor, dim: int, theta: float, scaling: RopeScaling | None = None) -> Rope:
    """Cosines and sines, fp32, of shape positions.shape + (dim / 2,).

    Equal to Hugging Face's to the bit: a frequency that is off by one rounding gives an angle off by 1e-4 at position
    1000.
    """
    exponent = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    period = theta**exponent
    frequency = 1.0 / period if scaling is None else slowed(period, theta, scaling)
    angle = positions.float().unsqueeze(-1) * frequency
    if scaling is None or scaling.attention == 1.0:
        return angle.cos(), angle.sin()
    return angle.cos() * scaling.attention, angle.sin() * scaling.attention


def slowed(period_P: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """The frequencies, 1 / `period`, as lowered by `scaling`, with the operations of Hugging Face."""
    frequency_P, factor, half = 1.0 / period_P, scaling.factor, len(period_P)
    if scaling.rule == "linear":
        return frequency_P / factor
    if scaling.rule == "yarn":
        first, last = scaling.ramp(2 * half, theta)
        index_P = torch.arange(half, dtype=torch.float32, device=frequency_P.device)
        kept_P = 1 - ((index_P - first) / (last - first)).clamp(0, 1)
        return 1.0 / (factor * period_P) * (1 - kept_P) + frequency_P * kept_P
    length_P = 2 * math.pi / frequency_P
    share_P = (scaling.original / length_P - scaling.low) / (scaling.high - scaling.low)
    between_P = (1 - share_P) * frequency_P / factor + share_P * frequency_P
    slow_P = torch.where(length_P > scaling.original / scaling.low, frequency_P / factor, between_P)
    return torch.where(length_P < scaling.original / scaling.high, frequency_P, slow_P)


def rotate(x_BTNP: Tensor, rope: Rope) -> Tensor:
    """Rotate the two halves of the last axis against each other (the half-split order of Hugging Face checkpoints).

    `rope` holds tables of shape [T, P/2], or [B, T, P/2] if the rows of the batch have positions of their own. Elements
    of the last axis beyond P are left alone.
    """
    cos, sin = (table.unsqueeze(-2) for table in rope)
    rotary = 2 * cos.shape[-1]
    if not rotary:
        return x_BTNP
    if rotary < x_BTNP.shape[-1]:
        return torch.cat((rotate(x_BTNP[..., :rotary], rope), x_BTNP[..., rotary:]), dim=-1)
    first, second = x_BTNP.to(at_least_fp32(x_BTNP.dtype)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTNP.dtype)


def inverse_rope(rope: Rope) -> Rope:
    """The rotation that undoes `rope`, of `rotate` or of `rotate_step`."""
    if len(rope) == 1:
        return (rope[0].mT,)
    cos, sin = rope
    return cos, -sin


def step_rope(rope: Rope, dtype: torch.dtype | None = None, width: int = 0) -> Rope:
    """The rotation for `rotate_step`, made of the tables of one position for `rotate`; of vectors of `dtype`, or in the
    type of the tables.

    Tables [1 or B, 1, P]; on the CPU the matrix [P, P], or [B, P, P], that rotates: there one small product takes the
    place of five operators, whose calls cost more than what they compute. It may be of `width`, more than P, and leaves
    the rest of a vector as it is.
    """
    cos, sin = (table.flatten(0, -2).unsqueeze(1) for table in rope)
    if cos.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    half, index = cos.shape[-1], 0 if len(cos) == 1 else slice(None)
    cos, sin = cos[index, 0], sin[index, 0]
    cos = torch.cat((cos, cos), dim=-1)
    if width > 2 * half:
        cos, sin = F.pad(cos, (0, width - 2 * half), value=1.0), F.pad(sin, (0, width - 2 * half))
    sine = torch.diag_embed(sin, half) - torch.diag_embed(sin, -half)
    matrix = torch.diag_embed(cos) + sine
    return (matrix if dtype is None else matrix.to(at_least_fp32(dtype)),)


def rotate_step(x_BNP: Tensor, rope: Rope) -> Tensor:
    """`rotate` single tokens in few operators, given a rotation of `step_rope`."""
    rotary = rope[0].shape[-1]
    if not rotary:
        return x_BNP
    if rotary < x_BNP.shape[-1]:
        return torch.cat((rotate_step(x_BNP[..., :rotary], rope), x_BNP[..., rotary:]), dim=-1)
    if len(rope) == 1:
        (matrix,) = rope
        if matrix.dtype == x_BNP.dtype:
            return torch.matmul(x_BNP, matrix)
        return torch.matmul(x_BNP.to(matrix.dtype), matrix).to(x_BNP.dtype)
    cos, sin = rope
    return torch.addcmul(x_BNP * cos, x_BNP.roll(rotary // 2, -1), sin).to(x_BNP.dtype)


class ScaledEmbedding(nn.Embedding):
    """Embeddings times the square root of their width, which is rounded to their type as in Gemma."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = super().forward(tokens_BT)
        return x_BTD * torch.full((), self.embedding_dim**0.5, dtype=x_BTD.dtype, device=x_BTD.device)


def build_embedding(size: SizeConfig) -> nn.Embedding:
    return (ScaledEmbedding if style_of(size).scale_embeddings else nn.Embedding)(size.vocab_size, size.d_model)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, d_model: int, d_ff: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.activation(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return out

    def activation(self, x_BTF: Tensor) -> Tensor:
        return F.silu(x_BTF)


class GeGLU(SwiGLU):
    """down(gelu(gate(x)) * up(x)), with the tanh form of GELU."""

    def activation(self, x_BTF: Tensor) -> Tensor:
        return F.gelu(x_BTF, approximate="tanh")


class GeluMLP(nn.Module):
    """down(gelu(up(x))), with the exact GELU."""

    def __init__(self, d_model: int, d_ff: int, bias: bool):
        super().__init__()
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.gelu(self.up_proj(x_BTD)))
        return out


MLP_MODULES: dict[str, type[SwiGLU | GeluMLP]] = {"swiglu": SwiGLU, "geglu": GeGLU, "gelu": GeluMLP}


def build_mlp(size: SizeConfig) -> SwiGLU | GeluMLP:
    style = style_of(size)
    return MLP_MODULES[style.mlp](size.d_model, size.d_ff, style.bias)
