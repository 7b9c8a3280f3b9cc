"""What a run opens: one folder, a mixture, or a message with the command that prepares it."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from arch import ArchConfig, SizeConfig, StoreConfig
from data.cli import value_text
from data.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from data.files import DataError
from data.prepare import prepare
from data.presets import load
from train.datamodule import TokenDataModule, check_limits
from train.schema import PretrainConfig
from train.training import check_data


def run(data: DataConfig) -> TokenDataModule:
    arch = ArchConfig({"kv": StoreConfig(kv_heads="all")}, ["new kv"])
    size = SizeConfig(vocab_size=600, seq_len=16)
    return TokenDataModule(PretrainConfig(arch=arch, size=size, data=data, tokens=16 * 8 * 4, batch_size=8))


def test_the_first_process_of_a_machine_checks_the_shards(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others trust it: they look at no shard before they read it."""
    folder = shutil.copytree(corpus, tmp_path / "data")
    shards = list(folder.glob("*.bin"))
    for path in shards:
        path.rename(path.with_suffix(".away"))
    arch, size = ArchConfig({"kv": StoreConfig(kv_heads="all")}, ["new kv"]), SizeConfig(vocab_size=600, seq_len=16)
    config = PretrainConfig(arch=arch, size=size, data=DataConfig(path=str(folder)), tokens=512, batch_size=8)
    data = TokenDataModule(config, check=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_data(config, tmp_path / "run", None, None, data)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(DataError, match=r"train-00000.bin is named by the manifest and is not there"):
        check_data(config, tmp_path / "run", None, None, data)
    for path in shards:
        path.with_suffix(".away").rename(path)
    assert len(data.train.corpora[0][3]) == 17


@pytest.fixture
def bytes_folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("some text " * 100)
    source = SourceConfig(train=str(tmp_path / "a.txt"))
    prepare(PrepareConfig(path=str(tmp_path / "b"), source=source, tokenizer=TokenizerConfig("bytes"), workers=1))
    return tmp_path / "b"


def test_a_mixture_is_other_data(corpus: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.symlink_to(corpus)
    single = run(DataConfig(path=str(corpus)))
    assert single.digest == next(iter(single.folders.values())).digest
    mixed = run(DataConfig(mix={str(corpus): 1, str(second): 3}, val_tokens=160, document_mask=True))
    assert mixed.train.weights == (1.0, 3.0)
    others = [
        run(DataConfig(path=str(corpus), document_mask=True)),
        run(DataConfig(mix={str(corpus): 1, str(second): 2})),
    ]
    assert len({single.digest, mixed.digest, *(data.digest for data in others)}) == 4
    assert run(DataConfig(mix={str(corpus): 2, str(second): 6}, document_mask=True)).digest == mixed.digest
    mixed.trainer = SimpleNamespace(global_rank=0, world_size=1, global_step=0, accumulate_grad_batches=1)
    assert len(mixed.val_dataloader().windows) == 10
    batch = next(iter(mixed.train_dataloader()))
    assert batch["inputs"].shape == batch["segment_ids_BT"].shape == (8, 16)


def test_data_that_a_run_refuses(corpus: Path, bytes_folder: Path) -> None:
    for data, message in (
        (DataConfig(mix={str(corpus): 1, str(bytes_folder): 1}), f"{bytes_folder} has another tokenizer than {corpus}"),
        (DataConfig(mix={str(corpus): 0}), "it is a positive number"),
        (DataConfig(mix={str(corpus): 1}, path=str(corpus)), "data.path and data.mix are both set"),
        (DataConfig(path=str(bytes_folder)), "has no split val; it has train"),
        (DataConfig(path="/nowhere"), "holds no prepared data"),
    ):
        with pytest.raises(DataError) as caught:
            run(data)
        assert message in str(caught.value)


def test_a_run_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.config.PREPARED", tmp_path)
    with pytest.raises(DataError) as caught:
        run(load("fineweb_edu", ["max_tokens=1000"]))
    folder = tmp_path / "fineweb_edu-gpt-neox-20b"
    shown = f"{folder} is not prepared yet; run\n  python data/prepare.py fineweb_edu max_tokens=1000"
    assert str(caught.value) == shown
    assert not folder.exists()


def test_limits_that_a_folder_was_not_prepared_with(tmp_path: Path) -> None:
    """A limit set on a training command is refused if it changes nothing; one in configs/data is not set there."""
    (tmp_path / "a.txt").write_text("some text " * 100)
    source, folder = SourceConfig(train=str(tmp_path / "a.txt")), tmp_path / "b"
    limited = PrepareConfig(str(folder), "pile_dedup", source, TokenizerConfig("bytes"), max_tokens=5000, workers=1)
    folders = {folder: prepare(limited)}
    preset = load("pile_dedup", [f"path={folder}"])
    assert preset.max_eval_tokens == 20_000_000 and limited.max_eval_tokens is None
    for accepted in (preset, replace(preset, max_tokens=5000), replace(preset, max_eval_tokens=None)):
        check_limits(accepted, folders)
    for key, value in (("max_tokens", 400), ("max_documents", 3), ("max_eval_tokens", 7), ("shard_tokens", 99)):
        with pytest.raises(DataError) as caught:
            check_limits(replace(preset, **{key: value}), folders)
        prepared = getattr(limited, key)
        assert f"{folder} was prepared with {key}={value_text(prepared)} instead of {value}" in str(caught.value)
        assert f"Leave out data.{key}, or" in str(caught.value)
        assert f"\n  python data/prepare.py pile_dedup path=FOLDER {key}={value}" in str(caught.value)


def test_a_data_set_prepared_otherwise(bytes_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit given when it was prepared is no difference; another source or tokenizer is."""
    monkeypatch.setattr("data.config.PREPARED", bytes_folder.parent)
    (bytes_folder.parent / "unnamed-bytes").symlink_to(bytes_folder)
    same = DataConfig(source=SourceConfig(train=str(bytes_folder.parent / "a.txt")), tokenizer=TokenizerConfig("bytes"))
    with pytest.raises(DataError, match="has no split val"):
        run(replace(same, max_tokens=10**9))
    with pytest.raises(DataError, match=r"was prepared with source.text=text instead of body; prepare another folder"):
        run(replace(same, source=replace(same.source, text="body")))
