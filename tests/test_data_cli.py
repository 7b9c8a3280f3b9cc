"""Command lines typed by a dataclass."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from data.cli import UsageError, fail, parse


@dataclass(frozen=True)
class Options:
    """Options.

    steps  optimizer steps
    """

    folders: tuple[str, ...] = ()
    steps: int = 3
    rate: float | None = None
    toy: bool = False
    lengths: tuple[int, ...] = (1, 2)
    out: Path | None = None
    name: str = "x"
    texts: tuple[Path, ...] = ()


def test_values_have_the_types_of_their_fields() -> None:
    words = ["a", "steps=5", "rate=1e-3", "toy=true", "lengths=4,5", "out=b/c", "name=y=z", "d*"]
    assert parse(Options, words, "folders") == Options(("a", "d*"), 5, 1e-3, True, (4, 5), Path("b/c"), "y=z")
    assert parse(Options, ["rate=null", "lengths=[7]"]) == Options(lengths=(7,))
    assert parse(Options, []) == Options()


def test_a_name_with_commas_is_one_file_where_it_is_here(tmp_path: Path) -> None:
    names = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    assert parse(Options, [f"texts={names}"]).texts == (tmp_path / "a", tmp_path / "b")
    (tmp_path / "a, b").touch()
    assert parse(Options, [f"texts={tmp_path / 'a, b'}"]).texts == (tmp_path / "a, b",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stps=5"], "unknown key stps, did you mean steps? The command line has steps, rate, toy, lengths, out, name"),
        (["folders=5"], "unknown key folders"),
        (["steps=many"], "steps is many; it must be a whole number"),
        (["steps=null"], "steps is null; it must be a whole number"),
        (["rate=fast"], "rate is fast; it must be a number, or null"),
        (["toy=yes"], "toy is yes; it must be true or false"),
        (["lengths=1,x"], "lengths is 1,x; it must be a list, with commas; each a whole number"),
        (["steps="], "cannot read 'steps='; write key=value"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(Options, words, "folders")
    assert message in str(caught.value)


def test_an_option_that_is_a_path_too_is_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("steps=5", "rank=1"):
        (tmp_path / name).mkdir()
    with pytest.raises(
        UsageError, match=r"steps=5 is an option and a path that is here; write \./steps=5 for the path"
    ):
        parse(Options, ["steps=5"], "folders")
    assert parse(Options, ["./steps=5", "rank=1"], "folders").folders == ("./steps=5", "rank=1")


def test_words_without_a_key_need_a_field() -> None:
    with pytest.raises(UsageError, match="cannot read 'word'; write key=value, the keys are folders, steps"):
        parse(Options, ["word"])


@pytest.mark.parametrize("words", [["--help"], ["a", "-h"], []])
def test_help(words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(Options, words, "folders")
    assert stopped.value.code is None
    text = capsys.readouterr().out
    for part in (
        "Command lines typed by a dataclass.",
        "steps  optimizer steps",
        "Defaults: steps=3 rate=null toy=false lengths=1,2 out=null name=x texts=",
    ):
        assert part in text


def test_failure(capsys: pytest.CaptureFixture) -> None:
    for message, text in (("a\nb", "error:\na\nb\n"), ("- a", "error: a\n")):
        with pytest.raises(SystemExit) as stopped:
            fail(message)
        assert (stopped.value.code, capsys.readouterr().err) == (2, text)
