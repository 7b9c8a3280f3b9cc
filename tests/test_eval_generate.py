"""`eval/generate.py`: text that appears as its tokens come, and what is said at the end."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, normalizers

from data.cli import UsageError
from data.tokenizer import byte_tokenizer
from eval.console import visible
from eval.generate import Stream, main, read_prompts
from train import load
from train.loading import Text


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "tests" / "golden" / "old", tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def fallback_tokenizer() -> Tokenizer:
    """A tokenizer that spells characters it does not know in bytes, and begins a text with a blank, as Llama 2's."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "b": 258, "</s>": 259}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTES, FALLBACK = Text(byte_tokenizer(), 256), Text(fallback_tokenizer(), 259)


def parts(
    text: str, stops: tuple[str, ...] = (), tokenizer: Text = BYTES, prompt: str = "é"
) -> tuple[list[str], Stream]:
    """What a stream shows after each token of `text`, and at the end."""
    before, tokens = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
    assert tokens[: len(before)] == before and tokenizer.decode(tokens) == prompt + text
    stream = Stream(tokenizer, before, stops)
    shown = []
    for token in tokens[len(before) :]:
        shown.append(stream.add(token))
        if stream.done:
            break
    return [*shown, stream.end()], stream


def test_characters_appear_whole() -> None:
    shown, _ = parts("aä€😀 z")
    assert shown == ["a", "", "ä", "", "", "€", "", "", "", "😀", " ", "z", ""]


@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK])
@pytest.mark.parametrize("prompt", ["é", "መመመመመ", "a", "a "])
def test_long_texts(tokenizer: Text, prompt: str) -> None:
    """Each character appears with its last byte, also amid a run of bytes, and what is shown is not decoded again."""
    text = "".join(random.Random(0).choices("ab ä€😀መ\n", k=100)) + "መ" * 40
    shown, stream = parts(text, (), tokenizer, prompt)
    assert "".join(shown) == stream.shown == text and list(filter(None, shown)) == list(text)
    assert not stream.tokens and len(stream.context) == 3


def test_broken_bytes_are_shown_at_the_end() -> None:
    stream = Stream(BYTES, [], ())
    assert [stream.add(0xE2), stream.add(0x82)] == ["", ""]
    assert stream.end() == "\ufffd"
    stream = Stream(FALLBACK, FALLBACK.encode("መ"), ())
    assert [stream.add(token) for token in (*"€".encode(), 0xE2, 257)] == ["", "", "€", "", "\ufffda"]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one\n\ntwo", ("\n\n",), "one"),
        ("one\ntwo", ("\n\n",), "one\ntwo"),
        ("abcabd", ("abd", "zz"), "abc"),
        ("stop", ("stop",), ""),
        ("almost sto", ("stop",), "almost sto"),
        ("x€y", ("€",), "x"),
        ("መ€y", ("መ€",), ""),
        ("መ😀y", ("መ€",), "መ😀y"),
        ("መ" * 40 + "€" + "መ" * 40, ("€መ",), "መ" * 40),
    ],
)
@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK])
def test_stops(text: str, stops: tuple[str, ...], expected: str, tokenizer: Text) -> None:
    """Nothing of a stop is ever shown, and what might have become one is shown as soon as it has not."""
    shown, stream = parts(text, stops, tokenizer)
    assert "".join(shown) == stream.shown == expected
    for number in range(len(shown)):
        assert expected.startswith("".join(shown[:number]))


def test_prompts_are_read_as_they_are(tmp_path: Path) -> None:
    """Line ends are part of a row, and none of a line of text."""
    prompts = ["def f():\n", "\n\n", "", " x\r\n"]
    rows, text = tmp_path / "prompts.jsonl", tmp_path / "prompts"
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    assert read_prompts(rows) == prompts
    text.write_bytes("".join(prompts).encode())
    assert read_prompts(text) == ["def f():", " x"]


@pytest.mark.parametrize("run", ["run-mixattention", "run-block"])
def test_the_command(run: str, old: Path, capsys: pytest.CaptureFixture) -> None:
    """Greedy and sampled, one prompt and several of different lengths: the text of `load(run).generate`."""
    prompts, loaded = ["def f(x):", "import os, sys and naïve", "class"], load(run)
    capsys.readouterr()

    def shown(*words: str) -> str:
        main([f"checkpoint={run}", "device=cpu", *words])
        return capsys.readouterr().out

    text = visible(prompts[0] + loaded.generate(prompts[0], 12))
    for steps in ("auto", "static"):
        assert shown(f"prompt={prompts[0]}", "max_new_tokens=12", f"steps={steps}", "quiet=true") == f"{text}\n"
    options = {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.001, "seed": 3}
    words = [f"{key}={value}" for key, value in options.items()]
    expected = loaded.generate(prompts, 12, **options)
    (old / "prompts.txt").write_bytes("\r\n\r\n".join(prompts[1:]).encode())
    out = shown(f"prompt={prompts[0]}", "prompts=prompts.txt", "max_new_tokens=12", *words)
    texts = [visible(prompt + more) for prompt, more in zip(prompts, expected, strict=True)]
    assert out == "\n".join(f"[{number}] {text}\n" for number, text in enumerate(texts, start=1))
    words = ["max_new_tokens=12", "stop=e, "]
    assert " " not in shown(f"prompt={prompts[0]}", *words, "quiet=true").removeprefix(prompts[0])
    at_once = shown(f"prompt={prompts[0]}", "prompts=prompts.txt", *words)
    for rows in (1, 2):
        assert shown(f"prompt={prompts[0]}", "prompts=prompts.txt", f"max_batch={rows}", *words) == at_once


def test_speed_and_cache_are_said(old: Path, capsys: pytest.CaptureFixture) -> None:
    main(["checkpoint=run-mixattention", "prompt=import", "max_new_tokens=9", "device=cpu"])
    line = capsys.readouterr().err
    model, tokenizer = load("run-mixattention")
    size = model.allocate_cache(1, len(tokenizer.encode("import")) + 8).nbytes
    assert re.search(
        rf"9 tokens, the first after [\d,]+ ms, then [\d,.]+ tokens/s on cpu; cache .*\({size:,} bytes\)", line
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["checkpoint="], "cannot read 'checkpoint='"),
        (["max_new_tokens=0"], "max_new_tokens is 0"),
        (["temperature=-1"], "temperature is -1.0; it must be at least 0"),
        (["top_p=2"], "top_p is 2.0; it must be from 0 to 1"),
        (["top_k=0"], "top_k is 0"),
        (["max_batch=0"], "max_batch is 0; it must be at least 1, or null"),
        (["max_batch=1", "prompt=x", "prompt=y", "cache=int8"], "takes no prompts later on, and there are 2"),
        (["prompts=nowhere"], "there is no such file"),
        (["dtype=fp8"], "choose auto, fp32"),
        (["steps=fast"], "steps is 'fast'; choose auto, plain, static, compiled, graph"),
        (["steps=graph", "device=cpu"], "steps=graph needs a model on CUDA"),
        (["steps=static", "cache=int4"], "steps=static with cache=int4: such a cache takes plain steps"),
        (["promt=x"], "did you mean prompt?"),
    ],
)
def test_mistakes(words: list[str], message: str, old: Path) -> None:
    with pytest.raises(UsageError) as caught:
        main(["checkpoint=run-block", *words])
    assert message in str(caught.value)
