"""A run, its configuration, its data and its tokenizer belong together: what does not match is refused by name."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console
from test_train_command import SMALL, pretrain

from arch import SizeConfig, resolve
from data.cli import UsageError
from data.config import DataConfig, PrepareConfig, SourceConfig, TokenizerConfig
from data.files import DataError
from data.prepare import prepare
from data.shards import Manifest
from eval.identity import Identity, data_of, name_data
from eval.overrides import as_typed
from eval.plain_yaml import REFERENCES, read_plain
from eval.runs import Run
from train import checkpoint
from train.benchmarks.positions import measure
from train.datamodule import TokenDataModule, check_limits
from train.errors import TrainingError
from train.export import export
from train.hub.request import ExportConfig
from train.run import load_config, resumed, write_start
from train.schema import PretrainConfig
from train.training import check_same_tokenizer

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A finished run on a copy of the corpus, `data` beside it."""
    folder = tmp_path_factory.mktemp("tied")
    shutil.copytree(corpus, folder / "data")
    options = ["trainer.checkpoint_every=4", "logger=csv", f"data.path={folder / 'data'}", f"folder={folder / 'run'}"]
    pretrain("+arch=cla2", "+size=tiny", *SMALL, *options)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, still tied to the first one's data."""
    return shutil.copytree(trained / "run", tmp_path / "run")


@pytest.fixture
def other(corpus: Path, tmp_path: Path) -> Path:
    """The same text with another tokenizer."""
    source, tokenizer = SourceConfig(corpus="unit"), TokenizerConfig(vocab_size=500)
    prepare(PrepareConfig(path=str(tmp_path / "other"), name="unit", source=source, tokenizer=tokenizer, workers=1))
    return tmp_path / "other"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def refusal(capfd: pytest.CaptureFixture, *arguments: str) -> str:
    """The line with which the command ends, with code 2."""
    with pytest.raises(SystemExit) as stopped:
        pretrain(*arguments)
    assert stopped.value.code == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    return line


def test_what_is_recorded_from_the_first_step(trained: Path) -> None:
    run, manifest = trained / "run", Manifest.load(trained / "data")
    tied = Identity.load(run)
    assert tied is not None
    assert (tied.data[0].digest, tied.tokenizer) == (manifest.digest, manifest.tokenizer_sha256)
    assert tied.config["size.d_ff"] == 48 and tied.config["seed"] == 0 and "tokens" not in tied.config
    for folder in checkpoint.checkpoints(run):
        assert checkpoint.identity_of(folder, run) == tied


def test_other_data_is_refused_everywhere(run: Path, trained: Path, other: Path, capfd: pytest.CaptureFixture) -> None:
    """Both digests and both folders are named, by resume=, by the export with either key, and by positions."""
    digests = [Manifest.load(folder).digest[:16] for folder in (trained / "data", other)]
    named = [*digests, str(trained / "data"), str(other)]
    found = [refusal(capfd, f"resume={run}", f"data.path={other}")]
    edit(run / "config.yaml", f"path: {trained / 'data'}", f"path: {other}")
    found.append(refusal(capfd, f"resume={run}"))
    for task in (
        lambda: export(ExportConfig(str(run), str(run.parent / "x"), verify=False), QUIET),
        lambda: export(ExportConfig(str(run), str(run.parent / "x"), verify=False, prepared=str(other)), QUIET),
        lambda: measure(run, [32], 64),
    ):
        with pytest.raises(DataError) as caught:
            task()
        found.append(str(caught.value))
    for message in found:
        assert all(word in message for word in named), message


def test_data_that_moved_is_the_same_data(run: Path, trained: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained / "data", moved)
    before = json.loads((run / "summary.json").read_text())
    pretrain(f"resume={run}", f"data.path={moved}")
    assert load_config(run).data.path == str(moved)
    assert json.loads((run / "summary.json").read_text())["experiment"] == before["experiment"]


def test_weights_of_another_tokenizer_are_refused(
    trained: Path, other: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Before any work; both tokenizers are named."""
    options = [f"init={trained / 'run'}", f"data.path={other}", f"folder={tmp_path / 'new'}"]
    message = refusal(capfd, "+arch=cla2", "+size=tiny", *SMALL, *options)
    tokenizers = [Manifest.load(folder).tokenizer_sha256[:16] for folder in (trained / "data", other)]
    assert all(word in message for word in [*tokenizers, str(trained / "data"), str(other)])
    assert not (tmp_path / "new").exists()


def test_altered_shards_are_not_trained_on(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folder = shutil.copytree(trained / "data", tmp_path / "data")
    shard = folder / "train-00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[-100] ^= 1
    shard.write_bytes(raw)
    message = refusal(capfd, "+arch=mha", "+size=tiny", *SMALL, f"data.path={folder}", f"folder={tmp_path / 'new'}")
    assert f"{shard} is altered" in message
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\nseed: 0", "\nseed: 1", "seed is 1, it was 0"),
        ("train_only: null", "train_only: layers", 'train_only is "layers", it was null'),
        ("d_ff: 48", "d_ff: 64", "size.d_ff is 64, it was 48"),
        ("- reuse kv", "- new kv", 'arch.pattern is ["new kv", "new kv"], it was ["new kv", "reuse kv"]'),
        ("document_mask: false", "document_mask: true", "data.document_mask is true, it was false"),
        ("name: adamw", "name: muon", 'optim.name is "muon", it was "adamw"'),
        ("\nbatch_size: 4", "", "lacks batch_size: it has been cut or edited"),
        ("document_mask: false", "document_mask: -1", "data.document_mask is -1; it must be true or false"),
        ("\nname: cla2-tiny", "\nname: x-${oc.env:HOME}", "name is x-${oc.env:HOME}; nothing"),
        ("project: kvfrontier", "project: ${seed}", "logger.project is ${seed}; nothing"),
        ("\nseed: 0", "\nseed: 0\nseed: 0", "has seed a second time"),
        ("\nseed: 0", "\nsede: 0", "Key 'sede' not in 'PretrainConfig'"),
        ("\nseed: 0", "\nseed: ???", "seed is ???, which stands for no value"),
    ],
)
def test_an_edited_configuration_is_refused(old: str, new: str, message: str, run: Path) -> None:
    edit(run / "config.yaml", old, new)
    with pytest.raises(UsageError) as caught:
        load_config(run)
    assert message in str(caught.value)
    assert str(run / "config.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_configuration_that_was_cut_is_refused(run: Path, capfd: pytest.CaptureFixture) -> None:
    """Wherever the cut is; the command says so in one line, with code 2."""
    path = run / "config.yaml"
    whole = path.read_text()
    for end in (*range(len(whole) // 3, len(whole) - 40, 97), whole.index("\ntokens:") + 1):
        path.write_text(whole[:end])
        with pytest.raises(UsageError, match=r"config\.yaml (lacks|is not the configuration of a run)"):
            load_config(run)
    assert "lacks tokens, batch_size, context" in refusal(capfd, f"resume={run}")
    path.write_text(whole.replace("\nname: cla2-tiny", "\nname: null"))
    assert "config.yaml is not the configuration of a run: name is missing" in refusal(capfd, f"resume={run}")
    path.write_text(whole.replace("tokens: 1024", "tokens: 2048").replace("log_every: 1", "log_every: 2"))
    assert load_config(run).tokens == 2048, "what a resumed run may change"


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("data.path=it's here", "it's here"),
        ("data.path=007", "007"),
        ("data.path=a: b", "a: b"),
        ("data.path=d #1", "d #1"),
        ("data.mix={a:3,b:1}", {"a": 3, "b": 1}),
        ("logger.notes=1e3", "1e3"),
        ("logger.tags=[x,y]", ["x", "y"]),
        ("trainer.max_hours=1e3", 1000.0),
        ("trainer.val_every=null", None),
    ],
)
def test_values_of_a_resumed_run_are_taken_as_typed(word: str, value: object, run: Path) -> None:
    config = resumed(run, as_typed([f"resume={run}", word], PretrainConfig, sweep=False))
    found: object = config
    for part in word.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)
    assert config.data.path is None or config.data.mix is None, "one that is given replaces the other"


def test_a_run_does_not_end_before_it_begins(run: Path, capfd: pytest.CaptureFixture) -> None:
    message = refusal(capfd, f"resume={run}", "tokens=512")
    assert "tokens is 512, 4 steps, and the run has trained step-00000008" in message
    assert load_config(run).tokens == 1024


def test_what_a_resumed_run_changes_is_said(run: Path, capsys: pytest.CaptureFixture) -> None:
    """By whichever way, against the last start that has reported."""
    config, tied = load_config(run), Identity.load(run)
    assert tied is not None
    for tokens in (1024, 2048):
        write_start(run, replace(config, tokens=tokens, seed=1), resolve(config.model), tied, {})
    assert capsys.readouterr().err == "from here on tokens is 2048; before, it was 1024\n"
    for precision in ("bf16", "fp8"):
        other = replace(config, trainer=replace(config.trainer, precision=precision))
        write_start(run, other, resolve(config.model), tied, {})
    assert capsys.readouterr().err == "from here on trainer.precision is fp8; before, it was auto\n", (
        "not mere rounding"
    )
    shutil.copytree(run / "metrics" / "0", run / "metrics" / "10")
    edit(run / "metrics" / "10" / "hparams.yaml", "clip: 1.0", "clip: 2.0")
    write_start(run, config, resolve(config.model), tied, {})
    assert capsys.readouterr().err == "from here on optim.clip is 1.0; before, it was 2.0\n"
    (run / "metrics" / "10" / "hparams.yaml").write_text("[")
    write_start(run, config, resolve(config.model), tied, {})
    assert capsys.readouterr().err == ""


def test_a_start_that_died_leaves_no_identity_behind(run: Path, tmp_path: Path) -> None:
    """Before config.yaml was written; the folder is then given to a run of another configuration."""
    config, tied = load_config(run), Identity.load(run)
    assert tied is not None
    folder = tmp_path / "new"
    for seed in (0, 1):
        other = replace(tied, config=tied.config | {"seed": seed})
        write_start(folder, replace(config, seed=seed), resolve(config.model), other, {})
        assert load_config(folder).seed == seed
        (folder / "config.yaml").unlink()


def test_a_mixture_says_where_there_is_too_little_to_validate_on(run: Path, trained: Path, tmp_path: Path) -> None:
    config, folders = load_config(run), [str(trained / "data"), str(tmp_path / "copy")]
    shutil.copytree(*folders)
    config.data.path, config.data.mix = None, dict(zip(folders, (9, 1), strict=True))
    config.data.val_tokens = 32 * 10**6
    data = TokenDataModule(config, check=False)
    size = len(data.val.corpora[0])
    start = f"validation: {round(size / 0.9)} of the 1000000 sequences asked for keep the shares of data.mix; "
    assert data.remarks() == [f"{start}there are {size} in {folders[0]}, {size} in {folders[1]}"]
    config.data.val_tokens = 32 * 10
    assert data.remarks() == []


def test_what_checkpoints_say_counts_where_the_file_is_gone(run: Path) -> None:
    (run / "identity.json").unlink()
    edit(run / "config.yaml", "\nseed: 0", "\nseed: 1")
    assert load_config(run).seed == 1
    with pytest.raises(UsageError, match="seed is 1, it was 0"):
        checkpoint.identity_of(checkpoint.checkpoints(run)[0], run)


def test_checkpoints_that_say_something_else(run: Path, capfd: pytest.CaptureFixture) -> None:
    """Another model, another plan, another step: refused; one of a wrong name is passed over for the one before."""
    newest, before = checkpoint.checkpoints(run)[:2]
    path = newest / "checkpoint.json"
    info = json.loads(path.read_text())
    for change, message in (
        ({"config": info["config"] | {"size": info["config"]["size"] | {"rope_theta": 5.0}}}, "size.rope_theta is 5.0"),
        ({"plan": info["plan"] | {"reads": [0, 0, 0]}}, "its plan is not that of its config"),
        ({"plan": {}}, "describes no model"),
        ({"config": 3}, "describes no model"),
    ):
        path.write_text(json.dumps(info | change))
        with pytest.raises(TrainingError) as caught:
            checkpoint.identity_of(newest, run)
        assert message in str(caught.value)
        with pytest.raises(TrainingError):
            export(ExportConfig(str(newest), str(run.parent / "x"), verify=False), QUIET)
    assert str(path) in refusal(capfd, f"resume={run}")
    path.write_text(json.dumps(info))
    newest.rename(newest.with_name("step-00000009"))
    assert checkpoint.latest_valid(run) == before
    assert "has the name of another step than checkpoint.json says, 8" in capfd.readouterr().err
    with pytest.raises(TrainingError, match="has the name of another step"):
        checkpoint.resolve(newest.with_name("step-00000009"))


def test_a_run_of_an_earlier_version_tells_what_its_summary_says(run: Path, other: Path) -> None:
    (run / "identity.json").unlink()
    for folder in checkpoint.checkpoints(run):
        info = json.loads((folder / "checkpoint.json").read_text())
        del info["identity"]
        (folder / "checkpoint.json").write_text(json.dumps(info))
    pretrain(f"resume={run}")
    (run / "identity.json").unlink()
    config = load_config(run)
    OmegaConf.save(
        OmegaConf.structured(replace(config, data=replace(config.data, path=str(other)))), run / "config.yaml"
    )
    with pytest.raises(SystemExit):
        pretrain(f"resume={run}")
    with pytest.raises(DataError, match="was trained on other data"):
        export(ExportConfig(str(run), str(run.parent / "x"), verify=False), QUIET)


def test_the_card_names_the_data_really_used(run: Path, trained: Path) -> None:
    export(ExportConfig(str(run), str(run.parent / "x"), verify=False), QUIET)
    card, manifest = (run.parent / "x" / "README.md").read_text(), Manifest.load(trained / "data")
    for line in ("data: unit", f"digest of the data: {manifest.digest}"):
        assert f"- {line}\n" in card
    assert f"- digest of the tokenizer: {manifest.tokenizer_sha256}\n" in card


def test_runs_of_other_data_are_told_apart(trained: Path, run: Path, tmp_path: Path) -> None:
    """The same folder with other content, as it was remade between two runs; and the same content in other places."""
    second = shutil.copytree(run, tmp_path / "second")
    tied = json.loads((second / "identity.json").read_text())
    edit(run / "config.yaml", f"path: {trained / 'data'}", "path: /elsewhere")
    assert data_of(Run(run)) == data_of(Run(second))
    assert name_data([Run(run), Run(second)]) == []
    tied["data"][0]["digest"] = "f" * 64
    (second / "identity.json").write_text(json.dumps(tied))
    assert data_of(Run(run)) != data_of(Run(second))
    lines = name_data([Run(run), Run(second)])
    digest = Manifest.load(trained / "data").digest[:16]
    assert lines == [f"data: {d} in {trained / 'data'}, of {r}" for d, r in ((digest, run), ("f" * 16, second))]
    (run / "identity.json").unlink()
    assert f"digest {digest}" in name_data([Run(run), Run(second)])[0], "as its summary says"


def test_a_mixture_is_tied_to_each_of_its_folders(corpus: Path, other: Path) -> None:
    """In their order and shares, wherever they lie."""
    first, second = Manifest.load(corpus), Manifest.load(other)
    tied = Identity.of({}, {corpus: first, other: second}, [3, 1])
    assert Identity.from_dict(json.loads(json.dumps(tied.to_dict())), Path("x")) == tied
    moved = Path("/elsewhere")
    tied.check_data("it", {moved: first, other: second}, [6, 2], "")
    tied.check_folder("it", moved, second, "")
    for folders, weights, message in (
        ({other: second, corpus: first}, [3, 1], "was trained on other data"),
        ({corpus: first}, [1], "was trained on other data"),
        ({corpus: first, other: second}, [1, 1], "has the shares"),
        ({corpus: first, other: replace(second, splits={})}, [3, 1], "was trained on other data"),
    ):
        with pytest.raises(DataError, match=message):
            tied.check_data("it", folders, weights, "")


def test_an_imported_tokenizer_is_compared_by_its_vocabulary(corpus: Path, other: Path, tmp_path: Path) -> None:
    data = TokenDataModule(
        PretrainConfig(size=SizeConfig(vocab_size=600, seq_len=16), data=DataConfig(path=str(corpus)))
    )
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "checkpoint.json").write_text('{"format": 2, "step": 0, "files": {}}')
    tokenizer = json.loads((corpus / "tokenizer.json").read_text())
    (tmp_path / "in" / "tokenizer.json").write_text(json.dumps(tokenizer))  # the same, written in another way
    check_same_tokenizer(tmp_path / "in", data)
    shutil.copyfile(other / "tokenizer.json", tmp_path / "in" / "tokenizer.json")
    with pytest.raises(DataError, match=f"{corpus} has another"):
        check_same_tokenizer(tmp_path / "in", data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: &a [x]\nb: *a\n", "line 2 has an alias, *a"),
        ("a: " + "[" * 100_000, "nested more than 32 deep"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1 has a tag, !!python/object/apply:os.system"),
        ("a:\n\tb: 1\n", "line 2: found character"),
        ("a: 1\na: 2\n", "line 2 has a a second time"),
        ("a: [\n", "line 2: did not find"),
        ("a: \x00\n", "control characters are not allowed"),
        ("a: b\n" * 100_000, "it is larger than 256 KiB"),
        ("a: 1\n---\nb: 1\n", "another document"),
        ("a:\n- {b: 'y${oc.env:HOME}'}\n", "a.0.b is y${oc.env:HOME}; nothing"),
        ("${oc.env:HOME}: 1\n", "nothing in a run's configuration is interpolated"),
        ("name: ${size.tokens}\n", "name is ${size.tokens}; nothing"),
        (b"a: \xff\n", "'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_yaml_that_is_no_plain_data(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as caught:
        read_plain(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_references_are_those_of_the_schema() -> None:
    config = PretrainConfig()
    found = {("optim.lr", config.optim.lr)} | {
        (key, getattr(config, key)) for key in ("tokens", "batch_size", "context")
    }
    assert found == REFERENCES


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda data: replace(data, tokenizer=TokenizerConfig(vocab_size=0)), "tokenizer.vocab_size"),
        (lambda data: replace(data, source=SourceConfig(corpus="unit", val_share=float("nan"))), "source.val_share"),
        (lambda data: replace(data, source=SourceConfig(dataset="books")), "source.dataset"),
        (lambda data: replace(data, max_tokens=-1), "max_tokens"),
        (lambda data: replace(data, workers=3), "workers"),
        (lambda data: replace(data, name="mine"), "name"),
    ],
)
def test_keys_that_change_nothing_beside_a_folder(
    change: Callable[[DataConfig], DataConfig], key: str, corpus: Path
) -> None:
    same = DataConfig(path=str(corpus), name="unit", source=SourceConfig(corpus="unit"))
    folders = {corpus: Manifest.load(corpus)}
    check_limits(same, folders)
    check_limits(replace(same, tokenizer=TokenizerConfig(vocab_size=600)), folders)
    with pytest.raises(DataError) as caught:
        check_limits(change(same), folders)
    assert f"{key}=" in str(caught.value)
    assert f"Leave out data.{key}" in str(caught.value)
