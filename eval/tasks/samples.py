"""Samples of the tasks that hide something in a long text: passkey, needles, variable tracking, common words.

Definitions as in RULER (Hsieh et al. 2024; NVIDIA/RULER, scripts/data/synthetic) and, of the passkey, Mohtashami and
Jaggi 2023; the texts around them are ours. A sample is a function of (task, tokenizer, length, depth, seed, number),
and samples of one number hide the same at every length and depth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from eval.tasks.haystack import Haystack, largest_fit
from eval.tasks.task import Tokenizer
from eval.tasks.words import draw_names, draw_numbers, draw_pairs, draw_words

POOL = 8  # so many times what is needed is drawn, for those of a length
TRIES = 20  # of samples whose haystack has what is hidden in it


@dataclass(frozen=True)
class Sample:
    """A prompt, and what is to follow.

    text        the prompt
    tokens      the prompt in tokens; with `new_tokens`, no more than the length asked for
    new_tokens  tokens that may be generated
    answers     all of them are to be generated, in any order
    right       continuations of the prompt that are answers; `wrong`: those that are not
    token_depth share of the prompt's tokens before what is asked for, in percent; None of tasks without a depth
    """

    text: str
    tokens: list[int]
    new_tokens: int
    answers: tuple[str, ...]
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    token_depth: float | None = None


@dataclass(frozen=True)
class Draft:
    """Texts that are hidden, with their depths in percent, in a haystack between `header` and `question`.

    target  index of the hidden text whose depth is reported; None: none
    unique  texts that the haystack must not have
    """

    header: str
    hidden: Sequence[tuple[float, str]]
    question: str
    answers: tuple[str, ...]
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    unique: tuple[str, ...]
    target: int | None = None


def new_tokens(tokenizer: Tokenizer, answers: Sequence[str], most: int, length: int) -> int:
    """Tokens that may be generated: `most`, as in RULER, but an eighth of short lengths, and room for the answers."""
    return max(len(tokenizer.encode(" " + ", ".join(answers))) + 8, min(most, length // 8))


def fill_draft(
    draft: Draft,
    haystack: Callable[[], Haystack],
    tokenizer: Tokenizer,
    length: int,
    most_new_tokens: int,
) -> Sample:
    """Fill up `draft` with as many words as fit into `length` tokens, new ones included.

    Raises ValueError if what is hidden does not fit, or if every haystack has some of it already.
    """
    new = new_tokens(tokenizer, draft.answers, most_new_tokens, length)
    for _ in range(TRIES):
        source = haystack()

        def prompt(words: int, source: Haystack = source) -> tuple[str, list[int]]:
            context, begins = source.around(draft.hidden, words)
            return f"{draft.header}\n{context}\n{draft.question}", [len(draft.header) + 1 + at for at in begins]

        def count(words: int, prompt: Callable[[int], tuple[str, list[int]]] = prompt) -> int:
            return len(tokenizer.prompt(prompt(words)[0]))

        words = largest_fit(count, length - new)
        around = " ".join(word for sentence in source.first(words) for word in sentence)
        if not any(text in around for text in draft.unique):
            break
    else:
        raise ValueError("the text has what is to be hidden in it; choose another text=")
    text, begins = prompt(words)
    tokens, depth = tokenizer.prompt(text), None
    if draft.target is not None:
        depth = 100 * len(tokenizer.prompt(text[: begins[draft.target]])) / len(tokens)
    return Sample(text, tokens, new, draft.answers, draft.right, draft.wrong, depth)


def of_equal_length(tokenizer: Tokenizer, texts: Sequence[str], count: int) -> list[str]:
    """`count` of `texts`, of one number of tokens as far as possible: a shorter text would be the likelier one."""
    groups: dict[int, list[str]] = {}
    for text in texts:
        groups.setdefault(len(tokenizer.encode(f" {text}")), []).append(text)
    largest = max(groups.values(), key=len)
    return [*largest, *(text for text in texts if text not in largest)][:count]


def equal_length_numbers(tokenizer: Tokenizer, random: np.random.Generator, count: int, digits: int) -> list[str]:
    """Different numbers of one number of tokens."""
    return of_equal_length(tokenizer, draw_numbers(random, POOL * count, digits), count)


def passkey(tokenizer: Tokenizer, random: np.random.Generator, depth: float, choices: int) -> Draft:
    key, *others = equal_length_numbers(tokenizer, random, choices, digits=5)
    return Draft(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about the important information there.",
        [(depth, f"The pass key is {key}. Remember it. {key} is the pass key.")],
        "What is the pass key? The pass key is",
        answers=(key,),
        right=(f" {key}",),
        wrong=tuple(f" {other}" for other in others),
        unique=(key, *others),
        target=0,
    )


@dataclass(frozen=True)
class NeedleTask:
    """RULER's needle in a haystack: `keys` keys with `values` numbers each, `queries` of the keys asked for."""

    keys: int = 1
    values: int = 1
    queries: int = 1


def needle(task: NeedleTask, tokenizer: Tokenizer, random: np.random.Generator, depth: float, choices: int) -> Draft:
    """Draft of `task`. The first needle that is asked for lies at `depth`, the others anywhere.

    Wrong choices are the numbers of keys that are not asked for, then numbers that are nowhere.
    """
    keys = draw_pairs(random, task.keys)
    wanted = task.queries * task.values
    numbers = equal_length_numbers(tokenizer, random, task.keys * task.values + choices, digits=7)
    spare = numbers[task.keys * task.values :]
    values = [numbers[k * task.values : (k + 1) * task.values] for k in range(task.keys)]
    depths = [depth, *random.uniform(0, 100, task.keys * task.values - 1).tolist()]
    order = [(k, v) for k in range(task.keys) for v in range(task.values)]  # the first keys are asked for
    kind = "number" if wanted == 1 else "numbers"
    hidden = [
        (at, f"One of the special magic numbers for {keys[k]} is: {values[k][v]}.")
        for at, (k, v) in zip(depths, order, strict=True)
    ]
    asked = keys[: task.queries]
    query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    answers = tuple(number for k in range(task.queries) for number in values[k])
    others = [number for k in range(task.queries, task.keys) for number in values[k]]
    wrong = [*others, *spare][: max(choices - len(answers), len(others), 1)]
    some, what, verb = ("A", "What is the", "is") if wanted == 1 else ("Some", "What are all the", "are")
    return Draft(
        f"{some} special magic {kind} {verb} hidden within the following text. Make sure to memorize it. I will quiz "
        f"you about the {kind} afterwards.",
        hidden,
        f"{what} special magic {kind} for {query} mentioned in the provided text? The special magic {kind} for {query} "
        f"mentioned in the provided text {verb}",
        answers=answers,
        right=tuple(f" {number}" for number in answers),
        wrong=tuple(f" {number}" for number in wrong),
        unique=(*keys, *numbers),
        target=0,
    )


def assignments(names: Sequence[str], number: str) -> list[str]:
    """The chain: VAR A = 1, VAR B = VAR A, ..."""
    return [f"VAR {names[0]} = {number}."] + [f"VAR {b} = VAR {a}." for a, b in pairwise(names)]


VARIABLES_HEADER = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"


def variables_question(number: str, count: int) -> str:
    return (
        f"Question: Find all variables that are assigned the value {number} in the text above. Answer: According to "
        f"the chain(s) of variable assignment in the text above, {count} variables are assigned the value {number}, "
        "they are:"
    )


def variables(tokenizer: Tokenizer, random: np.random.Generator, chains: int, hops: int) -> Draft:
    """RULER's variable tracking: a number is assigned to a variable, which is assigned to another, `hops` times.

    An example with names of three letters comes before it. Wrong choices are the variables of other chains, then names
    that are nowhere.
    """
    size = hops + 1
    short = draw_names(random, size, letters=3)
    drawn = [
        name for name in draw_names(random, POOL * size * (chains + 1), 5) if not any(part in name for part in short)
    ]
    everything = of_equal_length(tokenizer, drawn, size * (chains + 1))
    names = [everything[chain * size : (chain + 1) * size] for chain in range(chains)]
    nowhere = everything[chains * size :]
    short_number, *numbers = draw_numbers(random, chains + 1, digits=5)
    hidden: list[tuple[float, str]] = []
    for chain, number in zip(names, numbers, strict=True):
        depths = np.sort(random.uniform(0, 100, size)).tolist()
        hidden += zip(depths, assignments(chain, number), strict=True)
    hidden.sort(key=lambda item: item[0])
    example = " ".join(assignments(short, short_number))
    shown = f"{VARIABLES_HEADER}\n{example}\n{variables_question(short_number, size)} {' '.join(short)}\n\n"
    others = [name for chain in names[1:] for name in chain]
    return Draft(
        shown + VARIABLES_HEADER,
        hidden,
        variables_question(numbers[0], size),
        answers=tuple(names[0]),
        right=tuple(f" {name}" for name in names[0]),
        wrong=tuple(f" {name}" for name in [*others, *nowhere][: max(size, len(others))]),
        unique=tuple(everything),
    )


WORDS_HEADER = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often."
)


def numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def word_list(
    random: np.random.Generator, common: Sequence[str], others: Sequence[str], often: int, seldom: int
) -> str:
    listed = [*common] * often + [*others] * seldom
    return f"{WORDS_HEADER}\n{numbered([listed[i] for i in random.permutation(len(listed))])}\n"


def words_question(count: int) -> str:
    return (
        f"Question: What are the {count} most common words in the above list? Answer: The top {count} words that "
        "appear most often in the list are:"
    )


def common_words(tokenizer: Tokenizer, length: int, common: int, seed: Sequence[int]) -> Sample:
    """RULER's common-word extraction: `common` words of a list occur more often than all others; which are they?

    They occur 30 times and the others 3 times, below 4,096 tokens 6 times and once; an example comes before. Wrong
    choices are as many of the other words. Raises ValueError if not even the common words fit.
    """
    often, seldom = (6, 1) if length < 4096 else (30, 3)
    random = np.random.default_rng(seed)
    drawn = draw_words(random, max(3 * common, length // (3 * seldom)))  # an entry has 3 tokens at least
    choices = of_equal_length(tokenizer, drawn, 2 * common)
    right, wrong = choices[:common], choices[common:]
    rest = [*wrong, *(word for word in drawn if word not in choices)]
    example = draw_words(random, 2 * common if length < 4096 else 4 * common)
    shown = word_list(random, example[:common], example[common:], *((3, 1) if length < 4096 else (10, 3)))
    shown += f"{words_question(common)} {numbered(example[:common])}\n\n"
    order = int(random.integers(2**32))

    def prompt(others: int) -> str:
        listed = word_list(np.random.default_rng(order), right, rest[:others], often, seldom)
        return shown + listed + words_question(common)

    new = new_tokens(tokenizer, [numbered(right)], 120, length)
    others = largest_fit(lambda count: len(tokenizer.prompt(prompt(count))), length - new, least=common)
    text = prompt(others)
    return Sample(
        text,
        tokenizer.prompt(text),
        new,
        answers=tuple(right),
        right=tuple(f" 1. {word}" for word in right),
        wrong=tuple(f" 1. {word}" for word in wrong),
    )
