"""The remote decoder computes what ours does, and keeps the cache that the plan promises, for every layout it holds."""

import copy
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DECODERS, ROOT, WINDOW, build, covering, small, tokens, whole_depth
from conversions import from_hf, to_hf
from safetensors.torch import save_file
from test_train_export import QUIET, write_checkpoint
from torch.nn import functional as F

from arch import ArchConfig, Decoder, LatentConfig, ModelConfig, StoreConfig, generate, resolve
from arch import build as build_model
from arch.config import RopeScalingConfig
from arch.convert import ConversionError, UnsupportedModelError
from arch.convert_remote import FILES, from_hf_config, to_hf_config
from arch.convert_stock import GEMMA3, OLMO
from arch.footprint import kv_bytes
from arch.named import load_arch
from eval.transformers_model import TransformersModel
from train import checkpoint
from train.export import export
from train.hub.checkpoint_reader import CheckpointReader
from train.hub.request import ExportConfig
from train.hub.targets import TRANSFORMERS_FLOOR

transformers = pytest.importorskip("transformers", minversion=TRANSFORMERS_FLOOR)

from train.hf import KVFrontierConfig, KVFrontierForCausalLM

REFUSED = {"mla": "latent", "bct": "slots", "bct_gated": "slots", "bct_ring": "slots", "bct_mixed": "slots"}
REFUSED |= {"mimo": "k_dim, v_dim", "qwen3_next": "matrix", "kimi_linear": "matrix"}
REFUSED |= {"cla4_window": "reader_windows", "fusedkv": "mix", "deepseek_v4_hca": "stride", "gemma4": "k_dim, v_dim"}
REFUSED |= {"llama4": "chunk", "mtla": "stride"}
REFUSED |= {  # layouts of one's own
    name: "slots" if any(store.slots for store in load_arch(name).stores.values()) else "latent"
    for name in set(DECODERS) - set(REFUSED)
    if any(store.slots or store.latent for store in load_arch(name).stores.values())
}
# Two windows, three numbers of heads, two rotary bases, three rotary widths, sinks, a norm, and a reader of what is not
# the latest.
MIXED = ArchConfig(
    {
        "short": StoreConfig(2, window=4, rope_theta=500.0, sinks=True),
        "long": StoreConfig(4, window=7, kv_norm=True, rope="1/2"),
        "global": StoreConfig(1),
        "same": StoreConfig(1, rope="none"),
    },
    ["new short", "new long", "new global", "reuse short", "new same", "reuse global", "reuse long", "reuse short"],
)
# Keys that are values, in part rotated, with a window and sinks, or not at all; and one projection for both.
TIED = ArchConfig(
    {
        "near": StoreConfig(2, tied="vector", window=4, rope="1/2", sinks=True),
        "both": StoreConfig(4, tied="projection", kv_norm=True),
        "plain": StoreConfig(1, tied="vector", rope="none"),
    },
    ["new near", "reuse near", "new both", "reuse near", "new plain", "reuse both"],
)
# The styles of Gemma 3 and OLMo 2 with sharing, sinks and rotations scaled by each rule.
GEMMA = ArchConfig(
    {
        "near": StoreConfig(2, window=4, rope_theta=50.0, sinks=True),
        "far": StoreConfig(2, rope_scaling=RopeScalingConfig("linear", 8.0)),
        "both": StoreConfig(4, tied="projection", rope_scaling=RopeScalingConfig("llama3", 4.0, 16)),
    },
    ["new near", "new far", "reuse near", "new both", "reuse both"],
)
OLMO2 = ArchConfig(
    {
        "far": StoreConfig(2, rope_scaling=RopeScalingConfig("yarn", 4.0, 16), kv_norm=True),
        "both": StoreConfig(4, tied="projection", window=5),
    },
    ["new far", "reuse far", "new both", "reuse both"],
)
OWN = {"mixed": MIXED, "tied": TIED, "gemma-style": GEMMA, "olmo-style": OLMO2}
STYLES = {"gemma-style": GEMMA3, "olmo-style": OLMO}
WHOLE = {"window": None, "num_layers": 8}
LAYOUTS = [name for name in DECODERS if name not in REFUSED] + list(OWN)
OF_KINDS = [*covering(name for name in LAYOUTS if name not in OWN), *OWN]
LENGTH = 10  # of the prompt; more than any window
STEPS = 2 * WINDOW + 3


def depth(name: str) -> dict[str, int]:
    """The least number of layers, from four on, that shows all of a pattern."""
    return {"num_layers": whole_depth(name, least=4)}


@cache
def pair(name: str, **changes: Any) -> tuple[Decoder, Any]:
    """Ours and theirs with the same weights, in fp64, no two norms or sinks alike."""
    config = (
        small(OWN[name], **(WHOLE | {"num_layers": len(OWN[name].pattern)} | STYLES.get(name, {}) | changes))
        if name in OWN
        else small(name, **(depth(name) | changes))
    )
    ours = build(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
    theirs = KVFrontierForCausalLM(KVFrontierConfig(**to_hf_config(config))).double().eval()
    load(theirs, config, ours.state_dict())
    return ours, theirs


def load(theirs: Any, config: ModelConfig, weights: dict[str, torch.Tensor]) -> None:
    report = theirs.load_state_dict(to_hf("remote", config, weights), strict=False)
    assert report.missing_keys == (["lm_head.weight"] if config.size.tie_embeddings else [])
    assert not report.unexpected_keys


def greedy(theirs: Any, prompt: torch.Tensor, **how: Any) -> list[list[int]]:
    with torch.no_grad():
        whole = theirs.generate(prompt, max_new_tokens=STEPS, do_sample=False, **how)
    return whole[:, prompt.shape[1] :].tolist()


def storages(kv_cache: Any) -> int:
    """Bytes behind a cache of transformers; layers that reuse have none."""
    held = [(layer.keys, layer.values) for layer in kv_cache.layers if getattr(layer, "keys", None) is not None]
    return sum(tensor.untyped_storage().nbytes() for both in held for tensor in both)


def expected_cache_bytes(
    config: KVFrontierConfig, context: int, batch: int = 1, itemsize: int = 2, new_tokens: int = 1
) -> int:
    """Bytes of the storages behind the keys and values that a dynamic cache holds after `context` tokens, the last
    `new_tokens` of which were given together; of a static cache, with `context` its length.

    A sliding layer of transformers keeps window - 1 positions between two steps, but as a view of the tensor that the
    last step attended to, which had the new tokens too: after a step of one token that is the window, and after a
    prompt it is the whole prompt, until the next step.
    """
    elements = 0
    for layer, window in enumerate(config.windows):
        if config.kv_source_layers[layer] == layer:
            positions = context if window is None else min(context, window - 1 + new_tokens)
            tensors = 1 if config.tied[layer] == "vector" else 2
            elements += config.key_value_heads[layer] * tensors * config.head_dim * positions
    return batch * itemsize * elements


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_model(name: str) -> None:
    """Logits, gradients with and without checkpointing, and the way back; readers have no weights for keys."""
    ours, theirs = pair(name)
    batch = tokens(2, LENGTH + STEPS)
    with torch.no_grad():
        expected = ours(batch)
        torch.testing.assert_close(theirs(batch).logits, expected, rtol=0, atol=1e-12)
        single = [copy.deepcopy(model).float() for model in (ours, theirs)]
        torch.testing.assert_close(single[1](batch).logits, single[0](batch), rtol=0, atol=1e-5)
        eager = copy.deepcopy(theirs)
        eager.set_attn_implementation("eager")
        torch.testing.assert_close(eager(batch).logits, expected, rtol=0, atol=1e-12)

    owners = {i for i, owner in enumerate(ours.plan.owners) if owner == i}
    for kind in ("k_proj", "v_proj"):
        names = [name for name, _ in theirs.named_parameters() if kind in name or "kv_proj" in name]
        assert {int(name.split(".")[2]) for name in names} == owners
    assert theirs.config.kv_source_layers == list(ours.plan.owners)
    hf = json.loads(theirs.config.to_json_string())  # as any tool writes it
    config, weights = from_hf(hf, theirs.state_dict())
    assert to_hf_config(config) == to_hf_config(ours.config)
    assert [store.owner for store in resolve(config).stores] == [store.owner for store in ours.plan.stores]
    assert all(torch.equal(weights[key], value) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("name", OF_KINDS)
def test_gradients(name: str) -> None:
    """Ours, and theirs with and without checkpointing, of both kinds."""
    ours, theirs = pair(name)
    theirs = copy.deepcopy(theirs).train()
    batch = tokens(2, LENGTH)
    found = []
    for how in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if how is not None:
            theirs.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        out = theirs(batch, labels=batch, use_cache=how is None)
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        torch.testing.assert_close(out.loss.double(), loss, rtol=0, atol=1e-5)  # computed in fp32
        loss.backward()
        found.append({key: parameter.grad for key, parameter in theirs.named_parameters()})
        theirs.zero_grad(set_to_none=True)
    assert all(torch.equal(found[0][key], other[key]) for other in found[1:] for key in found[0])

    ours.zero_grad(set_to_none=True)
    F.cross_entropy(ours(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
    expected = to_hf("remote", ours.config, {key: parameter.grad for key, parameter in ours.named_parameters()})
    for key, gradient in expected.items():
        torch.testing.assert_close(found[0][key], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OF_KINDS)
def test_generation(name: str) -> None:
    """Greedy tokens of every cache, of prompts shorter and longer than the window, alone and padded to one batch."""
    ours, theirs = pair(name)
    short, padded = tokens(1, 3), torch.full((2, LENGTH), 7)
    padded[0, LENGTH - 3 :], padded[1] = short[0], tokens(1, LENGTH)[0]
    mask = torch.ones_like(padded)
    mask[0, : LENGTH - 3] = 0
    expected = generate(ours, [short[0].tolist(), padded[1].tolist()], STEPS)
    assert greedy(theirs, short) == expected[:1]
    assert greedy(theirs, padded, attention_mask=mask) == expected
    assert greedy(theirs, padded, attention_mask=mask, cache_implementation="static", disable_compile=True) == expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_cache_bytes(name: str) -> None:
    """Chunk by chunk and step by step: logits as without a cache, and the storages that were promised."""
    ours, theirs = pair(name)
    batch = tokens(3, 27)
    kv_cache, seen = None, 0
    with torch.no_grad():
        expected = ours(batch)
        for chunk in (1, 1, 3, 7, 1, 1, 5, 1, 1, 1, 5):
            out = theirs(batch[:, seen : seen + chunk], past_key_values=kv_cache)
            kv_cache, seen = out.past_key_values, seen + chunk
            torch.testing.assert_close(out.logits, expected[:, seen - chunk : seen], rtol=0, atol=1e-12)
            assert storages(kv_cache) == expected_cache_bytes(theirs.config, seen, 3, 8, new_tokens=chunk)
            if chunk == 1:  # what a step leaves behind is what the plan says, window and all
                assert storages(kv_cache) == 3 * kv_bytes(ours.plan, seen, 8).stored
        how = {"cache_implementation": "static", "disable_compile": True, "return_dict_in_generate": True}
        static = theirs.generate(batch, max_new_tokens=4, do_sample=False, **how).past_key_values
    assert storages(static) == expected_cache_bytes(theirs.config, 27 + 3, 3, 8)


@pytest.mark.parametrize("how", ["growing", "static", "evaluation"])
def test_caches_that_a_caller_makes_have_every_window(how: str) -> None:
    """As the documentation of transformers makes them, from the configuration, which has one window for all layers."""
    _, theirs = pair("mixed")
    batch = tokens(1, LENGTH + 2)
    with torch.no_grad():
        if how == "static":
            held = transformers.StaticCache(config=theirs.config, max_cache_len=LENGTH + STEPS)
            expected = greedy(theirs, batch[:, :LENGTH])
            assert greedy(theirs, batch[:, :LENGTH], past_key_values=held, disable_compile=True) == expected
            assert storages(held) == expected_cache_bytes(theirs.config, LENGTH + STEPS, itemsize=8)
            return
        model = TransformersModel(theirs)
        kv_cache = model.allocate_cache(1, LENGTH + 2)
        held = kv_cache.values if how == "evaluation" else transformers.DynamicCache(config=theirs.config)
        for part in batch.split([LENGTH, 1, 1], dim=1):
            if how == "evaluation":
                model(part, kv_cache)
            else:
                theirs(part, past_key_values=held)
    assert storages(held) == expected_cache_bytes(theirs.config, LENGTH + 2, itemsize=8)


@pytest.mark.parametrize("name", ["mixattention", "mixed", "tied"])
def test_other_ways_to_generate(name: str) -> None:
    """Without a cache, in batches without padding, beams, chunked prefill, an assistant, going on with a cache."""
    ours, theirs = pair(name)
    for length in (3, LENGTH):
        prompt = tokens(2, length)
        expected = generate(ours, prompt.tolist(), STEPS)
        assert greedy(theirs, prompt) == expected
        assert greedy(theirs, prompt, cache_implementation="static", disable_compile=True) == expected
    assert greedy(theirs, prompt, use_cache=False) == expected
    assert greedy(theirs, prompt, num_beams=2) == greedy(theirs, prompt, num_beams=2, use_cache=False)
    assert greedy(theirs, prompt, prefill_chunk_size=4) == expected
    how = {"cache_implementation": "static", "disable_compile": True, "prefill_chunk_size": 4}
    assert greedy(theirs, prompt, **how) == expected
    other = copy.deepcopy(theirs)
    other.model.norm.weight.data += torch.linspace(0, 2, other.config.hidden_size)  # another's tokens are taken back
    assert greedy(theirs, prompt[:1], assistant_model=other) == expected[:1]
    how = {"return_dict_in_generate": True, "do_sample": False}
    first = theirs.generate(prompt, max_new_tokens=5, **how)
    rest = theirs.generate(first.sequences, max_new_tokens=STEPS - 5, past_key_values=first.past_key_values, **how)
    assert rest.sequences[:, LENGTH:].tolist() == expected


def test_one_whole_graph() -> None:
    """Without a cache, and a step over a static one."""
    ours, theirs = pair("mixed", num_layers=4)
    theirs = copy.deepcopy(theirs)
    prompt = tokens(2, LENGTH)
    compiled = torch.compile(theirs, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(prompt, use_cache=False).logits, ours(prompt), rtol=0, atol=1e-12)
    whole = transformers.CompileConfig(fullgraph=True, backend="eager", mode=None)
    whole._compile_all_devices = True  # generate leaves it out on CPU
    expected = generate(ours, prompt.tolist(), STEPS)
    assert greedy(theirs, prompt, cache_implementation="static", compile_config=whole) == expected
    assert theirs._last_compile_config == whole
    torch._dynamo.reset()


def test_outputs_and_labels() -> None:
    ours, theirs = pair("mixed")
    batch = tokens(2, LENGTH)
    with torch.no_grad():
        out = theirs(batch, output_hidden_states=True, output_attentions=True)
        assert len(out.hidden_states) == 9 and len(out.attentions) == 8
        torch.testing.assert_close(theirs(batch, logits_to_keep=2).logits, out.logits[:, -2:], rtol=0, atol=0)
        kept = torch.tensor([1, 4])
        torch.testing.assert_close(theirs(batch, logits_to_keep=kept).logits, out.logits[:, kept], rtol=0, atol=0)
        embeds = theirs.get_input_embeddings()(batch)
        torch.testing.assert_close(theirs(inputs_embeds=embeds).logits, out.logits, rtol=0, atol=0)
        assert theirs(batch, return_dict=False)[0].equal(out.logits)
    with pytest.raises(ValueError, match="one of them"):
        theirs(batch, inputs_embeds=embeds)
    torch.testing.assert_close(out.hidden_states[-1] @ ours.embed.weight.T, out.logits)


@pytest.mark.parametrize("name", ["mixed", "yoco", "mha"])
def test_prefill_stops_at_the_last_keys(name: str) -> None:
    """Logits and cache as without, for prompts without padding, padded left and right, in chunks, and over a static
    cache; and no layer from the last that computes keys on runs on more than the last position. Not where others are
    asked for."""
    _, theirs = pair(name)
    tail, ran = max(theirs.config.kv_source_layers), []
    hooks = [
        layer.mlp.register_forward_hook(lambda _, inputs, out, n=n: ran.append((n, inputs[0].shape[1])))
        for n, layer in enumerate(theirs.model.layers)
    ]
    batch, left = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.int64)
    left[0, :4] = 0

    def check(keep: int, cut: bool, **how: Any) -> Any:
        whole = theirs(batch, **how).logits
        ran.clear()
        static = transformers.StaticCache(theirs.config, 2 * LENGTH) if how.get("use_cache") else None
        out = theirs(batch, logits_to_keep=keep, past_key_values=static, **how)
        expected = [(n, keep if cut and n >= tail else LENGTH) for n in range(len(theirs.model.layers))]
        assert ran == expected
        torch.testing.assert_close(out.logits, whole[:, -keep:], rtol=0, atol=1e-12)
        return out

    with torch.no_grad():
        for mask in (None, left, left.flip(1)):
            check(1, True, attention_mask=mask)
            check(1, True, attention_mask=mask, use_cache=True)
        check(3, False)
        check(1, False, output_hidden_states=True)
        kv_cache = theirs(batch[:, :6], logits_to_keep=1).past_key_values
        ran.clear()
        chunked = theirs(batch[:, 6:], past_key_values=kv_cache, logits_to_keep=1).logits
        assert ran == [(n, LENGTH - 6 if n < tail else 1) for n in range(len(theirs.model.layers))]
        torch.testing.assert_close(chunked, theirs(batch).logits[:, -1:], rtol=0, atol=1e-12)
    for hook in hooks:
        hook.remove()


def test_sinks_are_never_left_out() -> None:
    """torch's sdpa takes none: not chosen by default, refused when asked for, and refused if forced."""
    config = to_hf_config(small("swa_sinks"))
    assert KVFrontierForCausalLM(KVFrontierConfig(**config)).config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        KVFrontierForCausalLM._from_config(KVFrontierConfig(**config), attn_implementation="sdpa")
    _, theirs = pair("swa_sinks")
    forced = copy.deepcopy(theirs)
    forced.config._attn_implementation_internal = "sdpa"
    with pytest.raises(ValueError, match="sdpa takes no attention sinks"):
        forced(tokens(1, 3))
    assert pair("cla2")[1].config._attn_implementation == "sdpa"


def test_sinks_that_a_checkpoint_lacks_are_zero(tmp_path: Path) -> None:
    """Not whatever the memory held."""
    _, theirs = pair("swa_sinks", num_layers=7)
    weights = theirs.state_dict().items()
    kept = {name: tensor for name, tensor in weights if "sinks" not in name and "lm_head" not in name}
    theirs.config.save_pretrained(tmp_path)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    junk = [torch.ones(8, dtype=torch.float64) for _ in range(1000)]
    del junk
    again, report = KVFrontierForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    sinks = [parameter for name, parameter in again.named_parameters() if "sinks" in name]
    assert len(report["missing_keys"]) == len(sinks) == 7
    assert not torch.cat(sinks).any()


def test_masks_that_leave_windows_out_are_refused() -> None:
    """Of a caller that knows one window size, as `generate_batch` of transformers does; that of one size works."""
    _, theirs = pair("mixed")
    whole = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="dict of masks by name: sliding_attention_4, sliding_attention, full"):
        theirs(tokens(1, 3), attention_mask=whole)
    with pytest.raises(ValueError, match="no attention mask for sliding_attention_4"):
        theirs(tokens(1, 3), attention_mask={"sliding_attention": whole, "full_attention": whole})
    ours, theirs = pair("mixattention")
    masks = {"sliding_attention": whole, "full_attention": whole}  # three tokens are in every window
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens(1, 3), attention_mask=masks).logits, ours(tokens(1, 3)))


def test_readers_have_no_cache_and_kv_sharing_modes_say_so() -> None:
    _, theirs = pair("mixed")
    assert theirs.config.kv_sharing_modes == ["store", "store", "store", "reuse", None, "reuse", "reuse", "reuse"]
    assert theirs.config.mask_names[:3] == ["sliding_attention_4", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_source_layers": [0, 0, 1, 3, 4, 5, 6, 7]}, "layer 2 reads layer 1; it must read itself"),
        ({"kv_source_layers": [0, 1, 2, 4, 4, 5, 6, 7]}, "layer 3 reads layer 4; it must read itself"),
        ({"kv_source_layers": [0, 1]}, "kv_source_layers has 2 entries; num_hidden_layers is 8"),
        ({"kv_source_layers": [0, 0, 2, 0, 4, 5, 6, 0]}, "layer 1 reads layer 0; their windows differ: 7, not 4"),
        (
            {"value_source_layers": [0, 1, 2, 0, 2, 2, 1, 0]},
            "layer 4 reads values of layer 2; it must write none itself",
        ),
        (
            {"value_source_layers": [0, 1, 2, 0, 4, 2, 1, 1]},
            "layer 7 reads keys of layer 0 and values of layer 1; their windows differ",
        ),
        ({"layer_types": ["full_attention"] * 8}, "layer 0: full_attention with a window of 4"),
        ({"layer_types": ["linear_attention"] * 8}, "layer 0: layer type 'linear_attention'"),
        ({"layer_sliding_windows": [1, 7, None, 1, None, None, 7, 1]}, "layer 0: a window of 1"),
        ({"sliding_window": 4}, "sliding_window is 4; the layers' largest is 7"),
        ({"layer_key_value_heads": [3, 4, 1, 3, 1, 1, 4, 3]}, "layer 0: 3 key/value heads do not divide 8"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "it must be of rope_type default"),
        ({"layer_kv_norms": [True] * 8}, "layer 3 reads layer 0 and projects nothing"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"qk_norm": "heads"}, "qk_norm is 'heads'; it must be one of None, head, all"),
        ({"norm_placement": "post"}, "norm_placement is 'post'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"layer_rope_scaling": [{"rope_type": "linear"}] + [None] * 7}, "it is linear, llama3 or yarn, in whole"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, Any], message: str) -> None:
    config = to_hf_config(small(MIXED, **WHOLE))
    KVFrontierConfig(**config)
    with pytest.raises(ValueError) as error:
        KVFrontierConfig(**(config | change))
    assert message in str(error.value)


def test_what_it_cannot_hold_is_refused(arch: str) -> None:
    if arch in REFUSED:
        with pytest.raises(UnsupportedModelError, match=f"^- {REFUSED[arch]}: "):
            to_hf_config(small(arch))
    with pytest.raises(UnsupportedModelError, match=r"(?m)^- size.style: "):
        to_hf_config(small(arch, style="neox"))


def test_block_transformers_and_two_reasons_are_refused() -> None:
    from arch import BlockConfig

    config = small("mha")
    config.arch.block = BlockConfig()
    with pytest.raises(UnsupportedModelError, match=r"^- block: "):
        to_hf_config(config)
    both = ArchConfig({"a": StoreConfig(latent=LatentConfig()), "b": StoreConfig(2, window=1)}, ["new a", "new b"])
    with pytest.raises(UnsupportedModelError, match=r"(?s)^- latent: `a`.*\n- window: "):
        to_hf_config(small(both))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"kv_source_layers": None}, "kv_source_layers is missing"),
        ({"kv_source_layers": [0] * 7}, "kv_source_layers does not have 8 entries"),
        ({"kv_source_layers": [0, 1, 2, 9, 4, 2, 1, 0]}, "kv_source_layers is "),
        (
            {"kv_source_layers": [0, 1, 2, 9, 4, 2, 1, 0], "hidden_act": "relu"},
            "kv_source_layers is [0, 1, 2, 9, 4, 2, 1, 0]; layers read themselves, or an earlier one that does\n"
            "- hidden_act is 'relu'",
        ),
        (
            {"value_source_layers": [0, 0] + [2] * 6, "qk_norm": 3},
            "value_source_layers is [0, 0, 2, 2, 2, 2, 2, 2]; a layer that writes reads its own, others a layer that "
            "writes\n- qk_norm is 3",
        ),
        ({"layer_sinks": [True] + [False] * 7}, "layer_sinks is "),  # ours have them in all readers of a store
        ({"layer_types": ["full_attention"] * 8}, "layer_types is "),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0}}, "rope_parameters is "),
        ({"layer_rope_scaling": [{"rope_type": "dynamic"}] + [None] * 7}, "layer_rope_scaling is "),
        ({"layer_rope_scaling": [{"rope_type": "linear"}] + [None] * 7}, "layer_rope_scaling.factor is None"),
        ({"qk_norm": 3}, "qk_norm is 3"),
        ({"norm_placement": None}, "norm_placement is None"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"scale_embeddings": 1}, "scale_embeddings is 1"),
    ],
)
def test_configs_that_ours_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    hf = to_hf_config(small(MIXED, **WHOLE))
    assert to_hf_config(from_hf_config(hf)) == hf
    with pytest.raises(ConversionError) as error:
        from_hf_config(hf | change)
    assert str(error.value).startswith(f"- {message}")


FRESH = """
import json, sys, torch
junk = [torch.randn(1 << 16) for _ in range(64)]  # so that memory nobody wrote to holds no zeros
del junk
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
for folder in sys.argv[1:]:
    torch.manual_seed(0)
    batch, expected = (torch.load(f"{folder}/{name}.pt", weights_only=True) for name in ("batch", "logits"))
    for attempt in range(3):
        model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(report.values()), report
        assert model.dtype == torch.float64
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(batch).logits, expected, rtol=0, atol=1e-12)
            base = AutoModel.from_pretrained(folder, trust_remote_code=True)
            states = base(batch).last_hidden_state
            torch.testing.assert_close(states @ model.get_output_embeddings().weight.T, expected)
        if attempt == 1:  # as somebody does who trained it further
            folder += "-again"
            model.save_pretrained(folder)
            torch.save(batch, f"{folder}/batch.pt"), torch.save(expected, f"{folder}/logits.pt")
    auto_map = AutoConfig.from_pretrained(folder, trust_remote_code=True).auto_map
    more = [] if "block" in folder else ["AutoModelForSequenceClassification"]
    assert sorted(auto_map) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM", *more]
    if more:
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
        assert classifier(batch[:1]).logits.shape == (1, 3)
assert not any(name.partition(".")[0] in ("arch", "train") for name in sys.modules)
print("same")
"""


def test_fresh_process_without_this_repository(tmp_path: Path, corpus: Path) -> None:
    """From a folder, twice, and from what `save_pretrained` makes of it; no tensor missing or left over. The target
    that ships the files of arch, too."""
    source = write_checkpoint(tmp_path / "step-00000003", "block", num_layers=4)
    export(ExportConfig(str(source), str(tmp_path / "block"), prepared=str(corpus), verify=False), QUIET)
    config = json.loads((tmp_path / "block" / "config.json").read_text())
    (tmp_path / "block" / "config.json").write_text(json.dumps(config | {"dtype": "float64", "torch_dtype": "float64"}))
    shipped = build_model(CheckpointReader(source).model()[0])
    checkpoint.load(source, shipped)
    batch = tokens(2, LENGTH + 1)
    torch.save(batch[:, :-1], tmp_path / "block" / "batch.pt")
    with torch.no_grad():
        torch.save(shipped.double().next_token_logits(batch[:, :-1]), tmp_path / "block" / "logits.pt")
    for name, tied in (("mixed", True), ("tail_sharing", False)):
        ours, _ = pair(name, tie_embeddings=tied)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(to_hf_config(ours.config) | {"dtype": "float64"}))
        weights = to_hf("remote", ours.config, ours.state_dict())
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for file in FILES:
            shutil.copy(ROOT / "train" / "hf" / file, folder)
        batch = tokens(2, LENGTH)
        torch.save(batch, folder / "batch.pt")
        with torch.no_grad():
            torch.save(ours(batch), folder / "logits.pt")
    installed = str(Path(transformers.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *(str(tmp_path / name) for name in ("mixed", "tail_sharing", "block"))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": installed, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        timeout=240,
    )
    assert done.stdout == "same\n", done.stderr
