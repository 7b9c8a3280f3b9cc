"""Recipes compose and say what they do; launch files start, resume and requeue; docs/recipes.md shows what is there."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, forked_python, launch_in_process, run_script
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from arch import BlockPlan, Decoder, ModelConfig, Plan, build, resolve
from arch.convert_formats import read_config
from arch.footprint import forward_flops, kv_bytes, num_params
from arch.named import CONFIGS, names
from data.cli import UsageError
from train.estimates.capacity import choose_micro_batch, execution, needed_bytes, reserve_of
from train.optim import lr_share
from train.pretrain import main
from train.schema import PretrainConfig, num_steps, problems
from train.uptrain import blocks

RECIPES = names("experiment")
LAUNCH = ROOT / "train" / "launch"
DOCS = ROOT / "docs" / "recipes.md"
SMALL = [
    "size.num_layers=2", "size.d_model=32", "size.num_heads=4", "size.head_dim=8", "size.d_ff=48",
    "size.vocab_size=600", "size.seq_len=32", "batch_size=4", "tokens=256", "data.val_tokens=64", "logger=csv",
    "trainer.accelerator=cpu", "trainer.log_every=1", "trainer.checkpoint_every=1",
]  # fmt: skip


def text_of(recipe: str) -> str:
    return (CONFIGS / "experiment" / f"{recipe}.yaml").read_text()


@cache
def composed(recipe: str, *overrides: str) -> PretrainConfig:
    """The configuration as the command composes it, with an arch and a size where the recipe leaves them open."""
    ConfigStore.instance().store(name="pretrain_schema", node=PretrainConfig)
    arguments = [f"+experiment={recipe}", *overrides]
    if "/arch:" not in text_of(recipe) and not recipe.startswith("mixattention"):
        arguments.append("+arch=cla2")
    if recipe == "lr_sweep":
        arguments.append("+size=125m")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("pretrain", overrides=arguments, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        OmegaConf.set_struct(config, False)
        del config["hydra"]
        return OmegaConf.to_object(config)


def model_of(config: PretrainConfig) -> ModelConfig:
    return config.model


def plan(config: PretrainConfig) -> Plan:
    return resolve(model_of(config))


FREE = 79 * 2**30  # of a GPU of 80 GB, once the driver has its share


def fits(config: PretrainConfig, free: float = FREE) -> bool:
    """Whether the estimate of the whole step leaves the reserve."""
    how, size = execution(config), config.trainer.micro_batch
    needed = needed_bytes(config.model, resolve(config.model), how, config.batch_size // how.world, size)
    return needed <= free - reserve_of(free)


def remedies_of(message: str) -> list[list[str]]:
    """The words of the command line for each remedy of a refusal."""
    listed = message.partition("What would: ")[2].partition("; or, against")[0]
    found = []
    for remedy in listed.split("; "):
        words = re.findall(r"trainer\.\w+=\w+", remedy)
        if gpus := re.match(r"(\d+) GPUs", remedy):
            words.append(f"trainer.devices={gpus[1]}")
        found.append(words)
    return found


def run_on_gpus(config: PretrainConfig, recipe: str) -> None:
    """As typed, on the GPUs that docs/recipes.md names, of 80 GB each; on one of them too, or as printed there."""
    gpus = 8 if recipe.startswith(("cla_", "block_", "mixattention")) else 1
    many = replace(config.trainer, devices=gpus, strategy="fsdp" if gpus > 1 else "auto")
    chosen = choose_micro_batch(replace(config, trainer=many), FREE)
    assert chosen.needed + reserve_of(FREE) <= FREE
    assert chosen.size * chosen.accumulate * gpus == config.batch_size
    try:
        choose_micro_batch(config, FREE)
    except UsageError as error:
        changes = remedies_of(str(error))
        assert changes
        for change in changes:
            values = dict(word.removeprefix("trainer.").split("=") for word in change)
            typed = {key: yaml.safe_load(value) for key, value in values.items()}
            assert fits(replace(config, trainer=replace(config.trainer, **typed)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_can_be_trained_and_counts_its_steps_right(recipe: str) -> None:
    config = composed(recipe)
    assert not problems(config)
    run_on_gpus(config, recipe)
    resolved = plan(config)
    parts = (resolved.block, resolved.token) if isinstance(resolved, BlockPlan) else (resolved,)
    assert sum(part.num_layers for part in parts) == config.size.num_layers
    found = re.findall(
        r"^# ([\d,]+) tokens, ([\d,]+) a step \((\d+) sequences of (\d+)\): ([\d,]+) steps", text_of(recipe), re.M
    )
    if recipe == "lr_sweep":  # takes its budget from the size
        assert not found
        return
    (written,) = found
    numbers = [int(number.replace(",", "")) for number in written]
    step_tokens = config.batch_size * config.size.seq_len
    assert numbers == [config.tokens, step_tokens, config.batch_size, config.size.seq_len, num_steps(config)]


CLA = [recipe for recipe in RECIPES if recipe.startswith("cla_")]


@pytest.mark.parametrize("recipe", CLA)
def test_cla_recipe_is_the_papers(recipe: str) -> None:
    """Tables 1 to 7: bytes per token as printed there, the training of section 3.1, what the comment says of ours."""
    config = composed(recipe)
    size, optim, text = config.size, config.optim, text_of(recipe)
    heads = (size.head_dim or size.d_model // size.num_heads) * size.num_heads
    assert heads == {"h46": 2070, "h90": 1980}.get(recipe.split("_")[3] if "design" in recipe else "", size.d_model)
    (printed,) = re.findall(r"([\d,]+) KV bytes per token", text)
    assert kv_bytes(plan(config), 2048, 2).per_token == int(printed.replace(",", ""))
    assert (optim.name, optim.schedule, optim.warmup, optim.min_lr) == ("adamw", "cosine", 0.05, 0.1)
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip, optim.eps) == (0.9, 0.95, 0.1, 1.0, 1e-8)
    assert (size.init_std, size.norm_eps, size.rope_theta) == (0.01275, 1e-5, 1e4)
    assert (size.vocab_size, size.tie_embeddings, size.max_window) == (50304, True, None)
    assert config.data.val_tokens == 2048 * 2048


def test_cla_learning_rates() -> None:
    rates = {recipe: composed(recipe).optim.lr for recipe in CLA if "design" not in recipe}
    assert rates == {
        "cla_1b_mqa": 1.5e-3, "cla_1b_mqa_cla2": 2.25e-3, "cla_1b_mqa_h64": 2.25e-3,
        "cla_3b_mqa": 6.75e-4, "cla_3b_mqa_cla2": 2.25e-3, "cla_3b_mqa_h64": 1e-3,
        "cla_3b_set2_mqa_h32": 1e-3, "cla_3b_set2_mqa_h64": 1e-3, "cla_3b_set2_mqa_h64_cla2": 1e-3,
    }  # fmt: skip
    assert {composed(recipe).optim.lr for recipe in CLA if "design" in recipe} == {3e-4}
    assert sum("design" in recipe for recipe in CLA) == 20, "the rows of table 1"


def test_mixattention_stages() -> None:
    stages = [composed(f"mixattention_stage{number}") for number in (1, 2, 3)]
    assert [stage.size.seq_len for stage in stages] == [4096, 32768, 32768]
    assert [stage.size.rope_theta for stage in stages] == [5e5, 8e6, 8e6]
    assert [stage.tokens for stage in stages] == [101e9, 9e9, 5e8]
    assert [stage.init for stage in stages] == [None, "runs/mixattention_stage1", "runs/mixattention_stage2"]
    assert stages[0].train_only is None
    first = stages[0]
    assert (first.size.num_layers, first.size.num_heads) == (24, 12)
    assert {store.slot.kv_heads for store in plan(first).stores} == {3}
    assert {store.window for store in plan(first).stores} == {None, 1024}
    (written,) = re.findall(r"([\d.]+)B parameters;", text_of("mixattention_stage1"))
    assert float(written) == round(num_params(first.model, plan(first)) / 1e9, 2)
    assert first.optim.lr * first.optim.min_lr == pytest.approx(stages[1].optim.lr)
    baseline = composed("mixattention_stage1", "arch=mha", "arch.stores.kv.kv_heads=3")
    assert [store.slot.kv_heads for store in plan(baseline).stores] == [3] * 24


def test_stage_two_trains_the_attention_weights_and_nothing_else() -> None:
    config = composed("mixattention_stage2")
    with torch.device("meta"):
        model = Decoder(config.model)
    trained = {name for name, _ in model.named_parameters() if re.search(config.train_only, name)}
    assert {name.split(".")[-2] for name in trained} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(trained) == 2 * 24 + 2 * len(plan(config).stores)


# Of table 3, and of the FLOPs that follow from it: parameters, layers (of each decoder), width, heads, learning rate,
# batch, MFLOP per token of a forward pass over 2048; and whether it was trained with random padding.
BLOCK = {
    "block_33m": (33_846_272, 3, 256, 8, 1e-3, 256, 33.1, True),
    "block_77m": (77_391_872, 3, 512, 8, 1e-3, 256, 80.5, True),
    "block_170m": (173_164_032, 6, 768, 12, 6e-4, 256, 206.5, True),
    "block_420m": (420_313_088, 12, 1024, 16, 3e-4, 256, 560.4, False),
    "block_1b": (1_045_934_080, 8, 2048, 16, 3e-4, 512, 1422.6, False),
    "block_1.4b": (1_448_800_256, 12, 2048, 16, 2e-4, 512, 2028.8, False),
    "block_vanilla_31m": (30_494_720, 6, 256, 8, 1e-3, 256, 41.5, False),
    "block_vanilla_70m": (70_426_624, 6, 512, 8, 1e-3, 256, 101.8, False),
    "block_vanilla_160m": (162_322_944, 12, 768, 12, 6e-4, 256, 284.9, False),
    "block_vanilla_410m": (405_334_016, 24, 1024, 16, 3e-4, 256, 807.7, False),
}


def test_every_size_of_the_block_transformer_is_checked() -> None:
    assert sorted([*BLOCK, "block_uptrain_1b"]) == [recipe for recipe in RECIPES if recipe.startswith("block_")]


@pytest.mark.parametrize("recipe", BLOCK)
def test_block_recipe_is_the_papers(recipe: str) -> None:
    """Table 3, appendix G and the authors' code; parameters to the unit, counted in the model and said in the file."""
    params, layers, width, heads, lr, batch, mflops, padding = BLOCK[recipe]
    config = composed(recipe)
    model, size, optim = model_of(config), config.size, config.optim
    with torch.device("meta"):
        built = build(model)
    assert sum(p.numel() for p in built.parameters()) == num_params(model, built.plan) == params
    assert f"{params:,} parameters" in text_of(recipe)
    (loss,) = re.findall(r"training loss ([\d.]+)\.\n", text_of(recipe))
    assert f"| `{recipe}` | {params:,} | {loss} |" in DOCS.read_text()
    assert forward_flops(model, built.plan, 2048) / 2048 / 1e6 == pytest.approx(mflops, rel=4e-3)
    depths = [stack.plan.num_layers for stack in built.stacks]
    assert depths == ([layers] if "vanilla" in recipe else [layers, layers])
    assert (size.style, size.d_model, size.num_heads, size.d_ff) == ("neox", width, heads, 4 * width)
    assert (size.vocab_size, size.seq_len, size.tie_embeddings) == (50304, 2048, False)
    assert (size.init_std, size.norm_eps, size.rope_theta) == (0.02, 1e-5, 1e4)
    if isinstance(built.plan, BlockPlan):
        assert (
            built.plan.block_length,
            built.plan.num_context_vectors,
            built.plan.num_positions,
            built.plan.start,
        ) == (
            4,
            2,
            5,
            False,
        )
    assert config.data.block_padding == padding
    assert (config.batch_size, optim.lr, optim.schedule, optim.min_lr) == (batch, lr, "cosine", 0.1)
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip, optim.eps) == (0.9, 0.95, 0.1, 1.0, 1e-8)
    steps = num_steps(config)
    assert (steps, warmup(recipe)) == ((572_000, 3_000) if batch == 256 else (286_000, 1_500))
    assert config.tokens == 299_892_736_000


def warmup(recipe: str) -> int:
    """TokenPositions until the learning rate is at its peak; they are in the file's comment."""
    config = composed(recipe)
    steps = num_steps(config)
    until = next(step for step in range(steps) if lr_share(step, steps, config.optim) == 1) + 1
    assert f"Warm-up: {until:,} of them" in text_of(recipe)
    return until


PYTHIA_1B = {  # its config.json
    "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "layer_norm_eps": 1e-5, "max_position_embeddings": 2048,
    "num_attention_heads": 8, "num_hidden_layers": 16, "rotary_emb_base": 10000, "rotary_pct": 0.25,
    "tie_word_embeddings": False, "use_parallel_residual": True, "vocab_size": 50304,
}  # fmt: skip


def test_uptraining_is_the_papers() -> None:
    """A tenth of the steps, and the model that the two commands in its comment make of Pythia 1B."""
    config = composed("block_uptrain_1b")
    target = blocks(read_config(PYTHIA_1B).config, 4, 2, False)
    assert plan(config) == resolve(target)
    with torch.device("meta"):
        shapes = [
            {name: parameter.shape for name, parameter in build(model).named_parameters()}
            for model in (model_of(config), target)
        ]
    assert shapes[0] == shapes[1]
    for key in ("seq_len", "rope_theta", "norm_eps", "style"):
        assert getattr(config.size, key) == getattr(target.size, key)
    assert (num_steps(config), warmup("block_uptrain_1b")) == (28_600, 1_500)
    assert (config.tokens, config.optim.lr, config.init) == (29_989_273_600, 3e-4, "uptrained/pythia-1b")


def test_variants_differ_in_the_optimizer_alone() -> None:
    plain, wsd, muon = (composed(f"gpu_125m{variant}") for variant in ("", "_wsd", "_muon"))
    assert (wsd.optim.schedule, wsd.optim.min_lr, muon.optim.name) == ("wsd", 0.0, "muon")
    for other in (wsd, muon):
        assert (other.size, other.data, other.tokens, other.optim.lr) == (
            plain.size,
            plain.data,
            plain.tokens,
            plain.optim.lr,
        )
    steps = num_steps(wsd)
    assert sum(lr_share(step, steps, wsd.optim) < 1 for step in range(steps // 2, steps)) == 954


def test_sweep_is_the_papers_ladder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six runs in steps of 1.5, named after their learning rates; on top of another recipe; a sweep of recipes."""
    rates = [3e-4, 4.5e-4, 6.75e-4, 1e-3, 1.5e-3, 2.25e-3]
    assert all(1.47 < b / a < 1.53 for a, b in pairwise(rates))
    ran: list[tuple[str, float, str]] = []
    monkeypatch.setattr("train.training.run", lambda config: ran.append((config.name, config.optim.lr, config.folder)))
    sweep = f"hydra.sweep.dir={tmp_path}"
    launch_in_process(main, "pretrain", PretrainConfig, ["-m", "+experiment=lr_sweep", "+arch=mqa", "+size=1b", sweep])
    assert [(name, lr) for name, lr, _ in ran] == [(f"mqa-1b-lr{lr}", lr) for lr in rates]
    assert len({folder for _, _, folder in ran}) == 6
    ran.clear()
    launch_in_process(main, "pretrain", PretrainConfig, ["-m", "+experiment=[gpu_125m,lr_sweep]", "+arch=mqa", sweep])
    assert [(name, lr) for name, lr, _ in ran] == [(f"mqa-125m-lr{lr}", lr) for lr in rates]
    ran.clear()
    launch_in_process(main, "pretrain", PretrainConfig, ["-m", "+experiment=glob(cla_1b_design_h64_*)", sweep])
    assert [name for name, _, _ in ran] == [recipe for recipe in RECIPES if "design_h64" in recipe]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["+experiment=cla_1b_mqa_cla2"], "cla_1b_mqa_cla2"),
        (["+experiment=cla_1b_mqa_cla2", "arch=cla3"], "cla3-cla_1b_mqa_cla2"),
        (["+experiment=gpu_125m", "+arch=mha"], "mha-gpu_125m"),
        (["+experiment=gpu_125m", "+arch=mha", "size=350m"], "mha-350m-gpu_125m"),
        (["+experiment=gpu_125m", "+arch=mha", "name=mine"], "mine"),
        (["+arch=mha", "+size=tiny"], "mha-tiny"),
    ],
)
def test_name_of_a_run(arguments: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr("train.training.run", lambda config: ran.append(config.name))
    launch_in_process(main, "pretrain", PretrainConfig, [*arguments, f"folder={tmp_path / 'run'}"])
    assert ran == [name]


def test_a_recipe_without_arch_asks_for_one(capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        launch_in_process(main, "pretrain", PretrainConfig, ["+experiment=gpu_125m"])
    assert stopped.value.code == 2
    assert "choose +arch= one of" in capfd.readouterr().err


# docs/recipes.md


def table() -> str:
    """What docs/recipes.md ends with."""
    rows = ["| recipe | query heads | KV bytes | tokens | steps | peak rate | perplexity |", "| --- |" + " ---: |" * 6]
    for recipe in RECIPES:
        if recipe == "lr_sweep":
            continue
        config = composed(recipe)
        text = text_of(recipe)
        fixed = "/arch:" in text or recipe.startswith("mixattention")
        width = config.size.head_dim or config.size.d_model // config.size.num_heads
        added = f"{kv_bytes(plan(config), 2**20, 2).per_token:,}" if fixed else "as +arch"
        perplexity = re.search(r"validation perplexity ([\d.]+\d) ?", text)
        cells = [
            f"`{recipe}`", f"{config.size.num_heads} x {width}", added, f"{config.tokens:,}", f"{num_steps(config):,}",
            f"{config.optim.lr:g}", perplexity[1] if perplexity else "",
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def test_table_of_the_page() -> None:
    assert DOCS.read_text().endswith(table()), f"put this at the end of {DOCS}:\n{table()}"


def test_commands_of_the_page(tmp_path: Path) -> None:
    """Every recipe it names can be composed as it says, every launch prints a command, every data set has a file."""
    ConfigStore.instance().store(name="pretrain_schema", node=PretrainConfig)
    blocks = re.findall(r"```bash\n(.*?)```", DOCS.read_text(), re.DOTALL)
    kinds = set()
    for command in "".join(blocks).strip().splitlines():
        words = shlex.split(command)
        while words[0] in ("sbatch", "--nodes=2"):
            words.pop(0)
        kinds.add(words[1] if words[0] == "python" else words[0])
        if words[0].startswith("train/launch"):
            printed = dry(Path(words[0]).name, *words[1:], **SLURM)
            assert printed[0].split("train/pretrain.py ")[1].startswith(words[1]), command
        elif words[1] == "data/prepare.py":
            assert words[2] in names("data")
        elif words[1] == "train/estimate.py":
            done = run_script(*words[1:])
            assert "verdict: fits" in done.stdout, done.stderr
        elif words[1] == "train/pretrain.py" and not words[2].startswith(("resume=", "--config-dir=")):
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                for recipe in recipes_in(words):
                    overrides = [w for w in words[2:] if "=" in w and not w.startswith("+experiment=")]
                    config = compose("pretrain", overrides=[f"+experiment={recipe}", *overrides, "name=x"])
                    assert not problems(OmegaConf.to_object(config)), command
    assert kinds == {
        "train/import_hf.py", "train/uptrain.py", "train/export.py", "-m", "vllm",  # the last two: tests of exports
        "python3", ".venv/bin/pip", "source", "cp", "data/prepare.py", "train/estimate.py", "train/pretrain.py",
        "eval/footprint.py", "eval/pareto.py", "train/launch/single.sh", "train/launch/torchrun.sh",
        "train/launch/slurm.sbatch", "train/benchmarks/gpu_suite.py", "train/study.py",  # the last two: _bench, _study
    }  # fmt: skip


def recipes_in(words: list[str]) -> list[str]:
    (given,) = [word.partition("=")[2] for word in words if word.startswith("+experiment=")]
    return [
        name for part in given.split(",") for name in RECIPES if fnmatch(name, part.removeprefix("glob(").strip(")"))
    ]


# Launch files


def launch(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = {"PYTHONPATH", "WANDB_SERVICE", "WANDB_MODE"}  # left by tests that train in this process
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={k: v for k, v in os.environ.items() if k not in ours}
        | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def dry(script: str, *arguments: str, **environment: str) -> list[str]:
    done = launch(script, *arguments, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(sys.executable, "python").replace(" \n", "\n").splitlines()


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """The folder of a run, which may have no checkpoint yet."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").touch()
    return folder


SLURM = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(ROOT)}
START = ["+experiment=cla_1b_mqa_cla2", "trainer=fsdp", "trainer.devices=8", "optim.lr=1e-3", "seed=1"]


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_launch_files_parse(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK) == (path.suffix == ".sh" and path.stem != "common")


def test_commands_of_a_first_start(tmp_path: Path) -> None:
    arguments = [*START, f"folder={tmp_path / 'new'}"]
    plain = " ".join(["train/pretrain.py", *arguments])
    assert dry("single.sh", *arguments) == [f"python {plain}"]
    torchrun = "python -m torch.distributed.run"
    assert dry("torchrun.sh", *arguments) == [f"{torchrun} --standalone --nproc-per-node 8 {plain}"]
    assert dry("torchrun.sh", *arguments, "trainer.num_nodes=2", HEAD="node1:29500") == [
        f"{torchrun} --nnodes 2 --rdzv-backend c10d --rdzv-endpoint node1:29500 --rdzv-id kvfrontier "
        f"--nproc-per-node 8 {plain} trainer.num_nodes=2"
    ]
    assert dry("slurm.sbatch", *arguments, **SLURM) == [
        f"srun --kill-on-bad-exit=1 python {plain} trainer.num_nodes=2 trainer.devices=8",
        "scontrol requeue 77",
    ]
    assert dry("torchrun.sh", *arguments, MAX_RESTARTS="2") == [
        f"env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 {torchrun} --standalone --max-restarts 2 --nproc-per-node 8 "
        f"--no-python train/launch/single.sh {' '.join(arguments)}"
    ]
    assert dry("single.sh", "arch.pattern=[new kv]") == [r"python train/pretrain.py arch.pattern=\[new\ kv\]"]


def test_commands_of_a_requeue(started: Path) -> None:
    """Only what a resumed run may change is handed on."""
    arguments = [*START, f"folder={started}", "tokens=9", "optim.name=muon"]
    kept = f"train/pretrain.py resume={started} trainer.devices=8 optim.lr=1e-3 tokens=9"
    assert dry("single.sh", *arguments) == [f"python {kept}"]
    restarted, begun = (dry("single.sh", *arguments, TORCHELASTIC_RESTART_COUNT=count) for count in "10")
    assert restarted == [f"python {kept}"] != begun
    assert dry("torchrun.sh", *arguments) == [f"python -m torch.distributed.run --standalone --nproc-per-node 8 {kept}"]
    assert dry("slurm.sbatch", *arguments, **SLURM)[0] == (
        f"srun --kill-on-bad-exit=1 python {kept} trainer.num_nodes=2 trainer.devices=8"
    )


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "message"),
    [
        ("torchrun.sh", ["trainer.num_nodes=2", "folder=x"], {}, "set HEAD="),
        ("torchrun.sh", ["trainer.num_nodes=2"], {"HEAD": "a"}, "give folder="),
        ("torchrun.sh", ["trainer.devices=2"], {"MAX_RESTARTS": "1"}, "give folder="),
        ("slurm.sbatch", ["trainer=fsdp"], SLURM, "give folder="),
        ("slurm.sbatch", ["folder=x"], SLURM | {"SLURM_SUBMIT_DIR": "/"}, "submit from the repository's root"),
    ],
)
def test_launch_mistakes(script: str, arguments: list[str], environment: dict[str, str], message: str) -> None:
    done = launch(script, *arguments, DRY_RUN="1", **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert not done.stdout


def tools(folder: Path, **commands: str) -> str:
    """A PATH that starts with these commands."""
    folder.mkdir(exist_ok=True)
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("srun", "state", "requeued", "code"),
    [
        ("true", "RUNNING", True, 0),  # stopped by SIGTERM
        ("true", "CANCELLED", False, 0),
        ("true", "PENDING", False, 0),  # preempted: SLURM has requeued it
        ("touch $RUN/summary.json", "RUNNING", False, 0),  # finished
        ("exit 3", "RUNNING", False, 3),
    ],
)
def test_what_a_job_does_when_training_ends(started: Path, srun: str, state: str, requeued: bool, code: int) -> None:
    """With a stand-in for SLURM. A result of before, which the run is now to go beyond, does not count."""
    (started / "summary.json").touch()
    os.utime(started / "summary.json", (0, 0))
    path = tools(started / "bin", srun=srun, squeue=f"echo {state}", scontrol='echo "$@" > "$RUN/scontrol"')
    done = launch("slurm.sbatch", *START, f"folder={started}", PATH=path, RUN=str(started), **SLURM)
    assert done.returncode == code, done.stderr
    assert (started / "scontrol").exists() == requeued
    assert not requeued or (started / "scontrol").read_text() == "requeue 77\n"


@pytest.mark.parametrize(("failure", "tries", "code"), [(1, 3, 1), (2, 1, 2)])
def test_a_job_starts_failed_training_again(tmp_path: Path, failure: int, tries: int, code: int) -> None:
    """Up to MAX_RESTARTS times, and no mistake in a command. Once the run has begun, it is resumed."""
    run = tmp_path / "run"
    run.mkdir()
    srun = f'echo "$@" >> "$RUN/tries"; touch "$RUN/config.yaml"; exit {failure}'
    path = tools(tmp_path / "bin", srun=srun, squeue="echo RUNNING", scontrol="exit 9")
    done = launch("slurm.sbatch", *START, f"folder={run}", PATH=path, RUN=str(run), MAX_RESTARTS="2", **SLURM)
    started = (run / "tries").read_text().splitlines()
    assert (done.returncode, len(started)) == (code, tries)
    assert [f"resume={run}" in line for line in started] == [False, True, True][:tries]


@pytest.mark.slow
def test_two_processes_through_torchrun_and_slurm(tmp_path: Path, corpus: Path) -> None:
    """Trained on gloo; the same command with more tokens goes on where it ended, under an `srun` that does what SLURM's
    does: starts the tasks, each with its number in the environment. Interpreters are forks."""
    python = forked_python()
    arguments = ["+experiment=laptop", "+arch=cla2", *SMALL, "trainer=fsdp", f"data.path={corpus}"]
    arguments.append(f"folder={tmp_path / 'run'}")
    done = launch("torchrun.sh", *arguments, "trainer.devices=2", **python)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 2/2  loss") == 1
    assert "cla2-laptop: validation loss" in done.stdout
    srun = """shift  # --kill-on-bad-exit
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 SLURM_NTASKS=2 "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done"""
    environment = SLURM | {"SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODELIST": "localhost"}
    environment |= {"PATH": tools(tmp_path / "bin", srun=srun, squeue="echo RUNNING", scontrol="exit 9")}
    done = launch("slurm.sbatch", *arguments, "tokens=384", **environment, **python)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 3/3  loss") == 1
    assert "step 2/3  loss" not in done.stdout
    assert "cla2-laptop: validation loss" in done.stdout
