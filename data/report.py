"""Progress display of a preparation."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .writing import SplitProgress

LINE_SECONDS = 30


class Report:
    """Tokens and tokens/s on standard error: a bar on a terminal, a line every LINE_SECONDS elsewhere."""

    def __init__(self, name: str, max_tokens: int | None, splits: dict[str, SplitProgress]):
        self.name, self.splits = name, splits
        columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}")]
        columns += [TimeElapsedColumn(), TimeRemainingColumn()] if max_tokens else [TimeElapsedColumn()]
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self.task = self.bar.add_task(name, total=max_tokens, state="")
        self.started_at = self.updated_at = time.monotonic()
        self.resumed_tokens = self.num_tokens()

    def num_tokens(self) -> int:
        return sum(split.tokens for split in self.splits.values())

    def __enter__(self) -> "Report":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, source: str) -> None:
        """Show the counts and the end of the name of `source`, unless the last update was a moment ago."""
        now = time.monotonic()
        if now - self.updated_at < (0.2 if not self.bar.disable else LINE_SECONDS):
            return
        self.updated_at, tokens = now, self.num_tokens()
        speed = (tokens - self.resumed_tokens) / (now - self.started_at)
        state = f"{tokens:,} tokens, {speed:,.0f} tokens/s, {source[-40:]}"
        if self.bar.disable:
            print(f"{self.name}: {state}", file=sys.stderr, flush=True)
        else:
            self.bar.update(self.task, completed=self.splits["train"].tokens, state=state)

    def warn_of_lost_text(self) -> None:
        """Warn where the bytes that tokens stand for, which bits per byte count, are not the bytes of the text."""
        for name, split in self.splits.items():
            ratio = split.token_text_bytes / split.bytes
            if ratio != 1:
                word = "warning" if abs(ratio - 1) > 0.01 else "note"
                print(
                    f"{word}: the tokens of {name} stand for {ratio:.2%} of the bytes of its text (the tokenizer "
                    "changes text): bits per byte are counted from the text",
                    file=sys.stderr,
                )
