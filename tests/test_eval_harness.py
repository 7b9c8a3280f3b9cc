"""lm-eval over our models: what needs no lm-eval; and, where it is installed, the same scores as its `hf` model."""

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build, small
from conversions import to_hf
from oracles import Oracle, nothing, subject, tokenizers_of_all_kinds
from test_arch_convert import exported, stock

from arch.named import load_arch
from data.cli import UsageError
from eval.evaluations import entry
from eval.figures import axis
from eval.runs import Run
from eval.tasks import select_tasks
from eval.tasks.harness import Options, by_prefix, result, run, window_of
from eval.tasks.words import NOUNS

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not INSTALLED, reason='lm-eval is not installed: pip install -e ".[eval]"')
CONTEXT = 48  # tokens, less than some questions and texts below have
WORDS = tuple(NOUNS[:16])


def test_requests_of_one_prefix_are_together() -> None:
    assert by_prefix([]) == []
    assert by_prefix([(1, 2), (1,), (1, 2), (3,), (1,)]) == [[0, 2], [1, 4], [3]]


def test_the_window_of_a_request_ends_with_its_continuation() -> None:
    """Of the window's tokens all but the last are inputs, of which the model takes `most`."""
    assert window_of([1, 2, 3], [4, 5], 10) == (1, 2, 3)
    assert window_of([1, 2, 3], [4, 5], 3) == (2, 3)
    assert window_of([1, 2, 3], [4, 5, 6], 3) == (3,)
    for prefix, rest, most in (([1, 2], [4, 5, 6], 2), ([], [1], 8), ([1], [], 8)):
        with pytest.raises(UsageError, match="a prefix of"):
            window_of(prefix, rest, most)


def test_figures_are_of_tasks_and_metrics() -> None:
    scores = {"alias": "b", "acc,none": 0.25, "acc_stderr,none": 0.1, "exact_match,strict": 1.0, "ppl,none": 17.5}
    better = {"a": {}, "b": {"acc": True, "exact_match": False, "ppl": None}}
    results = {"results": {"b": scores, "a": {"alias": "a"}}, "n-samples": {"b": {"effective": 8}}, "version": "1"}
    found = result({**results, "higher_is_better": better})
    recorded = Run(Path())
    recorded.__dict__["summary"] = {"evaluations": {"lm-eval": entry(found, 1, "")}}
    for name, larger in (("acc", True), ("exact_match@strict", False), ("ppl", False)):
        assert axis(f"lm-eval/b/{name}", 8, [recorded]).larger is larger
    assert axis("lm-eval/b/exact_match@strict", 8).larger, "of a summary that says nothing of it"
    assert found.figures == {"b/acc": 0.25, "b/exact_match@strict": 1.0, "b/ppl": 17.5}
    (acc, match, ppl) = found.rows
    assert (acc["low"], acc["high"], acc["count"]) == (
        pytest.approx(0.0715, abs=1e-3),
        pytest.approx(0.5907, abs=1e-3),
        8,
    )
    assert match["high"] == 1.0
    assert (ppl["low"], ppl["high"]) == (None, None)


def test_options_of_a_task_of_lm_eval(tmp_path: Path) -> None:
    words = [f"lm_eval.include_path={tmp_path}", "lm_eval.limit=3"]
    (chosen,) = select_tasks(["lm-eval:a", "lm-eval:b"], words)
    assert chosen.options == Options(names=("a", "b"), include_path=str(tmp_path), limit=3)
    with pytest.raises(UsageError, match=r"lm_eval\.limit is 0.*\nlm_eval\.include_path is .*none, which is no folder"):
        select_tasks(["lm-eval:a"], [f"lm_eval.include_path={tmp_path}/none", "lm_eval.limit=0"])


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_lm_eval_the_extra_is_named() -> None:
    with pytest.raises(UsageError, match=r'pip install -c constraints.txt -e "\.\[eval\]"'):
        run(subject(Oracle(nothing, 300)), Options(names=("hellaswag",)))


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of each kind of request, with questions that fit into the context and others that do not."""
    path, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)
    rows = [
        {
            "question": text(rng, rng.choice((3, 9, 60))),
            "choices": [text(rng, rng.randint(1, 4)) for _ in range(4)],
            "answer": rng.randrange(4),
            "text": text(rng, rng.choice((1, 20, 120))),
        }
        for _ in range(12)
    ]
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path / "rows.jsonl"}}}}}
test_split: test
"""
    (path / "choice.yaml").write_text(f"""{common}
task: unit_choice
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    (path / "rolling.yaml").write_text(f"""{common}
task: unit_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
""")
    (path / "cloze.yaml").write_text(f"""{common}
task: unit_cloze
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{choices[0]}}}}"
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
""")
    (path / "written.yaml").write_text(f"""{common}
task: unit_written
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["q", " t"], max_gen_toks: 9}}
metric_list: [{{metric: exact_match}}]
""")
    return path


TASKS = ("unit_choice", "unit_rolling", "unit_cloze", "unit_written")


@needs_lm_eval
@pytest.mark.parametrize("whose", ["ours", "of transformers, with a begin of text"])
def test_scores_are_those_of_lm_evals_own_model(whose: str, folder: Path, tmp_path: Path) -> None:
    """The same weights as a stock class: every likelihood and text, and all metrics to the digits that are shown."""
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    from eval.tasks.harness_model import SubjectLM
    from eval.transformers_model import TransformersModel, TransformersTokenizer

    model, hf = exported("gqa4", vocab_size=500, seq_len=CONTEXT)
    text_tokenizer = tokenizers_of_all_kinds()["bpe"]
    fast = Tokenizer.from_str(text_tokenizer.tokenizer.to_str())
    special = {"eos_token": "<|endoftext|>"}
    if whose != "ours":
        special["bos_token"] = "!"
        fast.post_processor = TemplateProcessing(single="! $A", special_tokens=[("!", fast.token_to_id("!"))])
    theirs = HFLM(
        pretrained=stock(hf, to_hf("stock", model.config, model.state_dict()), tmp_path),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=fast, **special),
        batch_size=3,
    )
    assert theirs.max_length == CONTEXT
    given = subject(model, text_tokenizer, context=CONTEXT)
    if whose != "ours":
        given = subject(TransformersModel(theirs.model), TransformersTokenizer(theirs.tokenizer), context=CONTEXT)
        assert theirs.tok_encode("stone")[0] == given.tokenizer.begin
    ours = SubjectLM(given, batch=3)
    rng = random.Random(1)
    questions = [text(rng, n) for n in (1, 2, 5, 30, 70)] + [""]
    pairs = [(question, f" {text(rng, n)}") for question in questions for n in (1, 2, 6)]
    pairs += [("the quiet ", "heron"), (questions[2], pairs[6][1]), ("alone", " on the hill"), ("!so", " it is")]

    def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
        return [Instance(request_type=kind, doc={}, arguments=args, idx=0) for args in arguments]

    scored = [lm.loglikelihood(requests("loglikelihood", pairs)) for lm in (ours, theirs)]
    assert [greedy for _, greedy in scored[0]] == [greedy for _, greedy in scored[1]]
    assert [nats for nats, _ in scored[0]] == pytest.approx([nats for nats, _ in scored[1]], rel=1e-6, abs=1e-5)
    texts = [(text(rng, n),) for n in (1, 10, 50, 200)]
    rolled = [lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for lm in (ours, theirs)]
    assert rolled[0] == pytest.approx(rolled[1], rel=1e-6)
    options = [{"until": ["q", " t"], "max_gen_toks": 12}, {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}]
    asked = [(question, dict(option)) for question in questions[:5] for option in options]
    written = [lm.generate_until(requests("generate_until", asked)) for lm in (ours, theirs)]
    assert written[0] == written[1]
    assert len(set(written[0])) > 3

    found = run(given, Options(names=TASKS, include_path=str(folder), batch=3))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    expected = lm_eval.simple_evaluate(theirs, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)["results"]
    assert set(found.figures) == {
        *(f"unit_choice/{name}" for name in ("acc", "acc_norm")),
        *(f"unit_rolling/{name}" for name in ("word_perplexity", "bits_per_byte")),
        *(f"unit_cloze/{name}" for name in ("perplexity", "acc")),
        "unit_written/exact_match",
    }
    for name, value in found.figures.items():
        task, metric = name.split("/")
        assert f"{value:.5g}" == f"{expected[task][f'{metric},none']:.5g}", name
    assert 0 < found.figures["unit_choice/acc"] < 1
    assert {row["count"] for row in found.rows} == {12}
    with pytest.raises(UsageError, match="no task unit_choise, did you mean unit_choice"):
        run(given, Options(names=("unit_choise",), include_path=str(folder)))


@needs_lm_eval
@pytest.mark.parametrize("arch", ["mixattention", "bct", "block", "later"])
def test_every_layout_is_scored(arch: str, folder: Path) -> None:
    """Those of no stock class, too: metrics of choices are those of likelihoods without a cache."""
    layout = load_arch("block" if arch == "later" else arch)
    if arch == "later":
        layout.block.start = False
    model = build(small(layout, num_layers=4, vocab_size=500), torch.float32)
    given = subject(model, tokenizers_of_all_kinds()["bpe"], context=CONTEXT)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    found = run(given, Options(names=TASKS, include_path=str(folder), limit=5))
    assert len(found.figures) == 7
    assert {row["count"] for row in found.rows} == {5}
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    assert after[:2] == state[:2] and after[2].equal(state[2]), "training goes on with its own random numbers"
