"""Layouts: the papers' maps, any depth, and what is refused."""

import json
import re

import pytest
from conftest import ARCHS, small

from arch import ArchConfig, KVPlan, LatentConfig, LayoutError, ModelConfig, SizeConfig, StoreConfig, from_dict, resolve
from arch.named import load_arch, load_size

# Owner of each layer, `s` for sliding windows. CLA paper: figure 2, section 3.2.1. MixAttention paper: figures 2 to 11.
CLA_20 = {
    "cla2": "0 0 2 2 4 4 6 6 8 8 10 10 12 12 14 14 16 16 18 18",
    "cla3": "0 0 2 2 2 5 5 5 8 8 8 11 11 11 14 14 14 17 17 17",
    "cla4": "0 0 0 0 4 4 4 4 8 8 8 8 12 12 12 12 16 16 16 16",
    "cla2_keepends": "0 1 1 3 3 5 5 7 7 9 9 11 11 13 13 15 15 17 17 19",
    "cla2_densefront": "0 1 2 3 4 5 6 7 8 9 9 9 9 9 9 9 9 9 9 19",
    "cla2_denseback": "0 1 1 1 1 1 1 1 1 1 1 11 12 13 14 15 16 17 18 19",
}
MIX_24 = {
    "mha": " ".join(str(layer) for layer in range(24)),
    "swa": " ".join(f"{layer}s" for layer in range(24)),
    "ma": "0 1s 1s 3s 3s 3s 0 7s 7s 9s 9s 9s 0 13s 13s 15s 15s 15s 0 19s 19s 21s 21s 0",
    "ma_endslide": "0 1s 1s 3s 3s 3s 0 7s 7s 9s 9s 9s 0 13s 13s 15s 15s 15s 0 19s 19s 21s 21s 21s",
    "ma_offset": "0s 0s 2s 2s 2s 5 6s 6s 8s 8s 8s 5 12s 12s 14s 14s 14s 5 18s 18s 20s 20s 20s 5",
    "mixattention": "0 1s 1s 3s 3s 3s 0 7s 7s 9s 9s 9s 12 13s 13s 15s 15s 15s 12 19s 19s 21s 21s 21s",
    "ma_offset_slideshare": "0s 0s 0s 0s 0s 5 6s 6s 6s 6s 6s 5 12s 12s 12s 12s 12s 5 18s 18s 18s 18s 18s 5",
    "ma_pairs_slideshare": "0 1s 1s 1s 1s 1s 0 7s 7s 7s 7s 7s 12 13s 13s 13s 13s 13s 12 19s 19s 19s 19s 19s",
    "ma_successive1": "0 0 2s 2s 4s 4s 4s 7s 7s 9s 9s 9s 12 12 14s 14s 16s 16s 16s 19s 19s 21s 21s 21s",
    "ma_successive2": "0s 0s 2s 2s 2s 5 5 7s 7s 9s 9s 9s 12 12 14s 14s 16s 16s 16s 19s 19s 21s 21s 21s",
    "ma_successive3": "0s 0s 2s 2s 2s 5s 5s 7s 7s 7s 10 10 12s 12s 14s 14s 14s 17 17 19s 19s 21s 21s 21s",
    "ma_successive4": "0s 0s 2s 2s 2s 5s 5s 7s 7s 7s 10 10 12s 12s 14s 14s 14s 17s 17s 19s 19s 19s 22 22",
    "ma_noshare1": "0s 0s 2s 3 4s 4s 4s 7s 7s 9s 9s 9s 12s 12s 14s 14s 14s 17s 17s 19s 19s 19s 22s 22s",
    "ma_noshare2": "0s 0s 2s 2s 2s 5s 5s 7s 7s 7s 10 11s 11s 13s 13s 13s 16s 16s 18s 18s 18s 21s 21s 23s",
    "ma_noshare3": "0s 0s 2s 2s 2s 5s 5s 7s 7s 7s 10s 10s 12s 12s 12s 15s 15s 17s 17s 17s 20 21s 22s 22s",
    "yoco": " ".join([*(f"{layer}s" for layer in range(12)), *["12"] * 12]),
}
OTHERS = {
    ("bct", 3): "0b 1b 2b",
    ("bct_mixed", 9): "0 1b 1b 3s 0 5b 5b 7 8b",
    ("qwen3_next", 9): "0d 1d 2d 3 4d 5d 6d 7 8d",
    ("kimi_linear", 9): "0d 1d 2d 3 4d 5d 6d 7 8d",
    ("characterai", 13): "0 1s 1s 3s 3s 3s 0 7s 7s 9s 9s 9s 0",
    ("gemma3", 26): "0s 1s 2s 3s 4s 5 6s 7s 8s 9s 10s 11 12s 13s 14s 15s 16s 17 18s 19s 20s 21s 22s 23 24s 25s",
    ("gemma4", 9): "0s 1s 2s 3s 4s 5 6s 7s 8",
    ("tail_sharing", 35): (
        "0s 1s 2s 3s 4 5s 6s 7s 8s 9 10s 11s 12s 13s 14 15s 16s 17s 18s 19 "
        "18s 18s 18s 18s 19 18s 18s 18s 18s 19 18s 18s 18s 18s 19"
    ),
    ("cla3", 10): "0 1 1 1 4 4 4 7 7 7",
    # FusedKV paper, section on the method: the lower half writes. MLKV-2 of 12 layers in the MLKV paper.
    ("fusedkv_lite", 10): "0 1 2 3 4 4/0 4/0 4/0 4/0 4/0",
    ("fusedkv", 10): "0 1 2 3 4 4+0 4+0 4+0 4+0 4+0",
    ("mlkv", 12): "0 0 0 0 0 0 6 6 6 6 6 6",
}
MAPS = {
    **{(name, 20): layers for name, layers in CLA_20.items()},
    **{(name, 24): layers for name, layers in MIX_24.items()},
    **OTHERS,
}


@pytest.mark.parametrize(("name", "depth"), MAPS)
def test_map_of_the_paper(name: str, depth: int) -> None:
    assert str(resolve(small(name, num_layers=depth))) == MAPS[name, depth]


@pytest.mark.parametrize(
    ("name", "per_token"),
    {"mha": 163840, "gqa4": 40960, "gqa2": 20480, "mqa": 10240, "cla2": 5120, "cla3": 3584, "cla4": 2560}.items(),
)
def test_bytes_of_the_cla_paper(name: str, per_token: int) -> None:
    from arch.footprint import kv_bytes

    plan = resolve(ModelConfig(load_arch(name), load_size("1b")))
    assert kv_bytes(plan, 32768).per_token == per_token


def test_mixattention_reductions_of_the_paper() -> None:
    """KV at 32k tokens relative to 24 full layers, section 2.3's table."""
    from arch.footprint import kv_bytes

    def stored(name: str) -> int:
        return kv_bytes(resolve(small(name, num_layers=24, window=None)), 32768).stored

    full = stored("mha") // 4  # the MixAttention files have a quarter of the heads
    expected = {"ma": 19.2, "ma_endslide": 19.2, "ma_offset": 19.2, "mixattention": 10.7, "ma_successive3": 10.7}
    expected |= {"ma_offset_slideshare": 21.3, "ma_pairs_slideshare": 11.3, "swa": 32.0}
    for name, ratio in expected.items():
        assert round(full / stored(name), 1) == ratio, name


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 11, 20, 32, 61])
def test_any_depth(arch: str, depth: int) -> None:
    plan = resolve(small(arch, num_layers=depth))
    assert plan.num_layers == depth
    for layer in range(depth):
        store = plan.store(layer)
        assert store.owner <= layer
        assert plan.store(store.owner) is plan.stores[plan.reads[layer]], "a reader reads a store, never a reader"
    assert [store.owner for store in plan.stores] == sorted({store.owner for store in plan.stores})


def test_every_multi_layer_tile_says_where_the_short_group_goes() -> None:
    from conftest import ROOT

    for name in ARCHS:
        arch = load_arch(name)
        sections = [entry["pattern"] if isinstance(entry, dict) else entry for entry in arch.pattern]
        one_item = all(len(section) == 1 for section in sections if isinstance(section, list)) and (
            len(arch.pattern) == 1 or all(isinstance(entry, dict) for entry in arch.pattern)
        )
        assert one_item or "short_group:" in (ROOT / "configs" / "arch" / f"{name}.yaml").read_text(), name


def test_plan_is_plain_data_and_hashable(arch: str) -> None:
    plan = resolve(small(arch))
    assert KVPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert hash(plan) == hash(resolve(small(arch)))


def test_readers_start_with_the_owner(arch: str) -> None:
    plan = resolve(small(arch))
    assert sorted(layer for store in plan.stores for layer in plan.readers(store)) == list(range(plan.num_layers))
    assert all(plan.readers(store)[0] == store.owner for store in plan.stores)


def test_max_window_only_shortens(arch: str) -> None:
    plan, free = resolve(small(arch, window=6)), resolve(small(arch, window=None))
    for cut, store in zip(plan.stores, free.stores, strict=True):
        assert cut.window == (None if store.window is None else min(6, store.window))


def layout(stores: dict, pattern: list, **changes: object) -> KVPlan:
    arch = from_dict(ArchConfig, {"stores": stores, "pattern": pattern, "short_group": "last"})
    return resolve(small(arch, **changes))


KV = {"kv": {"kv_heads": 2}}
TWO = {**KV, "far": {"kv_heads": 2}}


@pytest.mark.parametrize(
    ("stores", "pattern", "changes", "message"),
    [
        (KV, [], {}, "arch.pattern is empty"),
        (KV, ["new kw"], {}, "names no store type; arch.stores has kv"),
        (KV, ["now kv"], {}, "cannot read 'now kv'; write `new X`"),
        (KV, ["new kv x0"], {}, "cannot read"),
        (KV, ["new kv", "reuse kv window=0"], {}, "or `reuse X window=256`"),
        (KV, ["new kv window=9999999999999999"], {}, "`new kv window=9999999999999999`: a window must be at most"),
        ({"kv": {"kv_heads": 1, "window": 4}}, ["new kv", "reuse kv window=5"], {}, "kv keeps 4 positions; a layer"),
        (
            {"kv": {"kv_heads": 1, "slots": 4, "rule": "gated"}},
            ["new kv", "reuse kv window=5"],
            {},
            "of which a layer reads all; leave window=5 out",
        ),
        (KV, ["new kv", "reuse kv value=kv"], {}, "`reuse X values=Y`, `reuse X mix=Y`"),
        (KV, ["new kv", "reuse kv values=kw"], {}, "`reuse kv values=kw` names no store type; arch.stores has kv"),
        (KV, ["new kv", "reuse kv mix=kv"], {}, "both are the same store; leave mix=kv out"),
        (TWO, ["new kv", "new far values=kv"], {}, "writes a store reads it whole; write `reuse` in a layer above"),
        (TWO, ["new kv", "reuse kv mix=far", "new far"], {}, "layer 1: `reuse kv mix=far` has nothing to reuse, no"),
        (
            {**TWO, "far": {"latent": {}}},
            ["new kv", "new far", "reuse kv values=far"],
            {},
            "far holds latents; only stores that have keys and values per head can be combined",
        ),
        (
            {**TWO, "far": {"kv_heads": 2, "window": 5000}},
            ["new kv", "new far", "reuse kv values=far window=3"],
            {},
            "they keep all and the last 5,000 positions; a key and its value must be of one position",
        ),
        (
            {**TWO, "far": {"kv_heads": 1}},
            ["new kv", "new far", "reuse kv values=far"],
            {},
            "they have 2 and 1 key/value heads; give both as many",
        ),
        (
            {**TWO, "far": {"kv_heads": 2, "rope_theta": 5.0}},
            ["new kv", "new far", "reuse kv mix=far"],
            {},
            "differ in width or rotation, and cannot be added",
        ),
        (KV, ["reuse kv", "new kv"], {}, "layer 0: `reuse kv` has nothing to reuse"),
        (KV, ["new kv", {"layers": 1, "pattern": ["new kv"]}], {}, "mixes items and sections"),
        (KV, [{"layers": 1, "pattern": ["new kv"]}], {}, "covers 1 layers, the model has 5"),
        (KV, [{"pattern": ["new kv"]}, {"pattern": ["new kv"]}], {}, "both lack `layers`"),
        (KV, [{"layers": "half", "pattern": ["new kv"]}], {}, "write a number, or a share of the depth"),
        (KV, [{"layer": 1, "pattern": ["new kv"]}], {}, "a section's keys are layers, pattern, short_group"),
        (KV, [{"pattern": "new kv"}], {}, "a pattern is a list"),
        (KV, [{"pattern": ["new kv"], "short_group": "middle"}], {}, "it is `first` or `last`"),
        ({**KV, "spare": {"kv_heads": 1}}, ["new kv"], {}, "arch.stores.spare is in no item"),
        ({"kv": {}}, ["new kv"], {}, "needs either kv_heads or latent"),
        ({"kv": {"kv_heads": 1, "latent": {}}}, ["new kv"], {}, "needs either kv_heads or latent"),
        ({"kv": {"kv_heads": 3}}, ["new kv"], {}, "does not divide the 8 query heads; choose 1, 2, 4, 8"),
        ({"kv": {"kv_heads": "1/3"}}, ["new kv"], {}, "it must come to a whole number"),
        ({"kv": {"kv_heads": "few"}}, ["new kv"], {}, "a share of the query heads such as 1/4"),
        ({"kv": {"kv_heads": 0}}, ["new kv"], {}, "at least 1"),
        ({"kv": {"kv_heads": 1, "window": 0}}, ["new kv"], {}, "it counts the current token"),
        ({"kv": {"kv_heads": 1, "sinks": True}}, ["new kv"], {}, "sinks needs a window"),
        ({"kv": {"kv_heads": 1, "rule": "gated"}}, ["new kv"], {}, "rule gated needs slots"),
        ({"kv": {"latent": {"heads": 3}}}, ["new kv"], {}, "latent.heads is 3; equal parts of the 8 query heads"),
        ({"kv": {"latent": {"k_dim": "1/3"}}}, ["new kv"], {}, "latent.k_dim is 1/3, 8/3 with 8 as the head dim"),
        ({"kv": {"kv_heads": 1, "rope_scaling": {"rule": "ntk"}}}, ["new kv"], {}, "it is linear, llama3 or yarn"),
        ({"kv": {"kv_heads": 1, "rope_scaling": {"factor": 0}}}, ["new kv"], {}, "rope_scaling.factor is 0"),
        ({"kv": {"kv_heads": 1, "rope_scaling": {"low": 2.0}}}, ["new kv"], {}, "low is 2.0; the rule linear has none"),
        ({"kv": {"kv_heads": 1, "rope_scaling": {"low": 1.0}}}, ["new kv"], {}, "low is 1.0; the rule linear has none"),
        ({"kv": {"kv_heads": 1, "rope_scaling": {"rule": "yarn"}}}, ["new kv"], {}, "rope_scaling.original is None"),
        (
            {"kv": {"kv_heads": 1, "rope_scaling": {"rule": "llama3", "original": 9, "attention": 2.0}}},
            ["new kv"],
            {},
            "attention is 2.0; the rule llama3 has none",
        ),
        (
            {"kv": {"kv_heads": 1, "rope_scaling": {"rule": "yarn", "original": 9, "low": 40.0}}},
            ["new kv"],
            {},
            "rope_scaling.low is 40, and high 32; it must be less",
        ),
        (
            {"kv": {"kv_heads": 1, "rope": "none", "rope_scaling": {}}},
            ["new kv"],
            {},
            "rope is none, and nothing turns",
        ),
        (
            {"kv": {"latent": {}, "rope_scaling": {}}},
            ["new kv"],
            {},
            "rope_scaling is of keys that are rotated per head",
        ),
        ({"kv": {"kv_heads": 1, "tied": "vector", "rope_scaling": {}}}, ["new kv"], {}, "tied is vector: leave it out"),
        ({"kv": {"kv_heads": 1, "slots": 4, "rope_scaling": {}}}, ["new kv"], {}, "rope_scaling is of keys"),
        ({"kv": {"kv_heads": 1, "query_scale": {"slope": "log"}}}, ["new kv"], {}, "a positive number, or learned"),
        ({"kv": {"kv_heads": 1, "query_scale": {"tokens": 0}}}, ["new kv"], {}, "query_scale.tokens is 0"),
        ({"kv": {"kv_heads": 1, "chunk": 4, "window": 4}}, ["new kv"], {}, "chunk is 4, and window is 4"),
        ({"kv": {"kv_heads": 1, "chunk": 0}}, ["new kv"], {}, "chunk is 0; it must be at least 1"),
        ({"kv": {"kv_heads": 1, "chunk": 4, "slots": 4, "rule": "gated"}}, ["new kv"], {}, "the store is bounded"),
        ({"kv": {"kv_heads": 1, "chunk": 4}}, ["new kv", "reuse kv window=2"], {}, "kv is read in chunks"),
        ({"kv": {"matrix": {}, "query_scale": {}}}, ["new kv"], {}, "the store holds a matrix per head: leave it out"),
        (
            {"kv": {"kv_heads": 1, "slots": 4}},
            ["new kv"],
            {},
            "rule is None; stores with slots need one of gated",
        ),
        ({"kv": {"kv_heads": 1, "slots": 4, "rule": "ntm"}}, ["new kv"], {}, "rule is 'ntm'; stores with slots need"),
        ({"kv": {"kv_heads": 1, "slots": 0, "rule": "gated"}}, ["new kv"], {}, "slots is 0; a bounded store has at"),
        ({"kv": {"latent": {}, "slots": 4, "rule": "gated"}}, ["new kv"], {}, "slots cannot hold a latent"),
        ({"kv": {"kv_heads": 1, "slots": 4, "rule": "ring_slots"}}, ["new kv"], {}, "ring_slots needs a window"),
        ({"kv": {"kv_heads": 1, "slots": 4, "rule": "gated", "window": 3}}, ["new kv"], {}, "has only slots, without"),
        ({"kv": {"kv_heads": 1, "slots": 4, "rule": "gated", "rope_theta": 9.0}}, ["new kv"], {}, "without positions"),
        ({"kv": {"kv_heads": 1, "rope_theta": -1.0}}, ["new kv"], {}, "must be positive"),
        ({"kv": {"kv_heads": 1, "rope": "half"}}, ["new kv"], {}, "kv.rope is 'half'; write a number, or a share of"),
        (
            {"kv": {"kv_heads": 1, "rope": 3}},
            ["new kv"],
            {},
            "kv.rope is 3, 3 of 8 elements; rotary embeddings need an even",
        ),
        ({"kv": {"kv_heads": 1, "rope": "none", "rope_theta": 9.0}}, ["new kv"], {}, "rope is none: leave one of them"),
        ({"kv": {"kv_heads": 1, "slots": 4, "rule": "gated", "rope": "full"}}, ["new kv"], {}, "without positions"),
        ({"kv": {"kv_heads": 1, "head_dim": 0}}, ["new kv"], {}, "kv.head_dim is 0"),
        ({"kv": {"kv_heads": 1, "k_dim": "1/3"}}, ["new kv"], {}, "kv.k_dim is 1/3, 8/3 with 8 as the head dimension"),
        ({"kv": {"kv_heads": 1, "k_dim": 3}}, ["new kv"], {}, "1 of keys of width 3 is rotated, and rotary embeddings"),
        ({"kv": {"kv_heads": 1, "k_dim": 3, "rope": "full"}}, ["new kv"], {}, "rope is full, of keys of width 3"),
        (
            {"kv": {"kv_heads": 1, "tied": "both"}},
            ["new kv"],
            {},
            "kv.tied is 'both'; it is vector, half or projection",
        ),
        (
            {"kv": {"kv_heads": 1, "tied": "vector", "v_dim": 4}},
            ["new kv"],
            {},
            "v_dim is 4; tied values are as wide as",
        ),
        ({"kv": {"kv_heads": 1, "tied": "half", "rope": "none"}}, ["new kv"], {}, "with tied half the shared half is"),
        ({"kv": {"kv_heads": 1, "tied": "half", "k_dim": 6}}, ["new kv"], {}, "take a multiple of 4"),
        ({"kv": {"latent": {}, "tied": "vector"}}, ["new kv"], {}, "kv.tied is vector; the store holds latents"),
        ({"kv": {"kv_heads": 1, "slots": 4, "rule": "gated", "tied": "half"}}, ["new kv"], {}, "the store is bounded"),
        ({"kv": {"latent": {}, "v_dim": 4}}, ["new kv"], {}, "kv.v_dim is 4; keys and values made of latents"),
        (
            {"kv": {"kv_heads": 1, "slots": 4, "rule": "gated", "head_dim": 4}},
            ["new kv"],
            {},
            "kv.head_dim is 4; keys and values are as wide as size.head_dim in a bounded store: leave it out",
        ),
        ({"kv": {"latent": {}, "rope": "none"}}, ["new kv"], {}, "write latent.rope_dim, 0 for none"),
        ({"kv": {"kv_heads": 1, "rope_theta": float("nan")}}, ["new kv"], {}, "must be positive and finite"),
        ({"kv": {"latent": {"dim": 16, "rope_dim": 3}}}, ["new kv"], {}, "rotary embeddings need an even number"),
        (KV, ["new kv"], {"num_layers": 0}, "size.num_layers is 0; it must be at least 1"),
        (KV, ["new kv"], {"head_dim": None, "d_model": 36}, "not a multiple of size.num_heads 8; set size.head_dim"),
        (KV, ["new kv"], {"head_dim": 0}, "rotary embeddings need an even one"),
        (KV, ["new kv"], {"init_std": float("inf")}, "size.init_std is inf; it must be positive and finite"),
        (KV, ["new kv"], {"head_dim": 7}, "rotary embeddings need an even one"),
        (KV, ["new kv"], {"max_window": 0}, "size.max_window is 0"),
        (KV, ["new kv"], {"num_layers": 10**9}, "size.num_layers is 1000000000; it must be at most 1,024"),
        (KV, ["new kv"], {"d_ff": 2**70}, "size.d_ff is 1180591620717411303424; it must be at most 16,777,216"),
        (KV, ["new kv"], {"vocab_size": 2**70}, "size.vocab_size is 1180591620717411303424; it must be at most"),
        (KV, ["new kv"], {"tokens": 2**70}, "it must be at most 1,000,000,000,000,000"),
        ({"kv": {"kv_heads": 1, "window": 2**70}}, ["new kv"], {}, "arch.stores.kv.window is 1180591620717411303424"),
        ({"kv": {"latent": {"dim": 10**9}}}, ["new kv"], {}, "latent.dim is 1000000000; it must be at most"),
        ({"k v": {"kv_heads": 1}}, ["new kv"], {}, "a store type has a name of letters, digits, _ and -"),
        (KV, [json.loads("[" * 20 + '"new kv"' + "]" * 20)], {}, "lists lie more than 16 deep in each other"),
    ],
)
def test_impossible_layouts_name_the_fix(stores: dict, pattern: list, changes: dict, message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        layout(stores, pattern, **changes)
    assert message in str(caught.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(LayoutError) as caught:
        layout({"kv": {"kv_heads": 3, "window": 0}}, ["new kv", "now kv"])
    assert len(str(caught.value).splitlines()) == 3


def test_heads_as_a_share_and_as_a_number_agree() -> None:
    assert layout({"kv": {"kv_heads": "1/4"}}, ["new kv"]) == layout(KV, ["new kv"])
    assert layout({"kv": {"kv_heads": "all"}}, ["new kv"]) == layout({"kv": {"kv_heads": 8}}, ["new kv"])


def test_short_group_first_and_last() -> None:
    tile = ["new kv", "reuse kv x2"]
    stores = {"kv": StoreConfig(kv_heads=1)}
    size = SizeConfig(num_layers=5, d_model=16, num_heads=2)
    assert str(resolve(ModelConfig(ArchConfig(stores, tile, "first"), size))) == "0 0 2 2 2"
    assert str(resolve(ModelConfig(ArchConfig(stores, tile, "last"), size))) == "0 0 0 3 3"


@pytest.mark.parametrize("repeats", ["4", "5", "6", "100000000", str(2**70), "9" * 5000])
def test_repeats_beyond_the_depth_are_cut(repeats: str) -> None:
    """At once, however many they are."""
    stores, size = {"kv": StoreConfig(kv_heads=1)}, SizeConfig(num_layers=5, d_model=16, num_heads=2)
    for short in ("first", "last"):
        plan = resolve(ModelConfig(ArchConfig(stores, ["new kv", f"reuse kv x{repeats}", "new kv"], short), size))
        assert str(plan) == "0 0 0 0 0"


def test_from_dict_refuses_unknown_keys() -> None:
    with pytest.raises(ValueError, match="StoreConfig has no kv_head; its keys are chunk, head_dim, k_dim, kv_heads"):
        from_dict(ArchConfig, {"stores": {"kv": {"kv_head": 1}}})
    latent = from_dict(StoreConfig, {"latent": {"dim": 4}}).latent
    assert latent == LatentConfig(dim=4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stores": None}, "ArchConfig.stores is None; it must be dict"),
        ({"stores": {"kv": 4}}, "ArchConfig.stores.kv is 4; it must be StoreConfig"),
        ({"stores": {"kv": {"latent": True}}}, "StoreConfig.latent is True; it must be LatentConfig or null"),
        ({"stores": {"kv": {"window": "4"}}}, "StoreConfig.window is '4'; it must be int or null"),
        ({"stores": {"kv": {"window": True}}}, "StoreConfig.window is True"),
        ({"stores": {"kv": {"window": 4.5}}}, "StoreConfig.window is 4.5"),
        ({"stores": {"kv": {"sinks": "no"}}}, "StoreConfig.sinks is 'no'; it must be bool"),
        ({"pattern": "new kv"}, "ArchConfig.pattern is 'new kv'; it must be list"),
    ],
)
def test_from_dict_refuses_other_types(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        from_dict(ArchConfig, values)


def test_a_reader_has_a_window_of_its_own() -> None:
    """Stored bytes are the writer's, read bytes the readers'; a window that restricts nothing is none."""
    from arch.footprint import kv_bytes

    stores = {"full": {"kv_heads": 2}, "local": {"kv_heads": 2, "window": 8}}
    pattern = ["new full window=4", "reuse full", "new local", "reuse local window=3", "reuse local window=8"]
    plan = layout(stores, pattern, num_layers=5, window=None)
    assert plan.reader_windows == (4, None, None, 3, None)
    assert str(plan) == "0s 0 2s 2s 2s"
    kv = kv_bytes(plan, 100, itemsize=1)
    position = plan.stores[0].slot.elements
    assert (kv.per_token, kv.constant, kv.stored) == (position, 8 * position, 108 * position)
    assert kv.read == (4 + 100 + 8 + 3 + 8) * position
    assert KVPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert "reader_windows" not in layout(stores, ["new full", "new local"]).to_dict()
    cut = layout(stores, pattern, num_layers=5, window=3)
    assert cut.reader_windows == (3, None, None, None, None)
    for wrong in ([4], [0] * 5, ["4"] * 5):
        with pytest.raises(TypeError, match="reader_windows are no windows"):
            KVPlan.from_dict(plan.to_dict() | {"reader_windows": wrong})


def test_a_layer_reads_two_stores() -> None:
    """What is stored is the writers'; a step reads the keys of one and the values of the other, or all of both."""
    from arch.footprint import kv_bytes

    stores = {"first": {"kv_heads": 2, "v_dim": 4}, "kv": {"kv_heads": 2}, "like": {"kv_heads": 2}}
    writers = ["new first", "new kv", "new like"]
    readers = ["reuse kv window=3 values=first", "reuse kv values=first", "reuse kv mix=like"]
    plan = layout(stores, [*writers, *readers], num_layers=6)
    assert str(plan) == "0 1 2 1s/0 1/0 1+2"
    assert plan.sources(3) == ((1,), (0,)) and plan.sources(5) == ((1, 2), (1, 2)) and plan.sources(2) == ((2,), (2,))
    assert plan.readers(plan.stores[1]) == (1, 3, 4, 5) and plan.second_readers(plan.stores[0]) == (3, 4)
    assert [plan.last_reader(number) for number in range(3)] == [4, 5, 5] and plan.tail == 2
    wide, narrow, context = 2 * 2 * (8 + 8), 2 * 2 * (8 + 4), 7
    kv = kv_bytes(plan, context)
    assert kv.per_token == narrow + 2 * wide
    assert kv.read == context * (narrow + 2 * wide) + 3 * narrow + context * narrow + context * 2 * wide
    again = KVPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan and again.views == plan.views
    assert "second_reads" not in layout(TWO, ["new kv", "new far"]).to_dict()
    for wrong in ([None], [["values", 3]] * 6, [["keys", 0]] * 6, [0] * 6, [["values"]] * 6, 5):
        with pytest.raises(TypeError):
            KVPlan.from_dict(plan.to_dict() | {"second_reads": wrong})
