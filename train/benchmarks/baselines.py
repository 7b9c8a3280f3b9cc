"""One Llama-shaped model in this repository and in its baselines, with equal shapes, weights and training steps.

Shapes: B batch, T tokens.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from arch import ModelConfig, SizeConfig, build, resolve
from arch.config import head_dim
from arch.store_spec import SlotShape
from train.benchmarks.timing import Series, Turns, take_turns
from train.loss import cross_entropy_sum
from train.optim import build_optimizer
from train.parallel import parallelize
from train.schema import OptimConfig

CLIP = 1.0
WARMUP = 2  # rounds that are not timed
Weights = dict[str, Tensor]


class UnavailableError(RuntimeError):
    """A measurement that cannot be made here; the message says why."""


@dataclass(frozen=True)
class Baseline:
    """A model to compare, ours included; `loss(inputs_BT, targets_BT)` is its mean training loss in nats per target."""

    name: str
    version: str
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]


def llama_slot(config: ModelConfig) -> SlotShape:
    """The slot of every layer. Raises UnavailableError unless the layout is plain MHA, GQA or MQA."""
    stack, *others = resolve(config).stacks
    if others:
        raise UnavailableError("the baselines have no Block Transformer, only mha, gqa and mqa")
    plan = stack.plan
    slot = plan.stores[0].slot
    plain = all(
        store.kind == "grouped" and store.window is None and not store.kv_norm and store.slot == slot
        for store in plan.stores
    )
    if not plain or len(plan.stores) != plan.num_layers:
        raise UnavailableError("the baselines have no such layout, only mha, gqa and mqa")
    return slot


def kvfrontier(
    config: ModelConfig, device: torch.device, compiled: bool, activation_checkpointing: bool = False
) -> Baseline:
    """Our model, built as `train/pretrain.py` does on one device; a Block Transformer predicts its inputs."""
    with torch.device("meta"):
        model = build(config, device_type=device.type)
    parallelize(
        model,
        activation_checkpointing=activation_checkpointing,
        compile_blocks=compiled,
        mesh=None,
        dtype=torch.float32,
    )
    model.to_empty(device=device)
    model.init_weights(0)

    def loss(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        predicted_BT = model.select_targets(targets_BT if model.plan.target_offset else inputs_BT)
        total: Tensor = model(inputs_BT, head=cross_entropy_sum(predicted_BT, compiled))
        return total / predicted_BT.numel()

    return Baseline("kvfrontier", "", model, loss)


@contextmanager
def importing(package: str) -> Iterator[None]:
    """Raise UnavailableError if something of `package` cannot be imported."""
    try:
        yield
    except ImportError as error:
        raise UnavailableError(f"{package} cannot be imported: {error}") from error


def hugging_face(config: ModelConfig, device: torch.device, compiled: bool) -> Baseline:
    """transformers' LlamaForCausalLM with SDPA and its own loss."""
    size, slot = config.size, llama_slot(config)
    with importing("transformers"):
        from transformers import LlamaConfig, LlamaForCausalLM
    with torch.device(device):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size.vocab_size,
                hidden_size=size.d_model,
                intermediate_size=size.d_ff,
                num_hidden_layers=size.num_layers,
                num_attention_heads=size.num_heads,
                num_key_value_heads=slot.kv_heads,
                head_dim=slot.k_dim,
                rms_norm_eps=size.norm_eps,
                max_position_embeddings=size.seq_len,
                rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
                tie_word_embeddings=size.tie_embeddings,
                initializer_range=size.init_std,
                attn_implementation="sdpa",
            )
        )
    model.train()
    if compiled:
        model.compile()

    def loss(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        total: Tensor = model(input_ids=inputs_BT, labels=targets_BT, shift_labels=targets_BT, use_cache=False).loss
        return total

    return Baseline("Hugging Face", version("transformers"), model, loss)


def litgpt(config: ModelConfig, device: torch.device, compiled: bool) -> Baseline:
    """litgpt's GPT with the loss of its pretraining script."""
    size, slot = config.size, llama_slot(config)
    with importing("litgpt"):
        from litgpt.config import Config
        from litgpt.model import GPT
        from litgpt.utils import chunked_cross_entropy
    with torch.device(device):
        model = GPT(
            Config(
                name="bench",
                block_size=size.seq_len,
                n_layer=size.num_layers,
                n_embd=size.d_model,
                vocab_size=size.vocab_size,
                padded_vocab_size=size.vocab_size,
                norm_class_name="RMSNorm",
                norm_eps=size.norm_eps,
                parallel_residual=False,
                n_head=size.num_heads,
                head_size=head_dim(size),
                n_query_groups=slot.kv_heads,
                rotary_percentage=1.0,
                rope_base=int(size.rope_theta),
                intermediate_size=size.d_ff,
                bias=False,
                mlp_class_name="LLaMAMLP",
            )
        )
    model.apply(model._init_weights)
    if size.tie_embeddings:
        model.transformer.wte.weight = model.lm_head.weight
    if compiled:
        model.compile()

    def loss(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        total: Tensor = chunked_cross_entropy(model(inputs_BT), targets_BT)
        return total

    return Baseline("litgpt", version("litgpt"), model, loss)


BUILDERS: dict[str, Callable[[ModelConfig, torch.device, bool], Baseline]] = {
    "ours": kvfrontier,
    "hugging_face": hugging_face,
    "litgpt": litgpt,
}


def copy_weights(config: ModelConfig, weights: Weights, name: str, baseline: Baseline) -> None:
    """Load our model's weights into a baseline. Raises RuntimeError if either has one that the other lacks."""
    renamed = {"hugging_face": _hugging_face_names, "litgpt": _litgpt_names}[name](weights)
    if config.size.tie_embeddings:
        renamed["lm_head.weight"] = weights["embed.weight"]
    baseline.model.load_state_dict(renamed)


def _hugging_face_names(weights: Weights) -> Weights:
    renamed = {}
    for key, value in weights.items():
        for old, new in (
            ("embed.", "embed_tokens."),
            (".attn_norm.", ".input_layernorm."),
            (".mlp_norm.", ".post_attention_layernorm."),
            (".reader.", ".self_attn."),
            (".writer.", ".self_attn."),
        ):
            key = key.replace(old, new)
        renamed[key if key.startswith("lm_head") else f"model.{key}"] = value
    return renamed


def _litgpt_names(weights: Weights) -> Weights:
    renamed = {}
    for key, value in weights.items():
        if key.endswith(("reader.q_proj.weight", "writer.v_proj.weight")):
            continue  # written together with k_proj
        if key.endswith("writer.k_proj.weight"):
            layer = key.removesuffix("writer.k_proj.weight")
            parts = [weights[f"{layer}{part}_proj.weight"] for part in ("reader.q", "writer.k", "writer.v")]
            key, value = f"{layer}attn.qkv.weight", torch.cat(parts)
        for old, new in (
            ("embed.", "wte."),
            ("layers.", "h."),
            (".attn_norm.", ".norm_1."),
            (".mlp_norm.", ".norm_2."),
            (".reader.o_proj.", ".attn.proj."),
            (".mlp.gate_proj.", ".mlp.fc_1."),
            (".mlp.up_proj.", ".mlp.fc_2."),
            (".mlp.down_proj.", ".mlp.proj."),
        ):
            key = key.replace(old, new)
        key = "ln_f.weight" if key == "norm.weight" else key
        renamed[key if key.startswith("lm_head") else f"transformer.{key}"] = value
    return renamed


class Step:
    """One optimizer step, the same for every model: forward, loss, backward, clipping, fused AdamW.

    A batch of B rows goes through in micro-batches of B / `accumulate`.
    """

    def __init__(self, baseline: Baseline, precision: Callable[[], AbstractContextManager[Any]], accumulate: int = 1):
        self.baseline, self.precision, self.accumulate = baseline, precision, accumulate
        self.parameters = list(baseline.model.parameters())
        self.optimizer = build_optimizer(baseline.model, OptimConfig(lr=1e-4))

    def __call__(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        total = torch.zeros((), device=inputs_BT.device)
        for inputs, targets in zip(*(x.chunk(self.accumulate) for x in (inputs_BT, targets_BT)), strict=True):
            with self.precision():
                loss = self.baseline.loss(inputs, targets) / self.accumulate
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def random_batch(vocab_size: int, batch: int, length: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T] of uniformly random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (batch, length + 1), generator=generator).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def train_in_turns(baselines: dict[str, Baseline], size: SizeConfig, batch: int, repeats: int) -> tuple[Turns, Series]:
    """Times of optimizer steps on the CPU in fp32, and the loss of every step; all take a round's step on one batch."""
    device = torch.device("cpu")
    rounds = range(WARMUP + repeats)
    batches = [random_batch(size.vocab_size, batch, size.seq_len, device, seed=number) for number in rounds]
    losses: Series = {name: [] for name in baselines}

    def training(name: str, baseline: Baseline) -> Callable[[int], None]:
        step = Step(baseline, contextlib.nullcontext)
        return lambda number: losses[name].append(step(*batches[number]).item())

    calls = {name: training(name, baseline) for name, baseline in baselines.items()}
    return take_turns(calls, repeats, WARMUP), losses
