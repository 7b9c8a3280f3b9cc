"""The other parts of a Block Transformer: embedders with an encoder, cross-attention, positions as shipped."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import tokens
from conversions import from_official, from_roberta
from test_arch_block import (
    HEADS,
    LENGTH,
    MHA,
    NEOX,
    VOCAB,
    WIDTH,
    build_block,
    formula,
    near,
    official_model,
    official_state,
    oracle_ids,
    segment_ids,
)
from test_arch_block_parts import ENCODER, build_part, part_config
from torch import Tensor, nn
from torch.nn import functional as F

from arch import (
    ArchConfig,
    BlockConfig,
    BlockTransformer,
    EncoderConfig,
    ModelConfig,
    SizeConfig,
    TokenDecoderConfig,
    generate,
)
from arch.block_plan import KINDS
from arch.block_transformer import Embedder
from arch.cache import Cache
from arch.convert import ConversionError

# Recorded from the authors' code (itsnamgyu/block-transformer at 17842dd, transformers 4.39.3) in fp64, with an encoder
# of 2 layers, width 32, 4 heads, d_ff 48; padded as `padding` says.
# (embedder, padded): first elements of blocks (0, 0) and (1, 3) embedded, logits [1, 4, 2, :4], loss
RECORDED = {
    ("encoder", False): (
        [0.058163125, -1.428974140, 4.249959721, -6.454605078],
        [3.278356448, -0.041868326, 2.800784301, -5.654872342],
        [-1.792784171, -1.417718106, 1.085348836, -0.936679404],
        8.4163934636,
    ),
    ("encoder", True): (
        [1.807849674, -0.012446061, 2.864006761, -5.186935526],
        [2.300412852, -1.576306111, 0.452340945, -6.648971454],
        [-1.942020583, -1.268478413, 0.993032475, -1.112221078],
        8.4673731122,
    ),
    ("cls", False): (
        [-2.207051355, 0.414304088, -2.528171429, 0.193816224],
        [-6.072117556, 0.830243597, -0.684946441, -0.210124894],
        [-1.202207432, 1.398380934, -1.180627857, -2.002920221],
        7.8245851461,
    ),
    ("cls", True): (
        [-4.187343727, 0.587935920, -2.159307426, -0.675829709],
        [-4.868392360, 0.264114729, -1.989326390, 0.178342488],
        [-1.317257776, 1.224676091, -0.777528101, -1.688987125],
        7.9037805971,
    ),
}
# Greedy text of the authors' generate() after prompts that it fills up with padding from the left.
PADDED_PROMPTS = [[2, 39, 77], [59, 18, 72]]
PADDED_TEXT = {
    "encoder": [[63, 63, 63, 63, 81, 47, 47, 47, 63, 63, 63, 63], [81, 58, 47, 67, 47, 47, 47, 47, 81, 58, 47, 58]],
    "cls": [[81, 58, 58, 66, 66, 17, 50, 58, 66, 17, 50, 58], [63, 63, 63, 63, 81, 58, 66, 58, 66, 17, 50, 58]],
}
# By prefix, of the lookup embedder after 8 tokens.
SHIPPED_TEXT = {
    1: [[63, 63, 63, 63, 50, 22, 63, 63, 50, 22, 63, 63], [50, 58, 18, 63, 67, 58, 45, 63, 74, 81, 28, 74]],
    2: [[81, 95, 58, 18, 8, 67, 66, 17, 81, 47, 67, 66], [81, 95, 58, 18, 81, 58, 45, 50, 18, 47, 67, 47]],
    3: [[58, 45, 50, 22, 81, 58, 45, 63, 58, 45, 9, 25], [47, 58, 18, 63, 78, 47, 47, 47, 81, 28, 63, 78]],
}


def encoder_state(embedder: str) -> dict[str, Tensor]:
    """The authors' names: a RobertaModel, and a convolution over its outputs."""
    width, d_ff = 32, 48
    shapes = {
        "embeddings.word_embeddings.weight": (VOCAB, width),
        "embeddings.position_embeddings.weight": (514, width),
        "embeddings.token_type_embeddings.weight": (1, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
        "projection_layer.weight": (WIDTH, width, 3 if embedder == "cls" else LENGTH),
        "projection_layer.bias": (WIDTH,),
    }
    for layer in range(2):
        modules: dict[str, tuple[int, ...]] = {
            f"attention.self.{name}": (width, width) for name in ("query", "key", "value")
        }
        modules |= {"attention.output.dense": (width, width), "intermediate.dense": (d_ff, width)}
        modules |= {"output.dense": (width, d_ff), "attention.output.LayerNorm": (width,), "output.LayerNorm": (width,)}
        for module, shape in modules.items():
            shapes[f"encoder.layer.{layer}.{module}.weight"] = shape
            shapes[f"encoder.layer.{layer}.{module}.bias"] = shape[:1]
    state = {f"embedder.{name}": formula(f"embedder.{name}", *shape) for name, shape in shapes.items()}
    return {name: tensor + name.endswith("LayerNorm.weight") for name, tensor in state.items()}


def official_encoder_model(embedder: str) -> BlockTransformer:
    token = TokenDecoderConfig(copy.deepcopy(MHA), ["new kv"], layers=3)
    encoder = EncoderConfig(layers=2, d_model=32, num_heads=4, d_ff=48)
    arch = ArchConfig(
        copy.deepcopy(MHA), ["new kv"], block=BlockConfig(embedder=embedder, encoder=encoder, token=token)
    )
    size = SizeConfig(num_layers=5, d_model=WIDTH, num_heads=HEADS, d_ff=4 * WIDTH, vocab_size=VOCAB, **NEOX)
    model = BlockTransformer(ModelConfig(arch, size)).double()
    state = {name: tensor for name, tensor in official_state().items() if not name.startswith("embedder.")}
    state |= encoder_state(embedder)
    model.load_state_dict(from_official(state, HEADS, HEADS, LENGTH, 3 if embedder == "cls" else 0))
    return model


def padding(ids: Tensor) -> Tensor:
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, :3] = real[1, 11] = real[1, 12:14] = real[0, 23] = False
    return real


@pytest.mark.parametrize(("embedder", "padded"), RECORDED)
@torch.no_grad()
def test_encoders_give_the_outputs_of_the_authors_code(embedder: str, padded: bool) -> None:
    model, ids = official_encoder_model(embedder), oracle_ids()
    first, later, said, loss = RECORDED[embedder, padded]
    real = padding(ids) if padded else torch.ones_like(ids, dtype=torch.bool)
    ids = ids * real
    vectors = model.embedder(ids, segment_ids(real) if padded else None)
    near(vectors[0, 0, :4], first)
    near(vectors[1, 3, :4], later)
    logits = model(ids, segment_ids_BT=segment_ids(real) if padded else None)
    near(logits.view(2, 5, 4, VOCAB)[1, 4, 2, :4], said)
    targets = model.select_targets(ids.masked_fill(~real, -100))
    near(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), loss)
    torch.testing.assert_close(model.embedder(ids, segment_ids(real)), vectors, rtol=0, atol=1e-12)


class ShippedPositions(Cache):
    """Positions of the token decoder as the authors' own generate() counts them (commit 17842dd of their code).

    It leaves out the context: vectors of a prefix all have position 0, the t-th token of a block t. Those of a prefix
    of 2 or more are then not where they were in training.
    """

    origin = 0

    def positions(self, length: int, device: torch.device) -> Tensor:
        return (super().positions(length, device) - self.origin).clamp(min=0)


def generate_shipped(
    model: BlockTransformer, prompts: list[list[int]], new: int, pad_token: int | None = None
) -> list[list[int]]:
    length = model.plan.block_length
    cache = model.allocate_cache(len(prompts), max(map(len, prompts)) + length + new)
    cache.tokens = ShippedPositions(**vars(cache.tokens))
    cache.tokens.origin = model.plan.num_positions - length
    return generate(model, prompts, new, pad_token=pad_token, cache=cache)


@pytest.mark.parametrize("embedder", PADDED_TEXT)
def test_generation_after_padding_is_that_of_the_authors_code(embedder: str) -> None:
    """The tokens of an encoder look at the padding of a short prompt neither there nor here."""
    model = official_encoder_model(embedder)
    rows = generate_shipped(model, PADDED_PROMPTS, 12, pad_token=0)
    assert rows == PADDED_TEXT[embedder]
    ragged = [PADDED_PROMPTS[0], [5] * 9, PADDED_PROMPTS[1]]
    assert generate_shipped(model, ragged, 12, pad_token=0)[::2] == rows


@pytest.mark.parametrize("prefix", SHIPPED_TEXT)
def test_positions_as_shipped_give_the_text_of_the_authors_generate(prefix: int) -> None:
    model, _ = official_model(prefix)
    prompts = oracle_ids()[:, :8].tolist()
    assert generate_shipped(model, prompts, 12) == SHIPPED_TEXT[prefix]
    assert (generate(model, prompts, 12) == SHIPPED_TEXT[prefix]) == (prefix == 1)


@contextmanager
def keys_rotated(model: BlockTransformer) -> Iterator[list[Tensor]]:
    """The rotary angles that the token decoder's first writer is handed, call by call, as positions."""
    seen: list[Tensor] = []
    half = model.token_decoder.plan.stores[0].rope_key[0] // 2

    def keep(_: nn.Module, arguments: tuple) -> None:
        tables = arguments[1]
        if len(tables) == 1:  # the matrix by which a step rotates
            (matrix,) = tables
            cos, sin = matrix[..., 0, 0], matrix[..., 0, half]
        else:
            cos, sin = (table[..., 0] for table in tables)
        seen.append(torch.atan2(sin, cos).round())

    handle = model.token_decoder.layers[0].writer.register_forward_pre_hook(keep)
    yield seen
    handle.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_positions(kind: str) -> None:
    """Those of one block, of which the prompt gives one token. Below pi, the first angle is the position."""
    config = part_config(kind, "lookup", style="llama")
    config.arch.block.length = 2
    config.arch.block.token.prefix = 3
    model = build_block(config)
    prefix = 3 if kind == "prefix" else 1
    for run, shift in ((generate, 0), (generate_shipped, prefix - 1)):
        for prompt in ([1, 2], [1, 2, 3]):
            with keys_rotated(model) as seen:
                run(model, [prompt], 4 - len(prompt))
            calls = torch.cat([part.flatten() for part in seen])
            assert calls.tolist() == [max(0, index - shift) for index in range(prefix + 1)]
            assert len(seen) == 4 - len(prompt)


@pytest.mark.parametrize("embedder", ["encoder", "cls"])
@torch.no_grad()
def test_the_encoder_is_the_stock_roberta(embedder: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = part_config("prefix", embedder)
    cls_tokens = ENCODER["cls_tokens"] if embedder == "cls" else 0
    stock = transformers.RobertaModel(
        transformers.RobertaConfig(
            vocab_size=61,
            hidden_size=ENCODER["d_model"],
            num_hidden_layers=ENCODER["layers"],
            num_attention_heads=ENCODER["num_heads"],
            intermediate_size=ENCODER["d_ff"],
            layer_norm_eps=config.size.norm_eps,
            type_vocab_size=1,
            max_position_embeddings=20,
            attn_implementation="eager",
        ),
        add_pooling_layer=False,
    ).double()
    stock.eval()
    for number, parameter in enumerate(stock.parameters()):
        parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(number))
    model = Embedder(config).double()
    model.proj = None
    model.load_state_dict(from_roberta(stock.state_dict(), 4, cls_tokens))
    ids = tokens(3, 8).clamp(min=2)
    real = torch.ones(3, 8, dtype=torch.bool)
    real[0, :3] = real[1, 2] = real[2, 6:] = False
    for mask in (None, real):
        blocks = F.pad(ids.view(-1, 4), (cls_tokens, 0), value=0)
        seen = F.pad((real if mask is not None else torch.ones_like(real)).view(-1, 4), (cls_tokens, 0), value=True)
        expected = stock(blocks, attention_mask=seen.long()).last_hidden_state
        expected = (expected[:, :cls_tokens] if cls_tokens else expected).reshape(3, 2, -1)
        torch.testing.assert_close(model(ids, segment_ids(mask)), expected, rtol=0, atol=1e-12)


def test_unknown_and_missing_weights_of_an_encoder() -> None:
    state = encoder_state("encoder")
    state["embedder.pooler.dense.weight"] = state.pop("embedder.embeddings.token_type_embeddings.weight")
    with pytest.raises(ConversionError) as error:
        from_official(state, 1, 1)
    assert str(error.value).splitlines()[-2:] == [
        "- pooler.dense.weight is unexpected",
        "- embeddings.token_type_embeddings.weight is missing",
    ]


def test_a_block_of_nothing_but_padding_sees_itself() -> None:
    model = build_part("prefix", "encoder")
    ids, real = tokens(1, 8), torch.ones(1, 8, dtype=torch.bool)
    real[0, :4] = False
    torch.testing.assert_close(model.embedder(ids, segment_ids(real)), model.embedder(ids), rtol=0, atol=1e-12)
