"""A trained decoder becomes a Block Transformer: what goes where, what is refused, and the command."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build, launch_in_process, small, tokens, weights
from einops import rearrange
from test_train_command import SMALL, pretrain

from arch import (
    ArchConfig,
    BlockTransformer,
    LayoutError,
    ModelConfig,
    StoreConfig,
    TokenDecoderConfig,
    from_dict,
    resolve,
)
from arch import build as build_model
from arch.block_plan import resolve_block, split_config
from arch.convert import ConversionError
from arch.convert_block import from_vanilla
from arch.decoder import Decoder
from train import checkpoint, uptrain
from train.import_hf import rename_from_flag
from train.uptrain import UptrainConfig, blocks, check_halves

Converted = tuple[Decoder, BlockTransformer]


def converted(arch: str = "mha", length: int = 4, prefix: int = 2, start: bool = False, **size: object) -> Converted:
    """A decoder, its norms and biases unlike any default, and what becomes of it, loaded strictly."""
    vanilla = build(small(arch, **({"num_layers": 5, "window": None} | size)))
    generator = torch.Generator().manual_seed(3)
    for parameter in vanilla.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    target = blocks(vanilla.config, length, prefix, start)
    model = BlockTransformer(target).double().eval()
    model.load_state_dict(from_vanilla(target, vanilla.state_dict()), strict=True)
    return vanilla, model


@pytest.mark.parametrize("size", [{}, {"style": "neox", "tie_embeddings": False}], ids=["llama", "neox"])
def test_what_goes_where(size: dict[str, object]) -> None:
    vanilla, model = converted(start=True, **size)
    before, after = vanilla.state_dict(), model.state_dict()
    used = set()
    for name, tensor in before.items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            lower = int(layer) < 3  # of five layers the block decoder has three
            theirs = (
                f"block_decoder.layers.{layer}.{rest}" if lower else f"token_decoder.layers.{int(layer) - 3}.{rest}"
            )
        else:
            theirs = f"token_decoder.{name}"  # embedding, final norm, output matrix
        assert torch.equal(after[theirs], tensor), theirs
        used.add(theirs)
    assert torch.equal(after["embedder.embed.weight"], before["embed.weight"])
    assert {name for name in after if name not in used} == {
        "embedder.embed.weight", "embedder.proj.weight", "embedder.proj.bias", "expansion.weight", "expansion.bias",
        "block_decoder.norm.weight", "start", *(["block_decoder.norm.bias"] if size else []),
    }  # fmt: skip
    assert after["block_decoder.norm.weight"].eq(1).all()
    for name in ("embedder.proj.bias", "expansion.bias", "start", "block_decoder.norm.bias"):
        assert name not in after or after[name].eq(0).all()


@pytest.mark.parametrize(("length", "prefix"), [(4, 2), (2, 1), (3, 5)])
@torch.no_grad()
def test_what_the_adapters_compute(length: int, prefix: int) -> None:
    """A block is the mean of its tokens' embeddings, every vector of a context is that context (appendix P)."""
    vanilla, model = converted(length=length, prefix=prefix)
    batch = tokens(2, 3 * length)
    mean = rearrange(vanilla.embed(batch), "b (n l) d -> b n l d", l=length).mean(dim=2)
    torch.testing.assert_close(model.embedder(batch), mean, rtol=0, atol=1e-12)
    context = torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.expand(context), context[:, None].expand(-1, prefix, -1))


@torch.no_grad()
def test_the_halves_are_those_of_the_decoder() -> None:
    """Run one after the other on what the decoder sees, they are the decoder."""
    vanilla, model = converted()
    batch = tokens(2, 9)
    middle = model.block_decoder.run(vanilla.embed(batch))
    upper = model.token_decoder
    logits = upper.norm(upper.run(middle)) @ upper.output_weight.T
    torch.testing.assert_close(logits, vanilla(batch), rtol=0, atol=1e-12)


def test_sharing_stays_where_the_halves_allow_it() -> None:
    """Pairs that the middle does not part; a reader above it would have nothing to read."""
    vanilla, model = converted("cla2", num_layers=8)
    assert vanilla.plan.owners == (0, 0, 2, 2, 4, 4, 6, 6)
    assert model.plan.block.owners == model.plan.token.owners == (0, 0, 2, 2)
    check_halves(vanilla.plan, model.plan)
    with pytest.raises(ConversionError, match=r"- block_decoder.layers.1.writer.k_proj.weight is missing"):
        converted("cla2", num_layers=6)  # three layers: the short group comes first


def test_layers_that_would_read_something_else_are_told() -> None:
    """The weights of five local layers and a global one fit in either half, and would be of another model."""
    vanilla, model = converted("gemma3", num_layers=8)
    with pytest.raises(LayoutError) as error:
        check_halves(vanilla.plan, model.plan)
    assert error.value.problems == [
        "layer 5 reads `global` of layer 5; as layer 1 of 4 it would read `local` of layer 5: "
        "the pattern has to be the same in both halves"
    ]


@pytest.mark.parametrize("how", ["in a window of 4", "with values=b of layer 7"])
def test_halves_that_read_otherwise_are_refused(how: str) -> None:
    """The same stores, of which the upper layers read less, or the values of another."""
    upper = ["new a", "new b", "reuse a window=4" if "window" in how else "reuse a values=b"]
    pattern = [{"pattern": ["new a", "new b", "reuse a"]}, {"layers": "1/2", "pattern": upper}]
    config = small(ArchConfig({"a": StoreConfig(2), "b": StoreConfig(2)}, pattern), num_layers=12)
    with pytest.raises(LayoutError) as error:
        check_halves(resolve(config), resolve_block(blocks(config, 4, 2, True)))
    assert len(error.value.problems) == 2
    assert error.value.problems[1] == (
        f"layer 8 reads `a` of layer 6 {how}; as layer 2 of 6 it would read `a` of layer 6: "
        "the pattern has to be the same in both halves"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedder": "lookup"}, "arch.block.embedder is 'lookup'; it must be 'projection'"),
        ({"embed_dim": 16}, "arch.block.embed_dim is 16; it must be 32"),
        ({"kind": "summation"}, "arch.block.token.kind is 'summation'; it must be 'prefix'"),
        ({"d_model": 16, "head_dim": 8}, "arch.block.token.d_model is 16; it must be 32"),
        ({"layers": 1}, "token_decoder.layers.1.attn_norm.weight is missing"),
        ({"d_ff": 40}, "token_decoder.layers.0.mlp.up_proj.weight has the shape [48, 32]; it must be [40, 32]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_a_decoder_cannot_fill(change: dict[str, object], message: str) -> None:
    vanilla = build(small("mha", num_layers=4, window=None))
    target = blocks(vanilla.config, 4, 2, False)
    for key, value in change.items():
        of_token = key in TokenDecoderConfig.__dataclass_fields__
        setattr(target.arch.block.token if of_token else target.arch.block, key, value)
    state = vanilla.state_dict()
    if "layers" in change:  # another share is another split of the same layers; one layer less is another decoder
        assert from_vanilla(target, state).keys() == dict(BlockTransformer(target).named_parameters()).keys()
        target.arch.block.token.layers = 2
        state = {name: tensor for name, tensor in state.items() if not name.startswith("layers.3.")}
    with pytest.raises(ConversionError) as error:
        from_vanilla(target, state)
    assert f"- {message}" in str(error.value)


# The command


def do_uptrain(*arguments: str) -> None:
    launch_in_process(uptrain.main, "uptrain", UptrainConfig, rename_from_flag([*arguments]))


@pytest.fixture(scope="module")
def vanilla_run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("vanilla") / "run"
    options = ["size.num_layers=4", "tokens=2560", "logger=csv", f"data.path={corpus}", f"folder={folder}"]
    pretrain("+arch=gqa2", "+size=tiny", *SMALL, *options)
    return folder


def test_the_command(vanilla_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """From a run of twenty steps to a checkpoint that is what the function makes of its weights."""
    assert checkpoint.latest_valid(vanilla_run).name == "step-00000020"
    do_uptrain(f"from={vanilla_run}", f"out={tmp_path / 'blocks'}", "prefix=3", "start=false")
    info = checkpoint.load_info(checkpoint.resolve(tmp_path / "blocks"))
    config = from_dict(ModelConfig, info["config"])
    assert json.loads(json.dumps(resolve(config).to_dict())) == info["plan"]
    block = config.arch.block
    assert (block.length, block.embedder, block.token.prefix, block.start) == (4, "projection", 3, False)
    assert [stage.size.num_layers for stage in split_config(config)] == [2, 2]
    expected, state = from_vanilla(config, weights(vanilla_run)), weights_of(tmp_path / "blocks")
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    printed = capsys.readouterr().out
    out = tmp_path / "blocks"
    assert f"pretrain.py --config-dir={out} +arch=uptrained +size=uptrained init={out}" in printed


def test_training_goes_on_from_it(
    vanilla_run: Path, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture
) -> None:
    """By the command that it prints: with next to no learning rate the weights stay as they came."""
    do_uptrain(f"from={vanilla_run}", f"out={tmp_path / 'blocks'}")
    (command,) = [line.split() for line in capsys.readouterr().out.splitlines() if "train/pretrain.py" in line]
    short = ["batch_size=2", "tokens=128", "data.val_tokens=64", "logger=csv", "optim.lr=1e-30"]
    command = [word.replace("data.path=DATA", f"data.path={corpus}") for word in command]
    pretrain(*command[2:], *short, f"folder={tmp_path / 'run'}", "trainer.accelerator=cpu")
    trained, started = weights(tmp_path / "run"), weights_of(tmp_path / "blocks")
    assert trained.keys() == started.keys()
    assert all((trained[name] - started[name]).abs().max() < 1e-20 for name in started)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    model = build_model(from_dict(ModelConfig, checkpoint.load_info(folder)["config"]))
    checkpoint.load(folder, model)
    return model.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out=x"], "from= is not set"),
        (["from=/nowhere", "out=x"], "from=/nowhere: /nowhere is neither a checkpoint nor a run"),
        (["from=RUN", "out=RUN"], "is there already; give a new folder"),
        (["from=RUN", "out=x", "length=0"], "arch.block.length is 0; it must be at least 1"),
        (["from=RUN", "out=x", "prefix=0"], "arch.block.token.prefix is 0"),
        (["from=RUN", "out=x", "lenght=8"], "unknown key lenght, did you mean length?"),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str], message: str, vanilla_run: Path, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        do_uptrain(*(argument.replace("RUN", str(vanilla_run)) for argument in arguments))
    assert stopped.value.code == 2
    assert message in capfd.readouterr().err
    assert not Path("x").exists()


def test_an_adapter_beside_a_checkpoint_is_refused(
    vanilla_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Beside the run that is given, or beside the checkpoint that is taken."""
    run = shutil.copytree(vanilla_run, tmp_path / "run")
    for place in (run, next((run / "checkpoints").glob("step-*"))):
        (place / "adapter_config.json").touch()
        with pytest.raises(SystemExit):
            do_uptrain(f"from={run}", f"out={tmp_path / 'blocks'}")
        message = capfd.readouterr().err
        assert f"{place} has an adapter, adapter_config.json, which would be left out; merge it" in message
        (place / "adapter_config.json").unlink()


def test_a_checkpoint_that_describes_no_model_is_refused(
    vanilla_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    folder = shutil.copytree(checkpoint.latest_valid(vanilla_run), tmp_path / "alone")
    info = json.loads((folder / checkpoint.INFO).read_text())
    for broken in ({}, {"config": 5}, {"config": []}, {"config": {"arch": [], "size": []}}):
        (folder / checkpoint.INFO).write_text(
            json.dumps({key: value for key, value in info.items() if key != "config"} | broken)
        )
        with pytest.raises(SystemExit) as stopped:
            do_uptrain(f"from={folder}", f"out={tmp_path / 'blocks'}")
        assert stopped.value.code == 2
        assert f"from={folder}: {folder / checkpoint.INFO} describes no model: " in capfd.readouterr().err


def test_a_block_transformer_is_not_converted_again(
    vanilla_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    do_uptrain(f"from={vanilla_run}", f"out={tmp_path / 'blocks'}")
    with pytest.raises(SystemExit):
        do_uptrain(f"from={tmp_path / 'blocks'}", f"out={tmp_path / 'again'}")
    assert "is a Block Transformer already: pretrain.py init= goes on from it" in capfd.readouterr().err
