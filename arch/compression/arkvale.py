"""ArkVale (Chen et al. 2024): all pages are held in another memory, and those that queries ask for are copied back.

Shapes: B batch, T new tokens, S slots read, N query heads, K key/value heads, H head, M pages, P resident pages,
G tokens of a page, Z pages of all rows that are moved.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..buffers import SlotBuffer, Tensors, repeat_row
from ..masks import Dense, visible
from ..precision import at_least_fp32
from .scores import EMPTY
from .small_buffers import CodedBuffer, CodedTensor, KeptBuffer
from .storage import kept_slots, page_layouts, page_ring, pages_of


def page_digest(keys_ZGKH: Tensor, kind: str) -> Tensor:
    """[Z, 2, K, H] upper and lower ends of a box for the keys of each page: `box` holds all of them, `mean` reaches as
    far from its centre as they do on average (the authors' code)."""
    keys = keys_ZGKH.to(at_least_fp32(keys_ZGKH.dtype))
    high, low = keys.amax(dim=1), keys.amin(dim=1)
    if kind == "mean":
        centre = (high + low) / 2
        radius = (keys - centre.unsqueeze(1)).abs().mean(dim=1)
        high, low = centre + radius, centre - radius
    return torch.stack((high, low), dim=1).to(keys_ZGKH.dtype)


def page_scores(q_BTNH: Tensor, digest_BM2KH: Tensor) -> Tensor:
    """[B, M] largest product of a query and a point in the box of each page, summed over queries and heads.

    Coordinate by coordinate that is at the upper end where the query is positive, else at the lower, so that queries
    that read the same keys can be added up before.
    """
    batch, _, _, heads, width = digest_BM2KH.shape
    dtype = at_least_fp32(q_BTNH.dtype)
    q = q_BTNH.to(dtype).reshape(batch, q_BTNH.shape[1], heads, -1, width)
    ends_B2KH = torch.stack((q.clamp(min=0).sum(dim=(1, 3)), q.clamp(max=0).sum(dim=(1, 3))), dim=1)
    return torch.einsum("bekh,bmekh->bm", ends_B2KH, digest_BM2KH.to(dtype))


def choose_pages(score_BM: Tensor, closed_B: Tensor, resident_BM: Tensor, slots: int, sinks: int, topk: int) -> Tensor:
    """[B, M] the pages that are to be resident, no more than `slots` of the first `closed_B` of each row.

    The first `sinks` pages always are, then the best `topk` of all, then pages that are resident already, and others
    where there still is room; the better come first. Of equal scores, the earlier page.
    """
    pages = score_BM.shape[1]
    page_M = torch.arange(pages, device=score_BM.device)
    valid_BM = page_M < closed_B[:, None]
    score_BM = score_BM.masked_fill(page_M < sinks, torch.inf).masked_fill(~valid_BM, -torch.inf)
    rank_BM = score_BM.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    class_BM = (rank_BM >= sinks + topk).long() * (1 + (~resident_BM).long())
    order_BM = torch.where(valid_BM, class_BM, 3) * pages + rank_BM
    return valid_BM & (order_BM.argsort(dim=-1).argsort(dim=-1) < slots)


class ArkValeBuffer(KeptBuffer):
    """Tokens of a row in pages: sink pages and those that queries asked for are resident, all are in another memory,
    and so are none of the newest tokens, which are whole.

    A page is closed when `recent` tokens follow it: its digest stays, and its tokens go. Pages are chosen before each
    reader of the store attends, by the votes of the readers up to it, and the same for all heads, as in the authors'
    code. Nothing is dropped.

    later   the newest tokens: those of pages that are not closed
    pool    resident pages, a row of it each; page_BP says which, EMPTY for none
    host    all closed pages, in host memory, pinned where the cache is on CUDA
    """

    sees_queries = True

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.queries: list[Tensor] = []  # the last of the prompt, of each reader, [B, 1, N, H]
        self.reader = 0
        self.pool: CodedBuffer | None = None
        self.host: CodedBuffer | None = None
        self.page_BP: Tensor | None = None
        self.digest_BM2KH: Tensor | None = None
        self.start_B: Tensor | None = None  # in host memory
        self.tally_BM: Tensor | None = None  # votes of the readers in this forward pass
        self.offset = 0  # tokens before the pass
        self.recalled_bytes = 0

    @property
    def tensors(self) -> Tensors:
        if self.whole is not None:
            return self.whole.tensors
        assert self.later is not None and self.pool is not None
        assert self.page_BP is not None and self.digest_BM2KH is not None
        return *self.later.tensors, *self.pool.tensors, self.page_BP, self.digest_BM2KH

    @property
    def offloaded(self) -> Tensors:
        """Tensors in the other memory."""
        return () if self.host is None else self.host.tensors

    @property
    def notes(self) -> Tensors:
        return tuple(self.queries)

    def see(self, q_BTNH: Tensor, k_BSKH: Tensor, mask: Dense, scale: float, sinks_N: Tensor | None) -> None:
        if self.whole is not None:
            self.queries[self.reader : self.reader + 1] = [q_BTNH[:, -1:] * scale]
            self.reader += 1

    def closed(self, length: int) -> Tensor:
        """[B] number of closed pages of each row of `length` tokens, in host memory."""
        assert self.kept is not None and self.start_B is not None
        return ((length - self.kept.newest - self.start_B).clamp(min=0)) // self.kept.page

    def compress(self, length: int, start_B: Tensor | None) -> "KeptBuffer | CodedBuffer | SlotBuffer":
        assert self.whole is not None and self.method.keep is not None
        tensors = tuple(tensor[:, :length] for tensor in self.whole.tensors)
        batch, dtype, device = len(tensors[0]), tensors[0].dtype, tensors[0].device
        kept = kept_slots(self.store, self.method, length, tensors[0].element_size(), self.capacity)
        if kept is None:
            self.queries = []
            return super().compress(length, start_B)
        self.kept = kept
        self.start_B = torch.zeros(batch, dtype=torch.int64) if start_B is None else start_B.cpu().long()
        pages, layouts = pages_of(kept, self.capacity), page_layouts(self.store, self.method.codec, kept)
        self.pool = CodedBuffer.allocate(layouts, batch * kept.resident, dtype, device)
        self.host = CodedBuffer.allocate(layouts, batch * pages, dtype, "cpu")
        if device.type == "cuda":
            self.host = pinned(self.host)
        self.page_BP = torch.full((batch, kept.resident), EMPTY, dtype=torch.int32, device=device)
        ends = (batch, pages, 2, *self.store.position_shapes[0])
        self.digest_BM2KH = torch.zeros(ends, dtype=dtype, device=device)
        self.later = CodedBuffer.allocate(page_ring(self.store, kept, self.capacity), batch, dtype, device)
        first = self.later.first(length)
        self.later.update(tuple(tensor[:, first:] for tensor in tensors), first)
        self.close(tensors, 0, torch.zeros_like(self.start_B), self.closed(length))
        score_BM = torch.zeros(batch, pages, device=device)
        for q_B1NH in self.queries:
            score_BM = score_BM + page_scores(q_B1NH, self.digest_BM2KH)
        self.recall(score_BM, length)
        self.recalled_bytes = 0  # those of the prompt need not leave
        self.whole, self.queries = None, []
        return self

    def close(self, tokens: Tensors, first: int, before_B: Tensor, after_B: Tensor) -> None:
        """Take digests of pages `before_B` to `after_B` - 1 of each row, and hold them in the other memory; `tokens`
        [B, S, ...] from number `first` on have them."""
        assert self.kept is not None and self.start_B is not None and self.method.keep is not None
        assert self.host is not None and self.digest_BM2KH is not None
        page_M = torch.arange(self.digest_BM2KH.shape[1])
        row_Z, page_Z = ((page_M >= before_B[:, None]) & (page_M < after_B[:, None])).nonzero(as_tuple=True)
        if not len(row_Z):
            return
        begin_Z = self.start_B[row_Z] + page_Z * self.kept.page - first
        device, dtype = tokens[0].device, self.digest_BM2KH.dtype
        place_ZG = (begin_Z[:, None] + torch.arange(self.kept.page)).to(device)
        row_on, page_on = row_Z.to(device), page_Z.to(device)
        pages = tuple(tensor[row_on[:, None], place_ZG].to(dtype) for tensor in tokens)
        self.digest_BM2KH[row_on, page_on] = page_digest(pages[0], self.method.keep.options["digest"])
        coded = CodedBuffer.allocate(page_layouts(self.store, self.method.codec, self.kept), len(row_Z), dtype, device)
        coded.update(pages, 0)
        for held, made in zip(self.host.tensors, coded.tensors, strict=True):
            held[row_Z * len(page_M) + page_Z] = made.cpu()

    def recall(self, score_BM: Tensor, length: int) -> None:
        """Copy the pages back that are to be resident now, of those that were closed by `length` tokens."""
        assert self.kept is not None and self.method.keep is not None
        assert self.pool is not None and self.host is not None and self.page_BP is not None
        kept, pages = self.kept, score_BM.shape[1]
        slots, device = kept.resident, score_BM.device
        if not slots:
            return
        index_BP = self.page_BP.long() + 1
        resident_BM = torch.zeros(len(index_BP), pages + 1, dtype=torch.bool, device=device).scatter_(1, index_BP, True)
        resident_BM = resident_BM[:, 1:]
        closed_B = self.closed(length).to(device)
        wanted_BM = choose_pages(score_BM, closed_B, resident_BM, slots, kept.sinks, kept.topk)
        row_Z, page_Z = (wanted_BM & ~resident_BM).nonzero(as_tuple=True)
        if not len(row_Z):
            return
        free_BP = ~F.pad(wanted_BM, (1, 0)).gather(1, index_BP)
        place_BP = free_BP.argsort(dim=-1, descending=True, stable=True)
        slot_Z = place_BP[row_Z, (wanted_BM & ~resident_BM).cumsum(dim=-1)[row_Z, page_Z] - 1]
        self.page_BP[row_Z, slot_Z] = page_Z.to(torch.int32)
        from_Z, to_Z = (row_Z * pages + page_Z).cpu(), row_Z * slots + slot_Z
        for pool, host in zip(self.pool.tensors, self.host.tensors, strict=True):
            moved = host[from_Z]
            pool[to_Z] = moved.to(device)
            self.recalled_bytes += moved.nbytes

    def update(self, new: Tensors, offset: int) -> Tensors:
        """Write as AppendBuffer.update; the newest tokens come back, before which `join` puts resident pages."""
        self.reader, self.tally_BM, self.offset = 0, None, offset
        if self.whole is not None:
            return self.whole.update(new, offset)
        assert self.later is not None
        seen = self.later.update(new, offset)
        self.close(seen, self.later.first(offset), self.closed(offset), self.closed(offset + new[0].shape[1]))
        return seen

    def allowed(self, offset: int, length: int, device: torch.device, start_B: Tensor | None) -> Tensor | None:
        """[B, 1, T, S] what each query sees of the newest tokens: those of no closed page."""
        if self.whole is not None:
            return None
        assert self.later is not None and self.kept is not None and self.start_B is not None
        query = torch.arange(offset, offset + length, device=device)
        first_B = (self.start_B + self.closed(offset) * self.kept.page).to(device)
        return visible(query, self.later.indices(offset, length, device), None, first_B)

    def join(self, q: Tensor, k: Tensor, v: Tensor, mask: Dense, scale: float) -> tuple[Tensor, Tensor, Dense]:
        """Count the votes of one reader, recall what they ask for, and put resident pages before the newest tokens."""
        if self.whole is not None:
            return k, v, mask
        assert self.pool is not None and self.page_BP is not None and self.digest_BM2KH is not None
        assert self.kept is not None and mask.allowed is not None
        vote_BM = page_scores(q * scale, self.digest_BM2KH)
        self.tally_BM = vote_BM if self.tally_BM is None else self.tally_BM + vote_BM
        self.recall(self.tally_BM, self.offset)
        if not self.kept.resident:
            return k, v, mask
        batch, size = len(k), self.kept.page
        keys, values = (
            tensor.reshape(batch, self.kept.resident * size, *tensor.shape[2:]) for tensor in self.pool.read(0, size)
        )
        pages = (self.page_BP >= 0).repeat_interleave(size, dim=1)[:, None, None]
        allowed = torch.cat((pages.expand(-1, -1, q.shape[1], -1), mask.allowed.expand(batch, -1, -1, -1)), dim=-1)
        k, v = torch.cat((keys.to(k.dtype), k), dim=1), torch.cat((values.to(v.dtype), v), dim=1)
        return k, v, Dense(causal=False, allowed=allowed)

    def repeat(self, rows: int) -> "ArkValeBuffer":
        copy = super().repeat(rows)
        assert isinstance(copy, ArkValeBuffer)
        copy.queries = [q.repeat_interleave(rows, dim=0) for q in self.queries]
        copy.tally_BM = None
        if self.whole is None:
            assert self.pool is not None and self.host is not None and self.start_B is not None
            assert self.page_BP is not None and self.digest_BM2KH is not None
            copy.pool, copy.host = several(self.pool, rows), several(self.host, rows)
            copy.page_BP, copy.start_B = repeat_row(self.page_BP, rows), repeat_row(self.start_B, rows)
            copy.digest_BM2KH = repeat_row(self.digest_BM2KH, rows)
        return copy


def pinned(buffer: CodedBuffer) -> CodedBuffer:
    """The same in pinned memory."""
    return CodedBuffer(
        tuple(of_tensors(coded, [x.pin_memory() for x in coded.tensors]) for coded in buffer.coded), None
    )


def several(buffer: CodedBuffer, rows: int) -> CodedBuffer:
    """Pages of `rows` sequences, each a copy of those of the only one of `buffer`, in memory of the same kind."""

    def repeated(x: Tensor) -> Tensor:
        made = x.repeat(rows, *[1] * (x.ndim - 1))
        return made.pin_memory() if x.device.type == "cpu" and x.is_pinned() else made

    return CodedBuffer(tuple(of_tensors(coded, [repeated(x) for x in coded.tensors]) for coded in buffer.coded), None)


def of_tensors(coded: CodedTensor, tensors: Sequence[Tensor]) -> CodedTensor:
    whole, *codes = tensors
    return CodedTensor(coded.layout, whole, tuple(codes))
