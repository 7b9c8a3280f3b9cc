"""The settings of generate() that a model with a cache of its own follows, and what follows its steps.

Shapes: B batch, T tokens.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation import StopStringCriteria
from transformers.generation.streamers import BaseStreamer

SUPPORTED_SETTINGS = {
    "max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p", "eos_token_id",
    "pad_token_id", "stop_strings", "prefill_chunk_size", "return_dict_in_generate",
}  # fmt: skip
# Values at which other settings change nothing; so does False, except for use_cache.
NEUTRAL_VALUES: dict[str, Any] = {
    "use_cache": True, "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "length_penalty": 1.0,
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "diversity_penalty": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "min_length": 0, "min_new_tokens": 0, "guidance_scale": 1.0, "penalty_alpha": 0.0,
    "bad_words_ids": [], "suppress_tokens": [], "begin_suppress_tokens": [], "sequence_bias": {},
    "logits_processor": [],
}  # fmt: skip
IGNORED_SETTINGS = {"bos_token_id", "transformers_version"}  # the former begins empty prompts, which are refused


def read_settings(sources: Iterable[GenerationConfig | None], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Collect the settings of `sources`, later ones first, and of `kwargs` before them all.

    Raises ValueError with every one that is not supported.
    """
    blank = GenerationConfig().to_dict()
    settings: dict[str, Any] = {}
    for source in sources:
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


def stop_criteria(
    given: StoppingCriteriaList | list[Any] | None, settings: dict[str, Any], tokenizer: Any
) -> StoppingCriteriaList:
    """The criteria that are given, and one for the setting stop_strings; raises ValueError if it has no tokenizer."""
    criteria = StoppingCriteriaList(given or [])
    if stop_strings := settings.get("stop_strings"):
        if tokenizer is None:
            raise ValueError("stop_strings need the tokenizer of the model; give tokenizer=")
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    return criteria


def sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """The options of arch's generate that choose a token; without do_sample the most likely one is taken."""
    if not settings.get("do_sample", False):
        return {"temperature": 0.0}
    options = {key: settings[key] for key in ("temperature", "top_p", "min_p") if key in settings}
    return {"temperature": 1.0, "top_k": settings.get("top_k") or None} | options


def one_token(eos: Any) -> int | None:
    """The one token of eos_token_id, which may be a list. Raises ValueError where there are several."""
    tokens = [] if eos is None else [int(token) for token in torch.as_tensor(eos).reshape(-1)]
    if len(tokens) > 1:
        raise ValueError(f"eos_token_id is {tokens}; generate() stops at one token: give one, or stopping_criteria")
    return tokens[0] if tokens else None


class Follower:
    """Follows a generation step by step: which rows have ended, and the text so far, [B, T].

    A row ends with the token `end` or where a criterion says so; from there on it is `pad`.
    """

    def __init__(
        self,
        prompt_BT: Tensor,
        end: int | None,
        pad: int,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
    ):
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise ValueError(f"streamer={streamer!r} has no put() and end(); give one of transformers")
        self.text_BT, self.end, self.pad, self.criteria, self.streamer = prompt_BT, end, pad, criteria, streamer
        self.ended_B = torch.zeros(len(prompt_BT), dtype=torch.bool, device=prompt_BT.device)
        if streamer is not None:
            streamer.put(prompt_BT.cpu())

    def __call__(self, new: Mapping[int, int]) -> list[int]:
        """Add the next token of each row that has not ended. Return the rows that end with it."""
        self._add(torch.tensor([new.get(row, self.pad) for row in range(len(self.text_BT))]))
        ended = self.ended_B.tolist()
        return [row for row in new if ended[row]]

    def _add(self, next_B: Tensor) -> None:
        next_B = next_B.to(self.text_BT)
        self.text_BT = torch.cat((self.text_BT, next_B[:, None]), dim=1)
        if self.streamer is not None:
            self.streamer.put(next_B.cpu())
        if self.end is not None:
            self.ended_B = self.ended_B | (next_B == self.end)
        if self.criteria:
            self.ended_B = self.ended_B | self.criteria(self.text_BT, ()).to(self.ended_B)

    def replay(self, rows: list[list[int]]) -> None:
        """Add rows that are complete, up to where all have ended."""
        going = set(range(len(rows)))
        for step in range(max(map(len, rows))):
            going -= set(self({row: rows[row][step] for row in going if step < len(rows[row])}))
            if not going:
                break

    def finish(self) -> Tensor:
        """Return the text, as a tensor that autograd may use."""
        if self.streamer is not None:
            self.streamer.end()
        return self.text_BT.clone()
