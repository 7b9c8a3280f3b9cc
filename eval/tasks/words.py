"""Words of the tasks, and a neutral text made of them that no model has seen."""

from collections.abc import Iterator

import numpy as np


def listed(words: str) -> list[str]:
    return words.split()


ADJECTIVES = listed(
    """
    amber ancient bitter bold brave bright brisk broad calm careful cheerful clean clear clever cold cool crisp
    curious dark deep dry dusty eager early empty faint fair famous firm flat fresh gentle glad golden grand green
    grey heavy hidden hollow honest humble idle keen kind large late lean light lively lonely long loose loud mellow
    mild modest narrow neat noble odd old open pale patient plain polite proud quick quiet rapid rare ready rich rough
    round royal sharp short shy silent silver simple slow small smooth soft solid steady steep still stout strange
    strong sturdy subtle sweet swift tall tame tender thick thin tidy tiny tired tough vast warm wide wild wise wooden
    young
    """
)
NOUNS = listed(
    """
    acorn anchor apple arrow badge baker barn basket bell bench bird blanket boat bottle bowl branch bread brick
    bridge broom brush bucket button cabin candle canoe carpet cart castle chair cherry clock cloud coat coin copper
    cottage cradle crow cup curtain deer desk door dove drum eagle engine falcon farmer feather fence field finch flag
    flute forest fountain fox garden gate glass glove goose grain guitar hammer harbor hat hawk heron hill honey horse
    house island jacket jar kettle key kite ladder lake lamp lantern leaf lemon letter lion loaf locket map maple
    market meadow miller mirror mitten moon mountain needle nest oak oar olive orchard otter owl paddle paper parrot
    path pear pebble pencil piano pigeon pillow pine plate plum pond porch potter quilt rabbit raft raven ribbon ring
    river robin rope rose saddle sailor salmon seed shell shepherd ship shoe shovel spoon sparrow spider stable star
    stone stove stream table tailor tent thread tiger tower train tree trout trumpet tunnel turtle valley vase violin
    wagon wall walnut weaver wheel whistle willow window wolf wren
    """
)
VERBS = listed(
    """
    admires borrows brings carries cleans counts covers draws drops finds follows forgets gathers greets guards helps
    holds keeps lifts likes loses meets mends misses moves notices paints passes praises pulls pushes reaches sees
    sells shows stops takes teaches touches trusts visits wants washes watches
    """
)
PREPOSITIONS = listed("above at behind below beside beyond in near outside under")
PLACES = listed(
    """
    barn bridge castle church cottage forest garden harbor hill island lake market meadow mill mountain orchard pond
    river school shore stable station tower valley village
    """
)
TIMES = (
    "After lunch",
    "At dawn",
    "At dusk",
    "At noon",
    "Before dinner",
    "Every evening",
    "Every morning",
    "In autumn",
    "In spring",
    "In summer",
    "In winter",
    "Most days",
    "Now and then",
    "On Fridays",
    "On Sundays",
    "Once a week",
)
# Of the passkey task (Mohtashami and Jaggi 2023) and of RULER's tasks with a haystack of noise.
NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)


def sentences(random: np.random.Generator) -> Iterator[str]:
    """Plain sentences without digits, names or facts, without end."""
    while True:
        one, other = (
            f"{random.choice(ADJECTIVES)} {random.choice(NOUNS)}" if random.random() < 0.6 else random.choice(NOUNS)
            for _ in range(2)
        )
        preposition, place = random.choice(PREPOSITIONS), random.choice(PLACES)
        sentence = f"the {one} {random.choice(VERBS)} the {other} {preposition} the {place}."
        yield f"{random.choice(TIMES)} {sentence}" if random.random() < 0.4 else sentence.capitalize()


def draw_words(random: np.random.Generator, count: int) -> list[str]:
    """Different words in random order: nouns, adjectives and verbs, and pairs of them where those do not suffice."""
    words = sorted({*ADJECTIVES, *NOUNS, *VERBS})
    found = [str(word) for word in random.permutation(words)[:count]]
    return found if len(found) == count else found + draw_pairs(random, count - len(found))


def draw_pairs(random: np.random.Generator, count: int) -> list[str]:
    """Different keys, an adjective and a noun each, such as `quiet-heron`."""
    most = len(ADJECTIVES) * len(NOUNS)
    if count > most:
        raise ValueError(f"{count} different keys: there are {most}")
    index = random.choice(most, count, replace=False)
    return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in index.tolist()]


def draw_numbers(random: np.random.Generator, count: int, digits: int = 7) -> list[str]:
    """Different numbers of so many digits, the first of which is not 0. Raises ValueError if there are fewer."""
    if count > (most := 9 * 10 ** (digits - 1)):
        raise ValueError(f"{count} different numbers of {digits} digits: there are {most}")
    found: dict[str, None] = {}
    while len(found) < count:
        found.setdefault(str(random.integers(10 ** (digits - 1), 10**digits)))
    return list(found)


def draw_names(random: np.random.Generator, count: int, letters: int = 5) -> list[str]:
    """Different names of variables, so many capital letters each. Raises ValueError if there are fewer."""
    if count > (most := 26**letters):
        raise ValueError(f"{count} different names of {letters} letters: there are {most}")
    found: dict[str, None] = {}
    while len(found) < count:
        found.setdefault("".join(chr(ord("A") + i) for i in random.integers(26, size=letters)))
    return list(found)
