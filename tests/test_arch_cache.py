"""The cache weighs what the formula says, and decoding over it is the parallel forward."""

from itertools import product

import pytest
import torch
from conftest import KINDS, WINDOW, Counted, build, small, tokens

from arch import LanguageModel, allocate, generate, resolve
from arch.buffers import StateBuffer, Step
from arch.compression.compressed import allocate_compressed
from arch.compression.method import parse_method
from arch.config import ArchConfig, LatentConfig, StoreConfig
from arch.footprint import allocated_bytes, kv_bytes
from arch.static_step import StaticStep

LENGTHS = (1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW)


def test_bytes(arch: str) -> None:
    """Allocated for any number of tokens, the storages weigh what the formula says."""
    plan = resolve(small(arch))
    for length, batch, dtype in product(LENGTHS, (1, 3), (torch.bfloat16, torch.float32)):
        expected = batch * kv_bytes(plan, length, dtype.itemsize).stored
        assert allocate(plan, batch, length, dtype=dtype).nbytes == expected
        assert allocated_bytes(plan, batch, length, dtype.itemsize) == expected


@pytest.mark.parametrize("arch", KINDS)
def test_a_full_cache_weighs_the_same(shared_model: LanguageModel) -> None:
    model = shared_model
    for length in LENGTHS:
        cache = allocate(model.plan, 2, length, dtype=torch.float64)
        with torch.no_grad():
            for token in tokens(2, length).split(1, dim=1):
                model(token, cache)
        assert cache.nbytes == 2 * kv_bytes(model.plan, length, 8).stored
        assert cache.length == length


def test_a_head_is_read_in_one_piece(arch: str) -> None:
    """Slots of one head follow each other in memory, in caches and in what steps are given of them."""
    cache = allocate(resolve(small(arch)), 2, 20, dtype=torch.float32)
    for buffer in cache.buffers:
        if not isinstance(buffer, StateBuffer):
            new = tuple(torch.ones(2, *tensor.shape[2:]) for tensor in buffer.tensors)
            for tensor in (*buffer.tensors, *buffer.append(new, Step(4, 5))):
                assert tensor.stride(1) == max(1, tensor.shape[-1]), "from slot to slot"


def test_slope_and_constant(arch: str) -> None:
    """Beyond all windows, stored bytes are a straight line: constant + slope * context."""
    plan = resolve(small(arch))
    for context in (WINDOW, 5 * WINDOW, 167 * WINDOW):
        kv = kv_bytes(plan, context)
        assert kv.stored == kv.constant + kv.per_token * context
        assert kv.read >= kv.stored, "every store is read at least by its owner"


@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize("chunk", [1, 3, 7, 20])
def test_chunks_and_steps_equal_the_forward(shared_model: LanguageModel, chunk: int) -> None:
    model, batch, length = shared_model, tokens(2, 20), 20
    assert length > 2 * WINDOW
    with torch.no_grad():
        expected = model(batch)
        cache = allocate(model.plan, 2, length, dtype=torch.float64)
        logits = torch.cat([model(part, cache) for part in batch.split(chunk, dim=1)], dim=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_prefill_then_steps(shared_model: LanguageModel) -> None:
    model, batch = shared_model, tokens(2, 20)
    with torch.no_grad():
        expected = model(batch)
        cache = allocate(model.plan, 2, 20, dtype=torch.float64)
        parts = [batch[:, :9], batch[:, 9:13], *batch[:, 13:].split(1, dim=1)]
        logits = torch.cat([model(part, cache) for part in parts], dim=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_left_padding_changes_nothing(shared_model: LanguageModel) -> None:
    """A row that starts late gives the logits it has alone, in prefill, chunks and steps."""
    model, length, starts = shared_model, 18, [0, 5, 11]
    batch = tokens(3, length)
    with torch.no_grad():
        alone = [model(batch[row : row + 1, start:]) for row, start in enumerate(starts)]
        for chunk in (length, 4, 1):
            cache = allocate(model.plan, 3, length, dtype=torch.float64, start_B=torch.tensor(starts))
            logits = torch.cat([model(part, cache) for part in batch.split(chunk, dim=1)], dim=1)
            for row, start in enumerate(starts):
                torch.testing.assert_close(logits[row : row + 1, start:], alone[row], rtol=0, atol=1e-10)


def test_stores_are_per_owner(arch: str) -> None:
    plan = resolve(small(arch))
    cache = allocate(plan, 1, 10, dtype=torch.float32)
    assert len(cache.buffers) == len(plan.stores) == len(set(plan.owners))


def test_latent_cache_holds_nothing_expanded() -> None:
    plan = resolve(small("mla"))
    for store in allocate(plan, 2, 10, dtype=torch.float32).buffers:
        assert [tuple(tensor.shape) for tensor in store.tensors] == [(2, 10, 32), (2, 10, 4)]


def test_full_cache_and_wrong_batch_are_refused() -> None:
    model = build(small("mha"))
    cache = allocate(model.plan, 2, 4, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(ValueError, match="allocated for 2 sequences, the batch has 3"):
        model(tokens(3, 2), cache)
    with torch.no_grad(), pytest.raises(ValueError, match="holds up to 4 tokens; it has 0 and 5 more do not fit"):
        model(tokens(2, 5), cache)
    assert cache.length == 0


def test_a_cache_of_another_layout_is_refused() -> None:
    model = build(small("cla2", num_layers=6))
    for other in ("mqa", "cla3"):
        cache = allocate(resolve(small(other, num_layers=6)), 1, 4, dtype=torch.float64)
        with torch.no_grad(), pytest.raises(ValueError, match="allocated for another layout"):
            model(tokens(1, 2), cache)


def test_a_cache_keeps_no_gradients() -> None:
    model = build(small("mha"))
    with pytest.raises(ValueError, match=r"decode under torch.no_grad\(\)"):
        model(tokens(1, 2), allocate(model.plan, 1, 4, dtype=torch.float64))


@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize(("weights", "cached"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_the_cache_may_be_of_another_type(arch: str, weights: torch.dtype, cached: torch.dtype) -> None:
    model, batch = build(small(arch, init_std=0.1), weights), tokens(2, 16)
    with torch.no_grad():
        expected = model(batch).float()
        cache = allocate(model.plan, 2, 16, dtype=cached)
        logits = torch.cat([model(part, cache).float() for part in batch.split(3, dim=1)], dim=1)
    assert cache.nbytes == allocated_bytes(model.plan, 2, 16, cached.itemsize)
    assert (logits - expected).abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize("arch", KINDS)
def test_autocast_decodes_like_it_trains(arch: str) -> None:
    model, batch = build(small(arch, init_std=0.1), torch.float32), tokens(2, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(batch).float()
        cache = allocate(model.plan, 2, 16, dtype=torch.bfloat16)
        logits = torch.cat([model(part, cache).float() for part in batch.split(3, dim=1)], dim=1)
    assert (logits - expected).abs().max() < 0.1 * expected.std()


def test_prefill_stops_at_the_last_writer(arch: str) -> None:
    """Whole, and in chunks of ragged rows, long enough that windows are read in blocks: the last logits and that of a
    step after them are those of the definition, and no layer from the last writer on computes more than the last
    position."""
    model, exact = build(small(arch)), build(small(arch), backend="reference")
    plan, length, starts = model.plan, 80, [0, 11, 70]
    batch, ran = tokens(3, length + 1), []
    for layer, block in enumerate(model.layers):
        block.mlp.register_forward_hook(lambda _, inputs, out, layer=layer: ran.append((layer, inputs[0].shape[1])))
    with torch.no_grad():
        expected = torch.cat([exact(batch[row : row + 1, start:])[:, -2:] for row, start in enumerate(starts)])
        for rows, chunk, start_B in ((1, None, None), (3, 33, torch.tensor(starts))):
            cache = allocate(plan, rows, length + 1, dtype=torch.float64, start_B=start_B)
            ran.clear()
            logits = [model.prefill(batch[:rows, :length], cache, chunk)]
            *before, last = [33, 33, 14] if chunk else [length]
            whole = [(layer, size) for size in before for layer in range(plan.last_owner)]
            assert ran == whole + [(layer, last if layer < plan.tail else 1) for layer in range(plan.num_layers)]
            logits.append(model.decode_step(batch[:rows, length:], cache))
            torch.testing.assert_close(torch.cat(logits, dim=1), expected[:rows], rtol=0, atol=1e-10)


def test_tail() -> None:
    """Layers of 20 that prefill leaves out; bounded stores need every position."""
    layers = {"yoco": 9, "tail_sharing": 8, "ma": 4, "cla4": 3, "cla2": 1, "mha": 0}
    for name, above in layers.items():
        plan = resolve(small(name, num_layers=20))
        assert plan.tail == plan.last_owner == 19 - above
    assert resolve(small("bct", num_layers=20)).tail == 20


def test_last_only(shared_model: LanguageModel) -> None:
    model, batch = shared_model, tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(batch, last_only=True), model(batch)[:, -1:], rtol=0, atol=1e-12)


def greedy(model: LanguageModel, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy decoding without a cache: the whole forward for every token. Rows start together; what follows the last
    token of a row changes nothing before it."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    rows = torch.zeros(len(prompts), int(lengths.max()) + new, dtype=torch.long)
    every = torch.arange(len(prompts))
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    with torch.no_grad():
        for count in range(new):
            ends = lengths + count
            rows[every, ends] = model(rows[:, : int(ends.max())])[every, ends - 1].argmax(-1)
    return [row[length : length + new].tolist() for row, length in zip(rows, lengths.tolist(), strict=True)]


@pytest.mark.parametrize("arch", KINDS)
def test_greedy_generation_of_a_ragged_batch(shared_model: LanguageModel) -> None:
    model = shared_model
    prompts = [tokens(1, length)[0].tolist() for length in (2, 9, 1, 14)]
    alone = greedy(model, prompts, 10)
    for chunk in (None, 3):
        assert generate(model, prompts, 10, prefill_chunk=chunk) == alone


def test_generation_stops_and_samples() -> None:
    model = build(small("cla2"))
    prompts = [[1, 2, 3], [4]]
    plain = generate(model, prompts, 12)
    stop = plain[0][4]
    stopped = generate(model, prompts, 12, stop_token=stop)
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in plain]
    drawn = generate(model, prompts, 12, temperature=1.5, seed=3)
    assert drawn == generate(model, prompts, 12, temperature=1.5, seed=3) != plain
    assert generate(model, prompts, 12, temperature=1.5, top_p=1e-6) == plain, "the smallest nucleus is the best token"


def test_nucleus_is_the_smallest_set_that_holds_top_p() -> None:
    from arch.generation import sample

    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits, 1.0, 0.75, generator).bincount(minlength=4) / 4000
    assert drawn[2:].sum() == 0
    assert abs(drawn[0] - 0.5 / 0.8) < 0.03


def test_top_k_and_min_p_leave_what_transformers_leaves() -> None:
    """Ties with the last of top_k stay; top_p is of what top_k leaves; min_p is a share of the most likely one."""
    from arch.generation import sample

    logits = torch.tensor([[0.4, 0.2, 0.2, 0.15, 0.05]]).log().repeat(2000, 1)

    def drawn(**how: float) -> set[int]:
        given = {"temperature": 1.0, "top_p": 1.0, "generator": torch.Generator().manual_seed(0)} | how
        return set(sample(logits, **given).tolist())

    assert drawn() == drawn(top_k=99) == {0, 1, 2, 3, 4}
    assert drawn(top_k=1) == drawn(min_p=1.0) == {0}
    assert drawn(top_k=2) == {0, 1, 2}
    assert drawn(top_k=3, top_p=0.45) == {0}, "0.4 is half of the 0.8 that top_k leaves"
    assert drawn(min_p=0.37) == {0, 1, 2, 3}
    assert drawn(min_p=0.4) == {0, 1, 2}


def test_temperature_flattens() -> None:
    from arch.generation import sample

    logits = torch.tensor([[0.8, 0.2]]).log().repeat(4000, 1)
    share = {t: sample(logits, t, 1.0, torch.Generator().manual_seed(0)).float().mean() for t in (0.5, 1.0, 2.0)}
    for temperature, drawn in share.items():
        expected = torch.tensor([0.8, 0.2]).pow(1 / temperature)
        assert abs(drawn - expected[1] / expected.sum()) < 0.03
    for flush in (True, False):
        torch.set_flush_denormal(flush)
        assert sample(logits, 1e-40, 1.0, torch.Generator()).sum() == 0, "next to nothing is greedy, not an overflow"


def test_generation_leaves_the_mode_as_it_was() -> None:
    model = build(small("mha")).train()
    generate(model, [torch.tensor([1, 2])], 2, cache_dtype=torch.float32)
    assert model.training
    with pytest.raises(ZeroDivisionError):
        generate(model, [[1]], 2, follow=lambda _: [1 // 0])
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "needs a prompt"),
        ({"prompts": [[1], []]}, "at least one token"),
        ({"max_new_tokens": 0}, "must be at least 1"),
        ({"prefill_chunk": 0}, "must be at least 1"),
        ({"temperature": -1.0}, "must be at least 0"),
        ({"temperature": float("nan")}, "must be at least 0 and finite"),
        ({"top_p": 0.0}, "must be at least 0"),
        ({"max_batch": 0}, "max_batch is 0; it must be at least 1"),
        ({"prompts": [[1, -1]]}, "the token -1"),
        ({"prompts": [[1], [99999]]}, "the token 99999; this model has a vocabulary of "),
    ],
)
def test_generation_refuses(arguments: dict, message: str) -> None:
    options = {"prompts": [[1]], "max_new_tokens": 2} | arguments
    with pytest.raises(ValueError, match=message):
        generate(build(small("mha")), **options)


@pytest.mark.parametrize("arch", KINDS)
def test_rows_that_end_take_the_next_prompt(shared_model: LanguageModel) -> None:
    """More prompts than rows: every one is continued as it is without a cache, whatever its row held before."""
    model = shared_model
    prompts = [tokens(1, length)[0].tolist() for length in (3, 9, 1, 14, 5)]
    alone = greedy(model, prompts, 6)
    stop = alone[1][2]
    stopped = [row[: row.index(stop)] if stop in row else row for row in alone]
    assert generate(model, prompts, 6, max_batch=2, stop_token=stop) == stopped

    counted = [row[: number + 1] for number, row in enumerate(alone)]
    for max_batch in (None, 2):
        follow = Counted()
        assert generate(model, prompts, 6, max_batch=max_batch, follow=follow) == counted
        assert [follow.given[number] for number in range(len(prompts))] == counted


def test_a_compressed_cache_takes_no_prompts_later_on() -> None:
    model = build(small("mha"))
    cache = allocate_compressed(model.plan, 1, 8, dtype=torch.float32, method=parse_method("int8"))
    with pytest.raises(ValueError, match="takes no prompts later on; give max_batch of at least 2"):
        generate(model, [[1], [2]], 6, max_batch=1, cache=cache)


@pytest.mark.parametrize("name", ["mixattention", "swa_sinks", "mla", "bct", "qwen3_next", "deepseek_v4_hca", "mtla"])
@pytest.mark.parametrize("steps", ["plain", "static"])
def test_rows_are_refilled_by_static_steps_too(name: str, steps: str) -> None:
    """And where no token ends a row, so that all end together."""
    model = build(small(name))
    prompts = [tokens(1, length)[0].tolist() for length in (3, 9, 1, 14, 5, 2, 8)]
    alone = generate(model, prompts, 6)
    for max_batch in (1, 3):
        assert generate(model, prompts, 6, max_batch=max_batch, steps=steps) == alone


FULL, LOCAL, LATENT = StoreConfig(2), StoreConfig(2, window=8, sinks=True), StoreConfig(latent=LatentConfig())


def test_a_window_of_all_readers_is_that_of_the_store() -> None:
    """The same weights give the same logits, although one of both keeps everything."""
    wide = ArchConfig({"kv": FULL}, ["new kv window=4", "reuse kv window=4"])
    narrow = ArchConfig({"kv": StoreConfig(2, window=4)}, ["new kv", "reuse kv"])
    models = [build(small(each, window=None)) for each in (wide, narrow)]
    models[1].load_state_dict(models[0].state_dict())
    batch = tokens(2, 80)
    with torch.no_grad():
        torch.testing.assert_close(models[0](batch), models[1](batch), rtol=0, atol=1e-12)


@pytest.mark.parametrize("starts", [None, [0, 5, 11]])
@pytest.mark.parametrize(
    ("stores", "pattern"),
    [
        ({"full": FULL}, ["new full window=4", "reuse full", "reuse full window=6"]),
        ({"local": LOCAL, "full": FULL}, ["new local", "reuse local window=3", "new full", "reuse full window=8"]),
        ({"latent": LATENT}, ["new latent", "reuse latent window=4"]),
    ],
)
def test_windows_of_readers_over_a_cache(
    stores: dict[str, StoreConfig], pattern: list[str], starts: list[int] | None
) -> None:
    """Logits of chunks, plain steps and static steps are those of each row alone by the definition."""
    layout = small(ArchConfig(stores, pattern), num_layers=len(pattern), window=None)
    model, exact, batch = build(layout), build(layout, backend="reference"), tokens(3, 24)
    start_B = None if starts is None else torch.tensor(starts)
    with torch.no_grad():
        cache = allocate(model.plan, 3, 24, dtype=torch.float64, start_B=start_B)
        parts = [model(part, cache) for part in (batch[:, :3], batch[:, 3:8], *batch[:, 8:18].split(1, dim=1))]
        step = StaticStep(model, cache, "static")
        parts += [step(token) for token in batch[:, 18:].split(1, dim=1)]
        logits = torch.cat(parts, dim=1)
        for row, start in enumerate(starts or (0, 0, 0)):
            alone = exact(batch[row : row + 1, start:])
            torch.testing.assert_close(logits[row : row + 1, start:], alone, rtol=0, atol=1e-10)
