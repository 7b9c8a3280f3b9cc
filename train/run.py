"""Write the folder of a run (eval/runs.py reads it), and load its configuration.

config.yaml    the resolved configuration; resume=FOLDER starts from it
identity.json  what of it, of the data and of the tokenizer the run is tied to: eval/identity.py
plan.json      the resolved KV layout
run.json       date, command, git revision, versions, hardware, threads, for each time the run was started
metrics/       metrics.csv, one folder for each time the run was started
checkpoints/   the newest ones and the best: train/checkpoint.py
summary.json   the result, written when training ends
"""

import sys
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from arch import Plan
from arch.config import to_dict
from arch.footprint import kv_bytes, num_params, train_flops_per_token
from data.cli import UsageError
from data.dotted import flat, lookup
from data.files import set_aside, write_json, write_text
from eval import identity
from eval.environment import environment
from eval.identity import Identity, changed_values
from eval.plain_yaml import read_config, read_plain
from eval.results import envelope
from eval.runs import KEYS, Run, RunError, deciding_values
from eval.typed import mistyped_booleans
from train.schema import PretrainConfig

# Keys that a resumed run cannot change; of GROUPS it can change single keys.
FIXED = tuple(key for key, value in KEYS.items() if value.fixed)
GROUPS = ("optim", "trainer", "logger")
# Where the data lies. A run that recorded its digests finds out whether it is the same.
MOVABLE = ("data.path", "data.mix")


def write_start(folder: Path, config: PretrainConfig, plan: Plan, tied: Identity, about: dict[str, Any]) -> None:
    """Write all files but the results, flushed. Each start of the run adds an entry to run.json, with the items of
    `about`; its identity stays the one of the first start. Where values that decide the result are no longer those of
    the start before, by whatever way, that is said on stderr.

    Raises UsageError if the folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "run.json"
        values = to_dict(config)
        for key, was, now in changed_values(_values_before(folder, values), values):
            if now is not None:  # a key that an earlier version had
                print(f"from here on {key} is {now}; before, it was {was}", file=sys.stderr)
        write_json(path, [*_starts(folder), {**about, **envelope()}])
        write_json(folder / "plan.json", plan.to_dict())
        # A start that died before config.yaml was there may have left the identity of another run.
        if not all((folder / name).exists() for name in ("config.yaml", identity.FILE)):
            tied.save(folder)
        # Last: from now on the folder holds a run.
        write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    except OSError as error:
        raise UsageError(
            f"cannot write to the run folder {folder} ({error.strerror}); give another with folder="
        ) from error


def _starts(folder: Path) -> list[dict[str, Any]]:
    """Read run.json; an empty list if there is none. A damaged one is renamed, with a warning: no run needs it."""
    path = folder / "run.json"
    try:
        return Run(folder).starts if path.exists() else []
    except RunError as error:
        print(f"{path} is damaged ({error}); it is now {set_aside(path).name}", file=sys.stderr)
        return []


def _values_before(folder: Path, now: dict[str, Any]) -> dict[str, Any]:
    """Read the values, by dotted key, that decide the result of a run, as it was or as it is `now`, and that a resumed
    run may change, as its last start that has reported logged them; none where that cannot be read."""
    logged = [path for path in (folder / "metrics").glob("*/hparams.yaml") if path.parent.name.isdecimal()]
    try:
        before = read_plain(max(logged, key=lambda path: int(path.parent.name)))
        keys = [key for values in (before, now) for key in deciding_values(values, "result")]
    except (OSError, ValueError, RecursionError):  # there is none, or it is damaged
        return {}
    found = flat({key: lookup(before, key) for key in keys if not KEYS[key].fixed})
    return {key: value for key, value in found.items() if key not in FIXED and value is not None}


def static_metrics(config: PretrainConfig, plan: Plan) -> dict[str, float]:
    """Compute the metrics that do not change while a run trains, by their names in logs and in wandb."""
    model = config.model
    kv = kv_bytes(plan, config.context, config.kv_itemsize)
    return {
        "kv/bytes_per_token": float(kv.per_token),
        "kv/bytes_constant": float(kv.constant),
        "kv/bytes_stored": float(kv.stored),
        "kv/bytes_read": float(kv.read),
        "model/params": float(num_params(model, plan)),
        "model/train_flops_per_token": train_flops_per_token(model, plan),
    }


def summarize(config: PretrainConfig, plan: Plan, data: str, steps: int, val: dict[str, float]) -> dict[str, Any]:
    """Build the summary.json of a run of `steps` steps on the data of checksum `data`: all that a Pareto plot needs.

    `experiment` holds everything that decides the result except the seed. `unpredicted`: number of targets at the start
    of each sequence that the model does not predict; they are neither trained on nor in any loss.
    """
    experiment = deciding_values(to_dict(config), "result")
    for key in ("data", "tokens"):  # the checksum and the steps stand for them
        del experiment[key]
    for key in ("tokens", "batch_size", "lr"):  # defaults of keys outside of size
        del experiment["size"][key]
    experiment |= {"steps": steps, "val_tokens": config.data.val_tokens, "data": data}
    experiment["unpredicted"] = plan.num_unpredicted
    return {
        "name": config.name,
        "seed": config.seed,
        "experiment": experiment,
        "params": num_params(config.model, plan),
        "tokens": steps * config.batch_size * config.size.seq_len,
        "seq_len": config.size.seq_len,
        "val": val,
        "environment": environment(),
    }


def load_config(run: Path) -> PretrainConfig:
    """Load the configuration of a run, of this version or an earlier one; nothing in it is interpolated.

    Raises UsageError if the folder `run` holds no run, if its config.yaml is none, or if it has been cut or edited in
    what decides the run.
    """
    path = run / "config.yaml"
    values = read_config(run)
    try:
        if wrong := mistyped_booleans(PretrainConfig, values):
            raise ValueError("; ".join(wrong))
        config = to_object(OmegaConf.merge(OmegaConf.structured(PretrainConfig), OmegaConf.create(values)))
    except (ValueError, OmegaConfBaseException, RecursionError) as error:
        raise UsageError(f"{path} is not the configuration of a run: {_first_line(error)}") from error
    recorded = Identity.load(run)
    if recorded is not None:
        recorded.check_config(path, values)
    return config


def resumed(run: Path, overrides: list[str]) -> PretrainConfig:
    """Load the configuration of `run` to continue it, changed by the other `overrides` of the command line.

    Raises as `load_config`, and UsageError where `overrides` would change what decides the course of the run.
    """
    config = load_config(run)
    if config.name is None:
        raise UsageError(f"{run / 'config.yaml'} is not the configuration of a run: name is missing")
    tied = Identity.load(run) is not None
    changes = [override for override in overrides if not override.startswith("resume=")]
    for change in changes:
        key = change.lstrip("+~").partition("=")[0]
        fixed = f"{key}.".startswith(tuple(f"{fixed}." for fixed in FIXED)) and not (tied and key in MOVABLE)
        if change[0] in "+~" or key in GROUPS or fixed:
            raise UsageError(f"{change}: a resumed run keeps its {', '.join(FIXED)} and its groups; start another run")
    # Read as a new run's, and not as YAML.
    given = {change.key_or_group: change.value() for change in OverridesParser.create().parse_overrides(changes)}
    if any(given.get(key) is not None for key in MOVABLE):
        config.data.path = config.data.mix = None  # or the folders given would join those that it had
    merged = OmegaConf.structured(config)
    for key, value in given.items():
        OmegaConf.update(merged, key, value)
    return to_object(OmegaConf.merge(merged, {"resume": str(run), "folder": str(run)}))


def to_object(config: DictConfig | ListConfig) -> PretrainConfig:
    """Resolve a configuration of this schema, and return it as an object."""
    result = OmegaConf.to_object(config)
    assert isinstance(result, PretrainConfig)
    return result


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
