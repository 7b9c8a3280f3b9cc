"""Convert a trained decoder to a Block Transformer to train further: `python train/uptrain.py from=RUN out=FOLDER`.

It converts weights from one layout to another, without training.
"""

import sys
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from data.cli import end_on_ctrl_c

    end_on_ctrl_c()

from omegaconf import DictConfig

from arch import (
    BlockConfig,
    BlockPlan,
    KVPlan,
    LayoutError,
    ModelConfig,
    TokenDecoderConfig,
    from_dict,
    resolve,
)
from arch.block_plan import resolve_block
from data.cli import UsageError
from eval.cli import Choices, launch, require_new_folder
from train.errors import TrainingError
from train.import_hf import rename_from_flag

NAME = "uptrained"


@dataclass
class UptrainConfig:
    """Options of the conversion.

    source  a run, a checkpoint of one, or an imported folder; on the command line `from=`
    out     a new folder, written completely or not at all
    length  tokens of a block
    prefix  vectors that a block's context is expanded to
    start   predict the first block too, from a context that begins as zero; false as in the paper
    """

    source: str = ""
    out: str = ""
    length: int = 4
    prefix: int = 2
    start: bool = True


def main(config: DictConfig, choices: Choices) -> None:
    if not config.source:
        raise UsageError("from= is not set; give a run, or a checkpoint")
    out = require_new_folder(config.out)
    convert(config, out)


def convert(config: DictConfig, out: Path) -> None:
    """Convert the weights and print what came out. Raises UsageError or LayoutError if the model does not allow it."""
    # These bring torch, which a mistake on the command line need not wait for.
    from arch import Decoder
    from arch.convert import ConversionError, StateDict
    from arch.convert_block import from_vanilla
    from arch.footprint import num_params
    from train import checkpoint
    from train.hub.checkpoint_writer import next_command, write
    from train.hub.importer import print_plan
    from train.loading import recorded_config

    try:
        folder = checkpoint.resolve(Path(config.source))
        vanilla = recorded_config(folder)
    except (TrainingError, UsageError) as error:
        raise UsageError(f"from={config.source}: {error}") from error
    if vanilla.arch.block is not None:
        raise UsageError(f"from={config.source} is a Block Transformer already: pretrain.py init= goes on from it")
    target = blocks(vanilla, config.length, config.prefix, config.start)
    plan = resolve_block(target)
    model = Decoder(vanilla)
    check_halves(model.plan, plan)
    checkpoint.load(folder, model)
    try:
        state = from_vanilla(target, model.state_dict())
    except ConversionError as error:
        raise UsageError(f"{config.source} cannot become a Block Transformer:\n{error}") from error
    info: dict[str, Any] = {"uptrained": {"from": str(folder)}}
    if (tied := checkpoint.identity_of(folder, None)) is not None:
        info["identity"] = replace(tied, config={}, keys=()).to_dict()  # of the tokenizer, and the data so far
    write(out, NAME, target, StateDict(state), info)
    print_plan(config.source, plan, target.size.seq_len)
    print(f"{num_params(target, plan):,} parameters, of {num_params(vanilla, resolve(vanilla)):,}: {out}")
    print(f"to train it further, on a tenth of the tokens as in the paper:\n  {next_command(out, NAME)}")


def blocks(vanilla: ModelConfig, length: int, prefix: int, start: bool) -> ModelConfig:
    """Return the Block Transformer whose two decoders are the halves of `vanilla`, each with its layout.

    Windows keep their numbers, which now count blocks, and positions within one.
    """
    layout = {key: value for key, value in asdict(vanilla.arch).items() if key != "block"}
    token = from_dict(TokenDecoderConfig, layout | {"prefix": prefix})
    block = BlockConfig(length=length, embedder="projection", start=start, token=token)
    return ModelConfig(replace(deepcopy(vanilla.arch), block=block), deepcopy(vanilla.size))


def check_halves(vanilla: KVPlan, plan: BlockPlan) -> None:
    """Raise LayoutError with every layer that would not read the store that it reads in the decoder."""
    lower = plan.block.num_layers
    problems = []
    for layer in range(vanilla.num_layers):
        half, first = (plan.block, 0) if layer < lower else (plan.token, lower)
        before, after = described(vanilla, layer, 0), described(half, layer - first, first)
        if before != after:
            problems.append(
                f"layer {layer} reads {before}; as layer {layer - first} of {half.num_layers} it would read {after}: "
                "the pattern has to be the same in both halves"
            )
    if problems:
        raise LayoutError(problems)


def described(plan: KVPlan, layer: int, first: int) -> str:
    """Say what `layer` reads, and how; `first` is added to the numbers of layers."""
    read, window, second = plan.store(layer), plan.own_window(layer), plan.second_read(layer)
    words = f"`{read.name}` of layer {read.owner + first}"
    if window is not None:
        words += f" in a window of {window}"
    if second is not None:
        other = plan.stores[second.store]
        words += f" with {second.how}={other.name} of layer {other.owner + first}"
    return words


if __name__ == "__main__":
    sys.argv[1:] = rename_from_flag(sys.argv[1:])
    launch(main, "uptrain", UptrainConfig)
