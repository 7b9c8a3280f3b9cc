"""Families of layouts: the idea by which a plan keeps its cache small. A plan belongs to the first that it fits."""

from collections.abc import Callable
from dataclasses import dataclass

from arch import Plan


@dataclass(frozen=True)
class Family:
    """Layouts of one idea.

    idea     three sentences: what is kept, what that does to bytes, whom it suits
    example  the layout that is drawn
    has      tells whether a plan is of the family, if it is of none before it
    """

    title: str
    idea: str
    example: str
    has: Callable[[Plan], bool]


def _shares(plan: Plan) -> bool:
    return any(len(stack.plan.stores) < stack.plan.num_layers for stack in plan.stacks)


def _drops(plan: Plan) -> bool:
    return any(view.window is not None for stack in plan.stacks for view in stack.plan.views)


def _merges(plan: Plan) -> bool:
    return any(not store.grows for stack in plan.stacks for store in stack.plan.stores)


def _has_latents(plan: Plan) -> bool:
    return any(store.slot.latent_dim for stack in plan.stacks for store in stack.plan.stores)


def _pools(plan: Plan) -> bool:
    return any(store.pools for stack in plan.stacks for store in stack.plan.stores)


BLOCKS = Family(
    "Blocks of tokens",
    "A block decoder has one position for each block of tokens, and a token decoder predicts within a block, with a "
    "cache that is dropped at the end of the block. The block length divides the cache, and the number of times that "
    "the block decoder runs. It suits throughput: at equal parameters it trains and decodes faster than MHA, with a "
    "higher loss.",
    "block",
    lambda plan: len(plan.stacks) > 1,
)
STATES = Family(
    "Fixed states",
    "A store keeps a state of fixed size into which every token is merged, in some layouts beside a window of the "
    "last tokens, and between layers that keep everything. Its bytes do not grow with the context, and neither does "
    "the time to read them. It suits contexts that are long or of unknown length; merged tokens cannot be separated "
    "again, which recall of single items shows first.",
    "bct_mixed",
    _merges,
)
POOLS = Family(
    "Pooled positions",
    "A layer pools every N positions into one entry, by learned weights; the newest positions are seen in a window of "
    "the last tokens, or in an entry that is not yet full. Bytes and the work of decoding still grow with the context, "
    "but N times more slowly. It suits the longest contexts, if each token has to see all of the text, however "
    "coarsely.",
    "deepseek_v4_hca",
    _pools,
)
LATENTS = Family(
    "Latents",
    "A layer writes one latent and one rotary key for all of its heads, and each head expands the latent into keys "
    "and values of its own. A position costs the same however many heads read it: at the dimensions here, as much as "
    "two and a quarter key/value heads. It suits models with many heads, and hardware with arithmetic to spare during "
    "decoding: each head is compared with the whole latent.",
    "mla",
    _has_latents,
)
BOTH = Family(
    "Windows and sharing",
    "Layers with windows stand between layers that keep everything, and layers of either kind read stores from "
    "below instead of writing their own. The slope is that of the few full stores, down to one for the whole "
    "network; if the upper layers only read, a prompt need not run through them. It suits the longest contexts "
    "in the least memory; bytes read fall less than bytes stored.",
    "mixattention",
    lambda plan: _shares(plan) and _drops(plan),
)
SHARING = Family(
    "Sharing between layers",
    "A layer that writes no keys and values reads those of a layer below it. Stored bytes and the writers' "
    "projections shrink by the size of the groups, bytes read do not. It suits cases in which memory limits the batch "
    "or the context, rather than the time of a step.",
    "cla2",
    _shares,
)
WINDOWS = Family(
    "Sliding windows",
    "Layers keep only the last positions, and in some layouts a few layers between them keep everything. Bytes read "
    "shrink as much as bytes stored, and so does the work of a prompt; only the full layers add bytes with each "
    "token. It suits long contexts at any size; without a full layer, older text reaches the output only through "
    "other layers, or not at all.",
    "gemma3",
    _drops,
)
FULL = Family(
    "A full store in every layer",
    "Every layer writes keys and values of its own and keeps them all; the layouts differ in their number of heads. "
    "Bytes grow with layers, heads and context, and every step reads all that is stored. Start here: the number of "
    "heads is the first thing to reduce, and every other idea combines with it.",
    "gqa4",
    lambda plan: True,
)
# As people meet them; `family` asks in the order of FIRST_FITTING.
FAMILIES = (FULL, LATENTS, WINDOWS, SHARING, BOTH, POOLS, STATES, BLOCKS)
FIRST_FITTING = (BLOCKS, STATES, POOLS, LATENTS, BOTH, SHARING, WINDOWS, FULL)


def family(plan: Plan) -> Family:
    return next(each for each in FIRST_FITTING if each.has(plan))
