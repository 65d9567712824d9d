"""A steered model in the installed lm-eval: the accuracy on a local task is our own scorer's, and for a plan that acts
at every token also that of lm-eval's own Hugging Face model with a hook."""

from __future__ import annotations

import json

import pytest
import torch

import faststeer as fs
from faststeer.evaluate import complete
from faststeer.evaluate.multiple_choice import Question, multiple_choice

lm_eval = pytest.importorskip("lm_eval")

VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(7))
WORDS = ["cake", "kite", "sea", "story", "boat", "passport", "bicycle", "colours"]


@pytest.fixture(scope="module")
def task(tmp_path_factory, monkeypatch_module):
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("task")
    monkeypatch_module.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    questions = [
        Question(f"Tell me a story, the {a}", (f"the {a}", f"{b} and sugar", "what is 12"), i % 3)
        for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS[:3])
    ]
    lines = [{"question": q.question, "choices": list(q.choices), "answer": q.answer} for q in questions]
    (folder / "local.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "local.yaml").write_text(
        "task: faststeer_local\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'local.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
    )
    return questions, TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def evaluate(lm, manager):
    found = lm_eval.simple_evaluate(lm, tasks=["faststeer_local"], task_manager=manager, bootstrap_iters=0)
    results = found["results"]["faststeer_local"]
    return results["acc,none"], results["acc_norm,none"], found["samples"]["faststeer_local"]


@pytest.mark.parametrize("positions", ["last"])
def test_the_same_accuracy_as_our_own_scorer(task, model, plain_tokenizer, positions):
    from faststeer.evaluate.lm_eval import SteeredLM

    questions, manager = task
    plan = fs.Plan([fs.Add(VECTOR, 3.0, layers=1, positions=positions)])
    acc, acc_norm, samples = evaluate(SteeredLM(model, plain_tokenizer, plan, batch_size=7), manager)
    own = multiple_choice(model, plain_tokenizer, questions, plan, chat=False, separator=" ")
    assert own.accuracy.rate == pytest.approx(acc)
    assert own.accuracy_per_character.rate == pytest.approx(acc_norm)
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    for sample, choice in zip(samples, own.choices, strict=True):
        assert [float(r[0][0]) for r in sample["resps"]] == pytest.approx(choice.log_probabilities, abs=1e-3)


def test_the_same_as_lm_evals_own_model_with_a_hook(task, model, plain_tokenizer):
    from lm_eval.models.huggingface import HFLM

    from faststeer.evaluate.lm_eval import SteeredLM

    _, manager = task
    theirs = HFLM(pretrained=model, tokenizer=plain_tokenizer, batch_size=4, max_length=128, device="cpu")
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: output + 3.0 * VECTOR)
    try:
        expected = evaluate(theirs, manager)[:2]
    finally:
        handle.remove()
    plan = fs.Plan([fs.Add(VECTOR, 3.0, layers=1)])
    assert evaluate(SteeredLM(model, plain_tokenizer, plan), manager)[:2] == pytest.approx(expected)
    assert evaluate(SteeredLM(model, plain_tokenizer), manager)[:2] != pytest.approx(expected), (
        "the plan does something"
    )


def request(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_rolling_likelihood_and_generation(model, plain_tokenizer):
    from faststeer.evaluate.lm_eval import SteeredLM

    plan = fs.Plan([fs.Add(VECTOR, 1.0, layers=1)])
    lm = SteeredLM(model, plain_tokenizer, plan, max_length=64)
    (total,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", "Tell me a story")], disable_tqdm=True)
    ids = plain_tokenizer("Tell me a story")["input_ids"]
    with torch.no_grad(), fs.steer(model, plan):
        logits = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    assert total == pytest.approx(float(logits.gather(-1, torch.tensor(ids[1:])[:, None]).sum()), abs=1e-3)
    asked = [
        request("generate_until", "Tell me", {"until": [], "max_gen_toks": 6}),
        request("generate_until", "Bake a cake", {"until": "e", "max_gen_toks": 12, "do_sample": False}),
    ]
    plain_tokenizer_answers = complete(model, plain_tokenizer, ["Tell me", "Bake a cake"], plan, max_new_tokens=12)
    short, stopped = lm.generate_until(asked, disable_tqdm=True)
    assert plain_tokenizer_answers[0].startswith(short)
    assert stopped == plain_tokenizer_answers[1].split("e")[0]
