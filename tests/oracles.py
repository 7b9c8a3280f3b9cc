"""Models that know what comes next, or nothing, with the methods of a language model; and tokenizers of all kinds."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from data.tokenizer import byte_tokenizer, end_token, train_bpe
from eval.tasks.task import Subject
from eval.tasks.words import sentences
from train.loading import Text


class Oracle(nn.Module):
    """Finds the tokens that `knows` returns for all before them equally likely, and others hopeless; of none, all."""

    plan = SimpleNamespace(block_length=1, target_offset=1, num_unpredicted=0, min_prompt=1)
    takes_static_steps = False

    def __init__(self, knows: Callable[[tuple[int, ...]], set[int]], vocab_size: int):
        super().__init__()
        self.knows, self.vocab_size = knows, vocab_size
        self.output_weight = torch.zeros(vocab_size, 1)

    def allocate_cache(self, batch: int, capacity: int, **_: Any) -> SimpleNamespace:
        cache = SimpleNamespace(tokens_BT=torch.empty(batch, 0, dtype=torch.int64), start_B=None)
        cache.pad_left = lambda start_B: setattr(cache, "start_B", start_B)
        cache.repeat = lambda rows: SimpleNamespace(tokens_BT=cache.tokens_BT.repeat(rows, 1), start_B=None)
        return cache

    def next_token_logits(self, tokens_BT: Tensor, new: int = 0, starts: Sequence[int] | None = None) -> Tensor:
        """After each of the last `new` tokens; 0: of all."""
        length = tokens_BT.shape[1]
        logits_BTV = torch.zeros(len(tokens_BT), new or length, self.vocab_size)
        for logits_TV, row, start in zip(logits_BTV, tokens_BT.tolist(), starts or [0] * len(tokens_BT), strict=True):
            for place in range(-len(logits_TV), 0):
                known = self.knows(tuple(row[start : length + 1 + place]))
                if known:
                    logits_TV[place] = -100.0
                    logits_TV[place, list(known)] = 0.0
        return logits_BTV

    def forward(self, tokens_BT: Tensor, cache: Any, last_only: bool = True) -> Tensor:
        cache.tokens_BT = torch.cat((cache.tokens_BT, tokens_BT), dim=1)
        starts = None if cache.start_B is None else cache.start_B.tolist()
        return self.next_token_logits(cache.tokens_BT, 1 if last_only else tokens_BT.shape[1], starts)

    def prefill(self, tokens_BT: Tensor, cache: Any, chunk: Any = None, segment_ids_BT: Any = None) -> Tensor:
        return self(tokens_BT, cache)

    def decode_step(self, tokens_B1: Tensor, cache: Any) -> Tensor:
        return self(tokens_B1, cache)


def nothing(before: tuple[int, ...]) -> set[int]:
    return set()


def first_time(before: tuple[int, ...]) -> set[int]:
    """What followed the last token where it occurred first."""
    place = before.index(before[-1])
    return {before[place + 1]} if place + 1 < len(before) else set()


def subject(model: nn.Module, tokenizer: Text | None = None, **fields: Any) -> Subject:
    """`model` as tasks are given it."""
    tokenizer = tokenizer or tokenizers_of_all_kinds()["bytes"]
    fields = {"name": "oracle", "context": 256, "quiet": True, "pad_token": tokenizer.end, **fields}
    return Subject(model=model, tokenizer=tokenizer, device=torch.device("cpu"), **fields)


@cache
def tokenizers_of_all_kinds() -> dict[str, Text]:
    """Bytes; byte-level BPE; one with a blank before a text and a begin before a prompt; and one whose tokens hold
    several words."""
    import numpy as np

    def corpus() -> Iterator[str]:
        source = sentences(np.random.default_rng(0))
        yield from (f"{next(source)} {number * 7919}" for number in range(300))

    blank, joined = Tokenizer(models.BPE(byte_fallback=True)), Tokenizer(models.BPE())
    blank.pre_tokenizer, blank.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    joined.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    joined.decoder = decoders.ByteLevel()
    letters = [*map(chr, range(33, 127)), "\n", "\u2581"]
    for tokenizer, alphabet, special in (
        (blank, letters, ["<s>", "</s>"]),
        (joined, pre_tokenizers.ByteLevel.alphabet(), ["</s>"]),
    ):
        tokenizer.train_from_iterator(
            corpus(),
            trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
        )
    found = {"bytes": byte_tokenizer(), "bpe": train_bpe(corpus(), 500), "blank": blank, "joined": joined}
    return {name: Text(one, end_token(one, None), one.token_to_id("<s>")) for name, one in found.items()}
