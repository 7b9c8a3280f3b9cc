"""The default micro-batch on CUDA: chosen by memory, agreed on by all processes, kept by a run that goes on."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import launch_in_process
from test_train_recipes import FREE, fits, remedies_of

from arch import ModelConfig, resolve
from arch.masks import BLOCK, SequenceBatch, blocks
from arch.named import load_arch, load_size
from data.cli import UsageError
from data.config import DataConfig
from data.shards import Manifest
from train import device, lightning_trainer, pretrain
from train.datamodule import TokenDataModule
from train.estimates import capacity, memory
from train.estimates.activations import Execution
from train.estimates.capacity import choose_micro_batch, execution, needed_bytes
from train.lit_module import LitModel
from train.schema import OptimConfig, PretrainConfig, TrainerConfig, micro_batch

GIB = 2**30


def run_of(arch: str, size: str, **trainer: object) -> PretrainConfig:
    model_size = load_size(size)
    tokens, batch = model_size.tokens, model_size.batch_size
    options = TrainerConfig(precision="bf16", **trainer)
    return PretrainConfig(load_arch(arch), model_size, trainer=options, tokens=tokens, batch_size=batch)


@pytest.mark.parametrize(("free", "size"), [(FREE, 16), (40 * GIB, 4), (22 * GIB, 1)])
def test_the_largest_that_fits(free: float, size: int) -> None:
    """Of cla2 at 1b on one GPU, whose part of the batch is all 2048 sequences."""
    config = run_of("cla2", "1b")
    chosen = choose_micro_batch(config, free)
    assert (chosen.size, chosen.accumulate) == (size, 2048 // size)
    for micro, expected in ((size, True), (2 * size, False)):
        config.trainer.micro_batch = micro
        assert fits(config, free) is expected


def test_the_line_and_what_changes_it() -> None:
    config = run_of("cla2", "3b", strategy="fsdp", devices=8)
    line = str(choose_micro_batch(config, FREE))
    assert re.fullmatch(
        r"micro-batch 8 of 256 \(\d\d\.\d of 79 GiB by estimate, 4 in reserve\), accumulated 32 times", line
    )
    kept = choose_micro_batch(config, FREE, before=4)
    assert (kept.size, kept.accumulate) == (4, 64), "a run goes on as it was, bit for bit"
    assert "before" not in str(kept)
    smaller = choose_micro_batch(config, 60 * GIB, before=8)
    assert smaller.size < 8 and "before, it was 8: losses go on up to rounding" in str(smaller)
    other = choose_micro_batch(config, FREE, before=3)
    assert other.size == 8, "which divides no batch of today's processes"
    config.trainer.micro_batch = 64
    asked = str(choose_micro_batch(config, FREE))
    assert asked.startswith("micro-batch 64 of 256 (") and "leave trainer.micro_batch out" in asked


def test_checkpointing_and_precision_are_those_of_the_run() -> None:
    plain = choose_micro_batch(run_of("mha", "3b"), FREE)
    recomputed = choose_micro_batch(run_of("mha", "3b", activation_checkpointing=True), FREE)
    assert recomputed.size > 8 * plain.size
    config = run_of("mha", "1b")
    sizes = [choose_micro_batch(replace(config, trainer=replace(config.trainer, precision=p)), FREE).size
             for p in ("auto", "bf16", "fp32")]  # fmt: skip
    assert sizes[0] == sizes[1] > sizes[2]


def test_what_fits_nowhere_is_refused_with_what_would_help() -> None:
    config = run_of("mha", "3b")
    with pytest.raises(UsageError) as refused:
        choose_micro_batch(config, 50 * GIB)
    message = str(refused.value)
    assert message.startswith("the run does not fit, ") and message.endswith(
        "or, against the estimate, trainer.micro_batch=1"
    )
    (more,) = remedies_of(message)
    assert more[0] == "trainer.strategy=fsdp"
    values = dict(word.removeprefix("trainer.").split("=") for word in more)
    config.trainer.strategy, config.trainer.devices = values["strategy"], int(values["devices"])
    config.trainer.micro_batch = int(values["micro_batch"])
    assert fits(config, 50 * GIB)


def test_a_run_that_cannot_fit_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * GIB, 80 * GIB))
    with pytest.raises(SystemExit) as stopped:
        launch_in_process(
            pretrain.main, "pretrain", PretrainConfig, ["+arch=mha", "+size=3b", f"folder={tmp_path / 'run'}"]
        )
    assert stopped.value.code == 2
    assert "What would: " in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def tiny(corpus: Path, **trainer: object) -> PretrainConfig:
    size = replace(
        load_size("tiny"), num_layers=2, d_model=32, d_ff=48, vocab_size=Manifest.load(corpus).vocab_size, seq_len=16
    )
    return PretrainConfig(
        load_arch("cla2"), size, DataConfig(path=str(corpus), val_tokens=160), OptimConfig(lr=1e-2),
        TrainerConfig(accelerator="cpu", val_every=2, **trainer), tokens=8 * 16 * 4, batch_size=8,
    )  # fmt: skip


def trained(config: PretrainConfig, callbacks: list, folder: Path | None = None) -> tuple[LitModel, object]:
    data = TokenDataModule(config)
    module = LitModel(config, data.token_bytes())
    trainer = lightning_trainer.lightning_trainer(config, "cpu", callbacks=callbacks, folder=folder)
    trainer.fit(module, data)
    return module, trainer


def test_a_run_trains_with_the_micro_batch_chosen(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The weights are those of a run in which it was set, bit for bit; and the run that goes on keeps it."""
    chosen = tiny(corpus)
    free = needed_bytes(chosen.model, resolve(chosen.model), execution(chosen), 8, 2) / 0.9
    monkeypatch.setattr(lightning_trainer, "free_memory", lambda device: free)
    (tmp_path / "run.json").write_text('[{"command": "of the test"}]')
    by_memory = lightning_trainer.MicroBatchByMemory(chosen, tmp_path)
    module, trainer = trained(chosen, [by_memory], tmp_path)
    assert (trainer.accumulate_grad_batches, trainer.val_check_interval, trainer.global_step) == (4, 8, 4)
    assert "micro-batch 2 of 8 (" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text()) == [{"command": "of the test", "micro_batch": 2}]
    expected, _ = trained(tiny(corpus, micro_batch=2), [])
    for (name, ours), theirs in zip(module.model.named_parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert module.val_metrics == expected.val_metrics
    whole, _ = trained(tiny(corpus), [])
    assert module.val_metrics["loss"] == pytest.approx(whole.val_metrics["loss"], rel=1e-5)
    assert by_memory.choose(100 * free) == 2, "kept by the next start"


@pytest.mark.parametrize(("frees", "size"), [((79, 40), 4), ((40, 79), 4), ((79, 10), None)])
def test_processes_agree_on_the_least_memory(
    frees: tuple[int, int], size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, said = run_of("cla2", "1b"), []
    monkeypatch.setattr(lightning_trainer, "free_memory", lambda device: frees[0] * GIB)

    def broadcast(value: object) -> object:
        said.append(value)
        return value

    strategy = SimpleNamespace(
        root_device=torch.device("cpu"),
        reduce=lambda tensor, reduce_op: (
            torch.tensor([*map(float, frees)]).amin() * GIB if reduce_op == "min" else None
        ),
        broadcast=broadcast,
    )
    trainer = SimpleNamespace(strategy=strategy, is_global_zero=True, accumulate_grad_batches=1, val_check_interval=10)
    callback = lightning_trainer.MicroBatchByMemory(config, None)
    if size is None:
        with pytest.raises(UsageError, match="does not fit"):
            callback.setup(trainer, None, "fit")
        return
    callback.setup(trainer, None, "fit")
    assert said == [size]
    assert (trainer.accumulate_grad_batches, trainer.val_check_interval) == (2048 // size, 10 * 2048 // size)


def test_on_the_cpu_nothing_changes(corpus: Path) -> None:
    config = tiny(corpus)
    made = lightning_trainer.lightning_trainer(config, "cpu")
    assert not any(isinstance(c, lightning_trainer.MicroBatchByMemory) for c in made.callbacks)
    assert config.batch_size // made.accumulate_grad_batches == micro_batch(config) == 8


def test_run_json_that_is_damaged_is_no_choice(tmp_path: Path) -> None:
    assert capacity.recorded_micro_batch(tmp_path) is None
    for text in ("{", "7", '[{"micro_batch": "8"}]', '[3, {"micro_batch": -1}]'):
        (tmp_path / "run.json").write_text(text)
        assert capacity.recorded_micro_batch(tmp_path) is None


def test_documents_are_counted() -> None:
    """No less than the tensors of FlexAttention's masks, one for each window, and the numbers of documents."""
    assert memory.FLEX_BLOCK == BLOCK
    size = replace(load_size("tiny"), seq_len=1024, max_window=None)
    model = ModelConfig(load_arch("mixattention"), size)
    (stack,) = memory.stack_shapes(model, resolve(model), 3)
    numbers = torch.arange(1024).div(100, rounding_mode="floor").expand(3, -1).contiguous()
    tensors = [numbers]
    for window in (None, 1024):
        mask = blocks(SequenceBatch(3, 1024, numbers, numbers.device), window)
        tensors += [tensor for tensor in mask.as_tuple() if isinstance(tensor, torch.Tensor)]
        tensors += [cell.cell_contents for cell in mask.mask_mod.__closure__ if torch.is_tensor(cell.cell_contents)]
    held = sum(tensor.nbytes for tensor in tensors)
    counted = memory.segment_bytes(stack, Execution(documents=True), 3)
    assert 0.5 * counted < held
    config = run_of("cla2", "1b")
    config.data.document_mask = True
    assert execution(config).documents


def test_the_fused_kernel_is_named() -> None:
    about = {}
    for name in ("mha", "mla", "gqa4", "swa", "block"):
        model = ModelConfig(load_arch(name), load_size("1b"))
        about[name] = device.sdpa_kernel_name(model, resolve(model), torch.device("cpu"))
    assert all(
        "scaled_dot_product_attention takes FLASH_ATTENTION" in text for name, text in about.items() if name != "swa"
    )
    assert about["swa"].endswith("no store is plainly causal")
