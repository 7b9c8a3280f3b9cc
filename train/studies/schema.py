"""Schema of `train/study.py`: every key of its command line, with its meaning."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.cores import cores
from eval.tasks import TASKS, ChosenTask, section, sections
from train.schema import MATCHES, EvalsConfig, chosen_tasks, option_text

LAUNCHERS = ("local", "slurm")
OTHERS = ("refuse", "keep", "ignore")
# Keys of train/pretrain.py that are not for `run` and `layouts`.
TAKEN = ("seed", "tokens", "optim.lr", "match", "name", "folder", "resume", "data.path", "trainer.max_hours")


@dataclass
class StudyData:
    """The text of all runs.

    path  prepared folder; null: the data set that the runs are configured with
    """

    path: str | None = None


@dataclass
class StudyConfig:
    """Layouts x learning rates x seeds at one size and budget.

    name           name of the study
    archs          layouts: names in configs/arch or in `layouts`
    layouts        layouts of the study's own: name -> arguments of train/pretrain.py,
                   {mqa_wide: ['+arch=mqa', 'size.head_dim=32']}
    seeds          seeds of each layout
    run            arguments of train/pretrain.py that all runs share: size, recipe, precision
    tokens         training tokens per run
    match          what every layout has in common with multi-head attention at the size that `run` gives: params,
                   flops, kv, or none
    lrs            peak learning rates that the first stage tries with each layout; one rate: no such stage
    lr_tokens      training tokens per run of the first stage
    lr_extra       number of further rates to try beyond an end of the list, by its factor, while the best is there
    tasks          tasks of eval/evaluate.py for every finished run
    options        options of the tasks: options={recall: {pairs: 8}}
    folder         parent of the run folders; null: runs/studies/<name>
    results        file of the rows; null: results.jsonl in the folder
    jobs           runs at a time
    threads        threads per run; null: the cores of this machine, shared evenly. launcher=slurm needs a number
    limit_minutes  save and end after this many minutes; the same command continues. null: no limit
    keep           keep the checkpoints of finished runs
    others         rows of another commit: refuse, keep (they count as done, in groups of their own), or ignore
    launcher       local, or slurm: SLURM jobs by submitit, which must be installed
    slurm          options of SLURM: slurm={slurm_partition: gpu, gpus_per_node: 1, timeout_min: 60}
    plan           print the plan and exit
    """

    name: str = "study"
    archs: list[str] = field(default_factory=lambda: ["mha"])
    layouts: Any = None  # a mapping, as options
    seeds: list[int] = field(default_factory=lambda: [0])
    run: list[str] = field(default_factory=list)
    tokens: int = 1_000_000
    match: str = "none"
    lrs: list[float] = field(default_factory=lambda: [1e-3])
    lr_tokens: int = 250_000
    lr_extra: int = 2
    tasks: list[str] = field(default_factory=lambda: ["perplexity"])
    options: Any = None  # a mapping; a typed one takes no new keys from the command line
    data: StudyData = field(default_factory=StudyData)
    folder: str | None = None
    results: str | None = None
    jobs: int = 1
    threads: int | None = None
    limit_minutes: float | None = None
    keep: bool = True
    others: str = "refuse"
    launcher: str = "local"
    slurm: Any = None
    plan: bool = False

    @property
    def place(self) -> Path:
        """The folder of the run folders."""
        return Path(self.folder or f"runs/studies/{self.name}")

    @property
    def rows(self) -> Path:
        """The file of the rows."""
        return Path(self.results) if self.results else self.place / "results.jsonl"

    @property
    def threads_of_run(self) -> int:
        return self.threads or max(1, cores() // self.jobs)

    def layout_words(self, arch: str) -> list[str]:
        """The words of the command line of train/pretrain.py that choose a layout."""
        own = self.layouts or {}
        return list(own[arch]) if arch in own else [f"+arch={arch}"]

    @property
    def task_sections(self) -> list[str]:
        """The names that the tasks have in `options`."""
        return [section(name.partition(":")[0]) for name in self.tasks]

    @property
    def used_options(self) -> Any:
        """`options` without those of tasks that are not chosen, which the file of a study may have."""
        if not isinstance(self.options, dict):
            return self.options
        unused = sections().keys() - self.task_sections
        return {name: given for name, given in self.options.items() if name not in unused}

    @property
    def chosen(self) -> list[ChosenTask]:
        """The tasks with their options. Raises UsageError if there is no such task or option."""
        return chosen_tasks(EvalsConfig(tasks=self.tasks, options=self.used_options))

    @property
    def task_words(self) -> list[str]:
        """The words of the command line of eval/evaluate.py that choose the tasks."""
        options = (self.used_options or {}).items()
        words = [f"{task}.{key}={option_text(value)}" for task, given in options for key, value in given.items()]
        return [f"tasks={','.join(self.tasks)}", *words]


def problems(config: StudyConfig) -> list[str]:
    """List what makes no sense, each with the fix."""
    found = []
    for name, value, choices in (
        ("launcher", config.launcher, LAUNCHERS),
        ("others", config.others, OTHERS),
        ("match", config.match, MATCHES),
    ):
        if value not in choices:
            found.append(f"{name} is {value}; choose {', '.join(choices)}")
    for name in ("archs", "seeds", "lrs"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            found.append(f"{name} is {list(values)}; give at least one, each once")
    for name in ("jobs", "threads", "tokens", "lr_tokens", "limit_minutes"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            found.append(f"{name} is {value}; it must be positive")
    if config.lr_extra < 0 or any(lr <= 0 for lr in config.lrs):
        found.append("lrs must be positive, and lr_extra at least 0")
    if config.slurm is not None and not isinstance(config.slurm, dict):
        found.append(f"slurm is {config.slurm!r}; write slurm={{slurm_partition: NAME}}")
    if config.launcher == "slurm" and config.threads is None:
        found.append("launcher=slurm needs threads=, the cores of one run: this machine has others than those of SLURM")
    found += [
        f"run has {word}; {key} is the study's to set" for word, key in keys(config.run) if key in (*TAKEN, "arch")
    ]
    return [*found, *layout_problems(config)]


def layout_problems(config: StudyConfig) -> list[str]:
    """List what makes no sense in the layouts of the study's own, each with the fix."""
    own = {} if config.layouts is None else config.layouts
    if not isinstance(own, dict) or not all(
        isinstance(words, list) and all(isinstance(word, str) for word in words) for words in own.values()
    ):
        return [f"layouts is {own!r}; write layouts={{mqa_wide: ['+arch=mqa', 'size.head_dim=32']}}"]
    found, shared = [], {key: word for word, key in keys(config.run)}
    for name, words in own.items():
        found += [
            f"layouts.{name} has {word}; {key} is the study's to set" for word, key in keys(words) if key in TAKEN
        ]
        if sum(key == "arch" for _, key in keys(words)) != 1:
            found.append(f"layouts.{name} is {words}; it needs one +arch=, the layout that the other words change")
        found += [
            f"run has {shared[key]}, which replaces {word} of layouts.{name}; give {key} in one of them alone"
            for word, key in keys(words)
            if key in shared and name in config.archs
        ]
    return found


def unused(config: StudyConfig, typed: Mapping[str, Any]) -> list[str]:
    """List the layouts and the options of tasks on the command line, whose values by key are `typed`, that the study
    does not use. Those of its file may lie idle: `archs` and `tasks` choose among them."""
    found = []
    tasks = {section(name): name for name in TASKS}
    for group, by, used in (("layouts", "archs", config.archs), ("options", "tasks", config.task_sections)):
        given = typed.get(group)
        names = [key.split(".")[1] for key in typed if key.startswith(f"{group}.")]
        for name in dict.fromkeys([*(given if isinstance(given, dict) else ()), *names]):
            wanted = name if group == "layouts" else tasks.get(name)  # a task that is none is refused with the others
            if name not in used and wanted is not None:
                listed = ",".join([*getattr(config, by), wanted])
                found.append(f"{group}.{name} is of no use without {wanted} among {by}; write {by}=[{listed}]")
    return found


def keys(words: list[str]) -> list[tuple[str, str]]:
    """Words of a command line, each with the key that it sets."""
    return [(word, word.lstrip("+~").partition("=")[0]) for word in words]
