"""The data sets of configs/data, by name: read with changes, and written back as the command that prepares them."""

import shlex
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from .cli import did_you_mean, unknown_key
from .config import LIMITS, DataConfig, PrepareConfig
from .files import DataError

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "data"


def names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def load(name: str, overrides: list[str]) -> DataConfig:
    """Read `configs/data/<name>.yaml`, changed by `key=value` words of PrepareConfig.

    Raises DataError on an unknown name or key, with the nearest known one, and on a value of another type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if name not in names():
        raise DataError(f"no data set {name!r}{did_you_mean(name, names())} configs/data has {', '.join(names())}")
    for override in overrides:
        _check_key(override)
    try:
        config = OmegaConf.merge(
            OmegaConf.structured(DataConfig),
            OmegaConf.load(CONFIGS / f"{name}.yaml"),
            OmegaConf.from_dotlist(overrides),
        )
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise DataError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    except YAMLError as error:
        raise DataError(f"cannot read {' '.join(overrides)}: a value is YAML, a list is written '[a,b]'") from error
    assert isinstance(result, DataConfig)
    return result


def command(config: PrepareConfig) -> str:
    """The command that prepares `config`."""
    return shlex.join(["python", "data/prepare.py", config.name, *_changes("", asdict(config), asdict(_base(config)))])


def changed_limits(config: PrepareConfig) -> dict[str, int]:
    """The limits of `config` that are set and are not those of its file in configs/data."""
    base = _base(config)
    return {key: getattr(config, key) for key in LIMITS if getattr(config, key) not in (None, getattr(base, key))}


def overridden(config: PrepareConfig) -> dict[str, Any]:
    """The keys of source and tokenizer, and the name and workers, that are not as in a file of configs/data, dotted.

    They are those typed beside a data set; under a name of one's own, of the data set that leaves the fewest.
    """
    bases = (
        [_base(config)] if config.name in names() else [PrepareConfig(), *(load(n, []).preparation for n in names())]
    )
    changes = [
        {
            key: value
            for key, value in _flat(asdict(config)).items()
            if key.startswith(("source.", "tokenizer.", "workers")) and value != _flat(asdict(base))[key]
        }
        for base in bases
    ]
    found = min(changes, key=len)
    return found if config.name in (*names(), PrepareConfig.name) else {"name": config.name, **found}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _base(config: PrepareConfig) -> PrepareConfig:
    """The data set of `config` as configs/data has it; the defaults where there is none of this name."""
    return load(config.name, []).preparation if config.name in names() else PrepareConfig()


def _check_key(override: str) -> None:
    """Raises DataError where `override` is not `key=value` with a key of PrepareConfig."""
    key, equals, _ = override.partition("=")
    if not equals:
        raise DataError(f"cannot read {override!r}; write key=value")
    schema: Any = PrepareConfig
    parts = key.split(".")
    for depth, part in enumerate(parts, 1):
        known = [item.name for item in fields(schema)] if is_dataclass(schema) else []
        if part not in known:
            raise DataError(unknown_key(".".join(parts[:depth]), known))
        schema = get_type_hints(schema)[part]


def _changes(prefix: str, config: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """`key=value` for each value that differs from the one in `base`."""
    changes = []
    for key, value in config.items():
        if isinstance(value, dict):
            changes += _changes(f"{prefix}{key}.", value, base[key])
        elif value != base[key]:
            text = f"[{','.join(value)}]" if isinstance(value, list) else "null" if value is None else value
            changes.append(f"{prefix}{key}={text}")
    return changes
