"""A trained model in the interface of transformers, computed by the very code that trained it.

Whatever the layout, `generate` decodes over the cache that the layout promises; `forward` has no cache.

Shapes: B batch, T tokens, D model, V vocabulary.
"""

from typing import Any

import einops  # noqa: F401  transformers names what this file imports and is not installed; the files beside it need it
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteriaList
from transformers import initialization as init
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.utils import can_return_tuple, logging

from arch.config import ModelConfig, from_dict
from arch.generation import batch_prompts, generate
from arch.layers import LayerNorm, RMSNorm
from arch.model import build

from .configuration_kvfrontier_shipped import KVFrontierShippedConfig

logger = logging.get_logger(__name__)

SUPPORTED_SETTINGS = {
    "max_new_tokens", "max_length", "do_sample", "temperature", "top_p", "eos_token_id", "pad_token_id",
    "return_dict_in_generate",
}  # fmt: skip
# Values at which other settings change nothing; so does False, except for use_cache.
NEUTRAL_VALUES = {"use_cache": True, "num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "top_k": 0}
IGNORED_SETTINGS = {"bos_token_id", "transformers_version"}  # the former begins empty prompts, which are refused


class KVFrontierShippedPreTrainedModel(PreTrainedModel):
    config: KVFrontierShippedConfig
    config_class = KVFrontierShippedConfig
    base_model_prefix = ""
    _no_split_modules = ["Decoder", "BlockTransformer"]  # noqa: RUF012  layers hand each other keys and values

    def __init__(self, config: KVFrontierShippedConfig):
        super().__init__(config)
        # From plain data: transformers may have loaded the configuration's file, and all it imports, a second time.
        self.model = build(from_dict(ModelConfig, {"arch": config.arch, "size": config.size}))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one module like init.py does; transformers calls it for parameters that are not loaded."""
        model, std = self.model, self.model.config.size.init_std
        for name, own_std in model.init_stds.items():
            if model.get_submodule(name.removesuffix(".weight")) is module:
                std = own_std
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight" and isinstance(module, nn.Linear | nn.Embedding):
                init.normal_(parameter, 0.0, std)
            elif name == "weight" and isinstance(module, RMSNorm | LayerNorm):
                init.ones_(parameter)
            else:
                init.zeros_(parameter)

    @property
    def num_unpredicted(self) -> int:
        """First tokens of a text that are not predicted; every model needs one before it predicts any."""
        return 1 if self.config.block_pad_token is not None else self.model.plan.min_prompt

    def states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T, D] whose product with the output matrix are the logits of the token after each of `input_ids`; zeros
        where that token is not predicted.

        Rows are turned until their padding is on the right, where no earlier token sees it.
        """
        begin_B = first_real(input_ids, attention_mask)
        if not begin_B.any():
            return self._states(input_ids)
        index_BT = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        there_BT, back_BT = (index_BT + by for by in (begin_B[:, None], -begin_B[:, None]))
        x_BTD = self._states(input_ids.gather(1, there_BT % input_ids.shape[1]))
        return x_BTD.take_along_dim((back_BT % input_ids.shape[1]).unsqueeze(-1), dim=1)

    def _states(self, tokens_BT: Tensor) -> Tensor:
        model, pad_token, num_tokens = self.model, self.config.block_pad_token, tokens_BT.shape[1]
        num_zeros = self.num_unpredicted - 1
        if num_zeros:
            logger.warning_once(
                f"the first block of a text, {num_zeros + 1} tokens, is not predicted: logits there are all 0, which "
                "is the uniform distribution; the loss leaves them out"
            )
        if num_tokens <= num_zeros:
            weight = model.output_weight
            return weight.new_zeros(*tokens_BT.shape, weight.shape[1])
        segment_ids_BT = None
        if num_fill := model.plan.min_prompt - 1 - num_zeros:
            segment_ids_BT = F.pad(torch.zeros_like(tokens_BT), (num_fill, 0), value=-1)
            tokens_BT = F.pad(tokens_BT, (num_fill, 0), value=pad_token)
        x_BTD = model.next_token_logits(tokens_BT, states_alone, segment_ids_BT)
        return F.pad(x_BTD, (0, 0, num_zeros, 0))


class KVFrontierShippedModel(KVFrontierShippedPreTrainedModel):
    @can_return_tuple
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:
        """The last hidden states, normalised: `states`."""
        return BaseModelOutput(last_hidden_state=self.states(input_ids, attention_mask))


class KVFrontierShippedForCausalLM(KVFrontierShippedPreTrainedModel, GenerationMixin):
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutput:
        """Logits [B, T, V] of the token after each of `input_ids`, of any length; with `labels` the loss.

        A Block Transformer predicts the tokens of a block from the blocks before it, hence without a start context
        nothing of the first block: there all logits are 0, the uniform distribution, and labels do not count.
        `logits_to_keep`: of the last so many positions (0: all; a tensor: those positions). Padding may be on the left
        or the right, never between tokens. Raises ValueError with `use_cache`: the cache is that of `generate`.
        """
        if use_cache:
            raise ValueError("forward keeps no cache; generate() does, or leave out use_cache")
        states_BTD = self.states(input_ids, attention_mask)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = F.linear(states_BTD[:, kept], self.model.output_weight)
        loss = None
        if labels is not None:
            place_BT = torch.arange(input_ids.shape[1], device=input_ids.device)
            place_BT = place_BT - first_real(input_ids, attention_mask)[:, None]
            labels = labels.masked_fill((place_BT >= 0) & (place_BT < self.num_unpredicted), -100)
            loss = self.loss_function(
                logits=logits_BTV,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutput(loss=loss, logits=logits_BTV)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Return the prompts and the tokens generated after them, [B, T + new], as generate() of transformers does.

        SUPPORTED_SETTINGS are read from `generation_config`, generation_config.json and `kwargs`, with their meaning
        in transformers; a setting that is nowhere set is off (top_k, too). Sampling draws its seed from torch. Prompts
        of unequal length are padded on the left. `stopping_criteria` are applied afterwards, without scores, to every
        prefix of the generated text, which is cut where the first one stops it.

        Raises ValueError with every other setting that would change the text.
        """
        prompt_BT = inputs if input_ids is None else input_ids
        if prompt_BT is None:
            raise ValueError("give input_ids; there is no token that begins a text")
        settings = self.settings(generation_config, kwargs)
        new = settings.get("max_new_tokens") or settings.get("max_length", 0) - prompt_BT.shape[1]
        if new < 1:
            raise ValueError(f"{new} tokens to generate; give max_new_tokens, or a max_length beyond the prompt's")
        begin_B = first_real(prompt_BT, attention_mask)
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError("attention_mask ends with padding; pad prompts on the left")
        prompts = [row[begin:].tolist() for row, begin in zip(prompt_BT, begin_B.tolist(), strict=True)]
        sampled, end = settings.get("do_sample", False), one_token(settings.get("eos_token_id"))
        how: dict[str, Any] = {
            "temperature": settings.get("temperature", 1.0) if sampled else 0.0,
            "top_p": settings.get("top_p", 1.0) if sampled else 1.0,
            "stop_token": end,
            "seed": int(torch.randint(2**31, ())),
        }
        model, fill = self.model, self.config.block_pad_token
        batch = batch_prompts(model.plan, prompts, fill, model.output_weight.device)
        cache = model.allocate_cache(len(prompts), batch.capacity(new))
        rows = generate(model, prompts, new, pad_token=fill, cache=cache, **how)
        if end is not None:
            rows = [row if len(row) == new else [*row, end] for row in rows]
        pad = settings.get("pad_token_id", end or 0)
        sequences = joined(prompt_BT, rows, pad, StoppingCriteriaList(stopping_criteria or []))
        if settings.get("return_dict_in_generate"):
            return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache)
        return sequences

    def settings(self, config: GenerationConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Collect the settings of `generate`. Raises ValueError with every one that it does not support."""
        blank, settings = GenerationConfig().to_dict(), {}
        for source in (self.generation_config, config):
            values = {} if source is None else source.to_dict()
            settings |= {key: value for key, value in values.items() if value != blank.get(key)}
        settings |= {key: value for key, value in kwargs.items() if value is not None}
        settings = {k: value for k, value in settings.items() if k not in IGNORED_SETTINGS and not k.startswith("_")}
        unsupported = {
            key: value
            for key, value in settings.items()
            if key not in SUPPORTED_SETTINGS
            and (value is not False or key == "use_cache")
            and value != NEUTRAL_VALUES.get(key)
        }
        if unsupported:
            wrong = ", ".join(f"{key}={value!r}"[:80] for key, value in unsupported.items())
            supported = ", ".join(sorted(SUPPORTED_SETTINGS))
            raise ValueError(f"generate() of this model does not do {wrong}; it reads {supported}")
        return settings


def states_alone(x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
    """Return the hidden states [B, T, D]: a head that leaves out the product with the output matrix."""
    return x_BTD


def one_token(eos: Any) -> int | None:
    """The one token of eos_token_id, which may be a list. Raises ValueError where there are several."""
    tokens = [] if eos is None else [int(token) for token in torch.as_tensor(eos).reshape(-1)]
    if len(tokens) > 1:
        raise ValueError(f"eos_token_id is {tokens}; generate() stops at one token: give one, or stopping_criteria")
    return tokens[0] if tokens else None


def first_real(tokens_BT: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B] where each row begins. Raises ValueError where padding is not at its ends."""
    if attention_mask is None:
        return torch.zeros(len(tokens_BT), dtype=torch.int64, device=tokens_BT.device)
    if attention_mask.shape != tokens_BT.shape:
        shapes = f"{tuple(attention_mask.shape)}, the tokens {tuple(tokens_BT.shape)}"
        raise ValueError(f"attention_mask has the shape {shapes}; give 1 for each token and 0 for padding")
    is_token_BT = attention_mask.bool()
    begin_B = is_token_BT.int().argmax(dim=1)
    place_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) - begin_B[:, None]
    whole_BT = (place_BT >= 0) & (place_BT < is_token_BT.sum(dim=1, keepdim=True))
    if not torch.equal(is_token_BT, whole_BT):
        raise ValueError("attention_mask has padding between tokens; a row is one run of tokens")
    return begin_B


def joined(prompt_BT: Tensor, rows: list[list[int]], pad: int, criteria: StoppingCriteriaList) -> Tensor:
    """The prompts with their rows after them, each up to where it stops, filled up with `pad`."""
    longest = max(map(len, rows))
    new_BT = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=prompt_BT.device)
    sequences_BT = torch.cat((prompt_BT, new_BT.to(prompt_BT.dtype)), dim=1)
    end_B = torch.tensor([prompt_BT.shape[1] + len(row) for row in rows], device=prompt_BT.device)
    if criteria:
        for end in range(prompt_BT.shape[1] + 1, sequences_BT.shape[1] + 1):
            stopped_B = criteria(sequences_BT[:, :end], ()).to(end_B.device)
            end_B = torch.where(stopped_B & (end_B > end), end, end_B)
    index_T = torch.arange(sequences_BT.shape[1], device=prompt_BT.device)
    return sequences_BT.masked_fill(index_T >= end_B[:, None], pad)[:, : int(end_B.max())]
