"""Golden numbers: a change that is meant to be neutral leaves losses and state-dict names as they are.

`python tests/test_golden.py NAME ...` writes the files of these layouts, without names all of them; a commit that
changes one says which numbers moved and why.
"""

import json
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

if __name__ == "__main__":  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.path.insert(1, str(Path(__file__).resolve().parent))

from conftest import ARCHS, documents, small, whole_depth

from arch import ModelConfig, build, resolve
from arch.config import EncoderConfig
from arch.named import load_arch
from data.batches import TrainBatches
from data.config import DataConfig
from eval.readme import committed
from train.loss import cross_entropy_sum
from train.optim import build_optimizer
from train.schema import OptimConfig, sequence_format

GOLDEN = Path(__file__).with_name("golden")
STEPS, BATCH, SEQ_LEN, END_OF_TEXT = 4, 4, 32, 256
GOLDEN_DEPTH = 7


def variants() -> Iterator[tuple[str, ModelConfig]]:
    """Every file of configs/arch, and what the files leave at its default: the neox style, the paper's other embedders
    and token decoders."""
    for name in ARCHS:
        yield name, small(name, num_layers=whole_depth(name, GOLDEN_DEPTH))
    for name in ("gqa2", "mla", "bct", "block"):
        neox = small(name, num_layers=whole_depth(name, GOLDEN_DEPTH), style="neox", head_dim=8, tie_embeddings=False)
        yield f"{name}-neox", neox
    for embedder, kind in (("projection", "summation"), ("encoder", "cross"), ("cls", "prefix")):
        layout = deepcopy(load_arch("block"))
        assert layout.block is not None
        layout.block.embedder, layout.block.token.kind = embedder, kind
        layout.block.encoder = EncoderConfig(layers=1, d_model=16, num_heads=2, d_ff=24)
        if embedder == "projection":
            layout.block.encoder, layout.block.start = EncoderConfig(), False
        yield f"block-{embedder}-{kind}", small(layout, num_layers=4)


VARIANTS = dict(variants())


class Text:
    """The bytes of the unit corpus, each document followed by an end of text, in rows of SEQ_LEN + 1."""

    seq_len, end_of_text, has_answers = SEQ_LEN, END_OF_TEXT, False

    def __init__(self) -> None:
        tokens = [token for _, text in documents() for token in (*text.encode(), END_OF_TEXT)]
        whole = len(tokens) // SEQ_LEN * SEQ_LEN
        self.tokens = np.array(tokens[: whole + 1], dtype=np.uint16)

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // SEQ_LEN

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[index * SEQ_LEN : (index + 1) * SEQ_LEN + 1]


def measure(config: ModelConfig) -> dict[str, object]:
    """Loss in nats per target at each of a few steps, and the shape of each tensor of the state dict.

    Steps are of fp32. Matrices per head make so much of its rounding, be it of an initial weight, that the fourth loss
    is 5e-3 off in fp32, and another on each processor: weights and steps are of fp64.
    """
    config = deepcopy(config)
    config.size.vocab_size, config.size.seq_len = END_OF_TEXT + 1, SEQ_LEN
    matrices = any(store.kind == "matrix" for stack in resolve(config).stacks for store in stack.plan.stores)
    torch.set_default_dtype(torch.float64 if matrices else torch.float32)
    try:
        model = build(config, seed=0)
    finally:
        torch.set_default_dtype(torch.float32)
    optimizer = build_optimizer(model, OptimConfig(lr=3e-3))
    losses = []
    for batch in TrainBatches(
        Text(), 0, STEPS, BATCH, BATCH, sequence_format=sequence_format(resolve(config), DataConfig())
    ):
        head = cross_entropy_sum(model.select_targets(batch["targets"]))
        loss = model(batch["inputs"], head=head, segment_ids_BT=batch["segment_ids_BT"])
        loss = loss / batch["step_targets"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(round(loss.item(), 6))
    return {"losses": losses, "state": {name: list(value.shape) for name, value in model.state_dict().items()}}


def path_of(name: str) -> Path:
    return GOLDEN / f"{name}.json"


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_names(name: str) -> None:
    if not path_of(name).exists() and name in ARCHS and name not in committed():
        pytest.skip(f"a layout of your own; before you commit it: python tests/test_golden.py {name}")
    assert path_of(name).exists(), f"a new layout: python tests/test_golden.py {name}"
    golden, now = json.loads(path_of(name).read_text()), measure(VARIANTS[name])
    assert now["state"] == golden["state"]
    assert now["losses"] == pytest.approx(golden["losses"], abs=2e-5), "rounding alone differs by less"


def test_every_file_is_a_case() -> None:
    files, own = {path.stem for path in GOLDEN.glob("*.json")}, set(ARCHS) - set(committed())
    assert files - own == set(VARIANTS) - own, "a layout was added or removed: python tests/test_golden.py NAME"


if __name__ == "__main__":
    for name in sys.argv[1:] or VARIANTS:
        state = measure(VARIANTS[name])
        lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(shape)}" for key, shape in state["state"].items())
        path_of(name).write_text(f'{{\n  "losses": {json.dumps(state["losses"])},\n  "state": {{\n{lines}\n  }}\n}}\n')
        print(name, *state["losses"])
