"""Tables and lines on a terminal or in a file, with every text shown as it is."""

import sys
import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

# Where there is no terminal, no line is broken: a log can be searched for whole names.
FILE_WIDTH = 1000
# Control characters, halves of a UTF-16 pair (bytes of a file name that are no UTF-8), and breaks of lines.
ESCAPED = {"Cc", "Cs", "Zl", "Zp"}
# Those that turn the direction of writing: what follows them would be shown in another order than it has.
TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


class PlainConsole(Console):
    """Standard output. Nothing in a string is markup, and what a terminal would obey is shown as an escape."""

    def __init__(self) -> None:
        width = None if sys.stdout.isatty() else FILE_WIDTH
        super().__init__(width=width, markup=False, highlight=False, emoji=False)

    def print(self, *objects: Any, **options: Any) -> None:
        if self.is_terminal:
            super().print(*objects, **options)
            return
        with self.capture() as printed:
            super().print(*objects, **options)
        text = "\n".join(line.rstrip() for line in printed.get().split("\n"))  # rich fills lines up to the width
        self.file.write(text)
        self.file.flush()

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


def visible(text: str) -> str:
    """`text`, the characters that a terminal does not show as escapes; tabs and line feeds stay."""
    return "".join(
        char.encode("unicode_escape").decode()
        if char not in "\t\n" and (unicodedata.category(char) in ESCAPED or unicodedata.bidirectional(char) in TURNING)
        else char
        for char in text
    )
