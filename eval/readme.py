"""Write what is made from the files of configs/arch that git tracks: `python eval/readme.py`.

That is README's table of layouts, and docs/layouts.md with its pictures.
"""

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

from arch import ModelConfig, resolve
from arch.footprint import kv_bytes
from arch.named import CONFIGS, load_arch, load_size, names
from data.cli import fail
from eval.families import FAMILIES, family
from eval.units import bytes_text, number_text

README = CONFIGS.parent / "README.md"
BEGIN, END = "<!-- layouts: python eval/readme.py -->\n", "<!-- end of layouts -->\n"
SIZE, CONTEXT = "1b", 32768


def layouts() -> str:
    """A Markdown table of the layouts at `SIZE`, by family; in each the heaviest cache first."""
    rows: dict[str, list[tuple[int, str]]] = {each.title: [] for each in FAMILIES}
    for name in committed():
        plan = resolve(ModelConfig(load_arch(name), load_size(SIZE)))
        kv = kv_bytes(plan, CONTEXT)
        cells = (f"`{name}`", description(name), number_text(kv.per_token), bytes_text(kv.stored), bytes_text(kv.read))
        rows[family(plan).title].append((-kv.stored, "| " + " | ".join(cells) + " |\n"))
    text = f"| `+arch=` | what it is | bytes per token | stored at {CONTEXT:,} tokens | read per decoded token |\n"
    text += "|---|---|---:|---:|---:|\n"
    for title, found in rows.items():
        if found:
            link = f"docs/layouts.md#{title.lower().replace(' ', '-')}"
            text += f"| **[{title}]({link})** | | | | |\n" + "".join(row for _, row in sorted(found))
    return text


def committed() -> list[str]:
    """Layouts that git tracks: a file of one's own asks for nothing until it is added. All of them without git."""
    if shutil.which("git") is not None:
        command = ["git", "-C", str(CONFIGS / "arch"), "ls-files", "*.yaml"]
        tracked = {Path(line).stem for line in subprocess.run(command, capture_output=True, text=True).stdout.split()}
        if tracked:
            return sorted(tracked & set(names("arch")))
    return names("arch")


def description(name: str) -> str:
    """The first comment of the layout's file, up to its first stop or colon."""
    text = (CONFIGS / "arch" / f"{name}.yaml").read_text()
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    comment = " ".join(line.removeprefix("#").strip() for line in lines)
    return re.split(r"(?<!\bal)[.:](?= |$)", comment)[0]


def updated(text: str) -> str:
    """`text` with a new table between its two marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + layouts() + END + rest.split(END)[1]


if __name__ == "__main__":
    if sys.argv[1:]:
        fail(f"{__doc__} It takes no arguments")
    from eval import layouts as pages  # which asks this module

    before = README.read_text()
    README.write_text(updated(before))
    changed = [README] if README.read_text() != before else []
    written = [str(path.relative_to(README.parent)) for path in (*changed, *pages.write())]
    print("\n".join(written) or "README.md, docs/layouts.md: as they were")
