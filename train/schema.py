"""Schema of `train/pretrain.py`: every key of its command line, with its meaning.

The keys of `arch` and `size` are in arch/config.py, those of `data` in data/config.py.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arch import ArchConfig, ModelConfig, Plan, SizeConfig
from arch.config import MAX_COUNT
from data.cli import UsageError, value_text
from data.config import DataConfig
from eval.tasks import ChosenTask, select_tasks

if TYPE_CHECKING:
    from data.batches import SequenceFormat

MAX_SEED = 2**63 - 1
MATCHES = ("none", "params", "flops", "kv")  # train/matching.py explains them
# Bytes of the logits that exist at one time. Larger chunks add to the gradient of the output matrix less often, which
# for 50304 tokens of width 2048 takes a GPU 0.3 ms.
LOSS_BYTES_ON_CUDA = 1 << 30
LOSS_BYTES, LOSS_ROWS = 1 << 22, 256  # what stays in a cache of the processor, and what products need to be fast


def same_as(key: str) -> Any:
    """Refer to the value of another key, resolved when the command line is composed: OmegaConf's `II` without it."""
    return "${" + key + "}"


@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule; matrices and embeddings decay, norms and other vectors do not.

    name          adamw, or muon: Muon for the hidden matrices, AdamW for the rest
    lr            peak learning rate of both optimizers
    beta1, beta2  decay of AdamW's moments
    eps           added to the root of AdamW's second moment
    weight_decay  decay per step, times the learning rate
    momentum      momentum of Muon
    schedule      after the warm-up: cosine, wsd (stable, then decay) or constant
    warmup        share of all steps over which the learning rate rises linearly
    decay         share of all steps, the last ones, over which it falls with wsd
    min_lr        learning rate at the last step with cosine and wsd, as a share of the peak
    clip          largest gradient norm
    """

    name: str = "adamw"
    lr: float = same_as("size.lr")
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    momentum: float = 0.95
    schedule: str = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    min_lr: float = 0.1
    clip: float = 1.0


@dataclass
class TrainerConfig:
    """Execution of the run; nothing here changes what is learned, up to rounding.

    accelerator       cpu, cuda, or auto: cuda if there is one, else cpu
    devices           processes per node, one device each
    num_nodes         machines
    strategy          auto (one device), ddp, fsdp (FSDP2: parameters, gradients and optimizer state sharded over all
                      processes), or hsdp (FSDP2 within each replica: sharded over its processes, gradients averaged
                      across replicas)
    replicas          replicas under hsdp, of as many processes each; null: one on each node
    precision         fp32, bf16 (weights and optimizer stay fp32), fp8 (as bf16, and wide linear layers of the blocks
                      multiply in fp8, by torchao, which changes more than rounding does), or auto: bf16 on CUDA, fp32
                      elsewhere
    micro_batch       sequences per forward pass. null, on CUDA: the most that fit into memory by estimate, or those of
                      the last start if a run is resumed; on the CPU: the most within 32768 tokens
    compile           torch.compile each block; null: on CUDA
    activation_checkpointing  recompute activations in the backward pass, to save memory
    backend           attention backend: auto (the best for layout and device), sdpa, reference, or on CUDA flex,
                      varlen, flash4, flash3, flash2, flash (the newest that is installed and can), and fla (bounded
                      stores of rule gated, matrices); decoding over a cache runs sdpa, or reference
    log_every         steps between reports
    val_every         steps between validations; null: four in the run
    checkpoint_every  steps between checkpoints
    checkpoint_minutes  minutes between checkpoints, instead of steps; null: by steps
    checkpoint_async  write checkpoints while training continues; takes as much host memory as a process has to write
    keep_checkpoints  number of newest checkpoints to keep, besides the best
    max_rise          end the run if the loss stays more than this many nats above its minimum
    max_hours         save and end after this many hours (leave room for one checkpoint); null: no limit
    peak_tflops       dense TFLOP/s of one device, for MFU; null: of its data sheet, no MFU if unknown
    progress          show reports, as a bar on a terminal, else as lines; validations are always shown
    """

    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    replicas: int | None = None
    precision: str = "auto"
    micro_batch: int | None = None
    compile: bool | None = None
    activation_checkpointing: bool = False
    backend: str = "auto"
    log_every: int = 10
    val_every: int | None = None
    checkpoint_every: int = 200
    checkpoint_minutes: float | None = None
    checkpoint_async: bool = False
    keep_checkpoints: int = 2
    max_rise: float = 3.0
    max_hours: float | None = None
    peak_tflops: float | None = None
    progress: bool = True


@dataclass
class LoggerConfig:
    """CSV always; wandb online if a key is set (WANDB_API_KEY or `wandb login`), else offline.

    wandb    log to wandb too
    project  of wandb
    entity   user or team of wandb; null: that of the key
    group    group of runs in wandb; null: the name of the run, which seeds share
    tags     words to filter runs by: logger.tags=[sweep,cla]
    notes    a text beside the run
    """

    wandb: bool = True
    project: str = "kvfrontier"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None


@dataclass
class EvalsConfig:
    """Tasks of eval/evaluate.py, run during training and at its end; they do not change the training.

    tasks    names, as in `python eval/evaluate.py --help`: evals.tasks=[perplexity,recall]
    every    steps between evaluations; null: only at the end
    text     files that tasks read instead of the validation split of the data
    options  options of the tasks: evals.options={recall: {pairs: 8}}
    """

    tasks: list[str] = field(default_factory=list)
    every: int | None = None
    text: list[str] = field(default_factory=list)
    options: Any = None  # a mapping; a typed one takes no new keys from the command line


@dataclass
class PretrainConfig:
    """One training run.

    name         null: <arch>-<size>, or the name of the experiment; runs of one name that differ only in the seed are
                 one point of a Pareto plot
    folder       folder to write the run to; null: runs/<time>/<name>-seed<seed>
    tokens       training tokens, rounded down to whole steps; at most 10**15, as are all counts
    batch_size   sequences per optimizer step, over all processes and micro-batches
    context      context length at which the KV footprint is logged
    kv_itemsize  bytes per cache element in that footprint: 2 for a bf16 cache
    seed         seed of the weights and of the order of the data
    init         run or checkpoint whose weights this run starts from; its model must have the same parameters
    match        params, flops or kv: change the width of MLP or heads until parameters, training FLOPs or bytes of
                 cache at `context` tokens equal those of multi-head attention at this size; none: leave it
    train_only   regular expression: train only parameters whose name contains a match; null: all
    resume       folder of a run to continue, with its own configuration; other keys on the command line change it
    """

    arch: ArchConfig = field(default_factory=ArchConfig)
    size: SizeConfig = field(default_factory=SizeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    evals: EvalsConfig = field(default_factory=EvalsConfig)
    name: str | None = None
    folder: str | None = None
    tokens: int = same_as("size.tokens")
    batch_size: int = same_as("size.batch_size")
    context: int = same_as("size.seq_len")
    kv_itemsize: int = 2
    seed: int = 0
    init: str | None = None
    match: str = "none"
    train_only: str | None = None
    resume: str | None = None

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(self.arch, self.size)


def problems(config: PretrainConfig) -> list[str]:
    """List what is wrong with the run apart from its layout, each with the fix."""
    found = value_problems(config)
    if found:
        return found
    trainer = config.trainer
    world = trainer.devices * trainer.num_nodes
    if world > 1 and trainer.strategy == "auto":
        found.append(f"{world} processes need trainer.strategy=ddp or trainer.strategy=fsdp")
    if trainer.replicas is not None and trainer.strategy != "hsdp":
        found.append(f"trainer.replicas is {trainer.replicas}; it is for trainer.strategy=hsdp alone; set it to null")
    elif trainer.strategy == "hsdp" and world % num_replicas(trainer):
        found.append(f"trainer.replicas {trainer.replicas} does not divide the {world} processes")
    if config.batch_size % world:
        found.append(f"batch_size {config.batch_size} is not a multiple of the {world} processes")
    elif trainer.micro_batch and (config.batch_size // world) % trainer.micro_batch:
        found.append(
            f"trainer.micro_batch {trainer.micro_batch} does not divide the {config.batch_size // world} sequences of "
            "batch_size that each process has in a step"
        )
    if num_steps(config) < 1:
        found.append(
            f"tokens {config.tokens} is less than one step of batch_size {config.batch_size} x seq_len "
            f"{config.size.seq_len}; give more tokens, or a smaller batch_size"
        )
    return found + block_problems(config) + optim_problems(config.optim) + evals_problems(config.evals)


def chosen_tasks(config: EvalsConfig) -> list[ChosenTask]:
    """The tasks with their options. Raises UsageError as `select_tasks`, and if the options are no mapping."""
    words = []
    if config.options is not None and not isinstance(config.options, dict):
        raise UsageError(f"evals.options is {config.options!r}; write evals.options={{TASK: {{OPTION: value}}}}")
    for name, options in (config.options or {}).items():
        if not isinstance(options, dict):
            raise UsageError(f"{name} is {options!r}; write evals.options={{{name}: {{OPTION: value}}}}")
        words += [f"{name}.{key}={option_text(value)}" for key, value in options.items()]
    return select_tasks(config.tasks, words) if config.tasks or words else []


def option_text(value: Any) -> str:
    """`value` as the command line of eval/evaluate.py has it."""
    return value_text(tuple(value) if isinstance(value, list) else value)


def evals_problems(config: EvalsConfig) -> list[str]:
    """List what is wrong with the tasks, each with the fix."""
    found = [f"evals.text: {path}: there is no such file" for path in config.text if not Path(path).is_file()]
    if config.every is not None and not config.tasks:
        found.append("evals.every is set without evals.tasks; name the tasks, or leave it out")
    try:
        chosen_tasks(config)
    except UsageError as error:
        found += [f"evals: {line}" for line in str(error).splitlines()]
    return found


def block_problems(config: PretrainConfig) -> list[str]:
    """List the options that a Block Transformer cannot be trained with, or only it can."""
    block, data = config.arch.block, config.data
    if block is None:
        return ["data.block_padding is for a Block Transformer; choose one, or leave it out"] * data.block_padding
    found = []
    if block.length > 0 and config.size.seq_len % block.length:
        found.append(f"size.seq_len {config.size.seq_len} is not a multiple of arch.block.length {block.length}")
    elif config.size.seq_len < 2 * block.length:
        found.append(f"size.seq_len {config.size.seq_len} is one block, and the block decoder needs one before it")
    stores = [store for layout in (config.arch, block.token) for store in layout.stores.values()]
    if data.block_padding and any(store.slots or store.matrix or store.stride for store in stores):
        found.append("data.block_padding is not for bounded stores, matrices and strides, which cannot leave out pads")
    if data.document_mask:
        found.append("data.document_mask is not for a Block Transformer, whose blocks cross the borders of documents")
    return found


def value_problems(config: PretrainConfig) -> list[str]:
    """List the values that make no sense by themselves."""
    trainer, found = config.trainer, []
    for name, value, choices in (
        ("strategy", trainer.strategy, ("auto", "ddp", "fsdp", "hsdp")),
        ("precision", trainer.precision, ("auto", "fp32", "bf16", "fp8")),
        ("accelerator", trainer.accelerator, ("auto", "cpu", "cuda")),
    ):
        if value not in choices:
            found.append(f"trainer.{name} is {value}; choose {', '.join(choices)}")
    if config.match not in MATCHES:
        found.append(f"match is {config.match}; choose {', '.join(MATCHES)}")
    found += [
        f"{key} is {value!r}; ${{ begins an interpolation, and a run is plain data: write it without"
        for key, value in _texts(asdict(config), "")
        if "${" in value
    ]
    for name, count in (
        ("trainer.devices", trainer.devices),
        ("trainer.num_nodes", trainer.num_nodes),
        ("trainer.replicas", trainer.replicas),
        ("trainer.log_every", trainer.log_every),
        ("trainer.checkpoint_every", trainer.checkpoint_every),
        ("trainer.keep_checkpoints", trainer.keep_checkpoints),
        ("trainer.val_every", trainer.val_every),
        ("evals.every", config.evals.every),
        ("trainer.micro_batch", trainer.micro_batch),
        ("batch_size", config.batch_size),
        ("size.seq_len", config.size.seq_len),
        ("context", config.context),
        ("kv_itemsize", config.kv_itemsize),
        ("tokens", max(1, config.tokens)),  # fewer than a step are reported below
        ("data.val_tokens", max(1, config.data.val_tokens)),
    ):
        if count is not None and count < 1:
            found.append(f"{name} is {count}; it must be at least 1")
        elif count is not None and count > MAX_COUNT:
            found.append(f"{name} is {count}; it must be at most {MAX_COUNT:,}")
    if config.data.val_tokens < config.size.seq_len:
        found.append(f"data.val_tokens is {config.data.val_tokens}, less than one sequence of {config.size.seq_len}")
    for name in ("checkpoint_minutes", "max_rise", "max_hours", "peak_tflops"):
        value = getattr(trainer, name)
        if value is not None and not 0 < value < math.inf:
            found.append(f"trainer.{name} is {value}; it must be positive and finite")
    if config.train_only is not None:
        try:
            re.compile(config.train_only)
        except re.error as error:
            found.append(f"train_only is no regular expression: {error}")
    if not 0 <= config.seed <= MAX_SEED:
        found.append(f"seed is {config.seed}; it must be at least 0 and at most {MAX_SEED}")
    return found


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield every text in `value`, nested, with its dotted key; keys of mappings are texts too."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield key, str(name)
            yield from _texts(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, str):
        yield key, value


def optim_problems(optim: OptimConfig) -> list[str]:
    """List what is wrong with optimizer and schedule, each with the fix."""
    found = []
    for name, choices in (("name", ("adamw", "muon")), ("schedule", ("cosine", "wsd", "constant"))):
        if getattr(optim, name) not in choices:
            found.append(f"optim.{name} is {getattr(optim, name)}; choose {', '.join(choices)}")
    for name in ("lr", "eps", "clip"):
        if not 0 < getattr(optim, name) < math.inf:
            found.append(f"optim.{name} is {getattr(optim, name)}; it must be positive and finite")
    for name in ("warmup", "decay", "min_lr", "weight_decay"):
        if not 0 <= getattr(optim, name) <= 1:
            found.append(f"optim.{name} is {getattr(optim, name)}; it must be from 0 to 1")
    for name in ("beta1", "beta2", "momentum"):
        if not 0 <= getattr(optim, name) < 1:
            found.append(f"optim.{name} is {getattr(optim, name)}; it must be at least 0 and below 1")
    if optim.schedule == "wsd" and optim.warmup + optim.decay > 1:
        found.append(f"optim.warmup {optim.warmup} and optim.decay {optim.decay} are more than the run; lower one")
    return found


def sequence_format(plan: Plan, data: DataConfig) -> "SequenceFormat":
    """Describe how a row of tokens becomes the inputs and targets of a model of `plan`."""
    from data.batches import SequenceFormat  # which imports torch

    return SequenceFormat(
        plan.target_offset,
        plan.num_unpredicted,
        data.document_mask,
        plan.block_length if data.block_padding else 0,
    )


def num_replicas(trainer: TrainerConfig) -> int:
    """Number of replicas of the model under hsdp."""
    return trainer.num_nodes if trainer.replicas is None else trainer.replicas


def num_steps(config: PretrainConfig) -> int:
    """Number of optimizer steps of the run."""
    return config.tokens // (config.batch_size * config.size.seq_len)


def loss_rows(tokens: int, vocab_size: int, itemsize: int, on_cuda: bool) -> int:
    """Number of tokens whose logits the loss makes at a time: within LOSS_BYTES_ON_CUDA, or else LOSS_BYTES or
    LOSS_ROWS, and where possible the same for every chunk, since compiled code is made for one shape."""
    row = vocab_size * itemsize
    most = max(1, LOSS_BYTES_ON_CUDA // row) if on_cuda else max(LOSS_ROWS, LOSS_BYTES // row)
    least = max(1, -(-tokens // most))
    chunks = next((n for n in range(least, 2 * least) if tokens % n == 0), least)
    return max(1, -(-tokens // chunks))


def micro_batch(config: PretrainConfig) -> int:
    """Number of sequences per forward pass: as configured, or the largest divisor of a rank's batch that stays within
    32768 tokens. On CUDA, where none is configured, memory decides: train/estimates/capacity.py."""
    if config.trainer.micro_batch:
        return config.trainer.micro_batch
    per_rank_batch = config.batch_size // (config.trainer.devices * config.trainer.num_nodes)
    most = max(1, 32768 // config.size.seq_len)
    return max(n for n in range(1, min(per_rank_batch, most) + 1) if per_rank_batch % n == 0)
