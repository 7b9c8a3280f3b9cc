"""Layouts against each other: equal parameters, the step each trains with, decoding as it generates."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import launch_in_process, small

from arch import ModelConfig, generate, resolve
from arch.footprint import num_params
from arch.named import load_arch, load_size
from train.benchmarks import gpu_decode
from train.benchmarks import layouts as bench_layouts
from train.benchmarks.baselines import kvfrontier, random_batch
from train.benchmarks.decoding import build_model, decode_fn

CPU = torch.device("cpu")


def bench_layouts_at_toy_size(*arguments: str) -> None:
    changes = ["size.num_layers=4", "size.d_model=32", "size.vocab_size=61", "size.seq_len=24", "repeats=3"]
    changes += ["decode_batches=[1,3]", "decode_context=8", "decode_tokens=4", *arguments]
    launch_in_process(bench_layouts.main, "bench_layouts", bench_layouts.LayoutsConfig, ["+size=tiny", *changes])


def test_layouts_are_compared_at_equal_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_layouts_at_toy_size(f"out={tmp_path}")
    result = json.loads((tmp_path / "layouts.json").read_text())
    models = result["models"]
    assert list(models) == ["mha", "block", "bct"]
    for arch, model in models.items():
        changes = {"num_layers": 4, "d_model": 32, "vocab_size": 61, "seq_len": 24, "d_ff": model["d_ff"]}
        size = replace(load_size("tiny"), **changes)
        config = ModelConfig(load_arch(arch), size)
        assert model["params"] == num_params(config, resolve(config))
        assert model["params"] == pytest.approx(models["mha"]["params"], rel=0.02)
    assert models["bct"]["d_ff"] > models["mha"]["d_ff"] == 344, "for the key/value heads it lacks"
    for found in (result["training"], *result["decoding"].values()):
        for values in found.values():
            assert len(values["seconds"]["all"]) == 3
            ratio = found["mha"]["cpu_seconds"]["median"] / values["cpu_seconds"]["median"]
            assert values["cpu"] == pytest.approx(ratio)
    for arch, values in result["training"].items():
        flops = models[arch]["train_flops_per_token"] / models["mha"]["train_flops_per_token"]
        assert values["flops_per_second"] == pytest.approx(flops * values["cpu"])
        assert values["losses"] == pytest.approx([math.log(61)] * 5, rel=0.2)
    for batch, tokens in (("1", 4), ("3", 12)):
        for values in result["decoding"][batch].values():
            assert values["cache_bytes"] == values["kv_bytes_stored"]
            assert values["tokens_per_second"] == pytest.approx(tokens / values["seconds"]["median"])
    assert "tiny, decoding, batch 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("archs=[mha,blok]", "archs has blok; choose of bct, "),
        ("archs=[mha]", "name two layouts or more"),
        ("archs=[mha,mha]", "name two layouts or more"),
        ("repeats=0", "repeats is 0; it must be at least 1"),
        ("decode_batches=[0]", "decode_batches is [0]"),
        ("decode_context=9", "decode_context is 9; block needs a multiple of its block length 4"),
        ("size.d_ff=8", "no d_ff makes them equal within 2%"),
    ],
)
def test_layouts_that_cannot_be_compared(argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_layouts_at_toy_size(argument)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["bct", "block"])
def test_what_decodes_is_what_generates(arch: str) -> None:
    """Prompts that end with a block, and within one."""
    model = build_model(small(arch), torch.float32, CPU)
    for length in (8, 10, 11):
        tokens, _ = random_batch(61, 2, length, CPU, seed=length)
        decode, _ = decode_fn(model, 2, length + 9)
        decoded = []
        with torch.inference_mode():
            for _ in range(9):
                tokens = decode(tokens)[:, -1].argmax(dim=-1, keepdim=True)
                decoded.append(tokens)
        prompts = random_batch(61, 2, length, CPU, seed=length)[0].tolist()
        generated = generate(model, prompts, 9)
        assert torch.cat(decoded, dim=1).tolist() == generated


def test_a_step_of_a_block_transformer_is_the_mean_over_a_block() -> None:
    calls = []
    plans = [resolve(small(arch)) for arch in ("mha", "block")]
    times = [gpu_decode.step_seconds(lambda: calls.append(1), plan, CPU) for plan in plans]
    assert [len(found) for found in times] == [gpu_decode.STEPS, gpu_decode.STEPS // 4]
    assert len(calls) == 2 * gpu_decode.STEPS


@pytest.mark.parametrize("arch", ["mha", "block"])
def test_ours_predicts_the_next_token_or_its_own_block(arch: str) -> None:
    baseline = kvfrontier(small(arch), CPU, False)
    inputs, targets = random_batch(61, 2, 16, CPU, seed=0)
    expected = torch.nn.functional.cross_entropy(
        baseline.model(inputs).flatten(0, 1), (inputs if arch == "block" else targets).flatten()
    )
    torch.testing.assert_close(baseline.loss(inputs, targets), expected)
