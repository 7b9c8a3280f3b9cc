"""Compressed caches: bytes are those of the formula, codecs round as they should, and what is left whole is exact."""

import itertools
import math
import re
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import ARCHS, build, small, tokens, whole_depth

from arch import ArchConfig, LatentConfig, MatrixConfig, StoreConfig, allocate, resolve
from arch.attend import Mask, reference, sdpa
from arch.compression.checks import check_method
from arch.compression.coding import (
    FP8,
    FP8_TO_FP16,
    decode,
    encode,
    fp8_as_fp16,
    hadamard_matrix,
    pack,
    rotate_hadamard,
    unpack,
)
from arch.compression.compressed import KeptKernel, allocate_compressed
from arch.compression.method import CODECS, KEEPS, Budget, CacheMethod, CodecSpec, parse_method
from arch.compression.small_buffers import CodedBuffer, CodedTensor, KeptBuffer
from arch.compression.storage import (
    TensorLayout,
    coded_layouts,
    compressed_bytes,
    keeps,
    kept_slots,
    offloaded_bytes,
    state_layout,
    tensor_layouts,
)
from arch.compression.xkv import XkvBuffer
from arch.compression.zipcache import ZipCacheBuffer
from arch.layers import rope_table, rotate
from arch.masks import Dense
from arch.plan import KVPlan

CODEC_TEXTS = (
    "bf16",
    "fp8(group=5)",
    "int8",
    "int4(group=64,recent=0)",  # larger than the cache
    "int4(keys=token,group=3,recent=2,hadamard=true,clip=0.95)",
    "int2(group=4,recent=3)",
)
KEEP_TEXTS = (
    "zipcache(recent=3,group=4)",
    "zipcache(recent=0,salient=0.01)",
    "think(recent=3)",
    "think(ratio=1,recent=0)",
    "int4(group=4)+think(recent=0)",
    "xkv(stores=3,recent=2)",
    "int4(group=4)+xkv(rank_k=1,rank_v=0.5,recent=0)",
    "streaming@25%",
    "streaming@1",
    "streaming@3(sinks=0)",
    "streaming@2KiB",
    "streaming@1000",
)
SCORED = (
    "random@40%",
    "knorm@1",
    "snapkv@7",
    "snapstream(ring=3)@7",
    "h2o@50%",
    "scissorhands(recent=0,sinks=0,merge=true)@5",
    "prefixkv@9(sinks=2)",
    "prefixkv@1KiB(recent=0,sinks=9)",
    "corm(window=4,sinks=1)",
    "corm(window=4,every=2)",
    "snapkv@3(window=1,every=2,windows=true)",
    "corm(window=2,every=1,windows=true)",
    "knorm@1(every=1,windows=true)",
    "int8(group=2,recent=1)+scissorhands@50%(history=3,recent=1,every=1,windows=true)",
    "prefixkv@9(recent=3,sinks=2,every=1)",
    "arkvale@8(page=2,recent=2)",
    "int4(group=3)+arkvale@90%(page=4,sinks=1,digest=box)",
    "h2o@9(every=2)",
    "snapkv@5(window=3,every=1)",
    "int8(group=4,recent=2)+scissorhands@4(history=3,recent=2,every=2,merge=true)",
)
FULL = (  # nothing to do in a prompt of 13 tokens, or in all 21
    "none",
    *(f"{name}@15" for name in ("streaming", "random", "knorm", "snapkv", "snapstream", "h2o", "scissorhands")),
    "prefixkv@15",
    *(f"{name}(recent=15)" for name in ("think", "zipcache", "xkv")),
    "corm(window=15)",
    "h2o@100%(every=20,windows=true)",
    "snapkv@13(every=8,windows=true)",
    "arkvale@21",
)
OF_KEYS = ("think", "zipcache", "arkvale")  # compare queries with keys, which latents are not
METHODS = (
    *CODEC_TEXTS,
    *KEEP_TEXTS,
    *SCORED,
    "knorm@30(every=2)",  # more than there is, until tokens are added
    "random@1(every=4)",
    "arkvale@1",
    "arkvale@30(page=3,recent=0,sinks=99,topk=99)",
    "h2o@100%(every=40)",
    "h2o@100%(every=40,windows=true)",
    "prefixkv@6KiB-total",
    "int8+snapkv@9",
    "int4(group=4,recent=2)+streaming@50%",
    "int8+streaming@9",
)


def test_methods_are_read() -> None:
    assert parse_method("none") == CacheMethod() and parse_method("none").is_none
    method = parse_method(" int4(group=16, recent=8) + streaming@12.5%(sinks=2)")
    assert method.text == "int4(group=16,recent=8)+streaming@12.5%(sinks=2)"
    assert method.codec == CodecSpec("int4", 16, 8, "channel")
    assert method.keep is not None and method.keep.budget is not None and method.keep.options == {"sinks": 2}
    budgets = {"0.5%": ("share", Fraction(1, 200)), "64": ("tokens", Fraction(64))}
    budgets |= {"1KiB": ("bytes", Fraction(1024)), "1.5KB-total": ("total", Fraction(1500))}
    for text, expected in budgets.items():
        keep = parse_method(f"streaming@{text}").keep
        assert keep is not None and keep.budget == Budget(*expected), text
    assert [Budget(*budgets["0.5%"]).tokens(prompt) for prompt in (1, 399, 400)] == [1, 1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int3", "no cache method 'int3'; codecs are bf16"),
        ("", "cannot read ''"),
        ("int4+int8", "two codecs"),
        ("streaming@1+streaming@2", "two keeps"),
        ("int4@25%", "takes no budget"),
        ("streaming@25%-total", "cannot read the budget"),
        ("streaming@64-total", "or streaming@1MiB-total of each sequence"),
        ("streaming", "needs a budget: streaming@25% of the prompt"),
        ("streaming@1.5", "no whole number of tokens"),
        ("streaming@many", "cannot read the budget"),
        ("int4(group=0)", "at least 1"),
        ("int4(recent=99999999)", "at most 16,777,216"),
        ("int4(group=4,group=8)", "int4(group) is given twice"),
        ("int4(group=\u0663)", "a whole number"),
        ("streaming@\u0663", "cannot read the budget"),
        ("streaming@0", "keeps nothing"),
        ("snapkv@0.0%", "keeps nothing"),
        ("snapkv@200%", "keeps more than there is"),
        ("snapkv@0B", "keeps nothing"),
        ("int4(recent=-1)", "at least 0"),
        ("int4(keys=head)", "channel or token"),
        ("int4(hadamard=2)", "true or false"),
        ("int4(clip=0)", "above 0"),
        ("bf16(group=4)", "bf16 has no option 'group=4'; its options and their defaults: recent=0"),
        ("int4+zipcache", "codecs of its own"),
        ("snapkv@25%(windows=true)", "needs every, as every=16: a window lets go of what was chosen once"),
        ("prefixkv@25%(windows=true,every=2)", "prefixkv does not act on windows: it shares bytes among stores"),
        ("xkv(windows=true)", "xkv does not act on windows: it acts once, on the prompt, which leaves them"),
        ("int4(windows=true)", "int4 has no option 'windows=true'"),
        ("arkvale@25%(page=0)", "at least 1"),
        ("arkvale@25%(digest=ball)", "mean or box"),
        ("think@25%", "takes no budget, every token stays"),
        ("corm@25%", "takes no budget, what stays depends on attention alone"),
        ("none+int4", "write int4"),
        ("csr", "a dictionary that is trained for each model beforehand"),
        ("xkv@4x0.25", "xkv takes no budget, every token stays; leave out @4x0.25"),
        ("xkv(stores=0)", "at least 1"),
        ("xkv(rank_k=1.5)", "above 0 and at most 1"),
        ("xkv+snapkv@25%", "two keeps"),
    ],
)
def test_wrong_methods_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        parse_method(text)


@pytest.mark.parametrize("text", ["x" * 9999, "int4" + "+int4" * 9999, f"int4({'a' * 9999})", "h2o@" + "9" * 9999])
def test_messages_are_of_one_short_line(text: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse_method(text)
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


def agrees(plans: list[KVPlan], method: CacheMethod) -> bool:
    """Tell whether a keep leaves the same positions of two stores that a layer reads together."""
    seconds = [second.how for plan in plans for second in plan.second_reads if second]
    agreeing = ("streaming", "xkv") if "mix" in seconds else ("streaming", "think", "xkv")
    return not seconds or method.keep is None or method.keep.name in agreeing


def one_tensor(plans: Iterable[KVPlan]) -> bool:
    """Tell whether keys and values of a store that grows are one tensor."""
    return any(keeps(s) and not s.slot.latent_dim and not s.slot.v_dim for p in plans for s in p.stores)


@pytest.mark.parametrize("name", ARCHS)
def test_allocated_bytes_are_those_of_the_formula(name: str) -> None:
    """Before and after compression, for codec x keep x layout, in two types of element."""
    plan = resolve(small(name))
    stacks = [stack.plan for stack in plan.stacks]
    windows = any(s.masked and s.window for p in stacks for s in p.stores)
    for text in METHODS:
        if "windows" in text and not windows:  # as without
            continue
        method = parse_method(text)
        if any(p.reader_windows for p in stacks):
            with pytest.raises(
                ValueError, match=r"layer \d sees the last 6 positions of store kv, and a compressed cache"
            ):
                allocate_compressed(plan, 1, 8, dtype=torch.float32, method=method)
            continue
        if not agrees(stacks, method):
            with pytest.raises(ValueError, match=r"reads stores kv and first together, and .* would keep other"):
                allocate_compressed(plan, 1, 8, dtype=torch.float32, method=method)
            continue
        if method.codec and not any(coded_layouts(s, method.codec) for p in stacks for s in p.stores):
            with pytest.raises(ValueError, match=f"every store {stacks[0].stores[0].summary}, and codecs"):
                allocate_compressed(plan, 1, 8, dtype=torch.float32, method=method)
            continue
        if method.keep and not any(keeps(s, method.keep) for p in stacks for s in p.stores):
            with pytest.raises(ValueError, match="no store grows"):
                allocate_compressed(plan, 1, 8, dtype=torch.float32, method=method)
            continue
        if any(name in text for name in OF_KEYS) and any(
            keeps(s, method.keep) and s.slot.latent_dim for p in stacks for s in p.stores
        ):
            with pytest.raises(ValueError, match="holds latents"):
                allocate_compressed(plan, 1, 8, dtype=torch.float32, method=method)
            continue
        if {"think", "arkvale"} & {method.keep and method.keep.name} and one_tensor(stacks):
            with pytest.raises(ValueError, match="has one tensor for keys and values"):
                allocate_compressed(plan, 1, 8, dtype=torch.float32, method=method)
            continue
        for dtype, capacity, prompt in ((torch.float32, 41, 24), (torch.bfloat16, 13, 13)):
            cache = allocate_compressed(plan, 2, capacity, dtype=dtype, method=method)
            assert cache.nbytes == compressed_bytes(plan, method, 2, capacity, itemsize=dtype.itemsize), text
            for stack, inner in zip(plan.stacks, cache.stacks, strict=True):
                inner.length = min(stack.num_positions(prompt), inner.capacity)
                for buffer, store in zip(inner.buffers, stack.plan.stores, strict=True):
                    if isinstance(buffer, KeptBuffer):
                        k = buffer.tensors[0] if store.slot.kv_heads else buffer.tensors[0].unsqueeze(2)
                        buffer.offset = inner.length - 1
                        q = torch.zeros(2, 1, 8, k.shape[-1], dtype=dtype)
                        buffer.see(q, k, Dense(False, None), 1.0, None)
            cache.compress()
            shape = {"prompt": prompt, "itemsize": dtype.itemsize}
            assert cache.nbytes == compressed_bytes(plan, method, 2, capacity, **shape, chosen=cache.chosen_slots), text
            assert cache.offloaded_nbytes == offloaded_bytes(plan, method, 2, capacity, **shape), text
            if method.keep and method.keep.name == "corm":
                with pytest.raises(ValueError, match="bytes depend on the text"):
                    compressed_bytes(plan, method, 2, capacity, **shape)
            else:
                even = compressed_bytes(plan, method, 2, capacity, **shape)
                assert cache.nbytes <= even if "prefixkv" in text else cache.nbytes == even, text


def head_of_last(x_BTD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """Logits of the last position alone: a product of more rows need not round alike."""
    return torch.nn.functional.linear(x_BTD[:, -1:], weight_VD)


@pytest.mark.parametrize("name", ARCHS)
def test_decoding_over_a_compressed_cache(name: str) -> None:
    """Chunks, compression, a second turn and steps: 8 bits are near the uncompressed cache, `none` and every keep with
    room for all are it, bit for bit, and what is dropped leaves logits finite.

    Before the compression a keep that sees queries runs those of the last layers at all positions, as a forward pass
    does and the prefill of another cache does not."""
    model, batch = build(small(name, num_layers=whole_depth(name, 3)), torch.float32), tokens(2, 21)
    block = model.plan.block_length
    starts = torch.tensor([0, 1 if block > 1 else 5])
    prompt, chunk = 4 * block if block > 1 else 13, block if block > 1 else 5

    def logits(cache: object) -> torch.Tensor:
        with torch.no_grad():
            parts = [model.prefill(batch[:, :prompt], cache, chunk)]
            if hasattr(cache, "compress"):
                cache.compress()
            parts.append(model(batch[:, prompt : prompt + 3], cache, last_only=True))
            parts += [model.decode_step(token, cache) for token in batch[:, prompt + 3 : prompt + 5].split(1, dim=1)]
        return torch.cat(parts, dim=1)

    expected = logits(model.allocate_cache(2, 21, start_B=starts.clone()))
    whole = model.allocate_cache(2, 21, start_B=starts.clone())
    with torch.no_grad():
        parts = [model(part, whole, block > 1, head_of_last) for part in batch[:, :prompt].split(chunk, dim=1)]
        forward = parts[-1]
    every = [store for stack in model.plan.stacks for store in stack.plan.stores]
    for text in (
        *FULL[ARCHS.index(name) % 8 :: 8],
        *SCORED[ARCHS.index(name) % 3 :: 3],
        "int8(group=4,recent=2)+h2o@6",
        "int8(group=4,recent=2)",
        "int8(keys=token,recent=0)+streaming@5",
        "int8+think(recent=3)",
        "zipcache(recent=3,group=2)",
        "xkv(stores=2,rank_k=1,rank_v=1,recent=3)",
    ):
        method = parse_method(text)
        if any(name in text for name in OF_KEYS) and any(keeps(s, method.keep) and s.slot.latent_dim for s in every):
            continue
        if {"think", "arkvale"} & {method.keep and method.keep.name} and one_tensor(s.plan for s in model.plan.stacks):
            continue
        if any(stack.plan.reader_windows for stack in model.plan.stacks):
            continue
        if not agrees([stack.plan for stack in model.plan.stacks], method):
            continue
        if method.codec and not any(coded_layouts(s, method.codec) for s in every):
            continue
        if method.keep and not any(keeps(s, method.keep) for s in every):
            continue
        cache = allocate_compressed(model.plan, 2, 21, dtype=torch.float32, method=method, start_B=starts.clone())
        seen = any(inner.sees_queries for inner in cache.stacks)
        got = logits(cache)
        if text in FULL:
            assert torch.equal(got[:, 1:], expected[:, 1:]), text
            assert torch.equal(got[:, :1], forward if seen else expected[:, :1]), text
        elif text.startswith("xkv"):
            assert (got - expected).abs().max() < 1e-4 * expected.std(), "the full rank rounds alone"
        elif method.keep is None:
            assert (got - expected).abs().max() < 0.1 * expected.std(), text
        assert got.isfinite().all(), text
        shape = {"prompt": prompt, "itemsize": 4}
        assert cache.nbytes == compressed_bytes(model.plan, method, 2, 21, **shape, chosen=cache.chosen_slots), text


def test_a_budget_for_all_stores_is_theirs_together() -> None:
    """Stores of unlike slots keep as many tokens each, and one more of them would be too much."""
    stores = {
        "wide": StoreConfig(kv_heads=4),
        "narrow": StoreConfig(kv_heads=1),
        "local": StoreConfig(kv_heads=2, window=4),
    }
    plan = resolve(small(ArchConfig(stores, ["new wide", "new narrow", "new local"])))
    assert isinstance(plan, KVPlan)
    growing = [store for store in plan.stores if keeps(store)]
    size = sum(2 * store.slot.elements for store in growing)
    positions = sum(4 * 2 * store.slot.kv_heads for store in growing)  # of two sinks
    for budget in (size * 7 + positions, size * 8 + positions - 1):
        method = parse_method(f"streaming@{budget}B-total(sinks=2)")
        cache = allocate_compressed(plan, 1, 24, dtype=torch.bfloat16, method=method)
        cache.length = 24
        cache.compress()
        held = [sum(tensor.nbytes for tensor in buffer.tensors) for buffer in cache.kept]
        assert len(held) == len(growing) and len(set(held)) == 2 and sum(held) - positions == 7 * size <= budget


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gqa2", "streaming@{}"),
        ("gqa2", "random@{}(recent=3)"),
        ("mla", "knorm@{}"),
        ("mla", "h2o@{}(every=16)"),
        ("gqa2", "h2o@{}(recent=40)"),
        ("gqa2", "snapkv@{}"),
        ("gqa2", "snapkv@{}(every=16)"),
        ("gqa2", "scissorhands@{}(every=16)"),
        ("gqa2", "prefixkv@{}(every=3)"),
        ("gqa2", "snapstream@{}(ring=20)"),
        ("gqa2", "arkvale@{}(page=8,recent=3)"),
        ("gqa2", "arkvale@{}"),
        ("gqa2", "int4(group=8)+arkvale@{}(page=5)"),
        ("gqa2", "int4+streaming@{}"),
        ("gqa2", "int2(group=16,recent=3)+h2o@{}(recent=5)"),
        ("mla", "int8(keys=token)+snapkv@{}(every=4)"),
        ("gqa2", "int2(group=400)+h2o@{}"),
        ("gqa2", "int4(group=64)+snapstream@{}(ring=9)"),
    ],
)
def test_a_budget_in_bytes_is_what_is_held(name: str, text: str) -> None:
    """Against budgets of tokens, tried one by one: the most of which slots, positions, scores, digests and the
    whole ring are not more. Where there are none, the least budget that works is named."""
    plan, prompt = resolve(small(name, num_layers=1)), 240
    room = 400 if "streaming" in text or "snapstream" in text else 0  # a ring is filled later, or has been

    def held(budget: str) -> int:
        method = parse_method(text.format(budget))
        return max(compressed_bytes(plan, method, 1, prompt + room, prompt=at) for at in {prompt, prompt + room})

    by_tokens = {tokens: held(str(tokens)) for tokens in range(1, prompt)}
    least = min(by_tokens.values())
    whole = compressed_bytes(plan, CacheMethod("", parse_method(text.format(1)).codec), 1, prompt + room)
    amounts = [least + 1, *range(least, min(by_tokens[120], whole), 97)]
    assert held(f"{whole}B") == whole
    for amount in amounts:
        most = max(tokens for tokens, size in by_tokens.items() if size <= amount)
        assert held(f"{amount}B") == held(f"{amount}B-total") == by_tokens[most] <= amount
    method = parse_method(text.format(f"{amounts[3]}B"))
    cache = allocate_compressed(plan, 1, prompt + room, dtype=torch.bfloat16, method=method)
    (store,), (buffer,) = plan.stores, cache.kept
    k = buffer.tensors[0] if store.slot.kv_heads else buffer.tensors[0].unsqueeze(2)
    cache.length, buffer.offset = prompt, prompt - 1
    buffer.see(torch.zeros(1, 1, 8, k.shape[-1]).bfloat16(), k[:, :prompt], Dense(False, None), 1.0, None)
    cache.compress()
    assert cache.nbytes == held(f"{amounts[3]}B") <= amounts[3]
    for unit in ("B", "B-total"):
        budget = re.escape(text.partition("@")[0].partition("+")[2] or text.partition("@")[0])
        with pytest.raises(ValueError, match=rf"the least is {budget}@{least}{unit}$"):
            allocate_compressed(
                plan, 1, prompt + room, dtype=torch.bfloat16, method=parse_method(text.format(f"{least - 1}{unit}"))
            )


@pytest.mark.parametrize(
    ("windows", "text"),
    [
        ((None,), "int4+random@{}(recent=3)"),
        ((None, 40), "h2o@{}(every=16,windows=true)"),
        ((None, 40), "int4+snapkv@{}(every=4,windows=true)"),
        ((40,), "int4(group=8)+h2o@{}(every=16,windows=true)"),
    ],
)
def test_a_budget_in_bytes_of_short_prompts_and_windows(windows: tuple[int | None, ...], text: str) -> None:
    """Against all numbers of tokens, of which the last are the whole cache, or that of a window."""
    stores = {f"s{at}": StoreConfig(kv_heads=2, window=window) for at, window in enumerate(windows)}
    pattern = [f"new {name}" for name in stores]
    plan = resolve(small(ArchConfig(stores, pattern), num_layers=len(windows), window=None))

    def held(budget: str) -> int:
        return compressed_bytes(plan, parse_method(text.format(budget)), 1, 90, prompt=90)

    by_tokens = [held(str(tokens)) for tokens in range(1, 91)]
    for amount in range(min(by_tokens), max(by_tokens) + 60, 53):
        best = next(size for size in reversed(by_tokens) if size <= amount)
        for unit in ("B-total", "B") if len(windows) == 1 else ("B-total",):
            assert held(f"{amount}{unit}") == best


def test_stores_read_together_take_bytes_only_where_their_slots_are_alike() -> None:
    """As many elements are not as many bytes with a codec."""
    stores = {"first": StoreConfig(kv_heads=2, k_dim=12, v_dim=4), "kv": StoreConfig(kv_heads=2)}
    arch = ArchConfig(stores, ["new first", "new kv", "reuse kv values=first"])
    plan = resolve(small(arch, num_layers=3, window=None))
    check_method(plan, parse_method("int4+streaming@20"))
    with pytest.raises(ValueError, match=r"keep other positions of one .* streaming with a budget of tokens"):
        check_method(plan, parse_method("int4+streaming@783B"))


@pytest.mark.parametrize("name", ["gqa2", "fusedkv", "fusedkv_lite"])
def test_streaming_is_attention_to_sinks_and_the_newest(name: str) -> None:
    """Against a mask that is written down over a cache that has everything; two stores of a layer keep the same."""
    model, batch = build(small(name)), tokens(1, 12)
    cache = allocate_compressed(model.plan, 1, 12, dtype=torch.float64, method=parse_method("streaming@5(sinks=2)"))
    whole = allocate(model.plan, 1, 12, dtype=torch.float64)
    with torch.no_grad():
        model.prefill(batch[:, :8], cache)
        model.prefill(batch[:, :8], whole)
        cache.compress()
        for place in range(8, 12):
            allowed = torch.zeros(1, place + 1, dtype=torch.bool)
            allowed[:, [0, 1, place - 2, place - 1, place]] = True
            masks = [Mask(sdpa, Dense(False, allowed)) for _ in model.plan.views]
            out = model.run(model.embed(batch[:, place : place + 1]), whole, masks)
            expected = model.norm(out) @ model.output_weight.T
            got = model.decode_step(batch[:, place : place + 1], cache)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_zipcache_rounds_what_few_look_at_to_two_bits() -> None:
    """Saliency against a loop over readers, heads and probes, each row's by its own positions, and the readers' sinks;
    the whole cache comes back, rounded in two ways."""
    stores = {"near": StoreConfig(kv_heads=2, window=6), "kv": StoreConfig(kv_heads=2, sinks=True)}
    model, batch = build(small(ArchConfig(stores, ["new near", "new kv", "reuse kv"]), num_layers=3)), tokens(2, 16)
    with torch.no_grad():
        for layer in model.layers[1:]:
            layer.reader.sinks.copy_(torch.linspace(0, 3, 8))
    starts, method = torch.tensor([0, 2]), parse_method("zipcache(salient=0.5,random=0.3,window=3,recent=2,group=3)")
    cache = allocate_compressed(model.plan, 2, 16, dtype=torch.float64, method=method, start_B=starts)
    with torch.no_grad():
        model.prefill(batch[:, :12], cache, 5)
        (buffer,) = cache.kept
        assert isinstance(buffer, ZipCacheBuffer) and buffer.whole is not None
        keys = buffer.whole.tensors[0][:, :12].clone()
        saliency, probes = buffer.saliency(12, starts), list(buffer.probes)
        assert len(probes) == len(model.plan.readers(model.plan.stores[1])) == 2
        of_row = [
            [p for p in range(first, 12) if p >= 9 or ((p - first) * 2654435761) % 2**32 < 0.3 * 2**32]
            for first in starts.tolist()
        ]
        assert {p - 2 for p in of_row[1]} & {p for p in of_row[0] if p < 9} and of_row[0] != of_row[1]
        heads = keys.shape[2]
        for row, head, slot in itertools.product(range(2), range(heads), range(12)):
            found, number = 0.0, 0
            for q, places, taken, sinks in probes:
                group, first = q.shape[2] // heads, int(starts[row])
                assert places[taken[row]].tolist() == of_row[row]
                for place in of_row[row]:
                    if not first <= slot <= place:
                        continue
                    number, i = number + 1, places.tolist().index(place)
                    for n in range(head * group, (head + 1) * group):
                        score = keys[row, first : place + 1, head] @ q[row, i, n] * buffer.scale
                        weight = torch.cat((score, sinks[n : n + 1].to(score))).softmax(0)
                        found += float(weight[slot - first]) / group
            expected = found / number if number else -math.inf
            assert float(saliency[row, head, slot]) == pytest.approx(expected, abs=1e-12)
        cache.compress()
        assert isinstance(buffer, ZipCacheBuffer) and buffer.position_BKC is not None
        best = saliency[..., :10].topk(5, dim=-1).indices.sort(dim=-1).values
        assert torch.equal(buffer.position_BKC[0, :, :5].long(), best[0])
        new = tuple(torch.zeros(2, 1, *tensor.shape[2:], dtype=torch.float64) for tensor in (keys, keys))
        got = buffer.update(new, 12)[0]
        order = torch.where(buffer.position_BKC >= 0, buffer.position_BKC.long(), 0)
        true = keys.gather(1, order.transpose(1, 2).unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1]))
        error = (got[:, :10] - true).abs()[0]
        assert 0 < error[:5].mean() < error[5:].mean() / 2
        assert torch.equal(got[:, 10:12], keys[:, 10:])
    assert cache.nbytes == compressed_bytes(model.plan, method, 2, 16, prompt=12, itemsize=8)


@pytest.mark.parametrize("name", ["gqa2", "cla2"])
def test_xkv_is_the_nearest_of_its_rank(name: str) -> None:
    """Against numpy's decomposition of the keys as they leave their projection, and of the values, of a padded row and
    another; a store is multiplied out once in a step, whoever reads it, and its bases are counted once."""
    model, batch, starts = build(small(name, num_layers=6)), tokens(2, 16), torch.tensor([0, 3])
    assert isinstance(model.plan, KVPlan)
    stores, text = model.plan.stores, "xkv(stores=2,rank_k=0.3,rank_v=0.5,recent=2)"
    method = parse_method(text)
    cache = allocate_compressed(model.plan, 2, 16, dtype=torch.float64, method=method, start_B=starts)
    written: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        handles = []
        for store in stores:
            writer = model.layers[store.owner].writer
            found: dict[str, torch.Tensor] = {}
            for kind in ("k_proj", "v_proj"):
                project = getattr(writer, kind)
                handles.append(
                    project.register_forward_hook(lambda _, __, out, kind=kind, found=found: found.update({kind: out}))
                )
            written.append(found)  # type: ignore[arg-type]
        model.prefill(batch[:, :12], cache)
        for handle in handles:
            handle.remove()
        cache.compress()
        position_BT = (torch.arange(10) - starts[:, None]).clamp(min=0)
        for first in range(0, len(stores), 2):
            group = range(first, min(first + 2, len(stores)))
            for index, (kind, share) in enumerate((("k_proj", 0.3), ("v_proj", 0.5))):
                for row, start in enumerate(starts.tolist()):
                    parts = [written[place][kind][row, :10].clone() for place in group]  # type: ignore[call-overload]
                    whole = torch.cat(parts, dim=-1).numpy()
                    whole[:start] = 0
                    u, s, v = np.linalg.svd(whole, full_matrices=False)
                    rank = int(min(whole.shape) * share)
                    nearest = torch.from_numpy((u[:, :rank] * s[:rank]) @ v[:rank])
                    for place, part in zip(group, nearest.split([p.shape[-1] for p in parts], dim=-1), strict=True):
                        heads = part.unflatten(-1, stores[place].position_shapes[index])
                        if not index:
                            heads = rotate(heads, rope_table(position_BT[row], *stores[place].rope_key))
                        got = cache.buffers[place].read()[index][row]
                        torch.testing.assert_close(got, heads, rtol=0, atol=1e-5)  # tables of angles are fp32
        reads: list[int] = []
        read = XkvBuffer.read
        patch.setattr(XkvBuffer, "read", lambda self: reads.append(id(self)) or read(self))
        model.decode_step(batch[:, 12:13], cache)
        assert len(reads) == len(set(reads)) == len(stores)
    one = allocate_compressed(model.plan, 1, 16, dtype=torch.float64, method=method)
    with torch.no_grad():
        model.prefill(batch[:1, :12], one)
        one.compress()
        copies = one.repeat(3)
        logits = model.decode_step(batch[:1, 12:13].expand(3, -1), copies)
        torch.testing.assert_close(logits[2:], model.decode_step(batch[:1, 12:13], one))
    assert copies.nbytes == 3 * one.nbytes == compressed_bytes(model.plan, method, 3, 16, prompt=12, itemsize=8)


@pytest.mark.parametrize("tied", ["vector", "half", "projection"])
def test_xkv_of_stores_with_one_tensor(tied: str) -> None:
    """Beside a store of another kind, which has bases of its own: the full rank rounds alone."""
    stores = {"kv": StoreConfig(kv_heads=2, tied=tied), "other": StoreConfig(kv_heads=2)}
    model, batch = build(small(ArchConfig(stores, ["new kv", "new other"]), num_layers=4)), tokens(2, 14)
    method, logits = parse_method("xkv(rank_k=1,rank_v=1,recent=2)"), []
    for each in (CacheMethod(), method):
        cache = allocate_compressed(model.plan, 2, 14, dtype=torch.float64, method=each)
        with torch.no_grad():
            model.prefill(batch[:, :12], cache)
            cache.compress()
            logits.append(model.decode_step(batch[:, 12:13], cache))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-6)
    assert cache.nbytes == compressed_bytes(model.plan, method, 2, 14, prompt=12, itemsize=8)


@pytest.mark.parametrize("name", ["gqa2", "cla2", "fusedkv_lite"])
def test_think_is_the_whole_cache_with_channels_of_keys_zeroed(name: str) -> None:
    """Channels by ThinK's formula, |Q_c K_c^T|_F, of the queries of all readers, over two rows and chunks."""
    model, batch = build(small(name)), tokens(2, 14)
    method = parse_method("think(ratio=0.5,recent=2,window=4)")
    cache = allocate_compressed(model.plan, 2, 14, dtype=torch.float64, method=method)
    whole = allocate(model.plan, 2, 14, dtype=torch.float64)
    queries: dict[int, list[torch.Tensor]] = {}

    def hook(layer: int, reader: torch.nn.Module) -> None:
        def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x, _, rope, _ = inputs
            q = rotate(module.q_proj(x).unflatten(-1, (module.num_heads, -1)), rope)  # type: ignore[operator]
            queries.setdefault(layer, []).append(q)

        handles.append(reader.register_forward_pre_hook(note))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    with torch.no_grad():
        for layer, block in enumerate(model.layers):
            hook(layer, block.reader)
        for part in batch[:, :10].split((7, 3), dim=1):
            model(part, whole)
        for handle in handles:
            handle.remove()
        model.prefill(batch[:, :10], cache, 7)
        cache.compress()
        for store, buffer in zip(model.plan.stores, whole.buffers, strict=True):
            keys = buffer.tensors[0]
            heads, width = store.slot.kv_heads, store.slot.k_dim
            for row in range(2):
                for head in range(heads):
                    score = torch.zeros(width, dtype=torch.float64)
                    for layer in model.plan.readers(store):
                        last = torch.cat(queries[layer], dim=1)[row, -4:]
                        group = last.shape[1] // heads
                        for n in range(head * group, head * group + group):
                            product = last[:, n, None, :] * keys[row, None, :8, head]
                            score += product.square().sum(dim=(0, 1))
                    keys[row, :8, head, score.argsort()[: width // 2]] = 0
        for token in batch[:, 10:].split(1, dim=1):
            torch.testing.assert_close(
                model.decode_step(token, cache), model.decode_step(token, whole), rtol=0, atol=1e-10
            )
    assert cache.nbytes == compressed_bytes(model.plan, method, 2, 14, prompt=10, itemsize=8)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [1, 7, 16])
def test_packing_is_undone(bits: int, width: int) -> None:
    code = torch.randint(1 << bits, (3, 2, width), dtype=torch.uint8)
    packed = pack(code, bits)
    assert packed.shape[-1] == math.ceil(width * bits / 8) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, width), code)


def test_fp8_is_converted_exactly() -> None:
    """All numbers of the type but NaN, which encoding clamps away, subnormal ones and negative zero included."""
    code = torch.arange(256, dtype=torch.uint8).view(FP8)
    got, expected = fp8_as_fp16(code).float() * FP8_TO_FP16, code.float()
    number = expected.isfinite()
    assert number.sum() == 254 and torch.equal(got[number], expected[number])
    assert torch.equal(got[number].signbit(), expected[number].signbit())


def test_hadamard_is_its_definition() -> None:
    for size in (1, 2, 8, 64):
        matrix = hadamard_matrix(size) * math.sqrt(size)
        assert set(matrix.round(decimals=9).flatten().tolist()) <= {1.0, -1.0}
        torch.testing.assert_close(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))
        entries = [[(-1.0) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]  # Sylvester's
        torch.testing.assert_close(matrix, torch.tensor(entries, dtype=torch.float64))
    x = torch.randn(5, 24, dtype=torch.float64)  # three matrices of 8
    torch.testing.assert_close(rotate_hadamard(rotate_hadamard(x)), x)
    torch.testing.assert_close(rotate_hadamard(x).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("by_channel", [True, False])
def test_integers_are_those_of_the_affine_formula(bits: int, by_channel: bool) -> None:
    """Element by element: round((x - least) / step) * step + least over a group, as HQQ and quanto define it with a
    zero in the units of x; half a step is the most that is lost, and a group of equal numbers is exact."""
    torch.manual_seed(bits)
    store = resolve(small("mha")).stores[0]
    codec = CodecSpec(f"int{bits}", 3, 0, "channel" if by_channel else "token")
    layout = tensor_layouts(store, codec, 12)[0]
    heads, width = layout.shape
    x = torch.randn(1, 4 if by_channel else 12, 3 if by_channel else 1, heads, width).half().float()
    x[0, 0] = 1.5
    got = decode(encode(x, layout), layout, torch.float32)
    most = 2**bits - 1
    for j in range(x.shape[1]):
        for k in range(heads):
            for begin in range(0, width, 1 if by_channel else 3):
                part = x[0, j, :, k, begin : begin + (1 if by_channel else 3)]
                least = part.min().item()
                wide = max(2**-24, (part.max().item() - least) / most)
                near = np.float16(wide)
                step = float(near if float(near) >= wide else np.nextafter(near, np.float16(np.inf)))
                expected = ((part - least) / step).round().clamp(0, most) * step + least
                mine = got[0, j, :, k, begin : begin + (1 if by_channel else 3)]
                torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)
                assert (mine - part).abs().max() <= 0.5 * step + 1e-6
    assert (got[0, 0] == 1.5).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("offset", [-300.0, -10.0, 0.0, 10.0, 300.0])
@pytest.mark.parametrize("width", [1e-3, 1.0])
def test_no_number_is_off_by_more_than_half_a_step(bits: int, offset: float, width: float) -> None:
    """Where fp16, in which zeros and scales are stored, is coarser than the steps."""
    layout = TensorLayout((1, 64), 32, None, CodecSpec(f"int{bits}", 32, 0, "channel"), 32, 1, True)
    x = offset + width * torch.rand(1, 1, 32, 1, 64).double()
    _, scale, _ = coded = encode(x, layout)
    error = (decode(coded, layout, torch.float64) - x).abs()
    assert (error <= 0.5001 * scale.double().unsqueeze(2)).all()


def test_clipping_shrinks_the_range_of_a_group_around_its_middle() -> None:
    """Wherever the group lies: its least and its largest number are off by as much, and no number by more."""
    codec = parse_method("int8(clip=0.9)").codec
    layout = TensorLayout((1, 5), 32, None, codec, 32, 1, True)
    x = torch.arange(32).double()[:, None, None] / 31 + torch.tensor([-8, -2, -0.5, 1, 7]).double()
    error = decode(encode(x[None, None], layout), layout, torch.float64)[0, 0, :, 0] - x[:, 0]
    ends = torch.full((5,), 0.05).double()
    torch.testing.assert_close(error[0], ends, rtol=0, atol=0.01)
    torch.testing.assert_close(error[-1], -ends, rtol=0, atol=0.01)
    assert (error.abs() < 0.06).all()


@pytest.mark.parametrize("window", [16, 17, 18, 40, 41, 47])
@pytest.mark.parametrize(("group", "recent"), [(1, 0), (3, 4), (8, 0), (8, 7)])
def test_a_window_has_room_for_the_blocks_that_it_shows(window: int, group: int, recent: int) -> None:
    codec = CodecSpec("int4", group, recent, "channel")
    layout, _ = tensor_layouts(resolve(small("mha")).stores[0], codec, 200, window)
    coded = CodedTensor(layout, torch.empty(0), ()).coded
    shown = max(coded(count) // group - max(0, count + 1 - window) // group for count in range(150))
    assert layout.blocks == shown > 0


@pytest.mark.parametrize(("ratio", "width", "left"), [("0.9", 80, 8), ("0.9", 60, 6), ("0.4", 128, 76), ("1", 8, 2)])
def test_shares_are_exact(ratio: str, width: int, left: int) -> None:
    """A tenth of 80 channels is 8: no binary fraction comes between."""
    store = resolve(small("mha", head_dim=width)).stores[0]
    kept = kept_slots(store, parse_method(f"think(ratio={ratio})"), 100, 2, 100)
    assert kept is not None and kept.channels == left


@pytest.mark.parametrize("window", [None, 1, 5, 8, 9])
def test_tokens_come_back_in_order(window: int | None) -> None:
    """Whatever the window, block, newest tokens and chunks: every token that can be seen comes back, near what it was,
    the newest as they were; groups larger than the cache, and widths that no group divides."""
    store = resolve(small("mha")).stores[0]
    generator = torch.Generator().manual_seed(window or 0)
    x = torch.rand(2, 24, *store.position_shapes[0], generator=generator)
    for group, recent, keys in itertools.product((1, 3, 32), (0, 4, 30), ("channel", "token")):
        codec = CodecSpec("int8", group, recent, keys)
        buffer = CodedBuffer.allocate(tensor_layouts(store, codec, 24, window), 2, torch.float32, "cpu")
        offset = 0
        for length in (7, 1, 1, 10, 1, 4):
            new = x[:, offset : offset + length]
            got = buffer.update((new, new), offset)
            index = buffer.indices(offset, length, x.device)
            assert index[0] == (0 if window is None else max(0, offset + 1 - window))
            for tensor in got:
                torch.testing.assert_close(tensor, x[:, index], rtol=0, atol=0.003)
                newest = min(tensor.shape[1], recent + length)
                assert torch.equal(tensor[:, tensor.shape[1] - newest :], x[:, index[-newest:]])
            offset += length


@pytest.mark.parametrize("length", [18, 20, 23, 24, 31])
def test_a_window_is_coded_by_what_is_in_it(length: int) -> None:
    """Where a keep finds nothing to drop from a window: a group of tokens is rounded by half a step of its own at most,
    though some of them left the window before."""
    plan = resolve(small(ArchConfig({"kv": StoreConfig(kv_heads=2, window=18)}, ["new kv"]), window=None))
    method = parse_method("int4(group=8,recent=2)+h2o@100%(every=1,windows=true)")
    cache = allocate_compressed(plan, 1, 40, dtype=torch.float64, method=method)
    x = 5 + torch.rand(1, length, 2, cache.buffers[0].tensors[0].shape[-1]).double()
    for buffer in cache.buffers:
        buffer.update((x, x), 0)
    cache.length = length
    cache.compress()
    for buffer in cache.buffers:
        assert isinstance(buffer, CodedBuffer)
        seen = buffer.first(length)
        for got in buffer.read(seen, length):
            torch.testing.assert_close(got, x[:, seen:], rtol=0, atol=0.51 / 15)


@pytest.mark.parametrize("rule", ["gated_delta", "kda"])
@pytest.mark.parametrize(
    "text", ["bf16", "fp8(group=3)", "int8(group=3)", "int4(group=5,hadamard=true,clip=0.9)", "int2(group=4)"]
)
def test_a_state_is_rounded_between_steps(rule: str, text: str) -> None:
    """Bit for bit a plain cache whose matrices are coded and decoded after each chunk and each step, in rows that begin
    late; and the bytes are those of the codes."""
    layout = ArchConfig({"state": StoreConfig(matrix=MatrixConfig(rule, v_dim="3/4"))}, ["new state"])
    model, batch, starts = build(small(layout), torch.float32), tokens(2, 20), torch.tensor([0, 9])
    assert isinstance(model.plan, KVPlan)
    method, store = parse_method(text), model.plan.stores[0]
    assert method.codec is not None
    coded_as = state_layout(store, method.codec)
    assert coded_as is not None
    cache = allocate_compressed(model.plan, 2, 20, dtype=torch.float32, method=method, start_B=starts.clone())
    rounded, plain = (model.allocate_cache(2, 20, start_B=starts.clone()) for _ in range(2))
    with torch.no_grad():
        for part in (*batch[:, :12].split((6, 4, 2), dim=1), *batch[:, 12:].split(1, dim=1)):
            run = model.decode_step if part.shape[1] == 1 else model
            got, expected, other = (run(part, each) for each in (cache, rounded, plain))
            assert torch.equal(got, expected)
            for buffer in rounded.buffers:
                exact = buffer.tensors[0]
                exact.copy_(decode(encode(exact[:, None, None], coded_as), coded_as, torch.float32)[:, 0, 0])
        assert not torch.equal(got, other)
        row = allocate_compressed(model.plan, 1, 20, dtype=torch.float32, method=method)
        model.prefill(batch[:1, :12], row)
        copies = row.repeat(3)
        torch.testing.assert_close(
            model.decode_step(batch[:1, 12:13].expand(3, -1), copies)[2:], model.decode_step(batch[:1, 12:13], row)
        )
    rows, width, group = store.slot.kv_heads * store.slot.k_dim, store.slot.v_dim, method.codec.group
    numbers = {"bf16": 0, "fp8": 2}.get(method.codec.name, 4) * math.ceil(width / min(width, group))
    of_codes = rows * (math.ceil(width * method.codec.bits / 8) + numbers)
    of_inputs = 3 * (2 * rows + store.slot.kv_heads * width) * 4
    assert width == 6 and rows == 64
    assert cache.nbytes == 2 * len(model.plan.stores) * (of_codes + of_inputs)
    assert cache.nbytes == compressed_bytes(model.plan, method, 2, 20, itemsize=4)


def test_what_cannot_be_is_refused() -> None:
    cache = allocate_compressed(resolve(small("mha")), 1, 8, dtype=torch.float32, method=parse_method("int8"))
    with pytest.raises(ValueError, match="no steps in unchanging shapes"):
        cache.hold_position()
    with pytest.raises(ValueError, match="needs an even one"):
        layout = ArchConfig({"l": StoreConfig(latent=LatentConfig(dim=7, rope_dim=4))}, ["new l"])
        odd = resolve(small(layout))
        allocate_compressed(odd, 1, 8, dtype=torch.float32, method=parse_method("int4(hadamard=true)"))


def test_a_store_that_a_keep_leaves_alone_may_hold_latents() -> None:
    stores = {"full": StoreConfig(2), "near": StoreConfig(latent=LatentConfig(), window=4)}
    plan = resolve(small(ArchConfig(stores, ["new full", "new near"])))
    for name in OF_KEYS:
        text = name + ("@4" if name == "arkvale" else "")
        check_method(plan, parse_method(text))
        with pytest.raises(ValueError, match="store full holds latents"):
            stores["full"] = StoreConfig(latent=LatentConfig())
            check_method(resolve(small(ArchConfig(stores, ["new full", "new near"]))), parse_method(text))
        stores["full"] = StoreConfig(2)


def test_codecs_and_keeps_have_names_of_their_own() -> None:
    assert not set(CODECS) & set(KEEPS) and "none" not in {*CODECS, *KEEPS}


def test_slots_of_each_head_beside_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two key heads that kept other slots, each read by two query heads with sinks of their own, as in gpt-oss' full
    layers."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, heads, 8, generator=draw) for length, heads in ((3, 4), (7, 2), (7, 2)))
    sinks, allowed = torch.randn(4, generator=draw), torch.rand(2, 2, 3, 7, generator=draw) > 0.4
    allowed[..., 0] = True
    buffer = KeptBuffer.__new__(KeptBuffer)
    monkeypatch.setattr(KeptBuffer, "see", lambda *_: None, raising=False)
    out = KeptKernel(buffer, sdpa)(q, k, v, Dense(False, allowed), 0.3, sinks)
    for head in range(4):
        kv, own = slice(head // 2, head // 2 + 1), slice(head, head + 1)
        mask = Dense(False, allowed[:, kv])
        alone = reference(q[:, :, own], k[:, :, kv], v[:, :, kv], mask, 0.3, sinks[own])
        torch.testing.assert_close(out[:, :, own], alone)
