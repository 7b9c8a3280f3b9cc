"""What a preparation shows while it runs."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .writing import Written

LINE_SECONDS = 30  # between lines where there is no terminal


class Report:
    """A bar with tokens and tokens/s on a terminal, a line now and then elsewhere; on standard error."""

    def __init__(self, name: str, max_tokens: int | None, splits: dict[str, Written]):
        self.name, self.splits = name, splits
        columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}")]
        columns += [TimeElapsedColumn(), TimeRemainingColumn()] if max_tokens else [TimeElapsedColumn()]
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self.task = self.bar.add_task(name, total=max_tokens, state="")
        self.began = self.shown = time.monotonic()
        self.first = self.tokens()

    def tokens(self) -> int:
        return sum(written.tokens for written in self.splits.values())

    def __enter__(self) -> "Report":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, part: str) -> None:
        now = time.monotonic()
        if now - self.shown < (0.2 if not self.bar.disable else LINE_SECONDS):
            return
        self.shown, tokens = now, self.tokens()
        speed = (tokens - self.first) / (now - self.began)
        state = f"{tokens:,} tokens, {speed:,.0f} tokens/s, {part[-40:]}"
        if self.bar.disable:
            print(f"{self.name}: {state}", file=sys.stderr, flush=True)
        else:
            self.bar.update(self.task, completed=self.splits["train"].tokens, state=state)

    def warn_of_lost_text(self) -> None:
        """Bits per byte count the bytes that tokens stand for: say so where these are not the text's."""
        for split, written in self.splits.items():
            share = written.covered / written.bytes
            if abs(share - 1) > 0.01:
                print(
                    f"warning: the tokens of {split} stand for {share:.1%} of the bytes of its text (the tokenizer "
                    "changes text): bits per byte count the former",
                    file=sys.stderr,
                )
