"""Models that transformers loads, with the methods of ours: next-token logits, prefill and decoding over a cache.

Shapes: B batch, T new tokens, S tokens in all, V vocabulary.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data.cli import UsageError
from data.tokenizer import scaled_bytes, token_bytes

MOST_CONTEXT = 4096  # of a model that was built for more


@dataclass(frozen=True)
class TransformersPlan:
    """The part of a plan that callers of a model read: every token but the first is predicted, one by one.

    stacks  none of ours: what transformers caches is its own affair
    """

    stacks: tuple[()] = ()
    block_length: int = 1
    target_offset: int = 1
    num_unpredicted: int = 0
    min_prompt: int = 1


@dataclass
class TransformersCache:
    """The cache that transformers makes; row b is padding before token `start_B[b]`."""

    values: Any
    capacity: int
    start_B: Tensor | None = None
    length: int = 0

    takes_rows = False

    @property
    def nbytes(self) -> int:
        """Bytes of the storages behind the cache."""
        found: dict[int, int] = {}
        seen: set[int] = set()
        todo: list[Any] = [self.values]
        while todo:
            item = todo.pop()
            if isinstance(item, Tensor):
                found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
            elif id(item) in seen:
                continue
            elif isinstance(item, dict):
                todo += item.values()
            elif isinstance(item, list | tuple):
                todo += item
            elif hasattr(item, "__dict__"):
                todo += vars(item).values()
            seen.add(id(item))
        return sum(found.values())

    def repeat(self, rows: int) -> "TransformersCache":
        """A cache of `rows` sequences, each a copy of the only one of this."""
        repeated: TransformersCache = _repeated(self, rows, {})
        return repeated

    def pad_left(self, start_B: Tensor | None) -> None:
        """Set `start_B` of an empty cache. Raises ValueError if it is not empty."""
        if self.length:
            raise ValueError(f"the cache has {self.length} positions already; prompts need an empty one")
        self.start_B = start_B


def _repeated(value: Any, rows: int, copies: dict[int, Any]) -> Any:
    """A copy of `value`, of whatever class, in which each tensor of one row has `rows` of them."""
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, Tensor):
        result: Any = value.repeat_interleave(rows, dim=0) if value.dim() and len(value) == 1 else value.clone()
    elif isinstance(value, list | tuple):
        result = type(value)(_repeated(item, rows, copies) for item in value)
    elif isinstance(value, dict):
        result = {key: _repeated(item, rows, copies) for key, item in value.items()}
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        result = copy.copy(value)
        result.__dict__.update({key: _repeated(item, rows, copies) for key, item in vars(value).items()})
    else:
        return value
    copies[id(value)] = result
    return result


class TransformersModel(nn.Module):
    """A causal language model of transformers. Its cache holds what its class keeps, in the type of its weights."""

    takes_static_steps = False  # the cache grows with each

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.plan = TransformersPlan()

    @property
    def output_weight(self) -> Tensor:
        """The output matrix [V, D]."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def allocate_cache(self, batch: int, capacity: int, **_: Any) -> TransformersCache:
        """An empty cache; it grows as tokens are added."""
        from transformers import DynamicCache

        return TransformersCache(DynamicCache(config=self.model.config), capacity)

    def next_token_logits(self, tokens_BT: Tensor) -> Tensor:
        """The logits [B, T, V] of the token after each of `tokens_BT`."""
        logits_BTV: Tensor = self.model(input_ids=tokens_BT, use_cache=False).logits
        return logits_BTV

    def forward(self, tokens_BT: Tensor, cache: TransformersCache, last_only: bool = True) -> Tensor:
        """Add tokens to `cache` and return the logits [B, 1, V] of the next one, or [B, T, V] of one after each."""
        begin, batch, device = cache.length, tokens_BT.shape[0], tokens_BT.device
        cache.length += tokens_BT.shape[1]
        position_S = torch.arange(cache.length, device=device)
        start_B = torch.zeros(batch, dtype=torch.int64, device=device) if cache.start_B is None else cache.start_B
        done = self.model(
            input_ids=tokens_BT,
            attention_mask=(position_S >= start_B[:, None]).long(),
            position_ids=(position_S[begin:] - start_B[:, None]).clamp(min=0),
            past_key_values=cache.values,
            use_cache=True,
            logits_to_keep=1 if last_only else 0,
        )
        logits_BTV: Tensor = done.logits
        return logits_BTV

    def prefill(
        self,
        tokens_BT: Tensor,
        cache: TransformersCache,
        chunk: int | None = None,
        segment_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Add prompts to `cache`, `chunk` tokens at a time, and return the logits [B, 1, V] of the token after them."""
        assert segment_ids_BT is None, "a prompt of one token is long enough"
        for part_BT in torch.split(tokens_BT, chunk or tokens_BT.shape[1], dim=1):
            logits_B1V: Tensor = self(part_BT, cache)
        return logits_B1V

    def decode_step(self, tokens_B1: Tensor, cache: TransformersCache) -> Tensor:
        """Add one token of each row to `cache` and return the logits [B, 1, V] of the next one."""
        logits_B1V: Tensor = self(tokens_B1, cache)
        return logits_B1V


class TransformersTokenizer:
    """A tokenizer of transformers; a special token spelled out in a text is read as its class does."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
        if end is None and begin is None:
            raise UsageError("the tokenizer has no token that begins or ends a text; no document can be scored")
        self.end: int = begin if end is None else end
        self.begin: int = self.end if begin is None else begin
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._bytes = None if backend is None else token_bytes(backend)

    @property
    def vocabulary(self) -> dict[str, int]:
        """All tokens, as the tokenizer spells them, with their numbers."""
        tokens: dict[str, int] = self.tokenizer.get_vocab()
        return tokens

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, without those that begin and end one."""
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def prompt(self, text: str) -> list[int]:
        """The tokens of a text to continue, with those that the class puts around it, unless it has its begin."""
        begin = self.tokenizer.bos_token
        special = begin is None or not text.startswith(begin)
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=special)
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without special tokens."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def text_bytes(self, text: str, tokens: Sequence[int]) -> Sequence[float]:
        """UTF-8 bytes of `text` that each of its `tokens` stands for; together all of them."""
        sizes = [1.0] * len(tokens) if self._bytes is None else self._bytes[list(tokens)].tolist()
        return scaled_bytes(sizes, text)


class LoadedTransformer(NamedTuple):
    """A model in eval mode, its tokenizer, and the tokens of context that it is evaluated with."""

    model: Any
    tokenizer: TransformersTokenizer
    context: int


def load_transformers(
    name: str | Path, device: torch.device, dtype: torch.dtype | str, trust: bool, revision: str | None
) -> LoadedTransformer:
    """Load a model and its tokenizer from a folder or the hub.

    `trust`: code that the folder brings is run. Raises UsageError if it cannot be loaded, or would need trust.
    """
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"checkpoint={name} is a model of transformers, which is not installed: pip install transformers"
        ) from error
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()  # or it warns of texts longer than one window
    logging.disable_progress_bar()
    where = {"trust_remote_code": trust, "revision": revision, "local_files_only": Path(name).is_dir()}
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype, **where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(name), **where)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        code = "trust_remote_code" in str(error)
        fix = "; it brings code of its own: trust=true runs it, if you know where it is from" if code else ""
        raise UsageError(f"checkpoint={name} cannot be loaded by transformers: {reason}{fix}") from error
    model = model.to(device).eval().requires_grad_(False)
    config = model.config.get_text_config()
    context = min(getattr(config, "max_position_embeddings", None) or MOST_CONTEXT, MOST_CONTEXT)
    if config.model_type == "kvfrontier_shipped":  # the model of arch/ itself, behind a wrapper
        return LoadedTransformer(model.model, TransformersTokenizer(tokenizer), context)
    return LoadedTransformer(TransformersModel(model), TransformersTokenizer(tokenizer), context)
