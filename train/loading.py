"""Trained models for use: `model, tokenizer = load("runs/mine")`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from tokenizers import Tokenizer

from arch import LanguageModel, ModelConfig, build, from_dict, generate
from data.cli import UsageError
from data.files import DataError, sha256
from data.shards import Manifest
from data.tokenizer import Encoder, begin_token, end_token, pretrained, scaled_bytes, token_bytes
from eval.identity import Identity, short
from eval.runs import Run, RunError
from train import checkpoint
from train.device import named_device
from train.errors import TrainingError
from train.run import load_config
from train.schema import PretrainConfig

FIX = "Give the prepared folder that it was trained on with prepared="


class Text:
    """A tokenizer between text and lists of tokens.

    end            the token that ends a document
    begin          the token before the first of a document: the end of the one before it, or what an imported model has
    chat_template  of an imported model, for its export
    """

    def __init__(self, tokenizer: Tokenizer, end: int, own_begin: int | None = None, chat_template: Any = None):
        self.tokenizer, self.end, self.own_begin, self.chat_template = tokenizer, end, own_begin, chat_template
        self._encoder = Encoder(tokenizer, end)

    @property
    def begin(self) -> int:
        return self.end if self.own_begin is None else self.own_begin

    @property
    def vocabulary(self) -> dict[str, int]:
        """All tokens, as the tokenizer spells them, with their numbers."""
        tokens: dict[str, int] = self.tokenizer.get_vocab(with_added_tokens=True)
        return tokens

    def encode(self, text: str) -> list[int]:
        """The tokens of `text` as in training, without an end: a special token spelled out is ordinary text."""
        tokens: list[int] = self._encoder([text])[0][:-1].tolist()
        return tokens

    def prompt(self, text: str) -> list[int]:
        """The tokens of a text to continue: those of `encode`, after a begin that an imported model has."""
        return self.encode(text) if self.own_begin is None else [self.own_begin, *self.encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, without special tokens."""
        text: str = self.tokenizer.decode(list(tokens))
        return text

    @cached_property
    def _sizes(self) -> np.ndarray:
        return token_bytes(self.tokenizer)

    def text_bytes(self, text: str, tokens: Sequence[int]) -> Sequence[float]:
        """UTF-8 bytes of `text` that each of its `tokens` stands for; together all of them."""
        sizes: list[float] = self._sizes[list(tokens)].tolist()
        return scaled_bytes(sizes, text)


@dataclass(frozen=True)
class LoadedModel:
    """A trained model in eval mode and its tokenizer, into which it unpacks.

    checkpoint  the folder that the weights come from
    config      the configuration of its run; None for a checkpoint that belongs to no run, as an imported one
    """

    model: LanguageModel
    checkpoint: Path
    config: PretrainConfig | None
    prepared: Path | None = field(repr=False, default=None)
    identity: Identity | None = field(repr=False, default=None)

    @cached_property
    def tokenizer(self) -> Text:
        """Read on first use. Raises UsageError if it is not on this machine, DataError if it is damaged, or not
        the one that the model was trained with.
        """
        return find_tokenizer(self.checkpoint, self.config, self.prepared, self.identity)

    def check_data(self, folders: Mapping[Path, Manifest], weights: Sequence[float]) -> None:
        """Raise DataError unless `folders`, of these weights, are those that the model was trained on."""
        if self.identity is not None:
            self.identity.check_data(str(self.checkpoint), folders, weights, "Put that data back")

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer))

    @overload
    def generate(self, prompts: str, max_new_tokens: int = 100, **options: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str], max_new_tokens: int = 100, **options: Any) -> list[str]: ...
    def generate(self, prompts: str | Sequence[str], max_new_tokens: int = 100, **options: Any) -> str | list[str]:
        """Continue a text, or each of several, up to the end of the text; `options` as of `arch.generate`.

        An empty text starts like a document: after the end of another one. A text shorter than a block is padded on the
        left if the model was trained with that (`data.block_padding`).
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        tokens = [self.tokenizer.prompt(text) or [self.tokenizer.begin] for text in texts]
        if self.config is not None and self.config.data.block_padding:
            options = {"pad_token": self.tokenizer.end, **options}
        options = {"stop_token": self.tokenizer.end, **options}
        found = [self.tokenizer.decode(row) for row in generate(self.model, tokens, max_new_tokens, **options)]
        return found[0] if isinstance(prompts, str) else found


def load(
    path: str | Path,
    *,
    which: str = "newest",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    prepared: str | Path | None = None,
) -> LoadedModel:
    """Load the model of a run, or of a checkpoint: one of a run, an imported or an uptrained one.

    which     of a run's checkpoints the `newest` intact one, or the `best` by validation loss
    device    cpu, cuda, ...
    dtype     type of the weights
    prepared  the folder of data that the tokenizer comes from; None: that of the run

    Raises UsageError if `path` is neither a run nor a checkpoint, or `device` is not here, TrainingError if its files
    are damaged.
    """
    path = Path(path)
    if (path / checkpoint.INFO).is_file():
        run = run_of(path)
        config = None if run is None else load_config(run)
    else:
        run, config = path, load_config(path)
    folder = choose_checkpoint(path, which)
    tied = checkpoint.identity_of(folder, run)
    device = named_device(device)
    with torch.device("meta"):
        model = build(recorded_config(folder) if config is None else config.model, device_type=device.type, init=False)
    model = model.to(dtype).to_empty(device=device)
    checkpoint.load(folder, model)
    place = None if prepared is None else Path(prepared)
    return LoadedModel(model.eval().requires_grad_(False), folder, config, place, tied)


def run_of(folder: Path) -> Path | None:
    """The run that the checkpoint `folder` belongs to; None if it lies in no run."""
    run = folder.absolute().parent.parent
    return run if (run / "config.yaml").is_file() else None


def recorded_config(folder: Path) -> ModelConfig:
    """The model of the checkpoint `folder` by its own record. Raises TrainingError if it describes none."""
    try:
        return from_dict(ModelConfig, checkpoint.load_info(folder)["config"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TrainingError(f"{folder / checkpoint.INFO} describes no model: {error!r}") from error


def choose_checkpoint(path: Path, which: str) -> Path:
    """The checkpoint `path`, or `which` of those of the run `path`. Raises as `checkpoint.resolve`."""
    if which not in ("newest", "best"):
        raise UsageError(f"which is {which!r}; choose newest or best")
    if which == "best" and not (path / checkpoint.INFO).is_file():
        try:
            best = Run(path).best
        except RunError as error:
            raise TrainingError(f"{error}; take the newest") from error
        if best is None:
            raise TrainingError(f"{path} has no checkpoints/best.json, which names the best; take the newest")
        path = path / "checkpoints" / best.checkpoint
    return checkpoint.resolve(path)


def find_tokenizer(
    folder: Path, config: PretrainConfig | None, prepared: Path | None, tied: Identity | None = None
) -> Text:
    """The tokenizer of the checkpoint `folder`, from `prepared`, or the data folder of its run, or beside its weights.

    Raises UsageError if there is none, DataError if it is not the one that made the data.
    """
    place = prepared_folder(config, prepared)
    if place is not None:
        manifest = open_prepared(folder, place, tied)
        return Text(pretrained(str(place / "tokenizer.json")), manifest.end_of_text)
    found = tokenizer_beside(folder, tied)
    if found is None:
        raise no_tokenizer(folder, config)
    return found


def prepared_folder(config: PretrainConfig | None, prepared: Path | None) -> Path | None:
    """The folder of data that has the tokenizer: `prepared`, or the first of the run of `config`; None if not here."""
    if prepared is not None or config is None:
        return prepared
    first = config.data.folders[0]
    return first if (first / "manifest.json").is_file() else None


def open_prepared(folder: Path, prepared: Path, tied: Identity | None) -> Manifest:
    """The manifest of `prepared`. Raises DataError unless the checkpoint `folder` was trained on that data."""
    manifest = Manifest.load(prepared)
    manifest.check_tokenizer(prepared)
    if tied is not None:
        tied.check_folder(str(folder), prepared, manifest, FIX)
    return manifest


def no_tokenizer(folder: Path, config: PretrainConfig | None) -> UsageError:
    """The error of a checkpoint whose tokenizer is not on this machine."""
    where = (
        f"{folder} lies in no run" if config is None else f"the run's data folder {config.data.folders[0]} is not here"
    )
    return UsageError(f"there is no tokenizer: {where}; {FIX[0].lower()}{FIX[1:]}")


def tokenizer_beside(folder: Path, tied: Identity | None) -> Text | None:
    """The tokenizer beside the weights of the checkpoint `folder`, as an import writes it; None if there is none.

    That of an imported model begins and ends a text as tokenizer.json and tokenizer_config.json say. Raises DataError
    if it is not the one that the weights are tied to, or damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    if tied is not None and sha256(path) != tied.tokenizer:
        raise DataError(
            f"{folder} was trained with the tokenizer {short(tied.tokenizer)}; {path} is another, "
            f"{short(sha256(path))}. {FIX}"
        )
    tokenizer = pretrained(str(path))
    if "imported" not in checkpoint.load_info(folder):
        return Text(tokenizer, end_token(tokenizer, None))
    config = tokenizer_config(folder)
    end = config.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    known = end if isinstance(end, str) and tokenizer.token_to_id(end) is not None else None
    template, template_file = config.get("chat_template"), folder / "chat_template.jinja"
    if template_file.is_file():
        template = template_file.read_text()
    return Text(tokenizer, end_token(tokenizer, known), begin_token(tokenizer), template)


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """Read the tokenizer_config.json of an imported model, {} if there is none. Raises DataError if it is damaged."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}; copy it anew, or delete it") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is no JSON object; copy it anew, or delete it")
    return found
