"""Words of a command line before Hydra reads them: values of text keys are taken as they were typed.

Hydra's grammar gives brackets, commas, numbers and quotes a meaning in every value. A name or a folder has none:
`resume=runs/lr=1e-3`, `name=007` and `train_only=(a|b)` reach their keys unchanged.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from arch.named import CONFIGS
from data.cli import UsageError, hydra_value
from eval.typed import hint_of

WORD = re.compile(r"(?P<key>(?:\+\+?)?(?P<name>[A-Za-z_][\w.]*))=(?P<text>.*)", re.DOTALL)


def as_typed(words: Sequence[str], schema: type, sweep: bool) -> list[str]:
    """Quote the values of text keys of `schema`, and of config groups, that Hydra would take for something else.

    Quoted values, null and interpolations keep their meaning; with `sweep` so do lists and ranges. Raises UsageError on
    a value without a key.
    """
    for word in words:
        if not word.strip() or word.startswith("="):
            raise UsageError(f"cannot read {word!r}; write key=value")
    parser = OverridesParser.create()
    return [_as_typed(word, schema, sweep, parser) for word in words]


def _as_typed(word: str, schema: type, sweep: bool, parser: OverridesParser) -> str:
    match = WORD.fullmatch(word)
    if match is None or not match["text"].strip() or match["text"][0] in "'\"":
        return word
    is_text, is_group = text_key(schema, match["name"]), (CONFIGS / match["name"]).is_dir()
    if not (is_text or is_group):
        return word
    try:
        parsed: Override | None = parser.parse_override(word)
    except HydraException:
        parsed = None
    if keeps_meaning(parsed, match["text"], is_text, sweep):
        return word
    return f"{match['key']}={hydra_value(match['text'])}"


def keeps_meaning(parsed: Override | None, text: str, is_text: bool, sweep: bool) -> bool:
    """Tell whether Hydra's reading of `text` (None: it has none) is what the user means."""
    if is_text and not sweep and os.path.lexists(text):
        return parsed is not None and parsed.value() == text
    if parsed is None:
        return sweep or not is_text
    if parsed.is_sweep_override() or "${" in text:
        return True
    value: Any = parsed.value()
    return value is None or isinstance(value, str | QuotedString) or (isinstance(value, list | dict) and not is_text)


def text_key(schema: type, key: str) -> bool:
    """Tell whether the dotted `key` of `schema` holds text."""
    hint: Any = schema
    for name in key.split("."):
        hint = hint_of(hint, name)
    return hint in (str, str | None)


def sweep_size(words: Sequence[str], params: Mapping[str, Any]) -> int:
    """Number of runs of a sweep over `words` and `params` (hydra.sweeper.params), as Hydra's sweeper counts them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra

    hydra = GlobalHydra.instance()  # which knows what glob(...) is among
    parser = OverridesParser.create(hydra.config_loader() if hydra.is_initialized() else None)
    overrides = parser.parse_overrides([*(f"{key}={value}" for key, value in params.items()), *words])
    return sum(map(len, BasicSweeper.split_arguments(overrides, None)))
