"""Messages between verify.py and the process that it starts, verify_child.py: plain data, sent as JSON.

The other process knows nothing of this repository: it imports these types for type checkers alone.
"""

from typing import TypedDict


class Request(TypedDict):
    """The work of the other process.

    trust_remote_code  whether the folder has code of its own
    own_cache          whether that code has a cache of its own, and none of transformers
    first              the first input after which a token is predicted
    prompts            one shorter and one longer than the smallest window
    positions          of each prompt, those whose logits are compared
    num_new_tokens     to generate after each prompt
    pad                token for padding on the left
    cache_text         tokens that fill the cache
    contexts           lengths of that text after which the bytes of the cache are counted
    windows            validation windows, one token longer than their inputs
    texts              to tokenize
    """

    trust_remote_code: bool
    own_cache: bool
    first: int
    prompts: list[list[int]]
    positions: list[list[int]]
    num_new_tokens: int
    pad: int
    cache_text: list[int]
    contexts: list[int]
    windows: list[list[int]]
    texts: list[str]


class CacheBytes(TypedDict):
    """[bytes of the tensors, bytes of the storages that they keep alive]: by context as text, and of a static cache."""

    growing: dict[str, list[int]]
    static: list[int] | None


class TokenizerReport(TypedDict):
    """The texts as tokens and decoded again, and the token that ends a text."""

    ids: list[list[int]]
    texts: list[str]
    end: int | None


class Response(TypedDict):
    """The findings of the other process; logits are in a file beside it.

    loading_report     what transformers reports of missing and unexpected weights
    greedy             by way of generating, the new tokens after each prompt
    nats               summed over the targets of all windows
    imported_packages  those of this repository, which must be none
    """

    model_class: str
    loading_report: dict[str, list[str]]
    num_parameters: int
    eos_token_id: int | None
    cache: CacheBytes
    greedy: dict[str, list[list[int]]]
    nats: float
    tokenizer: TokenizerReport
    imported_packages: list[str]
