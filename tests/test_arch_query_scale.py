"""Queries that grow with the logarithm of their position, in readers of every kind of store, in every form of pass."""

import math

import pytest
import torch
from conftest import build, small, tokens

from arch import ArchConfig, StoreConfig, from_dict
from arch.decoder import Decoder
from arch.query_scale import query_table
from arch.static_step import step_fn
from arch.store_spec import QueryScale

LEARNED, FIXED = {"slope": "learned"}, {"slope": 0.7, "tokens": 3}
LAYOUT = from_dict(
    ArchConfig,
    {
        "stores": {
            "grouped": {"kv_heads": 2, "rope": "none", "query_scale": FIXED},
            "window": {"kv_heads": 2, "window": 5, "rope": "none", "query_scale": LEARNED},
            "chunk": {"kv_heads": 2, "chunk": 4, "sinks": True, "query_scale": FIXED},
            "latent": {"latent": {"heads": 2, "k_dim": "1/2"}, "query_scale": LEARNED},
            "vector": {"kv_heads": 2, "tied": "vector", "query_scale": FIXED},
            "half": {"kv_heads": 2, "tied": "half", "query_scale": LEARNED},
            "other": {"kv_heads": 2, "rope": "none"},
        },
        "pattern": [
            *(
                "new grouped",
                "reuse grouped window=4",
                "new window",
                "new chunk",
                "new latent",
                "reuse latent",
                "new vector",
            ),
            *("new half", "new other", "reuse grouped mix=other"),
        ],
    },
)
LENGTH = 17


@pytest.fixture(scope="module")
def model() -> Decoder:
    model = build(small(LAYOUT, num_layers=10, init_std=0.1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head_scale" in name:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_factors() -> None:
    """Llama 4's formula; and logarithms of the number of positions, of which heads make their own."""
    positions = torch.tensor([0, 1, 2, 7])
    wanted = [1 + 0.1 * math.log(1 + n) for n in (0, 0, 1, 2)]
    assert query_table(positions, QueryScale(0.1, 3)).tolist() == pytest.approx(wanted)
    assert query_table(positions, QueryScale(None, 1)).tolist() == pytest.approx([math.log(n) for n in (1, 2, 3, 8)])


@torch.no_grad()
@pytest.mark.parametrize("way", ["plain", "static"])
def test_steps_are_the_forward(model: Decoder, way: str) -> None:
    """Of rows that begin at different tokens: each as if it were alone."""
    rows, start = tokens(2, LENGTH), torch.tensor([0, 3])
    cache = model.allocate_cache(2, LENGTH, start_B=start)
    logits = [model(rows[:, :6], cache, last_only=True), model(rows[:, 6:9], cache, last_only=True)]
    step = step_fn(model, cache, way)
    logits += [step(rows[:, index : index + 1]).clone() for index in range(9, LENGTH)]
    places = [5, *range(8, LENGTH)]
    for row, first in enumerate(start.tolist()):
        alone = model(rows[row : row + 1, first:])[0]
        for place, got in zip(places, logits, strict=True):
            torch.testing.assert_close(got[row, 0], alone[place - first], rtol=0, atol=1e-10)


@torch.no_grad()
def test_documents_count_from_their_own_start(model: Decoder) -> None:
    rows, ids = tokens(2, LENGTH), torch.arange(LENGTH).ge(6).int().expand(2, -1)
    packed = model(rows, segment_ids_BT=ids)
    torch.testing.assert_close(packed[:, :6], model(rows[:, :6]), rtol=0, atol=1e-10)
    # Rotary tables are fp32, and count through the row.
    torch.testing.assert_close(packed[:, 6:], model(rows[:, 6:]), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, store in LAYOUT.stores.items() if store.query_scale])
def test_every_reader_scales(name: str, model: Decoder) -> None:
    """Without the factors of this store logits are others."""
    layout = from_dict(ArchConfig, {"stores": dict(LAYOUT.stores), "pattern": list(LAYOUT.pattern)})
    layout.stores[name] = StoreConfig(**{**vars(LAYOUT.stores[name]), "query_scale": None})
    plain = build(small(layout, num_layers=10))
    own = plain.state_dict()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key in own})
    rows = tokens(1, LENGTH)
    assert (plain(rows) - model(rows)).abs().max() > 1e-3
