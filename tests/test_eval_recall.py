"""The recall task and loss by position, against what they say of themselves."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import build, small, tokens
from oracles import Oracle, first_time, nothing, subject

from arch import Decoder
from arch.named import load_arch
from data.batches import IGNORE, Batch
from data.cli import UsageError
from data.config import RECALL_KINDS, RecallConfig
from data.recall import RecallTask, ZoologyTask, texts
from data.tokenizer import number_tokenizer
from eval import recall
from eval.evaluations import digest_of
from eval.intervals import wilson
from eval.plots.positions import draw_positions
from eval.positions import Bucket, edges, loss_by_position
from eval.recall import Questions, questions, zoology_questions
from eval.tasks import compressed, select_tasks
from eval.tasks import recall as recall_task
from eval.tasks.task import Subject
from train.benchmarks.bounded_report import accuracy
from train.benchmarks.bounded_study import recall_counts
from train.loading import Text

TASK = RecallTask(length=40, gap=10, noise=3, keys=7, values=5)


JOINED = replace(TASK, joined=True)


@pytest.mark.parametrize("task", [TASK, JOINED])
@pytest.mark.parametrize("pairs", [1, 3, 7])
def test_the_context_decides_every_answer(task: RecallTask, pairs: int) -> None:
    asked = questions(task, pairs, batch=20, seed=0, number=4)
    context_BC = asked.inputs_BT[:, : task.pair_length * pairs]
    if task.joined:  # as two tokens
        assert (context_BC >= task.first_pair).all()
        pair_BP = context_BC - task.first_pair
        key_BP, value_BP = task.noise + pair_BP // task.values, task.noise + task.keys + pair_BP % task.values
        context_BC = torch.stack((key_BP, value_BP), dim=-1).flatten(1)
    for row, tokens_T in enumerate(asked.inputs_BT):
        targets_T, source_T, context = asked.targets_BT[row], asked.source_BT[row], context_BC[row].tolist()
        known = dict(zip(context[::2], context[1::2], strict=True))
        assert len(known) == pairs, "a key stands for one value"
        assert all(
            TASK.noise <= key < TASK.noise + TASK.keys <= value < TASK.vocab_size for key, value in known.items()
        )
        begin = task.pair_length * pairs
        first = begin + task.gap
        assert (tokens_T[begin:first] < task.noise).all()
        assert (targets_T[:first] == IGNORE).all()
        assert targets_T[first:].tolist() == [known[key] for key in tokens_T[first:].tolist()]
        of_pair = context_BC[row, 1::2][source_T[first:] // task.pair_length]
        assert of_pair.equal(targets_T[first:])
    assert (asked.distance[asked.is_question] > task.gap).all()
    assert int(asked.inputs_BT.max()) < task.vocab_size


def test_batches_are_a_function_of_seed_and_number() -> None:
    first = questions(TASK, 3, 8, seed=0, number=0)
    again = questions(TASK, 3, 8, seed=0, number=0)
    assert first.inputs_BT.equal(again.inputs_BT)
    assert first.targets_BT.equal(again.targets_BT)
    for seed, number in ((1, 0), (0, 1)):
        assert not first.inputs_BT.equal(questions(TASK, 3, 8, seed, number).inputs_BT)


@pytest.mark.parametrize(("window", "reached"), [(6, False), (8, True)])
def test_a_gap_beyond_the_windows_of_all_layers_hides_the_pairs(window: int, reached: bool) -> None:
    """By gradient: two layers see 2 (window - 1) tokens back, the gap is 10."""
    model = build(small("swa", window=window, num_layers=2, vocab_size=TASK.vocab_size))
    asked = questions(TASK, 3, 4, seed=0, number=0)
    seen: list[torch.Tensor] = []
    model.embed.register_forward_hook(lambda module, inputs, output: seen.append(output.retain_grad() or output))
    first = 6 + TASK.gap
    model(asked.inputs_BT)[:, first].square().sum().backward()
    gradient_T = seen[0].grad.abs().sum(dim=(0, 2))
    assert bool((gradient_T[:6] != 0).any()) == reached
    assert gradient_T[first] > 0


def test_counts_of_known_models() -> None:
    """One that knows all answers, and one that finds all tokens alike."""
    for pairs in (1, 3):
        counts = recall_counts(Oracle(first_time, TASK.vocab_size), TASK, pairs, sequences=70)
        assert accuracy(counts) == 1
        assert sum(total for _, total in counts.values()) == 70 * (TASK.length - 2 * pairs - TASK.gap)
        assert set(counts) <= {8, 16, 32}, "distances lie between the gap and the length, in powers of 2"
    assert accuracy(recall_counts(Oracle(nothing, TASK.vocab_size), TASK, 3, sequences=70)) == 0


@pytest.mark.parametrize(
    ("task", "pairs", "message"),
    [
        (TASK, 0, "0 pairs: at least 1, and at most 7"),
        (TASK, 8, "add keys"),
        (RecallTask(length=20, gap=10, keys=9), 4, "at most 3 find room in 20 tokens with a gap of 10"),
        (RecallTask(noise=0), 2, "noise is 0; it must be at least 1"),
    ],
)
def test_impossible_tasks(task: RecallTask, pairs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        questions(task, pairs, 1, 0, 0)


def batch_of(inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> Batch:
    return {
        "inputs": inputs_BT,
        "targets": targets_BT,
        "step_targets": targets_BT.numel(),
        "segment_ids_BT": None,
    }


@pytest.mark.parametrize(
    ("length", "bounds"), [(1, [0, 1]), (2, [0, 1, 2]), (8, [0, 1, 2, 4, 8]), (11, [0, 1, 2, 4, 8, 11])]
)
def test_edges(length: int, bounds: list[int]) -> None:
    assert edges(length) == bounds


@pytest.mark.parametrize("arch", ["mha", "swa_sinks", "bct"])
def test_loss_by_position_is_that_of_the_logits(arch: str) -> None:
    model = build(small(arch, num_layers=2))
    inputs_BT, targets_BT = tokens(5, 11), tokens(5, 12)[:, 1:].clone()
    targets_BT[1] = IGNORE  # a row of padding
    targets_BT[:, 1] = IGNORE  # a bucket without a target
    targets_BT[2, 5:7] = IGNORE
    found = loss_by_position(model, [batch_of(inputs_BT[:3], targets_BT[:3]), batch_of(inputs_BT[3:], targets_BT[3:])])
    assert [(bucket.first, bucket.end) for bucket in found] == [(0, 1), (2, 4), (4, 8), (8, 11)]
    log_BTV = direct(model, inputs_BT)
    for bucket in found:
        rows = []
        for b in range(5):
            real = [t for t in range(bucket.first, bucket.end) if targets_BT[b, t] != IGNORE]
            rows.append([-log_BTV[b, t, targets_BT[b, t]].item() for t in real])
        flat = [nats for row in rows for nats in row]
        means = torch.tensor([sum(row) / len(row) for row in rows if row], dtype=torch.float64)
        assert bucket.targets == len(flat)
        assert bucket.nats == pytest.approx(sum(flat) / len(flat), rel=1e-5)
        assert bucket.error == pytest.approx(means.std().item() / 2, rel=1e-4), "of four rows"


def test_every_line_of_the_picture_is_named() -> None:
    buckets = [Bucket(0, 1, nats=2.0, error=None, targets=3)]
    (axes,) = draw_positions({"_mine": buckets, "other": buckets}, "loss").axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["_mine", "other"]


@torch.no_grad()
def direct(model: Decoder, inputs_BT: torch.Tensor) -> torch.Tensor:
    log_BTV: torch.Tensor = model(inputs_BT).log_softmax(dim=-1)
    return log_BTV


def test_one_sequence_has_no_error() -> None:
    model = build(small("mha", num_layers=1))
    found = loss_by_position(model, [batch_of(tokens(1, 4), tokens(1, 4))])
    assert [bucket.error for bucket in found] == [None] * 3


def digest(asked: Questions) -> str:
    return hashlib.sha256(asked.inputs_BT.numpy().tobytes() + asked.targets_BT.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("task", "pairs", "batch", "seed", "expected"),
    [
        (ZoologyTask(), 4, 20, 123, "2dd8dace784e29bb2593c6dde0a429c7108a882dd7c8da867dd3479b591a98c1"),
        (ZoologyTask(128, 256, 0.1), 8, 50, 7, "4559a6a69e81e47e17b87082620f92e92859e76838d95e96133314e654798be2"),
        (ZoologyTask(16, 20), 2, 3, 0, "e0f9985ae0bc75a2bde65ff81ee41118922bf128b28eaa8d9e0660704adf0bf3"),
    ],
)
def test_zoology_sequences_are_those_of_its_generator(
    task: ZoologyTask, pairs: int, batch: int, seed: int, expected: str
) -> None:
    """Checksums of inputs and labels that HazyResearch/zoology's `multiquery_ar` at d88d6f5 made of the same seed."""
    asked = zoology_questions(task, pairs, batch, np.random.RandomState(seed))
    assert digest(asked) == expected
    if task.length == 16:
        assert asked.inputs_BT[0].tolist() == [8, 15, 3, 11, 8, 0, 3, *[0] * 9]
        assert asked.targets_BT[0, [4, 6]].tolist() == [15, 11]
        assert asked.source_BT[0, [4, 6]].tolist() == [1, 3]


def test_zoology_noise_takes_the_place_of_nothing() -> None:
    plain, noisy = (
        zoology_questions(ZoologyTask(noise=noise), 8, 30, np.random.RandomState(1)) for noise in (False, True)
    )
    said_BT = plain.inputs_BT != 0
    assert plain.targets_BT.equal(noisy.targets_BT)
    assert plain.inputs_BT[said_BT].equal(noisy.inputs_BT[said_BT])
    assert noisy.inputs_BT[~said_BT].float().mean() == pytest.approx(4096, rel=0.1)
    assert plain.is_question.sum(dim=1).tolist() == [8] * 30
    assert not (plain.inputs_BT[:, 16:] >= 4096).any(), "no answer among the inputs after the pairs"
    assert plain.is_question[:, 16:40].sum() > 0.6 * 30 * 8, "the first half of the places is asked more often"
    for task, pairs in ((ZoologyTask(63), 4), (ZoologyTask(64, 64), 4), (ZoologyTask(64), 17), (ZoologyTask(), 0)):
        with pytest.raises(ValueError, match=r"must be even|find room"):
            zoology_questions(task, pairs, 1, np.random.RandomState(0))


def test_the_recall_task_of_known_models() -> None:
    options = recall_task.Options(pairs=(2, 4), sequences=24, vocab=200, batch=16)
    knowing = recall_task.run(subject(Oracle(first_time, 200)), options)
    assert {row["accuracy"] for row in knowing.rows} == {row["choice"] for row in knowing.rows} == {1.0}
    asked = {(kind, pairs): 0 for kind in RECALL_KINDS for pairs in (2, 4)}
    for row in knowing.rows:
        asked[row["kind"], row["pairs"]] += row["count"]
    assert asked == {("zoology", 2): 48, ("zoology", 4): 96, ("gap", 2): 24 * 16, ("gap", 4): 24 * 32}
    clueless = recall_task.run(subject(Oracle(nothing, 200)), replace(options, pairs=(4,), sequences=150))
    assert clueless.figures["zoology/accuracy"] == 0
    assert clueless.figures["zoology/choice"] == pytest.approx(1 / 4, abs=0.06)
    assert clueless.figures["gap/choice"] == pytest.approx(1 / 4, abs=0.1)
    with pytest.raises(UsageError, match=r"nothing can be asked:\nzoology with 40 pairs is left out: 640 tokens"):
        recall_task.run(subject(Oracle(nothing, 200)), recall_task.Options(kinds=("zoology",), pairs=(40,)))


def test_recall_says_why_nothing_is_asked_of_a_block_transformer() -> None:
    layout = load_arch("block")
    layout.block.start, layout.block.length = False, 16
    asked = subject(build(small(layout, num_layers=2, vocab_size=80), torch.float32))
    options = recall_task.Options(kinds=("zoology",), pairs=(1, 4), sequences=2)
    found = recall_task.run(asked, options)
    reason = "zoology with 1 pairs is left out: all questions lie in the first 15 tokens, where the model answers none"
    assert found.notes[0].startswith(reason) and all(value == value for value in found.figures.values())
    with pytest.raises(UsageError, match=f"nothing can be asked:\n{reason}; set a larger recall.length"):
        recall_task.run(asked, replace(options, pairs=(1,)))


@pytest.mark.parametrize("arch", ["mha", "block"])
def test_recall_counts_what_the_logits_say(arch: str) -> None:
    """The first block of a Block Transformer is not asked."""
    layout = load_arch(arch)
    if layout.block is not None:
        layout.block.start = False
    model = build(small(layout, num_layers=2, vocab_size=80), torch.float32)
    asked = questions(RecallTask(length=24, gap=0, keys=10, values=5), 1, 6, seed=3, number=0)
    logits_BTV = torch.full((6, 24, 80), -9.0)
    logits_BTV[:, model.plan.min_prompt - 1 :] = model.next_token_logits(asked.inputs_BT)
    seen_BT = asked.is_question.clone()
    seen_BT[:, : model.plan.min_prompt - 1] = False
    right = (logits_BTV.argmax(-1) == asked.targets_BT) & seen_BT
    counts_B3 = torch.stack(list(recall.right(model, asked).values())).sum(dim=0)
    assert counts_B3[:, 0].equal(right.sum(dim=1).float())
    assert counts_B3[:, 2].equal(seen_BT.sum(dim=1).float())


def as_one(batches: Iterable[Questions]) -> Questions:
    return Questions(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


@pytest.mark.parametrize(("kind", "expected"), [("zoology", "27e2409e"), ("gap", "65e98f74")])
def test_the_size_of_a_batch_does_not_change_the_questions(kind: str, expected: str) -> None:
    """Nor does it change the digest of the result; those of the default are as they were."""
    given, (chosen,) = subject(Oracle(nothing, 297)), select_tasks(["recall"])
    for batch in (16, 7, 100):
        options = recall_task.Options(sequences=100, batch=batch)
        found = [*recall_task.batches(given, options, kind, 4)]
        assert {len(questions.inputs_BT) for questions in found[:-1]} <= {batch}
        parts = b"".join(part.numpy().tobytes() for part in as_one(found))
        assert hashlib.sha256(parts).hexdigest()[:8] == expected
        assert digest_of(replace(chosen, options=options), given) == digest_of(chosen, given)


def numbers(count: int, model: int) -> Subject:
    """A model of `model` tokens that was trained on sequences of `count`."""
    return subject(Oracle(nothing, model), Text(number_tokenizer(count), count))


@pytest.mark.parametrize("name", ["recall", "compressed"])
def test_questions_of_other_tokens_have_another_digest(name: str) -> None:
    """Of one model, by its data; a model of text keeps the digest that it had."""
    (chosen,) = select_tasks([name])
    digests = [digest_of(chosen, numbers(count, 4096)) for count in (77, 296, 4096)]
    assert len(set(digests)) == 3
    assert digest_of(chosen, subject(Oracle(nothing, 4096))) == digests[2], "all that the model has"
    assert digest_of(chosen, numbers(296, 297)) == digests[1], "whatever else is in its vocabulary"


@pytest.mark.parametrize(("kind", "joined"), [("gap", False), ("gap", True), ("zoology", False)])
@pytest.mark.parametrize("count", [77, 296])
def test_questions_are_of_the_tokens_that_the_model_was_trained_on(kind: str, joined: bool, count: int) -> None:
    """However many more there are in its vocabulary: where its data's one more key would be, values begin."""
    given = numbers(count, 4096)
    assert given.numbers == count and subject(Oracle(nothing, 4096)).numbers is None
    config = RecallConfig(kind=kind, pairs=4, length=64, vocab=count, joined=joined, rows=4000, val_rows=1)
    trained = {int(token) for split, text in texts(config) if split == "train" for token in text.split()}
    options = recall_task.Options(kinds=(kind,), joined=joined)
    asked = as_one(recall_task.batches(given, options, kind, 4))
    assert {*asked.inputs_BT.unique().tolist()} <= trained
    assert {*asked.targets_BT[asked.is_question].tolist()} <= trained


def test_other_tokens_than_those_of_the_data_are_refused() -> None:
    options = recall_task.Options(kinds=("gap",), pairs=(2,), vocab=20, sequences=2)
    with pytest.raises(UsageError, match=r"recall.vocab is 20, but the data of oracle has 296 .* set recall.vocab=296"):
        recall_task.run(numbers(296, 4096), options)
    recall_task.run(numbers(296, 4096), replace(options, vocab=72))  # of which there are as many keys and values
    with pytest.raises(UsageError, match=r"set recall.vocab=9000"):
        recall_task.run(numbers(9000, 9001), replace(options, kinds=("zoology",), vocab=8192))
    asked = as_one(recall_task.batches(numbers(9000, 9001), recall_task.Options(), "zoology", 16))
    assert asked.inputs_BT.max() > 8192, "nobody set the limit"
    for joined, message in (
        (
            True,
            "joined is false, but in the data of oracle a pair is one token; set recall.joined=true recall.kinds=gap",
        ),
        (False, "joined is true, but in the data of oracle a pair is two tokens; set recall.joined=false"),
    ):
        given = replace(numbers(296, 297), joined=joined)
        with pytest.raises(UsageError, match=message):
            recall_task.run(given, recall_task.Options(kinds=("gap",), joined=not joined))
        with pytest.raises(UsageError, match=message.partition(";")[0]):
            compressed.run(given, compressed.Options(parts=("recall",), joined=not joined))
        recall_task.run(given, recall_task.Options(kinds=("zoology",), pairs=(4,), sequences=1))
    asked = as_one(recall_task.batches(subject(Oracle(nothing, 4096)), options, "gap", 2))
    assert asked.inputs_BT.max() < 20, "of a model of text the option is a limit"


def test_what_is_impossible_is_known_before_and_faults_come_out() -> None:
    def fault(before: tuple[int, ...]) -> set[int]:
        raise ValueError("a fault")

    given, options = subject(Oracle(fault, 200)), recall_task.Options(kinds=("gap",), pairs=(2,), sequences=2)
    for vocab in (1, 9):
        with pytest.raises(UsageError, match=r"gap with 2 pairs is left out: keys is .* it must be at least 1"):
            recall_task.run(given, replace(options, joined=True, vocab=vocab))
    with pytest.raises(ValueError, match="a fault") as found:
        recall_task.run(given, options)
    assert not isinstance(found.value, UsageError)


def test_sequences_that_are_too_short_for_the_model_name_the_fix() -> None:
    layout = load_arch("block")
    layout.block.start, layout.block.length = False, 16
    asked = subject(build(small(layout, num_layers=2, vocab_size=80), torch.float32))
    message = "8 tokens are fewer than the 16 that the model needs; set recall.length=16"
    with pytest.raises(UsageError, match=message):
        recall_task.run(asked, recall_task.Options(pairs=(1,), length=8, sequences=2))
    message = "15 tokens before the compression are fewer than the 16 .* set a larger compressed.length"
    options = compressed.Options(parts=("recall",), pairs=(2,), length=30, sequences=2)
    with pytest.raises(UsageError, match=message):
        compressed.run(asked, options)


def test_intervals_are_of_sequences_as_wholes() -> None:
    """Of 32 questions about the same pairs."""
    knowing = recall_task.run(subject(Oracle(first_time, 200)), recall_task.Options(kinds=("gap",), pairs=(4,)))
    assert [(row["distance"], row["count"]) for row in knowing.rows] == [(16, 407), (32, 2793)]
    for row in knowing.rows:
        assert row["accuracy_high"] == 1 and row["accuracy_low"] == pytest.approx(wilson(100, 100)[0], abs=0.01)
