"""The target that ships the files of arch/: the same model in the interface of transformers, any layout."""

import copy
import io
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHS, build, launch_in_process, small, tokens, whole_depth
from rich.console import Console
from safetensors.torch import load_file
from test_train_export import QUIET, SHIPPED, in_process, no_picture, write_checkpoint  # noqa: F401  a fixture
from torch.nn import functional as F

import train.hub.exporter
import train.hub.verify
from arch import (
    ArchConfig,
    BlockTransformer,
    LanguageModel,
    LatentConfig,
    LayoutError,
    StoreConfig,
    generate,
    resolve,
)
from arch.convert import UnsupportedModelError
from arch.convert_formats import read_config
from arch.convert_shipped import FILES, from_hf_config, to_hf_config
from arch.footprint import allocated_bytes
from arch.named import load_arch
from train import import_hf
from train.errors import TrainingError
from train.export import export
from train.hub.checkpoint_reader import CheckpointReader
from train.hub.request import ExportConfig
from train.hub.targets import TRANSFORMERS_FLOOR, select_target
from train.import_hf import ImportConfig

transformers = pytest.importorskip("transformers", minversion=TRANSFORMERS_FLOOR)

from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from train.hf.configuration_kvfrontier_shipped import KVFrontierShippedConfig
from train.hf.modeling_kvfrontier_shipped import KVFrontierShippedForCausalLM
from train.hub.verify_child import own_cache, storage_bytes


def block(**changes: Any) -> ArchConfig:
    """The Block Transformer of configs/arch, with some of its section `block` changed."""
    layout = load_arch("block")
    assert layout.block is not None
    for key, value in changes.items():
        setattr(layout.block, key, value)
    return layout


LATENTS = ArchConfig({"latent": StoreConfig(latent=LatentConfig())}, ["new latent", "reuse latent"])
LAYOUTS: dict[str, tuple[ArchConfig | str, dict[str, Any]]] = {
    **{name: (name, {"num_layers": whole_depth(name, least=3)}) for name in ARCHS if name in SHIPPED},
    "block_unpredicted": (block(start=False), {"num_layers": 2}),
    "block_encoder": (block(embedder="encoder", length=3), {"num_layers": 2}),
    "latents": (LATENTS, {"num_layers": 3}),
    "neox": ("cla2", {"num_layers": 3, "style": "neox", "head_dim": 8, "tie_embeddings": False}),
    "window_1": (ArchConfig({"kv": StoreConfig(2, window=1)}, ["new kv"]), {"num_layers": 2}),
}
NEW = 9


@cache
def pair(name: str, **more: Any) -> tuple[LanguageModel, Any]:
    """Ours and theirs with the same weights, in fp64."""
    layout, changes = LAYOUTS[name]
    ours = build(small(layout, **changes))
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(parameter)))
    config = KVFrontierShippedConfig(**(to_hf_config(ours.config) | more))
    theirs = KVFrontierShippedForCausalLM(config).double().eval()
    theirs.model.load_state_dict(ours.state_dict())
    return ours, theirs


def least(model: LanguageModel) -> int:
    """Tokens that a prompt needs."""
    return model.plan.min_prompt


def continued(model: LanguageModel, prompts: list[list[int]], count: int, **how: Any) -> list[list[int]]:
    return generate(model, prompts, count, **how)


def ragged(lengths: list[int]) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Prompts, and the same padded on the left with something that counts if anybody looks: rows, and their mask."""
    prompts = [tokens(1, length)[0].tolist() for length in lengths]
    longest = max(lengths)
    rows = [[7] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return prompts, torch.tensor(rows), torch.tensor(mask)


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_those_of_the_next_token(name: str) -> None:
    """Of texts of any length, each as our own model generates it and as it scores whole blocks."""
    ours, theirs = pair(name)
    length, first = (ours.plan.block_length, least(ours)) if isinstance(ours, BlockTransformer) else (1, 1)
    text = tokens(2, 4 * length + 8)[:, : 4 * length + (8 if length == 1 else 0)]
    with torch.no_grad():
        logits = theirs(text[:, :-1]).logits
        expected = ours(text)[:, 1 if first == 1 and length > 1 else 0 :]
        expected = expected if length > 1 else ours(text[:, :-1])
        torch.testing.assert_close(logits[:, first - 1 :], expected, rtol=0, atol=1e-12)
        assert not logits[:, : first - 1].any()
        for count in range(1, text.shape[1]):
            torch.testing.assert_close(theirs(text[:, :count]).logits, logits[:, :count], rtol=0, atol=1e-12)
        torch.testing.assert_close(theirs(text, logits_to_keep=2).logits, theirs(text).logits[:, -2:])
    for count in (first, first + 1, first + 2, first + 3):
        said = continued(ours, text[:1, :count].tolist(), 1)
        assert said == [[int(logits[0, count - 1].argmax())]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_padding_changes_nothing(name: str) -> None:
    theirs = pair(name)[1]
    prompts, rows, mask = ragged([5, 9, 8])
    with torch.no_grad():
        alone = [theirs(torch.tensor([prompt])).logits[0] for prompt in prompts]
        left = theirs(rows, attention_mask=mask).logits
        turned = torch.stack([row.roll(int(keep.sum())) for row, keep in zip(rows, mask, strict=True)])
        turned_mask = torch.stack([keep.roll(int(keep.sum())) for keep in mask])
        right = theirs(turned, attention_mask=turned_mask).logits
    for row, expected in enumerate(alone):
        torch.testing.assert_close(left[row, -len(expected) :], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(right[row, : len(expected)], expected, rtol=0, atol=1e-12)
    mask[1, 4] = 0
    with pytest.raises(ValueError, match="padding between tokens"):
        theirs(rows, attention_mask=mask)


@pytest.mark.parametrize("name", LAYOUTS)
def test_generation(name: str) -> None:
    """Ragged batches, single prompts, the end of a text; over a cache of the bytes that the footprint promises."""
    ours, theirs = pair(name)
    prompts, rows, mask = ragged([least(ours), 4, 10])
    expected = continued(ours, prompts, NEW)
    out = theirs.generate(rows, attention_mask=mask, max_new_tokens=NEW)
    assert torch.equal(out[:, :10], rows)
    assert out[:, 10:].tolist() == expected
    single = theirs.generate(input_ids=torch.tensor(prompts[2:]), max_length=10 + NEW, return_dict_in_generate=True)
    assert single.sequences[0, 10:].tolist() == expected[2]

    end = expected[0][3]
    cut = [row[: row.index(end) + 1] if end in row else row for row in expected]
    longest = max(map(len, cut))
    padded = [row + [60] * (longest - len(row)) for row in cut]
    how = {"attention_mask": mask, "max_new_tokens": NEW, "pad_token_id": 60}
    assert theirs.generate(rows, eos_token_id=[end], **how)[:, 10:].tolist() == padded
    stop = transformers.EosTokenCriteria(end)  # asked afterwards, the same
    assert theirs.generate(rows, stopping_criteria=[stop], **how)[:, 10:].tolist() == padded

    for context in (10, 13):
        cache = own_cache(theirs, tokens(1, context)[0].tolist())
        assert storage_bytes(cache) == cache.nbytes == allocated_bytes(ours.plan, 1, context, 8)


@pytest.mark.parametrize("name", ["block", "bct"])
def test_sampling_follows_the_seed_of_torch(name: str) -> None:
    ours, theirs = pair(name)
    prompt = tokens(2, 6)

    def drawn(seed: int, **how: Any) -> list[list[int]]:
        torch.manual_seed(seed)
        return theirs.generate(prompt, do_sample=True, max_new_tokens=12, **how)[:, 6:].tolist()

    assert drawn(1) == drawn(1) != drawn(2)
    torch.manual_seed(1)
    seed = int(torch.randint(2**31, ()))
    assert drawn(1, temperature=0.7, top_p=0.9) == continued(ours, prompt.tolist(), 12, temperature=0.7, top_p=0.9,
                                                             seed=seed)  # fmt: skip
    greedy = continued(ours, prompt.tolist(), 12)
    assert drawn(3, top_p=1e-9) == greedy != drawn(3)
    config = transformers.GenerationConfig(max_new_tokens=12, do_sample=False)
    assert theirs.generate(prompt, config)[:, 6:].tolist() == greedy


def test_what_generate_cannot_do_is_refused_by_name() -> None:
    _, theirs = pair("bct")
    prompt = tokens(1, 4)
    for how, message in (
        ({"num_beams": 3}, "does not do num_beams=3"),
        ({"top_k": 50, "repetition_penalty": 1.2, "typical_p": 0.9}, "does not do repetition_penalty=1.2, typical_p=0"),
        ({"stop_strings": ["a"]}, "stop_strings need the tokenizer"),
        ({"top_k": -1, "do_sample": True}, r"top_k \(-1\) must be at least 1"),
        ({"min_p": 1.5, "do_sample": True}, r"min_p \(1.5\) in \[0, 1\]"),
        ({"use_cache": False}, "use_cache=False"),
        ({"past_key_values": 1}, "past_key_values=1"),
        ({"streamer": print}, "streamer="),
        ({"no_such_thing": 1}, "no_such_thing=1"),
        ({"eos_token_id": [3, 4]}, r"eos_token_id is \[3, 4\]; generate\(\) stops at one token"),
        ({"generation_config": transformers.GenerationConfig(num_beams=2)}, "num_beams=2"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "pad prompts on the left"),
        ({"attention_mask": torch.ones(1, 3)}, r"has the shape \(1, 3\), the tokens \(1, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            theirs.generate(prompt, **({"max_new_tokens": 2} | how))
    neutral = {"num_beams": 1, "use_cache": True, "top_k": 0, "repetition_penalty": 1.0, "output_scores": False}
    assert torch.equal(theirs.generate(prompt, max_new_tokens=2, **neutral), theirs.generate(prompt, max_new_tokens=2))
    from train.hf.generation_kvfrontier_shipped import NEUTRAL_VALUES

    assert torch.equal(
        theirs.generate(prompt, max_new_tokens=2, **NEUTRAL_VALUES), theirs.generate(prompt, max_new_tokens=2)
    )
    for how in ({"inputs_embeds": torch.ones(1, 4, 32)}, {"output_attentions": True}):
        with pytest.raises(ValueError, match=f"takes no {next(iter(how))}"):
            theirs(prompt, **how)
    with pytest.raises(ValueError, match="-4 tokens to generate; give max_new_tokens"):
        theirs.generate(prompt)
    with pytest.raises(ValueError, match="give input_ids"):
        theirs.generate(max_new_tokens=2)
    with pytest.raises(ValueError, match="forward keeps no cache"):
        theirs(prompt, use_cache=True)
    with pytest.raises(TypeError, match="past_key_values"):
        theirs(prompt, past_key_values=None)


def test_a_first_block_that_is_not_predicted() -> None:
    """Uniform logits and no loss there; all but the first token where a trained pad fills it."""
    ours, theirs = pair("block_unpredicted")
    length, text = ours.plan.block_length, tokens(2, 12)
    with torch.no_grad():
        out = theirs(text, labels=text)
        assert not out.logits[:, : length - 1].any()
        assert out.logits[:, length - 1 :].any(dim=-1).all()
        said = F.cross_entropy(ours(text).flatten(0, 1), text[:, length:].flatten())
        torch.testing.assert_close(out.loss.double(), said, rtol=0, atol=1e-5)
        assert not theirs(text[:, : length - 1]).logits.any()
        short = text[:, : length - 2]
        with pytest.raises(ValueError, match=f"a prompt has {length - 2} tokens, less than a block of {length}"):
            theirs.generate(short, max_new_tokens=3)

        filled = pair("block_unpredicted", block_pad_token=5)[1]
        rows = F.pad(text, (length - 1, 1), value=5)
        real = torch.arange(rows.shape[1]).expand_as(rows) >= length - 1
        torch.testing.assert_close(filled(text).logits, ours(rows, segment_ids_BT=real.long() - 1), rtol=0, atol=1e-12)
        expected = generate(ours, short.tolist(), 3, pad_token=5)
        assert filled.generate(short, max_new_tokens=3)[:, short.shape[1] :].tolist() == expected
        out = filled(text, labels=text)
        said = F.cross_entropy(ours(rows, segment_ids_BT=real.long() - 1)[:, :-1].flatten(0, 1), text[:, 1:].flatten())
        torch.testing.assert_close(out.loss.double(), said, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="block_pad_token is 61; it is no token of 61"):
        KVFrontierShippedConfig(**(to_hf_config(ours.config) | {"block_pad_token": 61}))


@pytest.mark.parametrize("name", ["block", "bct_mixed", "neox"])
def test_it_trains_as_ours_does(name: str) -> None:
    """Gradients of the loss, left padding included; and weights that are not loaded are drawn as ours are."""
    ours, theirs = (copy.deepcopy(model).train() for model in pair(name))
    prompts, rows, mask = ragged([8, 12])
    theirs(rows, attention_mask=mask, labels=rows.masked_fill(mask == 0, -100)).loss.backward()
    parts = []
    for prompt in prompts:
        text = torch.tensor([prompt])
        logits = ours(text)[:, 1:] if isinstance(ours, BlockTransformer) else ours(text[:, :-1])
        parts.append(F.cross_entropy(logits[0].float(), text[0, 1:], reduction="sum"))
    (sum(parts) / sum(len(prompt) - 1 for prompt in prompts)).backward()
    for (key, parameter), other in zip(ours.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(
            other.grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}"
        )
    ours.init_weights()
    fresh = KVFrontierShippedForCausalLM(theirs.config)
    for (key, parameter), other in zip(ours.named_parameters(), fresh.model.parameters(), strict=True):
        assert other.std().item() == pytest.approx(parameter.std().item(), rel=0.25), key
        assert other.mean().item() == pytest.approx(parameter.mean().item(), abs=0.1), key


def test_the_loss_counts_what_a_row_alone_counts() -> None:
    """Padding on the left or the right, each ignored by its label: the mean over the predictions of the rows alone.

    Nothing comes before a row's first token. A stock class counts there what it predicts from the padding."""
    _, theirs = pair("bct")
    prompts, rows, mask = ragged([5, 9])
    alone = [theirs(torch.tensor([prompt]), labels=torch.tensor([prompt])).loss for prompt in prompts]
    expected = (4 * alone[0] + 8 * alone[1]) / 12
    right = torch.tensor([prompts[0] + [7] * 4, prompts[1]])
    for text, keep in ((rows, mask), (right, torch.stack([mask[0].flip(0), mask[1]]))):
        loss = theirs(text, attention_mask=keep, labels=text.masked_fill(keep == 0, -100)).loss
        torch.testing.assert_close(loss, expected)


def test_trainer_passes_the_number_of_labels() -> None:
    """That of all micro-batches of a step, over which the loss is then a sum. Without the attribute, transformers'
    Trainer would look for `**kwargs` of forward."""
    _, theirs = pair("bct")
    assert theirs.accepts_loss_kwargs
    row = torch.arange(1, 9).unsqueeze(0)
    losses = [theirs(row, labels=row, num_items_in_batch=number).loss for number in (None, 14)]
    torch.testing.assert_close(losses[1], losses[0] * 7 / 14)


class Streamer:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


@pytest.mark.parametrize("name", ["bct", "block"])
def test_tokens_are_streamed_and_criteria_asked_as_they_are_made(name: str) -> None:
    _, theirs = pair(name)
    prompt, streamer = tokens(1, 6), Streamer()
    text = theirs.generate(prompt, max_new_tokens=5, streamer=streamer)
    assert streamer.seen == [prompt.tolist(), *([token] for token in text[0, 6:].tolist()), "end"]
    asked: list[int] = []

    def criterion(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        asked.append(ids.shape[1])
        return torch.tensor([ids.shape[1] >= 7, ids.shape[1] >= 8])

    rows = tokens(2, 6)
    text = theirs.generate(rows, max_new_tokens=9, stopping_criteria=[criterion], pad_token_id=60)
    assert asked == [7, 8]
    whole = theirs.generate(rows, max_new_tokens=2)
    assert text.tolist() == [[*whole[0, :7].tolist(), 60], whole[1].tolist()]


def test_stop_strings_and_choices_of_a_token(corpus: Path) -> None:
    _, theirs = pair("neox")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(corpus / "tokenizer.json"))
    prompt = tokens(1, 6)
    free = theirs.generate(prompt, max_new_tokens=6)
    word = tokenizer.decode(free[0, 8:9])
    first = next(end for end in range(7, 13) if word in tokenizer.decode(free[0, 6:end]))
    stopped = theirs.generate(prompt, max_new_tokens=6, stop_strings=[word], tokenizer=tokenizer)
    assert stopped.tolist() == free[:, :first].tolist()
    for how in ({"top_k": 1}, {"min_p": 1.0}, {"top_k": 5, "top_p": 1e-9}):
        assert torch.equal(theirs.generate(prompt, max_new_tokens=6, do_sample=True, **how), free)
    assert torch.equal(theirs.generate(prompt, max_new_tokens=6, prefill_chunk_size=2), free)


@pytest.mark.parametrize("name", ["bct", "block", "block_unpredicted"])
def test_hidden_states(name: str) -> None:
    """One more than layers, the last of which the output matrix takes; of padded rows those of the rows alone."""
    _, theirs = pair(name)
    prompts, rows, mask = ragged([5, 9])
    with torch.no_grad():
        padded = theirs(rows, attention_mask=mask, output_hidden_states=True)
        assert len(padded.hidden_states) == len(theirs.decoder.layers) + 1
        assert torch.equal(padded.hidden_states[-1] @ theirs.model.output_weight.T, padded.logits)
        for row, prompt in enumerate(prompts):
            alone = theirs(torch.tensor([prompt]), output_hidden_states=True).hidden_states
            for both in zip(padded.hidden_states, alone, strict=True):
                torch.testing.assert_close(both[0][row, -len(prompt) :], both[1][0], rtol=0, atol=1e-12)
    if name == "bct":
        embedded = theirs.get_input_embeddings()(torch.tensor(prompts[1]))
        assert torch.equal(padded.hidden_states[0][1], embedded)
    assert theirs(rows).hidden_states is None
    configured = copy.deepcopy(theirs)
    configured.config.output_hidden_states = True
    assert len(configured(rows).hidden_states) == len(padded.hidden_states)


class Adapter(torch.nn.Module):
    """A linear module with a low-rank term beside it, as LoRA puts in its place."""

    def __init__(self, base: torch.nn.Module):
        super().__init__()
        self.base_layer, (rows, columns) = base, base.weight.shape
        self.lora_A, self.lora_B = (torch.nn.Parameter(torch.randn(*s).double() / 9) for s in ((2, columns), (rows, 2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + x @ self.lora_A.T @ self.lora_B.T


def adapted(model: Any, *names: str) -> Any:
    model = copy.deepcopy(model).requires_grad_(False)
    for path, module in list(model.named_modules()):
        if path.endswith(names):
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, Adapter(module))
    return model


@pytest.mark.parametrize("name", ["bct", "block", "latents"])
def test_adapters_train_and_generate(name: str) -> None:
    """Called as peft calls a model; with recomputed layers the same gradients; what would be left out is refused."""
    _, theirs = pair(name)
    model, batch = adapted(theirs, "q_proj", "o_proj").train(), tokens(2, 12)
    how = {"inputs_embeds": None, "output_attentions": None, "output_hidden_states": None, "return_dict": None}
    found = []
    for recomputed in (False, True):
        if recomputed:
            model.gradient_checkpointing_enable()
            assert all(stack.activation_checkpointing for stack in model.model.stacks)
        model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch, **how).loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
        model.zero_grad(set_to_none=True)
    assert found[0] and all(
        gradient.abs().max() > 0 and torch.equal(found[1][k], gradient) for k, gradient in found[0].items()
    )
    model.gradient_checkpointing_disable()
    assert not any(stack.activation_checkpointing for stack in model.model.stacks)
    text = model.eval().generate(batch, max_new_tokens=3)
    assert torch.equal(text[:, 12:13], model(batch).logits[:, -1:].argmax(-1))
    with pytest.raises(ValueError, match=r"adapters on .* would be left out"):
        adapted(theirs, "kv_up_proj" if name == "latents" else "slot_keys" if name == "bct" else "token_decoder.embed")(
            batch
        )


@pytest.mark.parametrize("name", ["bct", "block", "neox"])
def test_embeddings_are_found_and_keep_their_size(name: str) -> None:
    """Among the modules, where peft looks for them; tied ones are one."""
    _, theirs = pair(name)
    first, last = theirs.get_input_embeddings(), theirs.get_output_embeddings()
    assert {first, last} <= set(theirs.modules())
    assert (first is last) == theirs.config.tie_word_embeddings
    assert last.weight is theirs.model.output_weight
    assert theirs.resize_token_embeddings(61) is first
    with pytest.raises(ValueError, match="has 61 tokens, part of its size, and cannot be resized to 70"):
        theirs.resize_token_embeddings(70)


def exported(name: str, folder: Path, corpus: Path, out: str = "out", console: Console = QUIET, **options: Any) -> Path:
    """A process takes the code of folders of one name to be one: who changes it gives another `out`."""
    layout, changes = LAYOUTS[name]
    checkpoint = write_checkpoint(folder / "step-00000003", layout, **({"num_layers": 3} | changes))
    export(ExportConfig(str(checkpoint), str(folder / out), prepared=str(corpus), **options), console)
    return folder / out


def test_a_name_of_which_transformers_warns_is_said_once(tmp_path: Path, corpus: Path) -> None:
    for out, notes in (("a name", 1), ("v1.0-name", 0)):
        console = Console(file=io.StringIO(), width=140)
        exported("latents", tmp_path / out, corpus, out, console, verify=False)
        assert console.file.getvalue().count("warns of ' ' in it") == notes


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ARCHS])
def test_layouts_that_no_file_has_are_verified(
    name: str, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of configs/arch: test_train_export.py."""
    monkeypatch.setattr(train.hub.verify, "fresh_process", in_process)
    monkeypatch.setattr(train.hub.verify, "NUM_NEW_TOKENS", 5)
    folder = exported(name, tmp_path, corpus)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "kvfrontier_shipped"


def test_it_is_the_code_in_the_folder_that_is_verified(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that allocates a position too many, one that looks a position too far: each is found, by what it did."""
    monkeypatch.setattr(train.hub.verify, "fresh_process", in_process)
    write = train.hub.exporter.write

    def differing(file: str, old: str, new: str) -> str:
        def wrong(request: Any, *rest: Any) -> None:
            write(request, *rest)
            code = (request.partial / file).read_text()
            assert old in code
            (request.partial / file).write_text(code.replace(old, new))

        monkeypatch.setattr(train.hub.exporter, "write", wrong)
        with pytest.raises(TrainingError, match="is not the model that was trained") as error:
            exported("latents", tmp_path / file, corpus, f"wrong_{file}")
        return str(error.value)

    message = differing("generation.py", "+ max_new_tokens - 1\n", "+ max_new_tokens\n")
    assert re.findall(r"^(bytes|greedy|logits)", message, re.MULTILINE) == ["bytes", "bytes"]
    before = "self._states(input_ids, with_hidden)\n"
    after = before.replace("input_ids", "input_ids.flip(1)")
    assert "logits in fp32" in differing("modeling_kvfrontier_shipped.py", before, after)


def test_the_folder(tmp_path: Path, corpus: Path) -> None:
    """Its files are all that its code needs; saved again and imported back it is the same model. In a process with
    nothing of ours on its path: test_train_hf_decoder.py."""
    folder = exported("bct_mixed", tmp_path, corpus, verify=False)
    assert f"Needs `transformers` {TRANSFORMERS_FLOOR} or later and `einops`." in (folder / "README.md").read_text()
    code = {path.name for path in folder.glob("*.py")}
    needed = set(FILES)
    for name in FILES:
        needed |= {Path(path).name for path in get_relative_import_files(folder / name)}
    assert code == needed
    assert not code & {"convert.py", "convert_formats.py", "footprint.py"}
    for name in code:
        assert set(get_imports(folder / name)) <= {"torch", "transformers", "einops"} | sys.stdlib_module_names
        if name not in FILES:
            arch = Path(import_hf.__file__).parents[1] / "arch"
            assert (folder / name).read_bytes() == (arch / name).read_bytes()
    assert "einops" in get_imports(folder / FILES[1])  # of this file alone transformers says what is not installed

    how = {"trust_remote_code": True, "local_files_only": True}
    text = tokens(2, 11)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", **how).eval()
    base = transformers.AutoModel.from_pretrained(tmp_path / "again", **how).eval()
    with torch.no_grad():
        logits = model(text).logits
        assert torch.equal(again(text).logits, logits)
        assert torch.equal(base(text).last_hidden_state @ model.model.output_weight.T, logits)

    for number, path in enumerate((folder, tmp_path / "again")):
        out = tmp_path / f"ours{number}"
        launch_in_process(
            import_hf.main, "import_hf", ImportConfig, import_hf.rename_from_flag([f"from={path}", f"out={out}"])
        )
        (shard,) = out.glob("*.safetensors")
        trained = CheckpointReader(tmp_path / "step-00000003")
        for key, tensor in load_file(shard).items():
            assert torch.equal(tensor, trained.get(key.removeprefix("model.")))
        assert CheckpointReader(out).model() == trained.model()


def test_a_config_is_what_it_says() -> None:
    """Nonsense is refused in words, by the importer and by transformers' class."""
    hf = to_hf_config(small("block"))
    assert from_hf_config(json.loads(json.dumps(hf))) == small("block")
    pattern, odd = hf["arch"] | {"pattern": ["new kv x999999999"]}, hf["arch"] | {"pattern": ["new other"]}
    for changes, message in (
        ({"size": None}, "size is missing"),
        ({"vocab_size": 60}, "vocab_size is 60"),
        ({"arch": odd}, "arch.stores.kv is in no item|no store"),
        ({"size": hf["size"] | {"more": 1}}, "SizeConfig has no more"),
        ({"size": hf["size"] | {"d_model": "x"}}, "SizeConfig.d_model is 'x'"),
    ):
        with pytest.raises((UnsupportedModelError, LayoutError), match=message):
            read_config(hf | changes)
        if changes != {"size": None}:
            with pytest.raises(ValueError, match=r"size|arch|SizeConfig"):
                KVFrontierShippedConfig(**(hf | changes))
    with pytest.raises(UnsupportedModelError, match="repeats an item more than"):
        read_config(hf | {"arch": pattern})
    wide = {"size": hf["size"] | {"d_ff": 2**24, "d_model": 2**20}, "intermediate_size": 2**24, "hidden_size": 2**20}
    with pytest.raises(UnsupportedModelError, match=r"a model of .* parameters"):
        read_config(hf | wide)
    wide = {"size": hf["size"] | {"d_ff": 10**30}, "intermediate_size": 10**30}
    with pytest.raises(LayoutError, match=r"size.d_ff is 10{30}; it must be at most"):
        read_config(hf | wide)
    for key in ("arch", "size"):
        for inner in hf[key]:
            for value in (None, "x", -1, 0, 1.5, [], ["x"], {}, 10**30, float("nan")):
                if inner == "num_layers" and value == 10**30:
                    continue
                try:
                    resolve(read_config(hf | {key: hf[key] | {inner: value}}).config)
                except (UnsupportedModelError, LayoutError) as error:
                    assert str(error)


@pytest.mark.parametrize("name", ["block_unpredicted", "bct"])
def test_lm_eval_scores_the_object(name: str, tmp_path: Path, corpus: Path) -> None:
    """Its stock HFLM: log-likelihoods and greedy text are those of our own model, batches ragged."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -c constraints.txt -e '.[eval]'")
    pytest.importorskip("accelerate", reason="lm_eval's hf model needs accelerate")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = exported(name, tmp_path, corpus, verify=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=32)
    pairs = [(f"def function_{n}(x):\n    return x", f" * {n}") for n in (1, 23, 456)]

    def asked(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
        return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]

    scores = lm.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
    ours = build(CheckpointReader(tmp_path / "step-00000003").model()[0], torch.float32)
    ours.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        for (context, answer), (score, _) in zip(pairs, scores, strict=True):
            start, ids = len(tokenizer(context)["input_ids"]), tokenizer(context + answer)["input_ids"]
            said = train.hub.verify.next_logits(ours, ids[:-1]).log_softmax(-1)
            first = ours.plan.min_prompt - 1
            expected = sum(said[place - 1 - first, ids[place]].item() for place in range(start, len(ids)))
            assert score == pytest.approx(expected, abs=1e-4)
        options = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
        texts = lm.generate_until(
            asked("generate_until", [(context, options) for context, _ in pairs]), disable_tqdm=True
        )
    for (context, _), text in zip(pairs, texts, strict=True):
        said = continued(ours, [tokenizer(context)["input_ids"]], 6, stop_token=tokenizer.eos_token_id)[0]
        assert text == re.split("\n", tokenizer.decode(said))[0]


def test_it_is_the_last_resort() -> None:
    for name, (layout, changes) in LAYOUTS.items():
        config = small(layout, **changes)
        target, passed = select_target(config, resolve(config))
        assert (target.name, list(passed)) == ("shipped", ["stock", "remote"]), name
    config = small("gqa2")
    assert select_target(config, resolve(config), "shipped")[0].name == "shipped"
