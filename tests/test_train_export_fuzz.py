"""Checkpoints that somebody has tampered with: each is refused with a message, or is a model after all.

No outcome may be a traceback, a hang, a file outside of the folder, or memory for what a header only claims.
"""

import json
import math
import random
import re
import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train_export import QUIET, REFUSALS, shard, sign, write_checkpoint

from train.export import export
from train.hub.request import ExportConfig

HUGE = (0, -1, 1, 7, 2**31, 2**40, 2**62, 2**64 - 1, 10**30)


@pytest.fixture(scope="module")
def limited() -> Iterator[None]:
    """No more than another GiB of address space: an absurd allocation fails, and is no refusal."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, as two processes write them."""
    folder = write_checkpoint(tmp_path_factory.mktemp("fuzz") / "step-00000003", "gqa2", num_layers=1)
    shard(folder)
    return folder


def parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its data."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def damage_file(raw: bytes, draw: random.Random) -> bytes:
    """Not even a header, or one byte."""
    kind = draw.randrange(5)
    if kind == 0:
        return struct.pack("<Q", draw.choice(HUGE) % 2**64) + raw[8:]
    if kind == 1:
        return raw[: draw.randrange(len(raw))]
    if kind == 2:
        return raw + bytes(draw.randrange(1, 99))
    if kind == 3:
        nested = b'{"a":' * 50_000
        return struct.pack("<Q", len(nested)) + nested
    where = draw.randrange(len(raw) if draw.random() < 0.5 else 2000)
    return raw[:where] + bytes([raw[where] ^ (1 << draw.randrange(8))]) + raw[where + 1 :]


def damage_header(raw: bytes, draw: random.Random) -> bytes:
    """One entry says something else."""
    header, data = parts(raw)
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    kind = draw.randrange(6)
    if kind == 0:
        entry["dtype"] = draw.choice(["I64", "F64", "F16", "BF16", "BOOL", "F8_E4M3", "X9", "", None, 5])
    elif kind == 1:
        odd = [draw.choice(HUGE) for _ in range(draw.randrange(4))]
        entry["shape"] = draw.choice([odd, entry["shape"][::-1], [*entry["shape"], 1], "many", None])
    elif kind == 2:
        entry["data_offsets"] = [draw.choice([*HUGE, *entry["data_offsets"]]) for _ in range(2)]
    elif kind == 3:
        header[draw.choice(["../../x", "model.", "model.embed.weight", "other", "optimizer", "a" * 9999])] = header.pop(
            name
        )
    elif kind == 4:
        del header[name]
    else:
        header[name] = draw.choice([None, [], {}, "tensor", 3])
    return with_header(header, data)


def damage_sharding(raw: bytes, draw: random.Random) -> bytes:
    """What the pieces say of where they belong."""
    header, data = parts(raw)
    metadata = header["__metadata__"]
    info = json.loads(metadata["DCP_SHARDING_INFO"])
    name = draw.choice(list(info))
    old = info[name]["saved_offsets"]
    kind = draw.randrange(4)
    if kind == 0:
        info[name]["saved_offsets"] = [draw.choice(HUGE) for _ in old]
    elif kind == 1:
        info[name] = draw.choice(
            [None, {}, [], {"saved_offsets": draw.choice(["here", [0.5], [True], [[0]], [0] * 9, []])}]
        )
    elif kind == 2:
        del info[name]
    text = "[" * 100_000 if kind == 3 and draw.random() < 0.5 else json.dumps(info)[: -1 if kind == 3 else None]
    header["__metadata__"] = draw.choice([metadata | {"DCP_SHARDING_INFO": text}] * 4 + [{}, None, 5])
    return with_header(header, data)


def damage_info(text: str, draw: random.Random) -> str:
    """checkpoint.json: any of its values, or all of it."""
    if draw.random() < 0.15:
        return draw.choice(
            ["", "[]", "null", "5", "[" * 100_000, text[: len(text) // 2], '{"format": 2}', "\udcff" * 0 + "{}"]
        )
    info = json.loads(text)
    place: Any = info
    while True:  # a random walk down to some value
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], dict | list) and place[key] and draw.random() < 0.85:
            place = place[key]
            continue
        odd = [None, True, "", "x", "1/0", [], {}, math.nan, math.inf, 0.5, "new kv x999999999", ["new kv"] * 3, *HUGE]
        if isinstance(place, dict) and draw.random() < 0.2:
            place[draw.choice(["../../etc/x.safetensors", "/etc/x.safetensors", "new", ""])] = place.pop(key)
        else:
            place[key] = draw.choice(odd)
        return json.dumps(info)


def outcome(folder: Path, corpus: Path) -> str:
    """The message of the refusal; empty where it was exported."""
    out = folder.parent / "out"
    began = time.monotonic()
    try:
        export(ExportConfig(str(folder), str(out), prepared=str(corpus), verify=False), QUIET)
        message = ""
        for path in out.glob("*"):
            path.unlink()
        out.rmdir()
    except REFUSALS as error:
        message = str(error)
        assert message
    assert time.monotonic() - began < 10
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}, "something is left"
    return message


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("seed", range(120))
def test_tampering(seed: int, pristine: Path, tmp_path: Path, corpus: Path) -> None:
    draw = random.Random(seed)
    folder = tmp_path / "step-00000003"
    folder.mkdir()
    for path in pristine.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    kind = seed % 4
    if kind == 3:
        path = folder / "checkpoint.json"
        path.write_text(damage_info(path.read_text(), draw))
    else:
        path = draw.choice(sorted(folder.glob("*.safetensors")))
        changed = (damage_file, damage_header, damage_sharding)[kind](path.read_bytes(), draw)
        same = changed == path.read_bytes()
        path.write_bytes(changed)
        if seed % 3:
            sign(folder)
        elif not same:  # the checksum tells
            assert re.search(r"were written|has been altered", outcome(folder, corpus))
    outcome(folder, corpus)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "step-00000003", "gqa2", num_layers=1)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Other tensors, under the names that weights have; None: gone."""
    (path,) = folder.glob("*.safetensors")
    held = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path)
    sign(folder)


def test_what_is_wrong_with_a_weight_is_said_by_its_name(folder: Path, corpus: Path) -> None:
    norm = "model__norm__weight"
    for tensor, message in (
        (torch.full((32,), math.nan), "model.norm.weight is not finite; export an earlier checkpoint"),
        (torch.ones(31), "model.norm.weight has the shape [31]; it must be [32]"),
        (torch.ones(32, 2), "model.norm.weight has the shape [32, 2]; it must be [32]"),
        (
            torch.ones(32, dtype=torch.int64),
            "model.norm.weight has the type torch.int64; it must be one of torch.float64",
        ),
        (torch.full((32,), 1e300, dtype=torch.float64), "model.norm.weight has elements too large for F32"),
        (None, "model.norm.weight is missing"),
    ):
        change(folder, **{norm: tensor})
        assert message in outcome(folder, corpus)
    change(folder, **{norm: torch.ones(32), "model__more__weight": torch.ones(1)})
    assert "model.more.weight is unexpected" in outcome(folder, corpus)
    change(folder, model__more__weight=None, other=torch.ones(1))
    assert "other is unexpected; a checkpoint has model.* and optimizer.*" in outcome(folder, corpus)
    change(folder, other=None)
    assert outcome(folder, corpus) == ""


def test_what_is_wrong_with_a_configuration_is_said_by_its_key(folder: Path, corpus: Path) -> None:
    info = json.loads((folder / "checkpoint.json").read_text())

    def asked(group: str, **values: object) -> str:
        config = info["config"] | {group: info["config"][group] | values}
        (folder / "checkpoint.json").write_text(json.dumps(info | {"config": config}))
        return outcome(folder, corpus)

    assert "size.num_layers is 1000000000, too large for the weights" in asked("size", num_layers=10**9)
    assert "size.num_heads is 1000000000, too large for the weights" in asked("size", num_heads=10**9)
    assert "arch.pattern repeats an item more than 10,000 times" in asked("arch", pattern=["new kv x1000000000"])
    assert "SizeConfig.d_ff is None; it must be int" in asked("size", d_ff=None)
    assert "size.norm_eps is inf; it must be positive and finite" in asked("size", norm_eps=math.inf)
    assert "SizeConfig has no more" in asked("size", more=1)


def test_files_outside_of_the_folder_are_not_read(folder: Path, corpus: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    info = json.loads((folder / "checkpoint.json").read_text())
    for name in (f"../{path.name}", str(path), "model.bin", "..", ""):
        (folder / "checkpoint.json").write_text(json.dumps(info | {"files": {name: info["files"][path.name]}}))
        assert f"files has {name!r}, which is no .safetensors file in this folder" in outcome(folder, corpus)
    (folder / "checkpoint.json").write_text(json.dumps(info))
    save_file({"model.more.weight": torch.ones(1)}, folder / "more.safetensors")
    assert "more.safetensors is not of this checkpoint: checkpoint.json does not name it" in outcome(folder, corpus)
