"""Decoding against transformers: the same weights and tokens, bytes by the formula, what cannot be measured."""

import json
from pathlib import Path

import pytest
import torch
from conftest import small, tokens

from data.cli import UsageError
from train.benchmarks import decode_study
from train.benchmarks.baselines import UnavailableError
from train.benchmarks.decoding import build_model, stock_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("arch", ["gqa4", "swa", "mla"])
def test_the_stock_model_is_ours(arch: str) -> None:
    config = small(arch)
    model = build_model(config, torch.float32, CPU)
    stock = stock_model(config, model)
    batch = tokens(2, 20)
    with torch.inference_mode():
        torch.testing.assert_close(stock(batch).logits, model(batch), rtol=0, atol=1e-4)


def test_layouts_without_a_stock_class_say_why() -> None:
    with pytest.raises(UnavailableError, match="sharing: layers 2, 4 read what an earlier layer wrote"):
        stock_model(small("cla2"), build_model(small("cla2"), torch.float32, CPU))


def test_methods_whose_budget_holds_nothing_say_why() -> None:
    found, reasons = decode_study.compressed_competitors({}, {"mha": small("mha")}, ("h2o@8B",), 64)
    assert not found and "the least is h2o@" in reasons["mha/h2o@8B"]


def test_the_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "size=tiny",
        "archs=mha,cla2,block",
        "shapes=8x1,12x2",
        "new=4",
        "rounds=2",
        "memory=1GiB",
        "compiled=null",
        "cache=none,int8",
    ]
    decode_study.main([*options, f"out={tmp_path}"])
    result = json.loads((tmp_path / "decode.json").read_text())
    assert list(result["without_peer"]) == ["cla2", "block"]
    for shape, batch in (("8x1", 1), ("12x2", 2)):
        found = result["shapes"][shape]
        methods = [f"{arch}/{method}" for arch in ("mha", "cla2", "block") for method in ("none", "int8")]
        assert list(found) == ["mha", "mha/dynamic", "mha/static", "cla2", "block", *methods]
        for name, values in found.items():
            assert values["tokens_per_second"] == pytest.approx(batch / values["step_seconds"]["median"])
            assert "tokens_differ" not in values
            if "/" not in name or name in methods:
                assert values["cache_bytes"] == values["formula_bytes"]
        assert found["mha/static"]["cache_bytes"] == found["mha"]["cache_bytes"]
        assert found["mha"]["decode_over_reference"]["speed"] == 1
    weights = result["models"]["mha"]["params"] * 4
    assert result["models"]["mha"]["largest_batch"]["8x1"] == (2**30 - weights) // (8 * 8 * 2 * 128 * 4)
    text = (tmp_path / "README.md").read_text()
    assert text.count("| `cla2` |") == 2 + 2 * 2
    assert text.count("| `cla2` | `int8` |") == 2
    assert text.index("## 12 tokens of prompt, batch 2") < text.index("1GiB with the weights")
    assert result["shared_read"]["context"] == 12
    assert "| `cla2` |" in capsys.readouterr().out
    assert (tmp_path / "decode.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("archs=mha,blok", "blok is not in configs/arch; choose of bct, "),
        ("size=huge", "huge is not in configs/size"),
        ("archs=mha,mha", "each once"),
        ("shapes=8", "shapes has 8; write PROMPTxBATCH"),
        ("shapes=0x1", "shapes has 0x1"),
        ("shapes=9x1", "9x1: 9 tokens; block needs a multiple of its block length 4"),
        ("rounds=0", "rounds is 0; it must be at least 1"),
        ("peers=paged", "peers is paged; choose of dynamic, static, or null"),
        ("cache=int3", "cache: no cache method 'int3'; codecs are "),
        ("memory=much", "memory: cannot read 'much'"),
    ],
)
def test_what_cannot_be_measured(argument: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        decode_study.main(["size=tiny", argument])
