"""Names of what is done to a cache at evaluation, without torch: `none`, `int4`, `streaming@25%`, `int4+streaming@256`.

A method is a codec (how a slot is stored), a keep (which positions stay), or both, joined by `+`. Options stand in
brackets, `int4(group=64,recent=0)`; the budget of a keep follows an `@`: a share of the prompt (`25%`), tokens (`256`),
bytes of each sequence and store (`16KiB`), or bytes of each sequence in all stores on which it acts (`1MiB-total`).
Bytes are all that is held of a prompt after the compression: slots as the codec stores them, their positions, scores
that the keep goes on with, digests of pages.
"""

import math
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

Value = int | float | Fraction | bool | str

# Options of each codec, with their defaults:
#   group     elements that share a scale and a zero: of a channel over tokens, or of a token over channels
#   recent    newest tokens that stay whole
#   keys      `channel`: a group is of one channel of the keys, and is stored when its tokens are there (KIVI);
#             `token`: of one token, as it always is of values and latents
#   hadamard  keys and values are rotated by a Hadamard matrix before they are rounded, and back after (QuaRot)
#   clip      share of the range of a group that its integers span, around its middle
_INTEGER: dict[str, Value] = {"group": 32, "recent": 32, "keys": "channel", "hadamard": False, "clip": 1.0}
CODECS: dict[str, dict[str, Value]] = {
    "bf16": {"recent": 0},
    "fp8": {"group": 32, "recent": 0},
    "int8": _INTEGER,
    "int4": _INTEGER,
    "int2": _INTEGER,
}
BITS = {"bf16": 16, "fp8": 8, "int8": 8, "int4": 4, "int2": 2}
CHOICES = {"keys": ("channel", "token"), "digest": ("mean", "box")}

# Options of each keep, with their defaults:
#   sinks   first tokens of a row that always stay
#   recent  newest tokens of the prompt that always stay as they are; with a budget at most half of it, towards which
#           they and the sinks count
#   window  last queries of the prompt that decide; SnapKV's and CORM's tokens of theirs always stay, as the recent
#   kernel  slots over which scores are pooled
#   ring    newest tokens that stay while later ones are added, at most half of the budget; those that were chosen in
#           the prompt stay for good
#   history queries among which is counted how often a position gets less attention than average
#   seed    of chance
#   merge   what is dropped of the tokens before the newest is averaged into the nearest that was chosen (Elastic Cache)
#   every   decoded tokens after which the keep acts again, so that a store has no more slots than what it chose and so
#           many; 0: it acts once, after the prompt
#   windows stores with a window, or with chunks, are kept smaller, too; a share is one of the window. Only with `every`
#   ratio   share of the channels of a key that are dropped
#   salient share of the tokens that get 4 bits, and not 2
#   random  share of the other queries of the prompt that decide, too
#   group   as that of a codec
#   stores  neighbouring stores that share a basis
#   rank_k  rank that is left of their keys, or latents, as a share of the most that it can be; rank_v of their values
#   page    tokens that are recalled together; a quarter of the budget at most
#   topk    pages that queries recall at a time; 0: half of the resident ones but the sinks
#   digest  of the keys of a page: a box that holds them (`box`), or reaches as far as they do on average (`mean`)
_ONCE: dict[str, Value] = {"sinks": 4, "recent": 16, "merge": False}
_AGAIN: dict[str, Value] = {"every": 0, "windows": False}
_SCORED: dict[str, Value] = {**_ONCE, **_AGAIN}
_SNAP: dict[str, Value] = {"sinks": 4, "window": 16, "kernel": 5, "merge": False}
KEEPS: dict[str, dict[str, Value]] = {
    "streaming": {"sinks": 4},
    "random": {**_SCORED, "seed": 0},
    "knorm": _SCORED,
    "snapkv": {**_SNAP, **_AGAIN},
    "snapstream": {**_SNAP, "ring": 64},
    "h2o": _SCORED,
    "scissorhands": {**_SCORED, "history": 64},
    "prefixkv": {**_ONCE, "every": 0},
    "corm": {"sinks": 4, "window": 32, "merge": False, **_AGAIN},
    "think": {"ratio": 0.4, "recent": 32, "window": 32},
    "arkvale": {"sinks": 4, "recent": 16, "page": 32, "topk": 0, "digest": "mean"},
    "zipcache": {"salient": 0.6, "random": 0.05, "recent": 32, "window": 32, "group": 32},
    "xkv": {"stores": 4, "rank_k": 0.125, "rank_v": 0.1875, "recent": 32},
}
WITHOUT_BUDGET: dict[str, str] = {  # and why
    "corm": "what stays depends on attention alone",
    "think": "every token stays",
    "zipcache": "every token stays",
    "xkv": "every token stays",
}
NO_WINDOWS: dict[str, str] = {  # why a keep does not act on stores with a window
    "streaming": "what it would leave of one is a shorter window; give the store that",
    "snapstream": "its ring is one already; take snapkv",
    "prefixkv": "it shares bytes among stores that hold the same tokens; take h2o",
    "arkvale": "it recalls tokens from far back, which they do not see; take h2o",
} | dict.fromkeys(("think", "zipcache", "xkv"), "it acts once, on the prompt, which leaves them; take a codec")
BY_CONTENT: frozenset[str] = frozenset({"prefixkv", "corm"})  # the number of slots of a store depends on the text

# Published methods that are none of these, and why.
LEFT_OUT: dict[str, str] = {
    "csr": (
        "it writes keys and values as sums of a few atoms of a dictionary that is trained for each model beforehand, "
        "where methods here act on any run as it is; take int2, which comes nearest to its bits"
    ),
}

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "KiB": 2**10, "MiB": 2**20}
MOST = 1 << 24  # of a number in an option


@dataclass(frozen=True)
class CodecSpec:
    """A codec and its options. `bits`: of an element, without scales."""

    name: str
    group: int = 32
    recent: int = 0
    keys: str = "token"
    hadamard: bool = False
    clip: Fraction = Fraction(1)

    @property
    def bits(self) -> int:
        return BITS[self.name]


@dataclass(frozen=True)
class Budget:
    """The part of a store that stays for each sequence: `unit` is share (of the prompt), tokens, bytes, or total (bytes
    of all stores on which the keep acts, each with as many tokens)."""

    unit: str
    amount: Fraction

    def tokens(self, prompt: int) -> int:
        """Tokens that stay of a prompt, at least 1, of a budget that is a share or tokens."""
        assert self.unit in ("share", "tokens")
        return max(1, math.floor(self.amount * prompt if self.unit == "share" else self.amount))


@dataclass(frozen=True)
class KeepSpec:
    """A keep, its budget (None: it needs none), and its options by name."""

    name: str
    budget: Budget | None
    options: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class CacheMethod:
    """A codec, a keep, both, or neither; `text` as it was written, without spaces."""

    text: str = "none"
    codec: CodecSpec | None = None
    keep: KeepSpec | None = None

    @property
    def is_none(self) -> bool:
        return self.codec is None and self.keep is None


PART = re.compile(r"(?P<name>[a-z0-9_]+)(?:\((?P<first>[^()]*)\))?(?:@(?P<budget>[^()]+))?(?:\((?P<last>[^()]*)\))?")


def parse_method(text: str) -> CacheMethod:
    """Read a method. Raises ValueError, which names the fix."""
    compact = re.sub(r"\s+", "", text)
    if compact == "none":
        return CacheMethod()
    codec: CodecSpec | None = None
    keep: KeepSpec | None = None
    for part in compact.split("+"):
        match = PART.fullmatch(part)
        if match is None or (match["first"] is not None and match["last"] is not None):
            raise ValueError(
                f"cannot read {part!r:.40} in cache method {text!r:.80}; write such as int4, or snapkv@25%"
            )
        name, options, budget = match["name"], match["first"] or match["last"] or "", match["budget"]
        if name in CODECS:
            if codec is not None:
                raise ValueError(f"cache method {text!r:.80} has two codecs; leave one out")
            if budget is not None:
                raise ValueError(f"{name} is a codec and takes no budget; write {name}, or {name}+streaming@{budget}")
            codec = CodecSpec(name, **_options(name, CODECS[name], options))
        elif name in KEEPS:
            if keep is not None:
                raise ValueError(f"cache method {text!r:.80} has two keeps; leave one out")
            keep = KeepSpec(name, _budget(name, budget), _options(name, KEEPS[name], options))
            if keep.options.get("windows") and not keep.options["every"]:
                raise ValueError(
                    f"{name}(windows=true) needs every, as every=16: a window lets go of what was chosen once, and "
                    "later tokens fill it"
                )
        elif name == "none":
            raise ValueError(f"none joins nothing; write {compact.replace('none+', '').replace('+none', '')}")
        elif name in LEFT_OUT:
            raise ValueError(f"no cache method {name}: {LEFT_OUT[name]}")
        else:
            raise ValueError(
                f"no cache method {name!r:.40}; codecs are {', '.join(CODECS)}, keeps (with a budget, as in "
                f"streaming@25%) {', '.join(KEEPS)}, and none leaves the cache as it is"
            )
    if codec is not None and keep is not None and keep.name == "zipcache":
        raise ValueError(f"zipcache has codecs of its own, 4 and 2 bits; leave out {codec.name}")
    return CacheMethod(compact, codec, keep)


def _options(name: str, defaults: dict[str, Value], text: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        key: Fraction(str(value)) if isinstance(value, float) else value for key, value in defaults.items()
    }
    given: set[str] = set()
    for entry in filter(None, text.split(",")):
        key, _, written = entry.partition("=")
        if key in given:
            raise ValueError(f"{name}({key}) is given twice; leave one out")
        if key == "windows" and name in NO_WINDOWS:
            raise ValueError(f"{name} does not act on windows: {NO_WINDOWS[name]}")
        if key not in defaults or not written:
            known = ", ".join(f"{key}={value}".lower() for key, value in defaults.items()) or "none"
            raise ValueError(f"{name} has no option {entry!r:.40}; its options and their defaults: {known}")
        given.add(key)
        values[key] = _value(f"{name}({key})", key, written, defaults[key])
    return values


def _value(where: str, key: str, text: str, default: Value) -> Value:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{where} is {text!r:.40}; it is true or false")
        return text.lower() == "true"
    if isinstance(default, str):
        if text not in CHOICES.get(key, (text,)):
            raise ValueError(f"{where} is {text!r:.40}; it is {' or '.join(CHOICES[key])}")
        return text
    if isinstance(default, int):
        least = 1 if key in ("group", "window", "kernel", "history", "ring", "stores", "page") else 0
        if not re.fullmatch(r"[0-9]{1,8}", text) or not least <= int(text) <= MOST:
            raise ValueError(f"{where} is {text!r:.40}; it is a whole number, at least {least} and at most {MOST:,}")
        return int(text)
    share = Fraction(text) if re.fullmatch(r"([01]?\.)?[0-9]{1,9}", text, re.ASCII) else Fraction(0)
    if not 0 < share <= 1:  # exact, so that counts of slots and channels follow from what is written
        raise ValueError(f"{where} is {text!r:.40}; it is a number above 0 and at most 1, as 0.25")
    return share


def _budget(name: str, text: str | None) -> Budget | None:
    if name in WITHOUT_BUDGET:
        if text is not None:
            raise ValueError(
                f"{name} takes no budget, {WITHOUT_BUDGET[name]}; leave out @{text:.40}, and see its options"
            )
        return None
    example = f"{name}@25% of the prompt, {name}@256 tokens, {name}@16KiB of each sequence and store, "
    example += f"or {name}@1MiB-total of each sequence"
    if text is None:
        raise ValueError(f"{name} needs a budget: {example}")
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)(%|(?:[KM]i?B|B)(?:-total)?)?", text)
    if match is None:
        raise ValueError(f"cannot read the budget {text!r:.40}: {example}")
    amount, unit = Fraction(match[1]), match[2]
    if not amount or (unit == "%" and amount > 100):
        raise ValueError(f"{name}@{text} keeps {'more than there is' if amount else 'nothing'}: {example}")
    if unit == "%":
        return Budget("share", amount / 100)
    if unit is None:
        if amount.denominator != 1:
            raise ValueError(f"{name}@{text} is no whole number of tokens: {example}")
        return Budget("tokens", amount)
    size, _, total = unit.partition("-")
    return Budget(total or "bytes", amount * UNITS[size])
