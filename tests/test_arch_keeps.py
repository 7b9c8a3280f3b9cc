"""Scores and kept positions: against kvpress and KVCache-Factory on a stock model with equal weights, and by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import record_keeps
import torch
from conftest import build, small, tokens
from torch import Tensor

from arch import ArchConfig, StoreConfig, attend, resolve
from arch.compression import scores
from arch.compression.arkvale import ArkValeBuffer, page_digest, page_scores
from arch.compression.checks import left_alone
from arch.compression.compressed import KeptKernel, allocate_compressed
from arch.compression.method import parse_method
from arch.compression.scores import EMPTY
from arch.compression.small_buffers import KeptBuffer, gather_slots
from arch.compression.storage import compressed_bytes, offloaded_bytes
from arch.masks import Dense
from arch.plan import KVPlan

RECORDED = json.loads((Path(__file__).parent / "recorded_keeps.json").read_text())["layers"]
LENGTH = record_keeps.LENGTH
BUDGET = int(LENGTH * (1 - record_keeps.RATIO))


class Seen:
    """Record of what the readers of one model asked of their stores: queries, keys and scale, layer by layer."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, float]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, form: Dense, scale: float, sinks: Tensor | None) -> Tensor:
        self.calls.append((q, k, scale))
        return attend.reference(q, k, v, form, scale, sinks)


@pytest.fixture(scope="module")
def layers() -> list[tuple[Tensor, Tensor, Tensor]]:
    """(keys [B, S, K, H], attention [B, N, T, S], its mean over the heads of a group) of each layer of the model that
    was recorded."""
    return observed(record_keeps.model())


def observed(model: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    seen = Seen()
    form = Dense(causal=True, allowed=None)
    with torch.no_grad():
        model.run(model.embed(record_keeps.prompt()), masks=[attend.Mask(seen, form)] * 2)
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    made = []
    for q, k, scale in seen.calls:
        weight = scores.attention_weights(q, k, causal, scale)
        made.append((k, weight, scores.observe(weight, causal, 2).weight))
    return made


def positions(rows: int, heads: int, length: int, start: tuple[int, ...] = ()) -> Tensor:
    """Positions [B, K, S] of rows padded on the left."""
    index = torch.arange(length) - torch.tensor(start or (0,) * rows)[:, None]
    return index.clamp(min=EMPTY)[:, None].expand(rows, heads, length)


def kept(score: Tensor, sinks: int = 0, budget: int = BUDGET) -> Any:
    rows, heads, length = score.shape
    return scores.select(score, positions(rows, heads, length), torch.full((rows,), budget), sinks).tolist()


def beside_newest(score: Tensor, sinks: int, newest: int) -> Any:
    """Positions that stay of which the newest do in any case."""
    before = kept(score[..., : LENGTH - newest], sinks, BUDGET - newest)
    return [[head + list(range(LENGTH - newest, LENGTH)) for head in row] for row in before]


@pytest.mark.parametrize("layer", [0, 1])
def test_scores_are_those_of_kvpress(layers: list[tuple[Tensor, Tensor, Tensor]], layer: int) -> None:
    """Scores and kept positions of SnapKV, key norms and accumulated attention, recorded with equal weights."""
    k, _, weight = layers[layer]
    window = record_keeps.WINDOW
    by_name = {
        "snapkv": scores.snapkv_scores(weight[:, :, -window:], record_keeps.KERNEL, window),
        "knorm": scores.knorm_scores(k),
        "observed": weight.sum(dim=2) / torch.arange(LENGTH, 0, -1),  # over the queries that see a slot
    }
    for name, score in by_name.items():
        recorded = RECORDED[name][layer]
        want = torch.tensor(recorded["scores"], dtype=torch.float64)
        until = LENGTH - window if name == "snapkv" else LENGTH  # kvpress gives its window another high number
        torch.testing.assert_close(score[..., :until], want[..., :until], rtol=2e-6, atol=1e-7)
        assert kept(score) == recorded["kept"], name
    sinks = record_keeps.SINKS
    assert beside_newest(torch.zeros(2, 2, LENGTH), sinks, BUDGET - sinks) == RECORDED["streaming"][layer]["kept"]


@pytest.mark.parametrize("layer", [0, 1])
def test_selection_is_that_of_kvcache_factory(layers: list[tuple[Tensor, Tensor, Tensor]], layer: int) -> None:
    """The best by accumulated attention, beside sinks and recent positions."""
    score = layers[layer][2].sum(dim=2)
    want = RECORDED["scissorhands_of_kvcache_factory"][layer]["kept"]
    assert beside_newest(score, record_keeps.SINKS, record_keeps.RECENT) == want


def test_attention_is_what_readers_compute() -> None:
    """With windows, sinks, and rows that see different slots."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 6, 8).double(), torch.randn(2, 9, 3, 8).double(), torch.randn(2, 9, 3, 4).double()
    sinks, allowed = torch.randn(6).double(), torch.rand(2, 1, 5, 9) < 0.6
    allowed[..., 0] = True
    weight = scores.attention_weights(q, k, allowed, 0.3, sinks)
    out = torch.einsum("bnts,bsnv->btnv", weight, v.repeat_interleave(2, dim=2))
    torch.testing.assert_close(out, attend.reference(q, k, v, Dense(False, allowed), 0.3, sinks))
    assert scores.attention_weights(q, k, torch.zeros(5, 9).bool(), 0.3).eq(0).all(), "a query that sees nothing"


def test_counts_by_hand() -> None:
    """Heads of a group are counted one by one, against the average over what a query sees."""
    weight = torch.tensor([[[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], [[0.9, 0.1, 0.0], [0.4, 0.35, 0.25]]]])
    causal = torch.tensor([[True, True, False], [True, True, True]])
    rows = scores.observe(weight, causal, 1)
    assert rows.above.tolist() == [[[[2, 1, 0], [1, 1, 1]]]]
    assert rows.below.tolist() == [[[[0, 1, 0], [1, 1, 1]]]]
    torch.testing.assert_close(rows.weight, weight.mean(dim=1, keepdim=True))
    assert scores.scissorhands_scores(rows.below).tolist() == [[[-1, -2, -1]]]
    assert scores.corm_kept(rows.above[:, :, :1]).tolist() == [[[True, True, False]]]


def test_selection_protects_and_pads() -> None:
    """Sinks go before scores; a row's padding is never kept in place of a token."""
    score = torch.tensor([[[0.0, 5, 1, 4, 2, 3]], [[9.0, 9, 9, 1, 2, 0]]])
    at = positions(2, 1, 6, (0, 3))
    for budget, want in (
        (0, [[], []]),
        (1, [[0], [3]]),
        (2, [[0, 1], [3, 4]]),
        (3, [[0, 1, 3], [3, 4, 5]]),
        (4, [[0, 1, 3, 5], [3, 4, 5, EMPTY]]),
        (100, [[0, 1, 2, 3, 4, 5], [3, 4, 5, EMPTY, EMPTY, EMPTY]]),
    ):
        chosen = scores.select(score, at, torch.tensor([budget, budget]), sinks=1)
        assert chosen[:, 0].tolist() == want, budget
    each = scores.select(score, at, torch.tensor([1, 3]))
    assert each[:, 0].tolist() == [[1, EMPTY, EMPTY], [3, 4, 5]], "rows have budgets of their own"
    marked = scores.select_marked(score > 1.5, at)
    assert marked[:, 0].tolist() == [[1, 3, 4, 5], [4, EMPTY, EMPTY, EMPTY]]


def test_random_scores_depend_on_positions_alone() -> None:
    """Padding and the other rows change nothing; seeds and heads do, and the numbers are spread evenly."""
    alone, padded = positions(1, 4, 1000), positions(2, 4, 1007, (7, 3))
    score = scores.random_scores(alone, 3)
    assert torch.equal(scores.random_scores(padded, 3)[0, :, 7:], score[0])
    assert not torch.equal(score, scores.random_scores(alone, 4)) and not torch.equal(score[:, 0], score[:, 1])
    assert score.min() >= 0 and score.max() < 1 and abs(score.mean() - 0.5) < 0.02
    correlation = torch.corrcoef(score[0])
    assert (correlation - torch.eye(4)).abs().max() < 0.1


def test_dropped_slots_are_merged_into_the_nearest() -> None:
    """The mean of a kept slot and of those that are nearest to it; padding goes nowhere."""
    x = torch.tensor([[100.0, 1, 2, 4, 8, 16]]).double()[..., None, None]
    at = positions(1, 1, 6, (1,))
    chosen = torch.tensor([[[2, 5, EMPTY]]])
    merged = scores.merge_dropped(x, at, chosen).flatten().tolist()
    assert merged == [(1 + 2 + 4) / 3, (8 + 16) / 2, 0]
    assert gather_slots(x, chosen).flatten().tolist() == [2, 16, 100], "an empty choice is any slot, which is hidden"
    everything = torch.arange(1, 6)[None, None]
    assert torch.equal(scores.merge_dropped(x, at, everything), x[:, 1:])
    assert scores.merge_dropped(x, at, everything[..., :0]).shape == (1, 0, 1, 1)


def test_a_window_longer_than_the_prompt_keeps_it() -> None:
    score = scores.snapkv_scores(torch.rand(1, 2, 4, 4), 5, 8)
    assert score.shape == (1, 2, 4) and bool((score == math.inf).all())


def compressed(model: Any, batch: Tensor, text: str, chunk: int | None = None, start: tuple[int, ...] = ()) -> Any:
    """A cache of the prompts `batch`, compressed, with room for 60 tokens."""
    start_B = torch.tensor(start) if start else None
    method = parse_method(text)
    cache = allocate_compressed(model.plan, len(batch), 60, dtype=torch.float64, method=method, start_B=start_B)
    with torch.no_grad():
        model.prefill(batch, cache, chunk)
    cache.compress()
    return cache


def kept_of(buffer: Any, row: int = 0) -> list[list[int]]:
    """Positions [K][...] of a row that stayed of the prompt, the newest left out."""
    assert isinstance(buffer, KeptBuffer) and buffer.position_BKC is not None
    return [[place for place in head if place >= 0] for head in buffer.position_BKC[row].tolist()]


@pytest.mark.parametrize("chunk", [None, 7])
def test_caches_keep_what_kvpress_does(chunk: int | None) -> None:
    """The whole way of a prompt, at once and in chunks: chosen positions and the newest are those recorded."""
    model, prompt = record_keeps.model(), record_keeps.prompt()
    window = record_keeps.WINDOW
    for text, name, newest in (
        (f"snapkv@{BUDGET}(sinks=0,window={window},kernel={record_keeps.KERNEL})", "snapkv", window),
        (f"knorm@{BUDGET}(sinks=0,recent=0)", "knorm", 0),
    ):
        cache = compressed(model, prompt, text, chunk)
        for layer, buffer in enumerate(cache.buffers):
            for row in range(2):
                end = list(range(LENGTH - newest, LENGTH))
                assert [head + end for head in kept_of(buffer, row)] == RECORDED[name][layer]["kept"][row], text


def test_readers_of_a_store_score_it_together() -> None:
    """SnapKV of a store that two layers read, from a sum of the attention of both that is computed here by itself."""
    model, batch, length, window = build(small("cla2", num_layers=4)), tokens(2, 24), 24, 4
    assert isinstance(model.plan, KVPlan) and [len(model.plan.readers(store)) for store in model.plan.stores] == [2, 2]
    seen = Seen()
    with torch.no_grad():
        model.run(model.embed(batch), masks=[attend.Mask(seen, Dense(True, None)) for _ in model.plan.stores])
    cache = compressed(model, batch, f"snapkv@10(sinks=0,window={window},kernel=3)")
    differs = False
    for place, buffer in enumerate(cache.buffers):
        both: list[Tensor] = []
        for q, k, scale in seen.calls[2 * place : 2 * place + 2]:
            score = torch.einsum("bthd,bsd->bhts", q, k.squeeze(2)) * scale
            score = score.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
            mean = score.softmax(-1)[:, :, -window:, :-window].mean(dim=(1, 2))
            both.append(torch.nn.functional.avg_pool1d(mean, 3, 1, 1))
        for row in range(2):
            want = [sorted(score[row].topk(6).indices.tolist()) for score in (both[0] + both[1], *both)]
            assert kept_of(buffer, row) == want[:1]
            differs |= want[0] != want[1]
    assert differs, "one reader alone would choose others somewhere"


@pytest.mark.parametrize("name", ["gqa2", "mla", "yoco"])
def test_padding_is_never_kept(name: str) -> None:
    """A row padded on the left keeps the tokens that it keeps alone."""
    model, batch = build(small(name)), tokens(2, 20)
    for text in (
        *("random@9", "knorm@9", "snapkv@9(window=3)", "h2o@9", "scissorhands@9(recent=2,history=8)"),
        "corm(window=4)",
    ):
        ragged = compressed(model, batch, text, start=(0, 6))
        alone = compressed(model, batch[1:, 6:], text)
        for one, other in zip(ragged.buffers, alone.buffers, strict=True):
            if isinstance(one, KeptBuffer):
                assert [[place - 6 for place in head] for head in kept_of(one, 1)] == kept_of(other), text


def test_a_ring_takes_generated_tokens() -> None:
    """SnapStream: memory ends at the ring, what was chosen stays, and the next token sees both: they are the budget."""
    model, batch = build(small("gqa2")), tokens(1, 60)
    cache = compressed(model, batch[:, :20], "snapstream@8(window=3,ring=5)")
    weight, (buffer, *_) = cache.nbytes, cache.buffers
    chosen = kept_of(buffer)
    with torch.no_grad():
        for token in batch[:, 20:60].split(1, dim=1):
            assert model.decode_step(token, cache).isfinite().all()
    assert cache.nbytes == weight and kept_of(buffer) == chosen
    assert weight < compressed(model, batch[:, :20], "snapkv@8(window=3)").nbytes, "which has room for 60"
    assert buffer.later.tensors[0].shape[1] == 4 and buffer.position_BKC.shape[-1] == 4
    (wide, *_) = compressed(model, batch[:, :20], "snapstream@12(window=3,ring=5)").buffers
    assert wide.later.tensors[0].shape[1] == 5 and wide.position_BKC.shape[-1] == 7


@pytest.mark.parametrize("chunk", [None, 7])
def test_caches_count_the_attention_of_a_prompt(layers: list[tuple[Tensor, Tensor, Tensor]], chunk: int | None) -> None:
    """H2O's sums over all queries and Scissorhands' counts over the last, from the whole attention of the prompt."""
    model, prompt = record_keeps.model(), record_keeps.prompt()
    causal, recent = torch.ones(LENGTH, LENGTH).tril().bool(), 5
    h2o = compressed(model, prompt, f"h2o@{BUDGET}(recent={recent})", chunk)
    counted = compressed(model, prompt, f"scissorhands@{BUDGET}(recent={recent},history=11)", chunk)
    for (_, weight, mean), by_sum, by_count in zip(layers, h2o.buffers, counted.buffers, strict=True):
        average = 1 / causal.sum(dim=1)
        low = (weight < average[:, None]) & causal
        count = -low[:, :, -11:].unflatten(1, (2, 2)).sum(dim=(2, 3)).double()
        for row in range(2):
            for buffer, score in ((by_sum, mean.sum(dim=2)), (by_count, count)):
                assert kept_of(buffer, row) == kept(score[..., : LENGTH - recent], 4, BUDGET - recent)[row]


def test_prefix_budgets_share_one_threshold() -> None:
    """Against every threshold tried one by one, over stores with slots of unlike size."""
    generator = torch.Generator().manual_seed(0)
    importance = [torch.rand(n, generator=generator).double() ** power for n, power in ((20, 1), (20, 8), (12, 3))]
    sizes = [2, 3, 5]
    shares = [x.sort(descending=True).values.cumsum(0) / x.sum() for x in importance]
    for budget, least in ((0, 0), (7, 0), (60, 2), (90, 0), (100, 2), (1000, 1)):
        best = [least] * 3
        for threshold in torch.cat(shares).sort().values:
            counts = [max(least, int((share < threshold).sum()) + 1) for share in shares]
            if sum(n * size for n, size in zip(counts, sizes, strict=True)) <= budget:
                best = counts
        want = best if budget < 160 else [20, 20, 12]
        assert scores.prefix_budgets(importance, sizes, budget, least) == want, budget
    assert scores.prefix_budgets([torch.zeros(8), torch.zeros(8)], [1, 1], 9) == [4, 4], "nobody looked"


@pytest.mark.parametrize("chunk", [None, 7])
def test_stores_share_a_budget(chunk: int | None) -> None:
    """PrefixKV over a prompt: numbers of slots and chosen positions from the whole attention; no more than an even
    budget together, and not the same for both stores."""
    model = record_keeps.model()
    model.layers[0].reader.q_proj.weight.data *= 0.1  # it looks at everything
    cache = compressed(model, record_keeps.prompt(), "prefixkv@16(sinks=1,recent=5)", chunk)
    columns = [mean.sum(dim=2)[..., : LENGTH - 5] for _, _, mean in observed(model)]
    shares = []
    for column in columns:
        ordered = column.sum(dim=1).sort(descending=True).values
        shares.append((ordered / ordered.sum(dim=1, keepdim=True)).mean(dim=0).cumsum(0))
    most = max(
        (c for t in torch.cat(shares) if sum(c := [int((s < t - 1e-12).sum()) + 1 for s in shares]) <= 22), key=sum
    )
    assert list(cache.chosen_slots) == most and most[0] != most[1] and 20 <= sum(most) <= 22
    for column, buffer, count in zip(columns, cache.buffers, most, strict=True):
        for row in range(2):
            assert kept_of(buffer, row) == kept(column, 1, count)[row]


@pytest.mark.parametrize("chunk", [None, 7])
def test_padding_has_no_share_of_a_budget(chunk: int | None) -> None:
    """PrefixKV gives the stores of a row that is padded on the left what it gives them of the row alone."""
    model, batch, text = record_keeps.model(), record_keeps.prompt()[:1, :20], "prefixkv@10(sinks=1,recent=5)"
    model.layers[0].reader.q_proj.weight.data *= 0.1  # it looks at everything
    assert compressed(model, batch, text).chosen_slots == (6, 4)
    for padding in (8, 30):
        padded = torch.nn.functional.pad(batch, (padding, 0))
        assert compressed(model, padded, text, chunk, (padding,)).chosen_slots == (6, 4)


@pytest.mark.parametrize("chunk", [None, 7])
def test_what_no_query_gave_the_average_goes(layers: list[tuple[Tensor, Tensor, Tensor]], chunk: int | None) -> None:
    """CORM over a prompt: a position stays where one of the last queries, of a head of the group, gave it the average
    over what it saw."""
    cache = compressed(record_keeps.model(), record_keeps.prompt(), "corm(sinks=1,window=6)", chunk)
    for (_, weight, _), buffer in zip(layers, cache.buffers, strict=True):
        counts = []
        for row, head in ((row, head) for row in range(2) for head in range(2)):
            last = weight[row, 2 * head : 2 * head + 2, -6:] * torch.arange(LENGTH - 5, LENGTH + 1)[:, None]
            want = [s for s in range(LENGTH - 6) if s < 1 or bool((last[:, :, s] >= 1).any())]
            assert kept_of(buffer, row)[head] == want
            counts.append(len(want))
        assert buffer.chosen_slots == max(counts) and len(set(counts)) > 1


class Steps:
    """Record of what one store's reader was shown: queries and keys of all tokens, and which slots each query saw."""

    def __init__(self, buffer: Any) -> None:
        self.buffer, self.see = buffer, buffer.see
        self.q: list[Tensor] = []
        self.k: list[Tensor] = []
        buffer.see = self
        if not buffer.sees_queries:
            buffer.sees_queries = True  # or the model leaves out queries of which nobody asks

    def __call__(self, q: Tensor, k: Tensor, mask: Dense, scale: float, sinks: Tensor | None) -> None:
        self.see(q, k, mask, scale, sinks)
        self.q += q.unbind(1)
        self.k += k[:, -q.shape[1] :].unbind(1)
        self.last_k, self.last_allowed, self.scale = k, mask.allowed, scale


@pytest.mark.parametrize(
    ("text", "newest"),
    [
        ("h2o@9(recent=2,sinks=1,every=3)", 2),
        ("scissorhands@9(recent=3,sinks=0,history=6,every=4)", 3),
        ("snapkv@9(window=3,kernel=3,sinks=1,every=2)", 3),
        ("knorm@9(recent=0,sinks=2,every=1)", 0),
        ("h2o@24(recent=2,sinks=1,every=3)", 2),  # more than the prompt has
        ("prefixkv@9(recent=2,sinks=1,every=3)", 2),
        ("corm(window=4,sinks=1,every=3)", 4),
        ("corm(window=18,sinks=0,every=4)", 18),  # longer than one row
        ("h2o@6(recent=2,sinks=6,every=3,windows=true)", 2),
        ("snapkv@5(window=2,kernel=3,sinks=0,every=2,windows=true)", 2),
        ("scissorhands@5(recent=1,sinks=0,history=4,every=1,windows=true)", 1),
        ("knorm@3(recent=0,sinks=0,every=4,windows=true)", 0),
        ("corm(window=4,sinks=0,every=3,windows=true)", 4),
        ("h2o@6(recent=2,sinks=6,every=2,windows=true)", 2),  # of chunks
    ],
)
def test_keeps_act_again(text: str, newest: int) -> None:
    """Every k tokens, against lists of what lives in each row and head, with scores summed query by query: readers get
    the keys of those, and memory stays as it is. In windows, what leaves them is neither seen nor chosen."""
    model, batch, start, prompt = record_keeps.model(), tokens(2, 50) % 61, (0, 4), 20
    window, chunk = (11 if "windows" in text else 100), "every=2,windows" in text and "h2o" in text
    if "windows" in text:
        store = StoreConfig(kv_heads=2, chunk=11) if chunk else StoreConfig(kv_heads=2, window=11)
        model = build(small(ArchConfig({"kv": store}, ["new kv"]), window=None, num_heads=4, num_layers=2))

    def first(query: int, row: int) -> int:
        """The first token that one sees."""
        return query - (query - start[row]) % window if chunk else query - window + 1

    method = parse_method(text)
    assert method.keep is not None
    budget, options = int(method.keep.budget.amount) if method.keep.budget else 0, method.keep.options
    start_B = torch.tensor(start)
    cache = allocate_compressed(model.plan, 2, 50, dtype=torch.float64, method=method, start_B=start_B)
    buffer: Any = cache.buffers[1]
    steps = Steps(buffer)
    live = [[list(range(start[row], prompt)) for _ in range(2)] for row in range(2)]
    rows: list[list[list[dict[int, float]]]] = [[[], []], [[], []]]  # of each query, by position
    with torch.no_grad():
        model.prefill(batch[:, :prompt], cache, 7)
    for end in range(prompt, 50):
        if end == prompt:
            cache.compress()
        with torch.no_grad():
            assert model.decode_step(batch[:, end : end + 1], cache).isfinite().all()
        for row, head in ((row, head) for row in range(2) for head in range(2)):
            seen = rows[row][head]
            for place in range(len(seen), end):  # of the prompt at first, then the last token
                at = [*range(start[row], place + 1)] if place < prompt else live[row][head]
                at = [p for p in at if first(place, row) <= p <= place]
                if not at:
                    seen.append({})
                    continue
                keys = torch.stack([steps.k[p][row, head] for p in at])
                weight = (steps.q[place][row, 2 * head : 2 * head + 2] @ keys.T * steps.scale).softmax(-1)
                told = -(weight * len(at) < 1).double().sum(0) if "history" in options else weight.mean(0)
                told = (weight * len(at) >= 1).double().sum(0) if "corm" in text else told
                seen.append(dict(zip(at, told.tolist(), strict=True)))
            if (end - prompt) % options["every"] == 0:
                before = [p for p in live[row][head] if first(end, row) <= p < end - newest]

                def score(p: int, seen: list = seen, row: int = row, head: int = head) -> float:
                    if "knorm" in text:
                        return -float(steps.k[p][row, head].norm())
                    last = seen[-options.get("history", options.get("window", 0)) :]
                    return sum(told.get(p, 0.0) for told in last)

                sinks = {p for p in before if p < start[row] + options["sinks"]}
                scored = [score(p) for p in before]
                if "snapkv" in text:  # neighbours that are left, whatever was between them
                    padded = [0.0, *scored, 0.0]
                    scored = [sum(padded[place : place + 3]) for place in range(len(scored))]
                by_place = dict(zip(before, scored, strict=True))
                ranked = sorted(before, key=lambda p: (p not in sinks, -by_place[p], p))
                best = ranked[: buffer.budget if "prefixkv" in text else budget - newest]
                if "corm" in text:
                    best = [p for p in before if p in sinks or by_place[p] > 0]
                live[row][head] = sorted(best) + [p for p in live[row][head] if p >= end - newest]
            live[row][head].append(end)
        shape = {"prompt": prompt, "itemsize": 8}
        assert cache.nbytes == compressed_bytes(model.plan, method, 2, 50, **shape, chosen=cache.chosen_slots)
        assert "corm" in text or cache.nbytes <= compressed_bytes(model.plan, method, 2, 50, **shape)
        for row, head in ((row, head) for row in range(2) for head in range(2)):
            got = steps.last_k[row, steps.last_allowed[row, head, 0], head]
            want = [p for p in live[row][head] if p >= first(end, row)]
            assert torch.equal(got, torch.stack([steps.k[p][row, head] for p in want])), (end, row, head)
    assert buffer.later.tensors[0].shape[1] == newest + options["every"]
    assert "corm" in text or sum(buffer.chosen_slots for buffer in cache.buffers) <= 2 * (budget - newest)


@pytest.mark.parametrize(
    ("text", "of_store"),  # bytes that are noted of two rows in a store of 2 heads, read by one layer of 4 queries
    [
        ("knorm@9", 0),
        ("h2o@9", 2 * 2 * 24 * 8),
        ("snapkv@9(window=5)", 2 * 2 * 5 * 24 * 8),
        ("scissorhands@9(history=6)", 2 * 2 * 6 * 24 * 2),
        ("arkvale@9(page=2,recent=2)", 2 * 4 * 8 * 8),
    ],
)
def test_notes_of_a_prompt_are_counted_until_it_is_compressed(text: str, of_store: int) -> None:
    model, method = record_keeps.model(), parse_method(text)
    cache = allocate_compressed(model.plan, 2, 40, dtype=torch.float64, method=method)
    with torch.no_grad():
        model.prefill(record_keeps.prompt()[:, :24], cache, 7)
    assert cache.notes_nbytes == 2 * of_store
    cache.compress()
    assert cache.notes_nbytes == 0


@pytest.mark.parametrize("prompt", [0, 1, 3])
def test_keeps_act_on_what_follows_a_prompt_of_few_tokens(prompt: int) -> None:
    """Of fewer than always stay: nothing is chosen at first, and memory is bounded from there on."""
    model, batch = record_keeps.model(), tokens(1, 40) % 61
    for name in ("h2o(recent=4,every=2)@9", "scissorhands(recent=4,every=2)@9", "corm(window=4,every=2)"):
        method = parse_method(name)
        cache = allocate_compressed(model.plan, 1, 40, dtype=torch.float64, method=method)
        with torch.no_grad():
            if prompt:
                model.prefill(batch[:, :prompt], cache)
            cache.compress()
            for token in batch[:, prompt:].split(1, dim=1):
                assert model.decode_step(token, cache).isfinite().all()
                chosen = cache.chosen_slots
                expected = compressed_bytes(model.plan, method, 1, 40, prompt=prompt, itemsize=8, chosen=chosen)
                assert cache.nbytes == expected


def test_a_long_chunk_after_a_budget_of_one() -> None:
    """There is nothing to choose from, and room is made for the chunk, which goes with the next token."""
    model, batch, method = record_keeps.model(), tokens(1, 26) % 61, parse_method("h2o@1(every=1)")
    cache = compressed(model, batch[:, :20], method.text)
    with torch.no_grad():
        assert model(batch[:, 20:25], cache).isfinite().all()
        model.decode_step(batch[:, 25:], cache)
    assert cache.nbytes == compressed_bytes(model.plan, method, 1, 60, prompt=20, itemsize=8)


def test_digests_are_boxes() -> None:
    """Coordinate by coordinate, as the authors' code has them, and scores as sums of the larger product; the box of
    extremes is a bound of what any key of the page gets."""
    torch.manual_seed(0)
    keys, q = torch.randn(3, 5, 2, 4).double(), torch.randn(1, 2, 6, 4).double()  # 3 pages, 3 query heads each
    for kind in ("mean", "box"):
        digest = page_digest(keys, kind)
        got = page_scores(q, digest[None])[0]
        for page in range(3):
            total = best = 0.0
            for token, head in ((token, head) for token in range(2) for head in range(6)):
                score = 0.0
                for d in range(4):
                    column = keys[page, :, head // 3, d].tolist()
                    centre, radius = (max(column) + min(column)) / 2, (max(column) - min(column)) / 2
                    if kind == "mean":
                        radius = sum(abs(x - centre) for x in column) / 5
                    x = float(q[0, token, head, d])
                    score += max(x * (centre + radius), x * (centre - radius))
                total += score
                best += float((keys[page, :, head // 3] @ q[0, token, head]).max())
            assert float(got[page]) == pytest.approx(total, abs=1e-12)
            assert kind == "mean" or total >= best


def test_a_page_that_is_asked_for_comes_back_exactly() -> None:
    """It is in the other memory alone; then a query looks at it, and at nothing else."""
    torch.manual_seed(0)
    plan, method = resolve(small("gqa2")), parse_method("arkvale@12(page=3,recent=2,sinks=0)")
    store = plan.stores[0]
    cache = allocate_compressed(plan, 2, 30, dtype=torch.float64, method=method)
    buffer = cache.kept[0]
    assert isinstance(buffer, ArkValeBuffer)
    heads, width = store.slot.kv_heads, store.slot.k_dim
    keys, values = torch.randn(2, 26, heads, width).double() * 0.1, torch.randn(2, 26, heads, width).double()
    asked = torch.randn(heads, width).double()
    keys[0, 10], keys[1, 4] = 50 * asked, 50 * asked  # in pages 3 and 1
    kernel = KeptKernel(buffer, attend.reference)
    buffer.update((keys[:, :25], values[:, :25]), 0)
    with torch.no_grad():
        buffer.see(-asked.repeat_interleave(2, 0).expand(2, 1, -1, -1), keys[:, :25], Dense(True, None), 1.0, None)
        cache.length = 25
        cache.compress()
        assert buffer.page_BP is not None
        before = buffer.page_BP.clone()
        assert 3 not in before[0].tolist() and 1 not in before[1].tolist() and buffer.recalled_bytes == 0
        k, v = buffer.update((keys[:, 25:], values[:, 25:]), 25)
        mask = Dense(False, buffer.allowed(25, 1, k.device, None))
        q = asked.repeat_interleave(2, 0).expand(2, 1, -1, -1)
        out = kernel(q, k, v, mask, 1.0, None)
    assert 3 in buffer.page_BP[0].tolist() and 1 in buffer.page_BP[1].tolist()
    moved = int((buffer.page_BP != before).sum())
    assert buffer.recalled_bytes == moved * 3 * 2 * heads * width * 8 > 0
    torch.testing.assert_close(out, attend.reference(q, keys, values, Dense(False, None), 1.0, None), rtol=0, atol=0)


@pytest.mark.parametrize("text", ["arkvale@14(page=3,recent=2,sinks=2,topk=1)", "arkvale@22(page=2,recent=3,sinks=0)"])
def test_readers_vote_for_pages(text: str) -> None:
    """Against lists of pages of each row: what both readers of a store see is the newest tokens and the pages that
    their queries, and before them those of the prompt, chose; the bytes that were copied back are counted."""
    model, batch, start, prompt = build(small("cla2", num_layers=4)), tokens(2, 48), (0, 4), 30
    method, slots = parse_method(text), {14: 3, 22: 8}
    assert method.keep is not None and method.keep.budget is not None
    options = method.keep.options
    size, recent = options["page"], options["recent"]
    room = slots[int(method.keep.budget.amount)]
    sinks = -(-options["sinks"] // size)
    topk = options["topk"] or room // 2
    cache = allocate_compressed(model.plan, 2, 48, dtype=torch.float64, method=method, start_B=torch.tensor(start))
    buffer: Any = cache.buffers[1]
    keys: list[Tensor] = []
    asked: list[Tensor] = []
    shown: list[tuple[Tensor, Tensor]] = []
    update, join = buffer.update, buffer.join

    def note_update(new: tuple[Tensor, ...], offset: int) -> Any:
        keys.extend(new[0].unbind(1))
        return update(new, offset)

    def note_join(q: Tensor, k: Tensor, v: Tensor, mask: Dense, scale: float) -> Any:
        asked.append(q[:, -1] * scale)
        k, v, mask = join(q, k, v, mask, scale)
        shown.append((k, mask.allowed))  # type: ignore[arg-type]
        return k, v, mask

    buffer.update, buffer.join = note_update, note_join

    def scores_of(row: int, queries: list[Tensor], pages: int) -> list[float]:
        found = []
        for page in range(pages):
            first = start[row] + page * size
            held = torch.stack([keys[p][row] for p in range(first, first + size)])
            centre = (held.amax(0) + held.amin(0)) / 2
            radius = (held - centre).abs().mean(0)
            total = 0.0
            for q in queries:
                for head, x in enumerate(q[row]):
                    k = head * held.shape[1] // len(q[row])
                    total += float(torch.maximum(x * (centre + radius)[k], x * (centre - radius)[k]).sum())
            found.append(total)
        return found

    resident: list[list[int]] = [[], []]
    recalled = 0
    with torch.no_grad():
        model.prefill(batch[:, :prompt], cache, 11)
    last = asked[-2:]
    for place in range(prompt, 48):
        if place == prompt:
            cache.compress()
        del asked[:], shown[:]
        with torch.no_grad():
            model.decode_step(batch[:, place : place + 1], cache)
        for reader in range(2) if place > prompt else (None, 0, 1):  # none: the compression
            queries = last if reader is None else asked[: reader + 1]
            for row in range(2):
                closed = max(0, place - start[row] - recent) // size
                score = scores_of(row, queries, closed)
                ranked = sorted(range(min(sinks, closed), closed), key=lambda page: -score[page])
                first = [*range(min(sinks, closed)), *ranked[:topk]]
                others = sorted(ranked[topk:], key=lambda page: (page not in resident[row], -score[page]))
                chosen = [*first, *others][:room]
                recalled += 0 if reader is None else len(set(chosen) - set(resident[row]))
                resident[row] = chosen
                if reader is not None:
                    places = [start[row] + page * size + i for page in chosen for i in range(size)]
                    places += range(start[row] + closed * size, place + 1)
                    want = torch.stack([keys[p][row] for p in places]).flatten(1)
                    k, allowed = shown[reader]
                    got = k[row, allowed[row, 0, 0]].flatten(1)
                    assert torch.equal(got[got[:, 0].argsort()], want[want[:, 0].argsort()]), (place, row, reader)
    assert buffer.recalled_bytes == recalled * size * 2 * keys[0][0].numel() * 8 > 0
    assert cache.nbytes == compressed_bytes(model.plan, method, 2, 48, prompt=prompt, itemsize=8)
    assert cache.offloaded_nbytes == offloaded_bytes(model.plan, method, 2, 48, prompt=prompt, itemsize=8)


def test_pages_with_room_for_all_but_the_newest_change_rounding_alone() -> None:
    """Of long chunks and steps, over ragged rows and copies of a row: every token is there, in another order."""
    model, batch = build(small("gqa2")), tokens(1, 40).expand(2, -1)
    method = parse_method("arkvale@39(page=3,recent=2)")
    cache = allocate_compressed(model.plan, 1, 40, dtype=torch.float64, method=method, start_B=torch.tensor([3]))
    whole = model.allocate_cache(1, 40, start_B=torch.tensor([3]))
    with torch.no_grad():
        model.prefill(batch[:1, :20], cache)
        model.prefill(batch[:1, :20], whole)
        cache.compress()
        cache, whole = cache.repeat(2), whole.repeat(2)
        for begin, end in ((20, 21), (21, 35), (35, 36), (36, 37)):
            got, want = model(batch[:, begin:end], cache), model(batch[:, begin:end], whole)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert cache.nbytes == compressed_bytes(model.plan, method, 2, 40, prompt=20, itemsize=8)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("gqa2", ""),
        ("gemma3", "store local, whose window is 6 tokens"),
        ("bct_mixed", "store local, whose window is 6 tokens, store memory, whose size is fixed"),
        ("block", "store kv of a block's tokens"),
    ],
)
def test_stores_that_a_keep_leaves_alone_are_named(name: str, left: str) -> None:
    assert left_alone(resolve(small(name)), parse_method("snapkv@25%"), 64) == left
    assert left_alone(resolve(small(name)), parse_method("int4"), 64) == ""
    assert "local" not in left_alone(resolve(small(name)), parse_method("snapkv@3(every=1,windows=true)"), 64)
    much = left_alone(resolve(small(name)), parse_method("snapkv@5(every=1,windows=true)"), 64)
    fits = "local" not in left
    assert fits or much.startswith("store local, whose window of 6 tokens holds no more than what would stay")


def test_a_total_budget_leaves_windows_alone_where_the_cache_is_short() -> None:
    stores = {"full": StoreConfig(kv_heads=2), "near": StoreConfig(kv_heads=2, window=40)}
    plan = resolve(small(ArchConfig(stores, ["new full", "new near"]), max_window=None))
    method = parse_method("h2o@13000B-total(every=1,windows=true)")
    assert left_alone(plan, method, 40) == "store near, whose window of 40 tokens holds no more than what would stay"
    assert left_alone(plan, method, 1000) == ""
