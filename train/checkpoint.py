"""Checkpoints: folders of safetensors that any number of processes, sharded or not, can write and read.

checkpoints/step-00000200/   complete or absent: written under another name, flushed, and renamed
  *.safetensors              weights and optimizer state by parameter name; each process writes its own shard
  checkpoint.json            step, the model they belong to, and size and sha256 of every file; nothing is pickled
checkpoints/best.json        which of them had the lowest validation loss

The position in the data and in every schedule is a function of the step, so a run needs nothing else to continue.
"""

import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.fsdp import FSDPModule
from torch.futures import Future

from arch import ModelConfig, from_dict, plan_from_dict
from arch import resolve as resolve_plan
from data.cli import UsageError
from data.dotted import flat
from data.files import rename, sha256, sync_folder, write_json
from eval.identity import Identity, changed_values
from eval.plain_yaml import read_config
from eval.source import CHECKPOINT
from train.errors import TrainingError
from train.processes import distributed, gather, local_shard, on_rank_0, rank
from train.tensor_pieces import DTYPES, SHARDING, NewPiece, StoredTensor, stored_tensors, write_file

FORMAT = 2
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is no mistake
INFO = CHECKPOINT
# Files of an adapter, as peft (adapter_config.json, adapter_model.*) and others (lora.safetensors) name them.
ADAPTER = re.compile(r"(pytorch_)?(adapters?|lora)([_.-].*)?\.(json|safetensors|bin|pt|pth|npz)", re.IGNORECASE)
NAME = re.compile("step-[0-9]{8,}")  # of a checkpoint in a run


def named_tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint: `model.<name>` and `optimizer.<key>.<name>` for every parameter of `model`.

    Without an optimizer, only those of the model. The tensors share memory with the parameters and the state.
    """
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            state = optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{key}.{name}": value for key, value in state.items()}
    return tensors


class TensorWriter(HuggingFaceStorageWriter):
    """Write the files of the base class without copying all tensors: one after the other, and hash them on the way.

    With `copies`, tensors in host memory by name, only copy the tensors there, over those of an earlier checkpoint;
    `write_copies` then writes the files.
    """

    def __init__(self, folder: Path, copies: dict[str, Tensor] | None = None):
        super().__init__(str(folder), save_distributed=True)
        self.folder, self.copies = folder, copies
        self.files: dict[str, Any] = {}  # size and sha256 of those that this process has written
        self.unwritten: dict[str, Callable[[], dict[str, Any]]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what `plan` gives this process. Larger types come first, which keeps all tensors aligned."""
        pieces = {}
        for item in plan.items:
            data = item.tensor_data
            assert data is not None and item.index.fqn not in pieces, item  # rows of this process are one piece
            piece = NewPiece(data.properties.dtype, data.chunk.sizes, data.chunk.offsets)
            pieces[item.index.fqn] = piece, item
        pieces = dict(sorted(pieces.items(), key=lambda entry: (-entry[1][0].dtype.itemsize, entry[0])))
        new = {name: piece for name, (piece, _) in pieces.items()}
        places = {name: {"saved_offsets": piece.offsets} for name, piece in new.items()}
        metadata = {SHARDING: json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
        if pieces:
            name = f"shard-{plan.storage_data['shard_index']:05d}-model-00001-of-00001.safetensors"
            tensors = (cast(Tensor, planner.resolve_data(item)) for _, item in pieces.values())
            path = self.folder / name
            if self.copies is None:
                self.files[name] = write_file(path, new, tensors, metadata)
            else:
                copied = [self._copy(key, tensor) for key, tensor in zip(pieces, tensors, strict=True)]
                self.unwritten[name] = partial(write_file, path, new, copied, metadata)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(MetadataIndex(name), piece.num_bytes, None) for name, piece in new.items()])
        return done

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        assert self.copies is not None
        if name not in self.copies:
            self.copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return self.copies[name].copy_(tensor)

    def write_copies(self) -> None:
        """Write what was copied. Raises OSError."""
        for name, write in self.unwritten.items():
            self.files[name] = write()


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, about: Mapping[str, Any]) -> None:
    """Write the checkpoint `folder`; all processes call this together. `about`: plain data for checkpoint.json.

    Needs memory for a few pieces of tensors beside the tensors themselves (train/tensor_pieces.py).

    Raises TrainingError, in all processes, if it cannot be written; nothing of it is left then.
    """
    with _saving(folder) as unfinished:
        writer = TensorWriter(unfinished)
        _give(writer, model, optimizer)
        info = {"format": FORMAT, "step": step, **about, "files": _union(gather(writer.files))}
        on_rank_0(lambda: _complete(unfinished, folder, info))


class BackgroundSave:
    """A checkpoint as `save` writes it, but written by a thread, from copies of the tensors, while training continues.

    All processes create it together, after the last one has ended. `copies`: an empty dictionary, which keeps the
    copies in host memory, as large as the files of this process, from one checkpoint to the next. `group`: a process
    group on the CPU that nothing else uses; None if there is one process.

    The checkpoint has its final name only once it is complete in all processes, even if they are killed. Raises
    TrainingError if the copies cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: int,
        about: Mapping[str, Any],
        copies: dict[str, Tensor],
        group: dist.ProcessGroup | None,
    ):
        self.folder, self.group = folder, group
        self.info = {"format": FORMAT, "step": step, **about}
        self._error: BaseException | None = None
        with _saving(folder) as unfinished:
            self._writer = TensorWriter(unfinished, copies)
            _give(self._writer, model, optimizer)
        # A daemon, for which no process waits that ends in haste.
        self._thread = Thread(target=self._run, name=f"save {folder.name}", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return self.ended and self._error is not None

    def wait(self) -> None:
        """Wait until the checkpoint is complete. Raises TrainingError, in all processes, if it cannot be written;
        nothing of it is left then.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with _saving(self.folder) as unfinished:
                problem = None
                try:
                    self._writer.write_copies()
                except Exception as error:  # the others wait to be told
                    problem = str(error) or repr(error)
                found = gather((self._writer.files, problem), self.group)
                if problems := dict.fromkeys(problem for _, problem in found if problem is not None):
                    raise OSError("; ".join(problems))
                files = _union([files for files, _ in found])
                on_rank_0(lambda: _complete(unfinished, self.folder, self.info | {"files": files}), self.group)
        except BaseException as error:  # for `wait`
            self._error = error


@contextmanager
def _saving(folder: Path) -> Iterator[Path]:
    """Yield the folder in which the checkpoint `folder` is written until it is complete.

    Raises TrainingError if it cannot be written, and then leaves nothing of it.
    """
    unfinished = folder.with_name(f"{folder.name}.partial")
    try:
        yield unfinished
    except (OSError, CheckpointException) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise TrainingError(f"cannot save {folder}: {_cause(error)}") from error


def _give(writer: TensorWriter, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give `writer` the tensors that this process saves."""
    if isinstance(model, FSDPModule):
        model.reshard()  # after a forward pass alone the root is still gathered, in tensors the optimizer does not know
    on_rank_0(lambda: _make_empty(writer.folder))
    dcp.save(named_tensors(model, optimizer), storage_writer=writer, no_dist=not distributed())


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def _complete(unfinished: Path, folder: Path, info: Mapping[str, Any]) -> None:
    """Give the checkpoint its name, replacing an earlier one of that name."""
    write_json(unfinished / INFO, info)
    delete(folder)
    rename(unfinished, folder)
    sync_folder(folder.parent.parent)  # it may be the first checkpoint


def delete(folder: Path) -> None:
    """Delete a checkpoint, if it is there; under another name first, so that no part of it ever looks like one.

    Does nothing where the folder cannot be renamed.
    """
    doomed = folder.with_name(f"{folder.name}.deleted.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    with suppress(OSError):
        os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def check_matches(folder: Path, model: nn.Module) -> dict[str, StoredTensor]:
    """Return the tensors in `folder`, by name, without reading their values.

    Raises TrainingError if it cannot be read, or its names or shapes are not those of `model`.
    """
    saved = stored_tensors(folder)
    tensors = named_tensors(model, None)
    unknown = sorted(name for name in saved if name.startswith("model.") and name not in tensors)
    wrong = [
        f"{name} {list(tensor.shape)} here, {list(saved[name].shape) if name in saved else 'not'} there"
        for name, tensor in tensors.items()
        if name not in saved or saved[name].shape != tuple(tensor.shape)
    ] + [f"{name} there only" for name in unknown]
    wrong += [f"{name} is {saved[name].dtype} there" for name in tensors if name in saved and not is_float(saved[name])]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise TrainingError(f"{folder} is of another model: {'; '.join(wrong[:3])}{more}")
    return saved


def is_float(stored: StoredTensor) -> bool:
    return DTYPES[stored.dtype].is_floating_point


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Fill `model`, and the state of `optimizer`, from `folder`, however many processes wrote it.

    Raises as `check_matches`, and, in all processes, TrainingError if a value is not finite.
    """
    saved, tensors = check_matches(folder, model), named_tensors(model, None)
    if optimizer is not None:
        _make_state(folder, saved, model, optimizer)
        tensors = named_tensors(model, optimizer)
    try:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not distributed())
    except (OSError, SafetensorError, CheckpointException) as error:
        raise TrainingError(f"cannot read {folder}: {_cause(error)}") from error
    found = gather([name for name, tensor in tensors.items() if not local_shard(tensor).isfinite().all()])
    broken = sorted(set(chain(*found)))
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise TrainingError(f"{folder} has values that are not finite, in {', '.join(broken[:3])}{more}")


def _make_state(
    folder: Path, saved: Mapping[str, StoredTensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Allocate optimizer state, all zeros, for every trained parameter, with the names and types in `saved`.

    Raises TrainingError if `saved` has state of another model, or none for a trained parameter.
    """
    by_name = dict(model.named_parameters())
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for entry in (name for name in saved if name.startswith("optimizer.")):
        _, key, name = entry.split(".", 2) if entry.count(".") > 1 else (*entry.split("."), "")
        parameter = by_name.get(name)
        size, dtype = torch.Size(saved[entry].shape), DTYPES[saved[entry].dtype]
        if parameter is None or size not in (parameter.shape, torch.Size()) or not dtype.is_floating_point:
            raise TrainingError(f"{folder} is of another model: it has {entry} {list(size)}")
        if id(parameter) in trained:
            like = parameter.detach() if size == parameter.shape else torch.empty((), device=parameter.device)
            optimizer.state[parameter][key] = torch.zeros_like(like, dtype=dtype)
    lacking = [n for n, p in by_name.items() if id(p) in trained and not optimizer.state.get(p)]
    if lacking:
        names = ", ".join(lacking[:3])
        raise TrainingError(f"{folder} lacks the optimizer state of {names}; a new run can have its weights by init=")


def load_info(folder: Path) -> dict[str, Any]:
    """Read checkpoint.json. Raises TrainingError if it is missing, is not one, or names files outside of `folder`."""
    try:
        info: dict[str, Any] = json.loads((folder / INFO).read_text())
        if info["format"] != FORMAT:
            raise TrainingError(f"{folder} has format {info['format']}, this version reads {FORMAT}")
        named = folder.parent.name == "checkpoints" and NAME.fullmatch(folder.name)  # elsewhere a name says nothing
        if named and info["step"] != step_of(folder):
            raise TrainingError(
                f"{folder} has the name of another step than {INFO} says, {info['step']}; give it its name back"
            )
        if not isinstance(info["files"], dict):
            raise ValueError("files is no mapping")
        for name in info["files"]:
            if Path(name).name != name or Path(name).suffix != ".safetensors":
                raise ValueError(f"files has {name!r}, which is no .safetensors file in this folder")
        return info
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrainingError(f"{folder} is no checkpoint: {INFO} cannot be read ({error})") from error


def identity_of(folder: Path, run: Path | None) -> Identity | None:
    """Return the identity of the checkpoint `folder`; None if an earlier version wrote it.

    With `run`, whose checkpoint it is, its config.yaml is compared: raises UsageError if that says what the run was
    not trained with, and TrainingError if checkpoint.json describes another model.
    """
    info = load_info(folder)
    tied: Identity | None
    if info.get("identity") is not None:
        tied = Identity.from_dict(info["identity"], folder / INFO)
    else:
        tied = None if run is None else Identity.load(run)
    if run is not None:
        values = read_config(run)
        if tied is not None:
            tied.check_config(run / "config.yaml", values)
        _check_description(folder, info, values)
    return tied


def _check_description(folder: Path, info: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Compare the model in checkpoint.json, where there is one, with arch and size in `values`, a config.yaml.

    Raises TrainingError with the keys that differ, or if the plan is not that of the model.
    """
    if "config" not in info:
        return
    try:
        model = from_dict(ModelConfig, info["config"])
        same_plan = "plan" not in info or plan_from_dict(info["plan"]) == resolve_plan(model)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, StopIteration, RecursionError) as error:
        raise TrainingError(f"{folder / INFO} describes no model: {error!r}") from error
    written = flat({group: values[group] for group in ("arch", "size") if group in values})
    found = [f"{key} is {there!r} there, {here!r} here" for key, here, there in changed_values(written, asdict(model))]
    if not same_plan:
        found.append("its plan is not that of its config")
    if found:
        raise TrainingError(f"{folder / INFO} describes another model than config.yaml: {'; '.join(found)}")


def verify_checksums(folder: Path) -> None:
    """Raise TrainingError, naming the file, unless exactly the files that were written are there, unchanged.

    Their headers must make sense, too: who forges a file can forge its checksum.
    """
    files = load_info(folder)["files"]
    for path in folder.glob("*.safetensors"):
        if path.name not in files:
            raise TrainingError(f"{path} is not of this checkpoint: {INFO} does not name it")
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            raise TrainingError(f"{path} is missing")
        if not isinstance(written, dict) or not {"bytes", "sha256"} <= written.keys():
            raise TrainingError(f"{folder} is no checkpoint: {INFO} has no size and checksum of {name}")
        if path.stat().st_size != written["bytes"]:
            raise TrainingError(f"{path} has {path.stat().st_size} bytes, {written['bytes']} were written")
        try:
            found = _describe(path)
        except OSError as error:
            raise TrainingError(f"{path} cannot be read ({error})") from error
        if found != written:
            raise TrainingError(f"{path} has been altered: its checksum is not the one written")
    stored_tensors(folder)


def checkpoints(run: Path) -> list[Path]:
    """List the checkpoints of a run, newest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def latest_valid(run: Path) -> Path | None:
    """Find the newest intact checkpoint of a run; None if it has saved none yet.

    Names the broken ones that it skips on stderr. Raises TrainingError if all of them are broken.
    """
    broken = []
    for folder in checkpoints(run):
        try:
            verify_checksums(folder)
        except (TrainingError, OSError) as error:
            broken.append(str(error))
            continue
        for reason in broken if rank() == 0 else []:
            print(f"broken checkpoint: {reason}; falling back to {folder.name}", file=sys.stderr)
        return folder
    if broken:
        raise TrainingError("every checkpoint is broken: " + "; ".join(broken))
    return None


def resolve(path: Path) -> Path:
    """Return `path` if it is a checkpoint, or the newest intact one if it is a run.

    Raises UsageError if it is neither, or an adapter lies in it, and TrainingError if it is broken.
    """
    try:
        if (path / INFO).is_file():
            refuse_adapter(path)
            verify_checksums(path)
            return path
        found = latest_valid(path)
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror})") from error
    if found is None:
        raise UsageError(f"{path} is neither a checkpoint nor a run that has saved one")
    for place in (path, found):
        refuse_adapter(place)
    return found


def refuse_adapter(folder: Path) -> None:
    """Raise UsageError if the files of an adapter lie in `folder`: what they change would be left out."""
    try:
        names = sorted(path.name for path in folder.iterdir() if ADAPTER.fullmatch(path.name))
    except OSError as error:
        raise UsageError(f"{folder} cannot be read ({error.strerror})") from error
    if names:
        raise UsageError(
            f"{folder} has an adapter, {names[0]}, which would be left out; merge it, and give the folder that this "
            f"writes: AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained(NEW)"
        )


def _union(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _cause(error: BaseException) -> str:
    """Return the message of an error; of a CheckpointException, those of the processes that failed."""
    if isinstance(error, CheckpointException):
        return "; ".join(dict.fromkeys(str(failure[0]) for failure in error.failures.values()))
    return str(error)
