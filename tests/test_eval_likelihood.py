"""Likelihood of continuations, with and without a shared cache; copying and induction; intervals."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import build, small, tokens
from oracles import Oracle, nothing, subject

from arch import LanguageModel
from arch.named import load_arch
from data.cli import UsageError
from eval.evaluations import digest_of
from eval.intervals import BETTER, UNDECIDED, WORSE, counted_share, interval, student, wilson
from eval.tasks import copying, select_tasks
from eval.tasks.drawn import share_of_sequences
from eval.tasks.likelihood import continuation_likelihoods, measure_next, next_token_likelihoods, whole_likelihoods


def blocks(length: int = 4, stores: str = "block", **changes: object) -> LanguageModel:
    """A Block Transformer that does not predict its first block, with a block decoder of the layout `stores`."""
    layout = load_arch(stores)
    layout.block = load_arch("block").block
    layout.block.start, layout.block.length = False, length
    return build(small(layout, num_layers=4, **changes))


PREFIX = tokens(1, 13)[0].tolist()
CONTINUATIONS = [[5], [7, 8, 9], [7, 8], [60, 0, 3, 3, 3, 1, 2, 50, 12]]


@pytest.mark.parametrize(
    "arch", ["mha", "mixattention", "mla", "bct", "bct_gated", "swa_sinks", "yoco", "block", "later", "single"]
)
def test_a_shared_cache_changes_no_likelihood(arch: str) -> None:
    """Prefixes within the windows and beyond them; of a Block Transformer within a block, at its end, of one token."""
    model = blocks(1 if arch == "single" else 4) if arch in ("later", "single") else build(small(arch))
    for prefix in (PREFIX, PREFIX[:12], PREFIX[:4]):
        found = continuation_likelihoods(model, prefix, CONTINUATIONS)
        assert found == [
            pytest.approx(x, abs=1e-9) for x in whole_likelihoods(model, [(prefix, c) for c in CONTINUATIONS])
        ]
        for likelihood, rest in zip(found, CONTINUATIONS, strict=True):
            logits_TV = model.next_token_logits(torch.tensor([prefix + rest]))[0, -len(rest) - 1 : -1]
            nats_T = logits_TV.log_softmax(-1)[range(len(rest)), rest]
            assert likelihood.nats == pytest.approx(nats_T.sum().item(), abs=1e-5)
            assert likelihood.greedy == (logits_TV.argmax(-1).tolist() == rest)
    greedy = model.next_token_logits(torch.tensor([PREFIX]))[0, -1].argmax().item()
    assert continuation_likelihoods(model, PREFIX, [[greedy]])[0].greedy


@pytest.mark.parametrize("stores", ["block", "bct"])
def test_a_prefix_shorter_than_a_block_is_filled_up(stores: str) -> None:
    """Also where stores merge positions: the block that is filled up is a position like any other."""
    model = blocks(stores=stores)
    found = continuation_likelihoods(model, [9], CONTINUATIONS, pad_token=60)
    whole = whole_likelihoods(model, [([9], rest) for rest in CONTINUATIONS], pad_token=60)
    assert found == [pytest.approx(x, abs=1e-9) for x in whole]
    short, long = whole_likelihoods(model, [([9], [5]), (PREFIX, [5])], pad_token=60)
    assert short == pytest.approx(found[0], abs=1e-9)
    assert long == pytest.approx(continuation_likelihoods(model, PREFIX, [[5]])[0], abs=1e-9)
    if stores == "bct":
        with pytest.raises(ValueError, match="give no padding"):
            model(tokens(1, 12), segment_ids_BT=torch.tensor([[-1] * 4 + [0] * 8]))
    for function in (lambda: continuation_likelihoods(model, [], [[1]]), lambda: whole_likelihoods(model, [([1], [])])):
        with pytest.raises(ValueError, match="at least one token"):
            function()


@pytest.mark.parametrize("arch", ["cla2", "bct", "block"])
def test_rows_of_a_repeated_cache_go_their_own_ways(arch: str) -> None:
    model = build(small(arch))
    with torch.no_grad():
        cache = model.allocate_cache(1, 20)
        model.prefill(tokens(1, 13), cache)
        copies = cache.repeat(3)
        assert copies.nbytes == 3 * cache.nbytes
        before = [tensor.clone() for tensor in tensors(cache)]
        logits_31V = model.decode_step(torch.tensor([[1], [2], [3]]), copies)
        assert all(a.equal(b) for a, b in zip(before, tensors(cache), strict=True)), "the prefix is as it was"
        assert logits_31V[1] == pytest.approx(model.decode_step(torch.tensor([[2]]), cache)[0], abs=1e-9)


def tensors(cache: object) -> list[torch.Tensor]:
    parts = [getattr(cache, name) for name in ("blocks", "tokens")] if hasattr(cache, "blocks") else [cache]
    return [tensor for part in parts for buffer in part.buffers for tensor in buffer.tensors]


@pytest.mark.parametrize("arch", ["mha", "block", "later"])
def test_measures_are_of_the_logits_in_their_places(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens_BT = blocks() if arch == "later" else build(small(arch)), tokens(3, 14)
    monkeypatch.setattr("eval.tasks.likelihood.MAX_LOGITS", 5 * 61)

    def first_logit(logits_NV, row_N, place_N):
        assert len(logits_NV) <= 5
        return torch.stack((logits_NV[:, 0], row_N.float(), place_N.float()), dim=-1)

    found_BTK = measure_next(model, tokens_BT, first_logit).detach()
    assert found_BTK[..., 0] == pytest.approx(model.next_token_logits(tokens_BT)[..., 0].detach(), abs=1e-5)
    assert found_BTK[..., 1].tolist() == [[b] * found_BTK.shape[1] for b in range(3)]
    assert found_BTK[..., 2].tolist() == [list(range(model.plan.min_prompt - 1, 14))] * 3


def last_time(before: tuple[int, ...]) -> set[int]:
    """What followed the last two tokens where they occurred before, or the last one alone."""
    for known in (2, 1):
        for place in range(len(before) - 2, known - 2, -1):
            if before[place - known + 1 : place + 1] == before[len(before) - known :]:
                return {before[place + 1]}
    return set()


def test_copying_by_known_models() -> None:
    options = copying.CopyOptions(lengths=(8, 16, 400), sequences=5, batch=3)
    copied = copying.copy(subject(Oracle(last_time, 5000)), options)
    assert [(row["length"], row["accuracy"], row["accuracy_count"]) for row in copied.rows] == [(8, 1, 35), (16, 1, 75)]
    assert [(row["generated"], row["generated_count"]) for row in copied.rows] == [(1, 20), (1, 40)]
    assert copied.figures["generated/16"] == 1
    assert copied.notes == (
        "400 tokens are left out: the model needs 2 or more, and a context of 256 has room for 127 twice",
    )
    clueless = copying.copy(subject(Oracle(nothing, 5000)), options)
    assert clueless.figures["accuracy"] < 0.05 > clueless.figures["generated"]
    assert [
        row["length"] for row in copying.copy(subject(Oracle(nothing, 5000)), copying.CopyOptions(sequences=1)).rows
    ] == [8, 32]
    with pytest.raises(UsageError, match="a context of 256 has room for 127 twice"):
        copying.copy(subject(Oracle(nothing, 50)), copying.CopyOptions(lengths=(128,)))


def test_copying_counts_what_a_block_transformer_predicts() -> None:
    """The shortest sequence whose second token, when it comes again, is not in the first block of 16."""
    given = subject(blocks(16, vocab_size=300), context=64, pad_token=None)
    found = copying.copy(given, copying.CopyOptions(lengths=(8, 13, 14), sequences=2))
    assert [(row["length"], row["accuracy_count"], row["generated_count"]) for row in found.rows] == [(14, 26, 14)]
    assert [note.partition(" twice")[0] for note in found.notes] == [
        f"{length} tokens are left out: the model needs 14 or more, and a context of 64 has room for 31"
        for length in (8, 13)
    ]
    assert [row["length"] for row in copying.copy(given, copying.CopyOptions(sequences=1)).rows] == [31]
    x_BN = copying.random_tokens(given, 2, 14, 0)
    assert next_token_likelihoods(given.model, copying.repeated(given, x_BN))[0].shape[1] == 13
    with pytest.raises(UsageError, match="oracle: a prompt has 13 tokens, less than a block of 16"):
        given.generate([[1] * 13], 3)


def test_induction_of_known_models() -> None:
    options = copying.InductionOptions(length=20, sequences=3, batch=2)
    found = copying.induction(subject(Oracle(last_time, 300)), options)
    assert found.figures["random/accuracy"] > 0.9
    assert found.figures["random"] < -3
    assert found.figures["text"] < 0
    assert {row["source"] for row in found.rows} == {"random", "text"}
    assert sum(row["targets"] for row in found.rows if row["source"] == "random") == 3 * 19
    clueless = copying.induction(subject(Oracle(nothing, 300)), options)
    assert clueless.figures["random"] == clueless.figures["text"] == 0
    assert clueless.figures["random/first"] == pytest.approx(math.log(300), rel=1e-5)
    for length in (1, 128):
        with pytest.raises(UsageError, match="needs 2 or more, and a context of 256 has room for 127 twice"):
            copying.induction(subject(Oracle(nothing, 50)), copying.InductionOptions(length=length))


def test_induction_of_a_block_transformer_leaves_out_its_first_block() -> None:
    model = blocks(vocab_size=300)
    found = copying.induction(subject(model), copying.InductionOptions(sources=("random",), length=12, sequences=2))
    assert sum(row["targets"] for row in found.rows) == 2 * (12 - 3)
    x_BN = copying.random_tokens(subject(model), 2, 12, 0)
    logits_BTV = model.next_token_logits(copying.repeated(subject(model), x_BN)[:, :-1])[:, -12:]
    nats_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), x_BN, reduction="none")
    assert found.figures["random/second"] == pytest.approx(nats_BT[:, 3:].mean().item(), rel=1e-5)


def test_wilson_intervals() -> None:
    """Values of the formula in Brown, Cai and DasGupta 2001."""
    for right, total, low, high in (
        (0, 10, 0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1),
        (81, 263, 0.2553, 0.3662),
    ):
        assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)
    assert counted_share(0, 0) == {"share": None, "low": 0.0, "high": 1.0, "count": 0}


def test_intervals_of_shares_of_sequences() -> None:
    """Of sequences that are right or wrong as wholes: as many trials as sequences, or fewer; of questions that have
    nothing to do with each other: as many as questions, but for Student's t; of all that are right: as sequences."""
    wholes = share_of_sequences([32.0] * 30 + [0.0] * 70, [32] * 100)
    assert wholes.value == 0.3
    assert wholes[1:] == pytest.approx(wilson(0.3 * 95, 95), abs=2e-3)
    assert wholes[1:] != pytest.approx(wilson(960, 3200), abs=0.01)
    random = np.random.default_rng(0)
    alone = share_of_sequences(random.binomial(32, 0.3, 2000).tolist(), [32] * 2000)
    assert alone.high - alone.low == pytest.approx(4 * math.sqrt(0.3 * 0.7 / 64000), rel=0.05)
    assert share_of_sequences([32.0] * 50 + [0.0], [32] * 50 + [0]) == (1.0, *wilson(50, 50))
    assert share_of_sequences([0.0], [7]) == (0.0, *wilson(0, 1))
    assert share_of_sequences([3.0, 3.0], [7, 7]).high > 0.9, "that two are alike may be chance"
    with pytest.raises(ValueError, match="no question"):
        share_of_sequences([0.0], [0])


def test_nineteen_of_twenty_intervals_hold_the_share() -> None:
    """Of sequences whose shares differ, 8 questions each: Wilson's of all questions holds it half of the time."""
    random, holds, too_few = np.random.default_rng(1), [], []
    for _ in range(1000):
        right = random.binomial(8, random.beta(0.4, 1.6, 60)).tolist()  # 0.2 on average
        share = share_of_sequences(right, [8] * 60)
        low, high = wilson(sum(right), 480)
        holds.append(share.low <= 0.2 <= share.high)
        too_few.append(low <= 0.2 <= high)
    assert 0.93 < sum(holds) / 1000 < 0.98
    assert sum(too_few) / 1000 < 0.8


def test_a_few_mistakes_make_no_interval_narrower() -> None:
    """One question wrong in each of up to four sequences of 32, or right: no better than none, or worse."""
    found = [share_of_sequences([31.0] * wrong + [32.0] * (100 - wrong), [32] * 100) for wrong in range(5)]
    assert found == sorted(found, reverse=True)
    assert [share.low for share in found] == sorted((share.low for share in found), reverse=True)
    assert [share.high for share in found] == sorted((share.high for share in found), reverse=True)
    turned = [share_of_sequences([1.0] * right + [0.0] * (100 - right), [32] * 100) for right in range(5)]
    for share, other in zip(found, turned, strict=True):
        assert (other.low, other.high) == pytest.approx((1 - share.high, 1 - share.low))


def test_intervals_hold_a_share_whose_mistakes_are_seldom_whole_sequences() -> None:
    """100 of 32 questions: one sequence in 50 is wrong as a whole, and one question in 2,500 of the others."""
    random, holds = np.random.default_rng(2), 0
    for _ in range(1000):
        right = np.where(random.random(100) < 0.02, 0, random.binomial(32, 1 - 0.0004, 100)).astype(float).tolist()
        share = share_of_sequences(right, [32] * 100)
        holds += share.low <= 0.98 * (1 - 0.0004) <= share.high
    assert holds / 1000 > 0.93


@pytest.mark.parametrize("options", [copying.CopyOptions, copying.InductionOptions])
def test_the_size_of_a_batch_does_not_change_what_is_copied(options: type) -> None:
    given, found = subject(Oracle(nothing, 300)), []
    (chosen,) = select_tasks(["copy" if options is copying.CopyOptions else "induction"])
    block = options().batch
    for batch in (block, 5, 50):
        sequences = replace(options(), batch=batch)
        draw = copying.random_tokens if options is copying.CopyOptions else copying.text_tokens
        found.append(torch.cat([*copying.drawn(draw, given, sequences, 12, block)]))
        assert digest_of(replace(chosen, options=sequences), given) == digest_of(chosen, given)
    assert found[0].equal(found[1]) and found[0].equal(found[2])
    assert found[0][block : 2 * block].equal(draw(given, block, 12, 1)), "as before, in batches of the default"


def test_intervals_of_means() -> None:
    """Student's t: by its table, and beyond it to three digits of published ones; nothing of a single pair."""
    published = {1: 12.706, 15: 2.131, 16: 2.120, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980, 10**6: 1.960}
    assert {freedom: student(freedom) for freedom in published} == pytest.approx(published, abs=6e-4)
    found = interval([1.0, 2.0, 6.0])
    assert (found.mean, found.half) == (3.0, pytest.approx(4.303 * math.sqrt(7 / 3)))
    assert interval([1.0]).half is None


def test_a_few_equal_differences_tell_nothing_apart() -> None:
    """Such as those of a count: one question more of 12,288 that both seeds answer. Signs of six or more do."""
    for few in ([1 / 12288] * 2, [0.7 - 0.6, 0.9 - 0.8], [-1.0] * 5, [0.0] * 2):
        found = interval(few)
        assert (found.half, found.verdict) == (None, UNDECIDED)
    assert interval([-1.0] * 6).verdict == BETTER and interval([0.0] * 6).verdict == UNDECIDED
    assert interval([1.0, 1.001]).verdict == WORSE
