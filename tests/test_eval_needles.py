"""Passkey, needles, variable tracking, common words: what the samples promise, and models with known scores."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from oracles import Oracle, nothing, subject, tokenizers_of_all_kinds

from data.cli import UsageError
from eval.evaluate import main
from eval.plots.heatmap import Panel, draw_heatmap
from eval.source import Source
from eval.tasks.haystack import Haystack, haystack_sentences, largest_fit, split_sentences
from eval.tasks.needles import KINDS, WITH_DEPTH, Options, all_makers, match, run, split_choices
from eval.tasks.samples import Sample
from eval.tasks.words import draw_names
from train.subjects import data_of_run, open_subject

TOKENIZERS = tokenizers_of_all_kinds()
# Enough for every kind in bytes; a word and what the tokenizer joins it with.
LENGTH, WORD = 1500, 25
HIDDEN = re.compile(
    r"One of the special magic numbers for [a-z-]+ is: \d+\."
    r"|The pass key is \d+\. Remember it\. \d+ is the pass key\."
)


def make(kind: str, tokenizer: str, depth: float = 50.0, number: int = 0, length: int = LENGTH, **options) -> Sample:
    given = Options(kinds=(kind,), **{"common": 3, **options})
    ((_, maker),) = all_makers(subject(Oracle(nothing, 600), TOKENIZERS[tokenizer]), given)
    return maker(length, depth if kind in WITH_DEPTH else None, number)


def test_more_choices_than_there_are_numbers_end() -> None:
    with pytest.raises(ValueError, match="different numbers of 5 digits: there are 90000"):
        make("passkey", next(iter(TOKENIZERS)), choices=20_000)
    with pytest.raises(ValueError, match="20000 different names of 3 letters: there are 17576"):
        draw_names(np.random.default_rng(0), 20_000, letters=3)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_as_long_and_as_deep_as_asked(kind: str, tokenizer: str) -> None:
    for depth in (0.0, 70.0, 100.0) if kind in WITH_DEPTH else (50.0,):
        sample = make(kind, tokenizer, depth)
        used = len(sample.tokens) + sample.new_tokens
        assert LENGTH - WORD * (2 if kind == "words" else 1) <= used <= LENGTH
        assert sample.tokens == TOKENIZERS[tokenizer].prompt(sample.text)
        if kind not in WITH_DEPTH:
            assert sample.token_depth is None
            continue
        answer = sample.answers[0]
        start = "The pass key is" if kind == "passkey" else "One of the special magic numbers for"
        at = sample.text.rindex(start, 0, sample.text.index(answer))
        before, after = (
            [part.split() for part in split_sentences(HIDDEN.sub("", part))]
            for part in (sample.text[sample.text.index("\n") : at], sample.text[at : sample.text.rindex("\n")])
        )
        words, all_words = sum(map(len, before)), sum(map(len, before + after))
        assert abs(words - depth * all_words / 100) <= max(map(len, before + after)) / 2
        prompt_share = 100 * len(TOKENIZERS[tokenizer].prompt(sample.text[:at])) / len(sample.tokens)
        assert sample.token_depth == pytest.approx(prompt_share)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_in_the_prompt_and_other_choices_are_not(kind: str) -> None:
    for number in range(5):
        sample = make(kind, "bpe", number=number, chains=2)
        text = sample.text
        assert len({*sample.right, *sample.wrong}) == len(sample.right) + len(sample.wrong)
        if kind == "words":
            entries = Counter(re.findall(r"\d+\. ([a-z-]+)", text.rpartition("Below is")[2]))
            assert {entries[word] for word in sample.answers} == {6}
            assert set(entries) - set(sample.answers) >= {choice.removeprefix(" 1. ") for choice in sample.wrong}
            assert {count for word, count in entries.items() if word not in sample.answers} == {1}
            continue
        question = text.rpartition("\n")[2]
        assert not [answer for answer in sample.answers if answer in question], "the question gives nothing away"
        assert all(choice[1:] == answer for choice, answer in zip(sample.right, sample.answers, strict=True))
        times = {"passkey": 2}.get(kind, 1)
        if kind == "variables":
            assigned = dict(re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", text))
            number_asked = re.search(r"value (\d+) in", question)[1]

            def root(name: str, assigned: dict[str, str] = assigned) -> str:
                return root(assigned[name]) if name in assigned else name

            assert {name for name in assigned if root(name) == number_asked} == set(sample.answers)
            assert len(assigned) == 10, "two chains of five"
        else:
            assert all(text.count(answer) == times for answer in sample.answers)
        present = [choice for choice in sample.wrong if choice[1:] in text]
        assert len(present) == {"multikey": 3, "variables": 5}.get(kind, 0), "of keys that are not asked for"


def test_there_is_a_wrong_choice_however_few_are_asked_for() -> None:
    for kind in ("multivalue", "multiquery"):
        assert make(kind, "bpe", choices=2).wrong


def test_keys_that_are_asked_for_have_the_values_that_answer() -> None:
    for kind, asked, values in (("single", 1, 1), ("multikey", 1, 1), ("multivalue", 1, 4), ("multiquery", 4, 1)):
        sample = make(kind, "bpe")
        stated: dict[str, list[str]] = {}
        for key, value in re.findall(r"magic numbers for ([a-z-]+) is: (\d{7})\.", sample.text):
            stated.setdefault(key, []).append(value)
        question = sample.text.rpartition("\n")[2]
        keys = [key for key in stated if key in question]
        assert len(keys) == asked
        assert len(stated) == (4 if kind in ("multikey", "multiquery") else 1)
        assert sorted(value for key in keys for value in stated[key]) == sorted(sample.answers)
        assert len(sample.answers) == asked * values


def test_a_number_hides_the_same_at_every_length_and_depth() -> None:
    one, other = make("multikey", "bpe", 0.0), make("multikey", "bpe", 100.0, length=700)
    assert (one.answers, one.wrong) == (other.answers, other.wrong)
    assert one.text != other.text
    assert make("multikey", "bpe", 0.0).text == one.text
    assert make("multikey", "bpe", 0.0, number=1).answers != one.answers


def test_text_that_has_what_is_hidden_is_refused_or_passed_over(tmp_path: Path) -> None:
    key = make("passkey", "bpe").answers[0]
    file = tmp_path / "book.txt"
    file.write_text(f"The number of the day is {key}. It is not a secret.\nNext line")
    given = subject(Oracle(nothing, 600), TOKENIZERS["bpe"], texts=(file,))
    ((_, maker),) = all_makers(given, Options(kinds=("single",)))
    sample = maker(600, 50.0, 0)
    assert sample.text.count("It is not a secret.") > 3, "a short text is repeated"
    value = sample.answers[0]
    file.write_text(f"There is {value} in it.")
    ((_, maker),) = all_makers(given, Options(kinds=("single",)))
    with pytest.raises(ValueError, match="choose another text="):
        maker(600, 50.0, 0)


def test_a_haystack_cuts_its_last_sentence() -> None:
    hay = Haystack(["one two three.", "four five.", "six."])
    assert hay.first(0) == []
    assert hay.first(4) == [["one", "two", "three."], ["four"]]
    text, begins = hay.around([(0, "A"), (100, "B"), (60, "C"), (60, "D")], 5)
    assert text == "A one two three. C D four five. B"
    assert [text[begin] for begin in begins] == ["A", "B", "C", "D"]
    with pytest.raises(ValueError, match="too few words"):
        hay.first(7)
    assert split_sentences("A b. C\n\nd  e? F") == ["A b.", "C", "d e?", "F"]


def test_the_largest_fit() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        counts = np.cumsum(random.integers(1, 9, 3000)).tolist()
        least, budget = int(random.integers(20)), int(random.integers(200, 6000))
        asked: list[int] = []
        size = largest_fit(lambda size: (asked.append(size), counts[size])[1], budget, least)  # noqa: B023
        assert counts[size] <= budget < counts[size + 1]
        assert len(asked) < 30
    with pytest.raises(ValueError, match="at least 50 tokens are needed, there are 40"):
        largest_fit(lambda size: 50 + size, 40)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_choices_begin_where_their_tokens_differ_from_the_prompt(tokenizer: str) -> None:
    sample = make("multikey", tokenizer)
    prefix, choices = split_choices(subject(Oracle(nothing, 600), TOKENIZERS[tokenizer]), sample)
    assert all(choices)
    for tokens, choice in zip(choices, (*sample.right, *sample.wrong), strict=True):
        assert prefix + tokens == TOKENIZERS[tokenizer].prompt(sample.text + choice)


def test_string_match_is_of_all_answers_in_any_order_and_case() -> None:
    assert match("b, A and 12", ["a", "B", "c", "12"]) == 0.75


def test_models_with_known_scores() -> None:
    """One that continues every prompt with its answers, and one that knows nothing."""
    text = TOKENIZERS["joined"]
    options = Options(kinds=KINDS, lengths=(LENGTH,), depths=(50.0,), samples=2, common=3)
    given = subject(Oracle(nothing, 600), text, context=LENGTH)
    script: dict[tuple[int, ...], set[int]] = {}
    for kind, maker in all_makers(given, options):
        for depth in options.depths:
            for number in range(options.samples):
                sample = maker(LENGTH, depth if kind in WITH_DEPTH else None, number)
                answer = "".join([sample.right[0], *(f", {other}" for other in sample.answers[1:])])
                prefix, choices = split_choices(given, sample)
                for before, after in (
                    (sample.tokens, text.encode(answer)),
                    (prefix, choices[0]),
                ):
                    for place, token in enumerate(after):
                        script.setdefault((*before, *after[:place]), set()).add(token)

    knowing = run(subject(Oracle(lambda before: script.get(before, set()), 600), text, context=LENGTH), options)
    assert {row["kind"] for row in knowing.rows} == set(KINDS)
    for row in knowing.rows:
        assert (row["match"], row["choice"]) == (1.0, 1.0), row
        assert row["count"] == 2
        assert row["choice_low"] < 1 == row["choice_high"]
    assert set(knowing.pictures) == set(WITH_DEPTH)
    clueless = run(subject(Oracle(nothing, 600), text, context=LENGTH), options)
    for row in clueless.rows:
        assert row["match"] == 0
        assert row["choice"] == pytest.approx(row["chance"])
    assert clueless.figures["multikey/choice"] == pytest.approx(0.1)
    assert clueless.figures["multivalue/choice"] == pytest.approx(0.4)


def test_what_does_not_fit_is_left_out_by_name() -> None:
    given = subject(Oracle(nothing, 600))
    options = Options(kinds=("passkey", "words"), lengths=(40, 400), depths=(50.0,), samples=1, generate=False)
    found = run(given, options)
    assert [(row["kind"], row["length"], row["match"]) for row in found.rows] == [("passkey", 400, None)]
    assert len(found.notes) == 3
    assert "passkey at 40 tokens is left out: at least" in found.notes[0]
    with pytest.raises(UsageError, match="nothing fits:\nwords at 40 tokens"):
        run(given, Options(kinds=("words",), lengths=(40,)))
    assert Options(kinds=("pass",), depths=(101.0,), samples=0).problems() == [
        "kinds: pass is none of passkey, single, multikey, multivalue, multiquery, variables, words",
        "depths: 101.0 is not between 0 and 100",
        "samples is 0; it must be at least 1",
    ]


def test_the_tasks_of_a_run_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a Block Transformer, generation included; the text around what is hidden is that of its validation split."""
    for name in ("run-block", "data"):
        shutil.copytree(ROOT / "tests" / "golden" / "old" / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    asked = {
        "recall": ["pairs=2", "sequences=4"],
        "needles": ["kinds=single", "lengths=420", "depths=0,100", "samples=1"],
        "copy": ["lengths=8", "sequences=2"],
        "induction": ["length=12", "sequences=2"],
    }
    options = [f"{task}.{option}" for task, given in asked.items() for option in given]
    main(["checkpoint=run-block", f"tasks={','.join(asked)}", "device=cpu", *options])
    found = json.loads((tmp_path / "run-block" / "summary.json").read_text())["evaluations"]
    assert set(found) == set(asked)
    assert set(found["needles"]["figures"]) == {"single/match", "single/choice", "single/margin"}
    assert {"zoology/accuracy", "gap/choice/2"} <= set(found["recall"]["figures"])
    assert {"accuracy", "generated"} <= set(found["copy"]["figures"])
    assert {"random", "text"} <= set(found["induction"]["figures"])
    assert (tmp_path / "run-block" / "evaluations" / "needles-single.png").exists()
    opened = open_subject(Source("run-block", device="cpu"))
    sentences = haystack_sentences(replace(opened.subject, prepared=data_of_run(opened)))
    assert any(sentence.startswith("def function_") for sentence in sentences), "validation text"


def test_a_heat_map_has_a_cell_for_each_length_and_depth() -> None:
    shares = {(length, depth): length / 200 for length in (100, 200) for depth in (0.0, 50.0, 100.0)}
    del shares[200, 50.0]
    figure = draw_heatmap([Panel("one", shares), Panel("other", {(100, 0.0): 0.25}, chance=0.1)], "name: kind " * 9)
    one, other = figure.axes[:2]
    assert [text.get_text() for text in one.texts] == ["0.50", "1.00", "0.50", "0.50", "1.00"]
    assert [text.get_text() for text in other.texts] == ["0.25"]
    assert [label.get_text() for label in one.get_xticklabels()] == ["100", "200"]
    assert [label.get_text() for label in one.get_yticklabels()] == ["0", "50", "100"]
    assert "chance 0.10" in other.get_title()
    assert "\n" in figure.get_suptitle()
