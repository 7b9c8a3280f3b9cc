"""A trained model in the interface of transformers, computed by the very code that trained it.

Whatever the layout, `generate` decodes over the cache that the layout promises; `forward` has no cache.

Shapes: B batch, T tokens, D model, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import einops  # noqa: F401  transformers says what this file imports and is not installed; files beside it need it
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteriaList
from transformers import initialization as init
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.utils import can_return_tuple, logging

from arch.config import ModelConfig, from_dict
from arch.decoder import Decoder
from arch.generation import batch_prompts, generate
from arch.layers import LayerNorm, RMSNorm
from arch.model import build

from .configuration_kvfrontier_shipped import KVFrontierShippedConfig
from .generation_kvfrontier_shipped import Follower, one_token, read_settings, sampling, stop_criteria

logger = logging.get_logger(__name__)

# Modules whose weights are used without calling them: an adapter in front of one would be left out, in silence.
NOT_CALLED = ("lm_head", "kv_up_proj", "slot_keys", "position")


class KVFrontierShippedPreTrainedModel(PreTrainedModel):
    config: KVFrontierShippedConfig
    config_class = KVFrontierShippedConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["Decoder", "BlockTransformer"]  # noqa: RUF012  layers hand each other keys and values

    def __init__(self, config: KVFrontierShippedConfig):
        super().__init__(config)
        # From plain data: transformers may have loaded the configuration's file, and all it imports, a second time.
        # `post_init` draws the weights that are not loaded.
        self.model = build(from_dict(ModelConfig, {"arch": config.arch, "size": config.size}), init=False)
        self.gradient_checkpointing = False
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

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, every_n_layers: int = 1, **__: Any) -> None:
        """Recompute every layer in the backward pass, as in training: without reentry, whatever is asked for."""
        if enable and every_n_layers != 1:
            raise ValueError(f"every_n_layers is {every_n_layers}; this model recomputes every layer, or none")
        self.gradient_checkpointing = enable
        for stack in self.model.stacks:
            stack.activation_checkpointing = enable  # type: ignore[assignment]

    @property
    def decoder(self) -> Decoder:
        """The decoder that predicts tokens."""
        return self.model.decoder

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the tokens that the decoder sees. A Block Transformer's embedder has one of its own."""
        return self.decoder.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.embed = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        """The module whose weight is the output matrix: the embedding where the two are tied."""
        return self.decoder.embed if self.decoder.lm_head is None else self.decoder.lm_head

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Return the embedding. Raises ValueError for another number of tokens, which is part of `config.size`."""
        held, wanted = self.config.vocab_size, new_num_tokens or self.config.vocab_size
        if -(-wanted // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1) != held:
            raise ValueError(f"this model has {held} tokens, part of its size, and cannot be resized to {wanted}")
        return self.decoder.embed

    def check_adapters(self) -> None:
        """Raise ValueError where an adapter, such as LoRA's, would be left out."""
        used = [(name, module) for name, module in self.model.named_modules() if hasattr(module, "base_layer")]
        tied = self.config.tie_word_embeddings
        names = [name for name, _ in used if name.endswith(NOT_CALLED) or (tied and name.endswith("embed"))]
        if names:
            raise ValueError(
                f"adapters on {', '.join(names)} would be left out, their weights are used directly; leave them out of "
                "target_modules"
            )

    def wants_hidden(
        self, inputs_embeds: Tensor | None, output_attentions: bool | None, output_hidden_states: bool | None
    ) -> bool:
        """Tell if hidden states are asked for, here or in the configuration. Raises ValueError as `refuse`."""
        config = self.config
        attentions = config.output_attentions if output_attentions is None else output_attentions
        refuse(inputs_embeds=inputs_embeds, output_attentions=attentions)
        return bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states)

    def states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T, D] whose product with the output matrix are the logits of the token after each of `input_ids`; zeros
        where that token is not predicted.
        """
        return self.all_states(input_ids, attention_mask)[-1]

    def all_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, with_hidden: bool = False
    ) -> tuple[Tensor, ...]:
        """`states`; with `with_hidden`, before them what enters the first layer and what leaves each but the last.

        All are [B, T, D]. Those of a Block Transformer are of its token decoder, at the places from which it predicts.
        Rows are turned until their padding is on the right, where no earlier token sees it.
        """
        self.check_adapters()
        begin_B = first_real(input_ids, attention_mask)
        if not begin_B.any():
            return self._states(input_ids, with_hidden)
        index_BT = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        there_BT, back_BT = (index_BT + by for by in (begin_B[:, None], -begin_B[:, None]))
        turned = self._states(input_ids.gather(1, there_BT % input_ids.shape[1]), with_hidden)
        back_BT1 = (back_BT % input_ids.shape[1]).unsqueeze(-1)
        return tuple(x_BTD.take_along_dim(back_BT1, dim=1) for x_BTD in turned)

    def _states(self, tokens_BT: Tensor, with_hidden: bool) -> tuple[Tensor, ...]:
        model, pad_token, num_tokens = self.model, self.config.block_pad_token, tokens_BT.shape[1]
        num_zeros = self.num_unpredicted - 1
        if num_zeros:
            logger.warning_once(
                f"the first block of a text, {num_zeros + 1} tokens, is not predicted: logits there are all 0, which "
                "is the uniform distribution; the loss leaves them out"
            )
        if num_tokens <= num_zeros:
            weight = model.output_weight
            zeros_BTD = weight.new_zeros(*tokens_BT.shape, weight.shape[1])
            return (zeros_BTD,) * (len(self.decoder.layers) + 1 if with_hidden else 1)
        segment_ids_BT = None
        if num_fill := model.plan.min_prompt - 1 - num_zeros:
            segment_ids_BT = F.pad(torch.zeros_like(tokens_BT), (num_fill, 0), value=-1)
            tokens_BT = F.pad(tokens_BT, (num_fill, 0), value=pad_token)
        with residual_streams(self.decoder) if with_hidden else no_streams() as streams:
            x_BTD = model.next_token_logits(tokens_BT, states_alone, segment_ids_BT)
        plan = model.plan
        first = plan.min_prompt - plan.num_unpredicted - plan.target_offset  # that is asked for, of those predicted
        end = first + x_BTD.shape[1]
        kept = (*(model.by_token(x, len(tokens_BT))[:, first:end] for x in streams[:-1]), x_BTD)
        return tuple(F.pad(x, (0, 0, num_zeros, 0)) for x in kept)


class KVFrontierShippedModel(KVFrontierShippedPreTrainedModel):
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """The last hidden states, normalised: `states`."""
        with_hidden = self.wants_hidden(inputs_embeds, output_attentions, output_hidden_states)
        hidden = self.all_states(input_ids, attention_mask, with_hidden)
        return BaseModelOutput(last_hidden_state=hidden[-1], hidden_states=hidden if with_hidden else None)


class KVFrontierShippedForCausalLM(KVFrontierShippedPreTrainedModel, GenerationMixin):
    accepts_loss_kwargs = True  # num_items_in_batch: Trainer would look for **kwargs

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutput:
        """Logits [B, T, V] of the token after each of `input_ids`, of any length; with `labels` the loss.

        A Block Transformer predicts the tokens of a block from the blocks before it, hence without a start context
        nothing of the first block: there all logits are 0, the uniform distribution, and labels do not count. Nor does
        the label of a row's first token, which nothing comes before: the loss is the same with padding on the left, on
        the right, or none. (Stock classes count there, with padding on the left, what they predict from the padding.)
        `logits_to_keep`: of the last so many positions (0: all; a tensor: those positions). Padding may be on the left
        or the right, never between tokens. Raises ValueError with `use_cache`: the cache is that of `generate`.
        """
        if use_cache:
            raise ValueError("forward keeps no cache; generate() does, or leave out use_cache")
        with_hidden = self.wants_hidden(inputs_embeds, output_attentions, output_hidden_states)
        hidden = self.all_states(input_ids, attention_mask, with_hidden)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = F.linear(hidden[-1][:, kept], self.model.output_weight)
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
        return CausalLMOutput(loss=loss, logits=logits_BTV, hidden_states=hidden if with_hidden else None)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        streamer: BaseStreamer | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Return the prompts and the tokens generated after them, [B, T + new], as generate() of transformers does.

        The settings in SUPPORTED_SETTINGS (generation_kvfrontier_shipped.py) are read from `generation_config`,
        generation_config.json and `kwargs`, with their meaning in transformers; one that is nowhere set is off (top_k,
        too). Sampling draws its seed from torch. Prompts of unequal length are padded on the left.
        `stopping_criteria`, without scores, and `streamer` are given each token as it is made, or all of them
        afterwards where rows of a Block Transformer begin at different places of a block. `tokenizer` is for the
        setting stop_strings.

        Raises ValueError with every other setting that would change the text.
        """
        prompt_BT = inputs if input_ids is None else input_ids
        if prompt_BT is None:
            raise ValueError("give input_ids; there is no token that begins a text")
        self.check_adapters()
        settings = read_settings([self.generation_config, generation_config], kwargs)
        new = settings.get("max_new_tokens") or settings.get("max_length", 0) - prompt_BT.shape[1]
        if new < 1:
            raise ValueError(f"{new} tokens to generate; give max_new_tokens, or a max_length beyond the prompt's")
        begin_B = first_real(prompt_BT, attention_mask)
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise ValueError("attention_mask ends with padding; pad prompts on the left")
        prompts = [row[begin:].tolist() for row, begin in zip(prompt_BT, begin_B.tolist(), strict=True)]
        end, criteria = one_token(settings.get("eos_token_id")), stop_criteria(stopping_criteria, settings, tokenizer)
        follower = Follower(prompt_BT, end, settings.get("pad_token_id", end or 0), criteria, streamer)
        model, fill = self.model, self.config.block_pad_token
        batch = batch_prompts(model.plan, prompts, fill, model.output_weight.device)
        cache = model.allocate_cache(len(prompts), batch.capacity(new))
        live = (streamer is not None or len(criteria) > 0) and not batch.forced_BF.shape[1]
        rows = generate(
            model,
            prompts,
            new,
            **sampling(settings),
            stop_token=None if live else end,
            follow=follower if live else None,
            pad_token=fill,
            prefill_chunk=settings.get("prefill_chunk_size"),
            cache=cache,
            seed=int(torch.randint(2**31, ())),
        )
        if not live:
            follower.replay(rows if end is None else [row if len(row) == new else [*row, end] for row in rows])
        sequences = follower.finish()
        if settings.get("return_dict_in_generate"):
            return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache)
        return sequences


def refuse(**given: Any) -> None:
    """Raise ValueError where an argument that the model does not have is more than None or False."""
    wrong = [name for name, value in given.items() if value is not None and value is not False]
    if wrong:
        raise ValueError(f"this model takes no {', '.join(wrong)}; give input_ids, and leave it out")


@contextmanager
def residual_streams(decoder: Decoder) -> Iterator[list[Tensor]]:
    """Collect what enters the first layer of `decoder` and what leaves each, [B, T, D]."""
    streams: list[Tensor] = []
    first = decoder.layers[0].register_forward_pre_hook(lambda _, arguments: streams.append(arguments[0]))
    hooks = [layer.register_forward_hook(lambda _, __, out: streams.append(out[0])) for layer in decoder.layers]
    try:
        yield streams
    finally:
        for hook in (first, *hooks):
            hook.remove()


@contextmanager
def no_streams() -> Iterator[list[Tensor]]:
    yield []


def states_alone(x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
    """Return the hidden states [B, T, D]: a head that leaves out the product with the output matrix."""
    return x_BTD


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
