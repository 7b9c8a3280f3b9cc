"""Time of a step by counts: against published runs, and against a roofline that was counted in compiled code."""

from dataclasses import replace

import pytest
from test_train_estimate import planned

from arch import ModelConfig, resolve
from arch.footprint import train_flops_per_token
from arch.named import load_arch, load_size
from eval.hardware import TERA, find_gpu
from train.estimates.activations import Execution
from train.estimates.roofline import ROOF, StepTime, published_rates, step_time

MPT = {"760m": (24, 1536, 12), "1b": (24, 2048, 16), "3b": (32, 2560, 20), "7b": (32, 4096, 32), "13b": (40, 5120, 40)}
# GPU, model, sequence length, GPUs, micro-batch, micro-batches of a step, tokens/s per GPU. From the tables "H100 80GB
# BF16" and "A100 80GB" of llm-foundry, scripts/train/benchmarking/README.md: FSDP, no activation checkpointing.
FITTED_TO = [  # by two rates for H100, with OLMo-core's row below, and two for A100
    ("h100", "1b", 2048, 8, 14, 1, 45455),
    ("h100", "1b", 2048, 16, 20, 1, 46037),
    ("h100", "1b", 8192, 8, 3, 4, 29157),
    ("h100", "3b", 2048, 16, 10, 3, 24142),
    ("h100", "3b", 2048, 64, 6, 3, 22525),
    ("h100", "7b", 2048, 8, 6, 1, 10643),
    ("a100-80", "760m", 2048, 8, 24, 2, 32434),
    ("a100-80", "1b", 2048, 8, 14, 4, 20513),
    ("a100-80", "1b", 8192, 8, 3, 4, 13814),
    ("a100-80", "1b", 32768, 8, 1, 4, 6275),
    ("a100-80", "3b", 2048, 8, 10, 2, 10811),
    ("a100-80", "3b", 8192, 8, 3, 6, 7695),
    ("a100-80", "7b", 2048, 8, 6, 2, 4641),
    ("a100-80", "13b", 2048, 8, 2, 3, 2262),
]
HELD_OUT = [
    ("h100", "1b", 1024, 8, 18, 4, 48910),
    ("h100", "1b", 2048, 32, 20, 1, 45130),
    ("h100", "1b", 2048, 64, 20, 1, 44402),
    ("h100", "1b", 4096, 8, 7, 4, 38535),
    ("h100", "3b", 4096, 8, 5, 6, 20964),
    ("h100", "3b", 8192, 8, 3, 6, 16578),
    ("h100", "3b", 16384, 8, 1, 6, 11152),
]
# Outside of 5 %, and why: the estimate takes communication to be hidden.
OUTSIDE = [
    # Micro-batches of 4,096 tokens, one a step, of 13 billion parameters: gathers and the optimizer are not hidden.
    ("h100", "13b", 2048, 8, 2, 1, 4792),
    # The same model on 16 and 32 GPUs is published as 8 % faster than on these 8.
    ("h100", "760m", 2048, 8, 24, 2, 63147),
]


def model_of(**changes: object) -> ModelConfig:
    arch = "gqa8" if changes.pop("gqa8", False) else "mha"
    return ModelConfig(load_arch(arch), replace(load_size("1b"), **changes))


def tokens_per_second(model: ModelConfig, gpu: str, gpus: int, micro: int, accumulate: int) -> float:
    device = find_gpu(gpu)
    how = Execution("fsdp", gpus, accumulate=accumulate)
    peak = device.flops("bf16")
    return 1 / step_time(model, resolve(model), how, micro, published_rates(device), peak, device).total


def mpt(name: str, seq_len: int) -> ModelConfig:
    layers, width, heads = MPT[name]
    shape = {"num_layers": layers, "d_model": width, "num_heads": heads, "d_ff": 4 * width, "seq_len": seq_len}
    return model_of(style="neox", vocab_size=50368, **shape)


@pytest.mark.parametrize("row", FITTED_TO + HELD_OUT, ids=lambda row: "-".join(map(str, row[:4])))
def test_published_runs_of_mpt(row: tuple) -> None:
    gpu, name, seq_len, gpus, micro, accumulate, published = row
    assert tokens_per_second(mpt(name, seq_len), gpu, gpus, micro, accumulate) == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize("row", OUTSIDE, ids=lambda row: "-".join(map(str, row[:4])))
def test_published_runs_that_are_outside(row: tuple) -> None:
    gpu, name, seq_len, gpus, micro, accumulate, published = row
    estimate = tokens_per_second(mpt(name, seq_len), gpu, gpus, micro, accumulate)
    assert 1.05 * published < estimate < 1.18 * published


def test_other_stacks() -> None:
    """OLMo-core's page on PyPI: 44 to 47 thousand tokens/s per H100 for a 1B model of 4096 tokens. torchtitan's
    docs/performance.md: 6,667 for Llama 3 8B at 8192, compiled, which recomputes a part and ran at 500 W: less than the
    estimate without recomputation, more than that with all of it."""
    olmo = model_of(num_layers=16, d_ff=8192, vocab_size=100352, tie_embeddings=False, seq_len=4096)
    assert tokens_per_second(olmo, "h100", 8, 4, 4) == pytest.approx(45_500, rel=0.05)
    llama = model_of(
        gqa8=True, num_layers=32, d_model=4096, num_heads=32, d_ff=14336, vocab_size=128256, seq_len=8192,
        tie_embeddings=False,
    )  # fmt: skip
    whole = tokens_per_second(llama, "h100", 8, 2, 1)
    assert 0.78 * whole < 6667 < whole


def step(arch: str, size: str, how: Execution, micro: int) -> tuple[StepTime, float]:
    model, gpu = ModelConfig(load_arch(arch), load_size(size)), find_gpu("h100")
    plan, peak = resolve(model), gpu.flops("bf16")
    time = step_time(model, plan, how, micro, ROOF, peak, gpu)
    return time, train_flops_per_token(model, plan) / time.total / peak


# Layout at 1b: thousands of tokens/s, milliseconds of matrix products and of attention for 16 x 2048 tokens, counted in
# the compiler's sm_90 code. The token decoder of `block` as one long row, and its loss without a scatter, in chunks of
# 8192 tokens (9 ms less).
COUNTED = {
    "mha": (75.3, 312, 45), "gqa4": (83.0, 277, 45), "mqa": (84.6, 271, 45), "cla2": (85.9, 268, 45),
    "mixattention": (81.8, 270, 56), "gemma3": (79.5, 277, 57), "swa_sinks": (78.5, 277, 59), "mla": (71.5, 295, 74),
    "block": (102.7, 243, 5),
}  # fmt: skip


@pytest.mark.parametrize("arch", COUNTED)
def test_roof_is_the_one_counted_in_compiled_code(arch: str) -> None:
    time, mfu = step(arch, "1b", Execution(accumulate=64), 16)
    thousands, products, attention = COUNTED[arch]
    assert 1e-3 / time.total == pytest.approx(thousands, rel=0.06)
    assert 32768e3 * time.matmul == pytest.approx(products, rel=0.02)
    assert 32768e3 * time.attention == pytest.approx(attention, abs=8)
    assert 0.45 < mfu < 0.57


@pytest.mark.parametrize(("arch", "thousands"), [("mha", 23.6), ("cla2", 27.4), ("mixattention", 26.3), ("mla", 23.5)])
def test_roof_of_eight_gpus(arch: str, thousands: float) -> None:
    time, _ = step(arch, "3b", Execution("fsdp", 8, accumulate=16), 8)
    assert 1e-3 / time.total == pytest.approx(thousands, rel=0.03)


def test_what_a_step_spends_once_is_shared_by_its_micro_batches() -> None:
    """A 3B model on one GPU with single sequences: a third of the time is the optimizer's, and casts and sums."""
    alone, _ = step("mha", "3b", Execution(), 1)
    many, _ = step("mha", "3b", Execution(accumulate=16), 1)
    assert many.step == pytest.approx(alone.step / 16)
    assert alone.step > 0.15 * alone.total
    recomputed, _ = step("mha", "3b", Execution(accumulate=16, checkpointing=True), 1)
    assert recomputed.matmul == pytest.approx(many.matmul * 4 / 3)


@pytest.mark.parametrize("arch", ["mha", "mixattention", "mla", "block", "bct", "bct_gated", "qwen3_next"])
def test_no_estimate_is_above_its_roof(arch: str) -> None:
    found = planned(arch, "1b", gpus=8)
    assert found["tokens_per_second"] < found["roof_tokens_per_second"]
    assert found["roof_mfu"] / found["mfu"] == pytest.approx(
        found["roof_tokens_per_second"] / found["tokens_per_second"]
    )
    assert ("published for Block" in found["source"]) == (arch == "block")
    assert ("bounded stores at" in found["source"]) == arch.startswith("bct")
    assert ("matrices per head at" in found["source"]) == (arch == "qwen3_next")
    assert planned(arch, "1b", gpus=8, mfu=0.3)["source"] == "assumed: 30% of the peak of 990 TFLOP/s"


def test_a_device_that_is_not_listed() -> None:
    found = planned("mha", "1b", gpu="H300", memory="80GB", peak_tflops=989.5)
    listed = planned("mha", "1b", gpu="h100")
    assert found["tokens_per_second"] == pytest.approx(listed["tokens_per_second"], rel=0.01)
    assert find_gpu("h100").flops("bf16") == TERA * 989.5
