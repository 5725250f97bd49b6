"""lm-eval on our model: against its own `hf` model on the same weights, on local tasks, with the network cut."""

import json
import os
import random
import socket
import sys

import pytest
import torch
import yaml
from conftest import SMALL, SPECIAL_TOKENS, tiny_reference, write_tiny_tokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from test_tokenizer import LLAMA2, make_llama_json

import lora
from eval import lm_eval_harness
from eval.lm_eval_harness import OnetuneLM, Settings, find_tasks, only_local
from inference.writer import Writer
from shell.cli import UserError
from text.messages import read_messages
from text.prompts import STYLES, encode_prompt, prompt_text
from text.tokenizer import Tokenizer
from weights import peft_format
from weights.checkpoint import load_model

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
KINDS = pytest.mark.parametrize("kind", ["llama", "mistral", "sentencepiece"])
NO_NETWORK = """
import socket
def refuse(*_, **__):
    raise RuntimeError("the network was asked for")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def folder_of(tiny_model_dir, tmp_path_factory):
    """Model folders: tokens without BOS; beyond a window of 7; SentencePiece with BOS and a dummy prefix."""
    folders = {
        "llama": tiny_model_dir,
        **{kind: tmp_path_factory.mktemp(kind) for kind in ("mistral", "sentencepiece")},
    }
    tiny_reference("mistral").save_pretrained(folders["mistral"])
    write_tiny_tokenizer(folders["mistral"])
    make_llama_json(folders["sentencepiece"])
    reference = tiny_reference("llama")
    reference.resize_token_embeddings(32000)
    with torch.no_grad():
        reference.lm_head.weight[:259] = 0  # never said: bytes that are no UTF-8 are decoded in more than one way
    reference.config.bos_token_id, reference.config.eos_token_id = 1, 2
    reference.generation_config.bos_token_id, reference.generation_config.eos_token_id = 1, 2
    reference.save_pretrained(folders["sentencepiece"])
    return folders


@pytest.fixture(scope="session")
def ours_of(folder_of):
    models = {}

    def load(kind):
        if kind not in models:
            models[kind] = OnetuneLM(Writer(folder_of[kind], None, None, "32-true"), 300, 3)
        return models[kind]

    return load


@pytest.fixture(scope="session")
def theirs_of(folder_of):
    from lm_eval.models.huggingface import HFLM

    models = {}

    def load(kind):
        if kind not in models:
            models[kind] = HFLM(pretrained=str(folder_of[kind]), dtype="float32", device="cpu", batch_size=3)
        return models[kind]

    return load


def words(least, most):
    syllables = [a + b for a in "bdfglmnprst" for b in ("a", "e", "i", "o", "u", "an", "er")]
    count = random.randint(least, most)
    return " ".join("".join(random.choices(syllables, k=random.randint(1, 3))) for _ in range(count))


def write_task(folder, name, rows, **config):
    """A task of lm-eval over rows in a file of their own."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": name, "dataset_path": "json", "test_split": "test", "metadata": {"version": 1},
        "dataset_kwargs": {
            "data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache"),
        },
    } | config  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


def metrics(*names):
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


@pytest.fixture
def tasks(tmp_path):
    """A folder of three tasks, shaped as GSM8K, BBQ and WikiText are; some questions are longer than the context."""
    lengths = [(1, 1), (2, 9), (10, 30), (200, 220)]
    write_task(
        tmp_path, "tiny_gsm", [{"question": words(*n), "answer": f"{words(1, 3)}\n#### {n[0]}"} for n in lengths],
        output_type="generate_until", doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_target="{{answer.split('####')[-1].strip()}}", metric_list=metrics("exact_match"),
        generation_kwargs={"until": ["Question:", "ba"], "do_sample": False, "max_gen_toks": 12},
    )  # fmt: skip
    write_task(
        tmp_path, "tiny_bbq",
        [
            {"context": words(*n), "question": words(3, 9), **{f"ans{i}": words(1, 5) for i in range(3)}, "label": 1}
            for n in lengths
        ],
        output_type="multiple_choice", doc_to_text="{{context}} {{question}}", doc_to_target="label",
        doc_to_choice="{{[ans0, ans1, ans2]}}", metric_list=metrics("acc", "acc_norm"),
    )  # fmt: skip
    write_task(
        tmp_path, "tiny_text", [{"text": words(*n)} for n in lengths],
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )  # fmt: skip
    return tmp_path


TASKS = ["tiny_bbq", "tiny_gsm", "tiny_text"]


def asked(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=argument, idx=0) for argument in arguments]


def assert_close(ours, theirs, tolerance=1e-3):
    """Pairs (log-likelihood, greedy)."""
    assert len(ours) == len(theirs)
    for got, right in zip(ours, theirs, strict=True):
        assert got[0] == pytest.approx(right[0], abs=tolerance, rel=1e-5)
        assert got[1] == right[1]


# ---------------------------------------------------------------------------------------------- against `hf` of lm-eval


def evaluate(model, folder, names=TASKS, **options):
    manager = TaskManager(include_path=folder, include_defaults=False)
    return simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True, **options)


def assert_same_results(ours, theirs):
    for name in ours["results"]:
        for metric, value in theirs["results"][name].items():
            right = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert ours["results"][name][metric] == right, (name, metric)
        for got, right in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert got["arguments"] == right["arguments"]
            for a, b in zip(got["resps"], right["resps"], strict=True):
                if isinstance(b[0], str):
                    assert a == b
                else:
                    pairs = [(x, None) if isinstance(x, float) else x for x in (a[0], b[0])]
                    assert_close(pairs[:1], pairs[1:])


@KINDS
def test_the_results_are_those_of_hf(kind, ours_of, theirs_of, tasks):
    """Metrics, every log-likelihood, every text; contexts that are too long, whole texts of several windows."""
    assert_same_results(evaluate(ours_of(kind), tasks), evaluate(theirs_of(kind), tasks))


def test_with_examples_before_the_question(ours_of, theirs_of, tasks):
    names = ["tiny_bbq", "tiny_gsm"]
    ours, theirs = (evaluate(model("llama"), tasks, names, num_fewshot=2) for model in (ours_of, theirs_of))
    assert_same_results(ours, theirs)


@KINDS
def test_spaces_and_empty_contexts(kind, ours_of, theirs_of):
    """Spaces at a context's end go to the continuation; an empty context is BOS, or EOS where there is none."""
    context, end, special = words(5, 9), words(2, 4), SPECIAL_TOKENS[1]
    pairs = [
        (context, " " + end), (context + " ", end), (context + "  ", " " + end), (context, end), ("", end),
        ("", " " + end), (" " + context, " " + end), (context + "\n", "\n" + end), (context + special, end + special),
        (words(250, 260), " " + end), (words(1, 1), " " + words(60, 70)), (context, " "),
    ]  # fmt: skip
    requests = asked("loglikelihood", *pairs)
    ours, theirs = (model(kind).loglikelihood(requests, disable_tqdm=True) for model in (ours_of, theirs_of))
    assert_close(ours, theirs)


def test_a_context_of_spaces_alone(ours_of):
    """lm-eval's own model stops at it: nothing is left when the space has gone to the continuation."""
    blank, empty = ours_of("llama").loglikelihood(asked("loglikelihood", (" ", "ba"), ("", " ba")), disable_tqdm=True)
    assert blank == pytest.approx(empty)


@KINDS
def test_whole_texts(kind, ours_of, theirs_of):
    texts = asked("loglikelihood_rolling", *[(words(n, n),) for n in (1, 3, 40, 300)])
    ours, theirs = (model(kind).loglikelihood_rolling(texts, disable_tqdm=True) for model in (ours_of, theirs_of))
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-3)


@KINDS
def test_answers(kind, ours_of, theirs_of):
    """Stops as text, as list and not at all; EOS written out; prompts beyond what the answer leaves of the context."""
    eos = ours_of(kind).writer.tokenizer.eos_token
    requests = asked(
        "generate_until",
        *[(words(n, n), {"until": ["e", "."], "max_gen_toks": 9}) for n in (1, 7, 3, 250, 20)],
        (words(4, 9), {"until": "a", "max_gen_toks": 9}),
        (words(4, 9), {"until": [eos], "max_gen_toks": 5, "do_sample": False}),
        (words(4, 9), {"max_gen_toks": 30}),
        (words(4, 9), {"until": [], "max_gen_toks": 240}),
        (words(4, 9) + "\n", {"until": [], "max_new_tokens": 1}),
    )
    ours, theirs = (model(kind).generate_until(requests, disable_tqdm=True) for model in (ours_of, theirs_of))
    assert ours == theirs


@pytest.mark.real
def test_the_small_real_model(smollm2_dir, tasks):
    from lm_eval.models.huggingface import HFLM

    write_task(
        tasks, "facts", [{"text": "The capital of France is", "choices": [" Paris", " Rome"], "label": 0}] * 2,
        output_type="multiple_choice", doc_to_text="text", doc_to_target="label", target_delimiter="",
        doc_to_choice="choices", metric_list=metrics("acc"),
    )  # fmt: skip
    ours = OnetuneLM(Writer(smollm2_dir, None, None, "32-true"))
    theirs = HFLM(pretrained=str(smollm2_dir), dtype="float32", device="cpu", batch_size=4)
    results = [evaluate(model, tasks, ["facts", "tiny_gsm"]) for model in (ours, theirs)]
    assert_same_results(*results)
    assert results[0]["results"]["facts"]["acc,none"] == 1


# ------------------------------------------------------------------------------------------------------ what hf has not


def test_no_stop_and_a_special_token_as_stop(ours_of):
    """`until: null`, and a token that is no text: the model, which says it first of all, answers nothing."""
    ours = ours_of("llama")
    (text,) = ours.generate_until(asked("generate_until", ("ba be", {"until": None, "max_gen_toks": 5})), True)
    assert text
    settings, ends = ours._sampling({"until": [SPECIAL_TOKENS[1], "be", ""], "max_gen_toks": 7})
    assert ends == {1, 2} and settings.stop == [SPECIAL_TOKENS[1], "be"] and settings.max_new_tokens == 7


def test_sampling_by_request(ours_of):
    """Each request has its settings: sampled ones a seed of their own, greedy ones beside them stay greedy."""
    ours, context = ours_of("llama"), words(5, 5)
    sampled = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "max_gen_toks": 8}
    requests = asked("generate_until", *[(context, sampled)] * 3, (context, {"max_gen_toks": 8}))
    first = ours.generate_until(requests, disable_tqdm=True)
    assert first == ours.generate_until(requests, disable_tqdm=True)
    assert len(set(first[:3])) > 1
    assert first[3:] == ours.generate_until(requests[3:], disable_tqdm=True)
    assert ours._sampling(sampled)[0].temperature == 1.5
    for given, used in (({"temperature": 0.7}, 0.7), ({"temperature": 0.7, "do_sample": False}, 0)):  # as lm-eval's hf
        assert ours._sampling(given | {"max_gen_toks": 8})[0].temperature == used


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"num_beams": 4}, "num_beams"), ({"penalty_alpha": 0.6}, "penalty_alpha"), ({"max_gen_toks": 256}, "256"),
        ({"max_gen_toks": 0}, "max_gen_toks 0"), ({"temperature": -1.0, "do_sample": True, "max_gen_toks": 5}, "-1"),
    ],
)  # fmt: skip
def test_what_cannot_be_generated_so_is_refused(ours_of, kwargs, says):
    with pytest.raises(UserError, match=says):
        ours_of("llama").generate_until(asked("generate_until", ("a", kwargs)), disable_tqdm=True)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", ["llama", "sentencepiece"])
def test_a_rendered_question_has_the_ids_of_training(folder_of, style, kind):
    """Through a text, which is what lm-eval passes on."""
    tokenizer = Tokenizer(folder_of[kind])
    tokenizer.chat_template = tokenizer.chat_template or LLAMA2
    model = OnetuneLM.__new__(OnetuneLM)
    model.chat, model._tokenizer = True, tokenizer
    messages = [{"role": "user", "content": words(3, 9)}]
    assert model._prompt(prompt_text(tokenizer, messages, style)) == encode_prompt(tokenizer, messages, style)


def test_an_answer_that_has_begun(folder_of):
    tokenizer = Tokenizer(folder_of["llama"])
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "So: "}]
    assert prompt_text(tokenizer, messages, "chatml") == ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nSo: ")
    for wrong in ([], "text", [{"role": "system", "content": "a"}]):
        with pytest.raises(UserError):
            prompt_text(tokenizer, read_messages(wrong), "chatml")


def test_a_chat(ours_of, tasks):
    """Every question goes through the style; options and answers follow it."""
    model = OnetuneLM(ours_of("llama").writer, chat=True)
    results = evaluate(model, tasks, ["tiny_bbq", "tiny_gsm"], apply_chat_template=True, num_fewshot=1)
    for name in ("tiny_bbq", "tiny_gsm"):
        context = results["samples"][name][1]["arguments"][0][0]
        assert context.startswith("<|im_start|>user\n") and context.endswith("<|im_start|>assistant\n")
        assert context.count("<|im_start|>") == 4


# -------------------------------------------------------------------------------------------------------------- tasks


def test_local_tasks_are_known_without_lm_eval(tasks):
    def local(*names):
        return only_local(Settings(eval_tasks=list(names), checkpoint_dir="any", include_path=tasks))

    assert local(*TASKS) and not local("tiny_bbq", "hellaswag") and not local("tiny_*")
    assert not only_local(Settings(eval_tasks=["hellaswag"], checkpoint_dir="any"))
    (tasks / "broken.yaml").write_text("task: [")
    assert local(*TASKS)
    (tasks / "far.yaml").write_text("task: far\ndataset_path: cais/mmlu\n")
    assert not local(*TASKS)
    (tasks / "far.yaml").write_text("task: far\ndataset_kwargs: {data_files: https://example.org/a.json}\n")
    assert not local(*TASKS)


def test_groups_tags_and_patterns(tasks, monkeypatch):
    """Looked for among all of lm-eval's tasks, here an index of the local ones."""
    (tasks / "both.yaml").write_text("group: both\ntask: [tiny_bbq, tiny_gsm]\n")
    path = tasks / "tiny_text.yaml"
    path.write_text(path.read_text() + "tag: texts\n")
    monkeypatch.setattr(
        lm_eval_harness, "TaskManager", lambda include_path, include_defaults: TaskManager(
            include_path=include_path, include_defaults=False
        ),
    )  # fmt: skip
    for wanted, expected in (("both", TASKS[:2]), ("texts", TASKS[2:]), ("tiny_*", TASKS)):
        manager, found = find_tasks(Settings(eval_tasks=[wanted], checkpoint_dir="any", include_path=tasks))
        assert sorted(manager.load(found)["tasks"]) == expected
    with pytest.raises(UserError, match="tiny_bbp.*did you mean tiny_bbq"):
        find_tasks(Settings(eval_tasks=["tiny_bbp"], checkpoint_dir="any", include_path=tasks))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "gone.jsonl"),
        ({"doc_to_text": "{{question.nothing.at_all}}"}, "nothing"), ({"test_split": "none"}, "none"),
        ({"unsafe_code": True}, "runs the code"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_loaded(tasks, change, says):
    config = yaml.safe_load((tasks / "tiny_gsm.yaml").read_text()) | change
    (tasks / "tiny_gsm.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=f"(?s)--eval_tasks tiny_gsm.*{says}"):
        find_tasks(Settings(eval_tasks=["tiny_gsm"], checkpoint_dir="any", include_path=tasks))


def test_a_template_that_fails_later(ours_of, tasks, monkeypatch):
    """On the second sample: lm-eval tries a template on the first one alone when it loads a task."""
    config = yaml.safe_load((tasks / "tiny_gsm.yaml").read_text())
    config["doc_to_text"] = "{{ question if question|length < 10 else nothing.at_all }}"
    (tasks / "tiny_gsm.yaml").write_text(yaml.safe_dump(config))
    (tasks / "tiny_gsm.jsonl").write_text(
        '{"question": "a", "answer": "b"}\n{"question": "abcdefghijk", "answer": "b"}\n'
    )
    writer = ours_of("llama").writer
    monkeypatch.setattr(lm_eval_harness, "Writer", lambda *_: writer)
    s = Settings(eval_tasks=["tiny_gsm"], checkpoint_dir="any", include_path=tasks)
    with pytest.raises(UserError, match="template.*nothing"):
        lm_eval_harness.main(s)


def test_without_lm_eval_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-eval\.txt"):
        Settings(eval_tasks=["a"], checkpoint_dir="any")


# ---------------------------------------------------------------------------------------------------------- as a script


@pytest.fixture
def cut_off(tmp_path_factory):
    """The environment of a process in which every use of the network fails."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    return {**NO_GPU, "PYTHONPATH": str(folder)} | {k: "" for k in os.environ if k.lower().endswith("_proxy")}


def test_a_run(tiny_model_dir, tasks, tmp_path, run_script, cut_off):
    """A quantised base with an adapter: a table on the terminal, the same figures in the file."""
    model, config, adapter = load_model(tiny_model_dir, torch.float32), lora.AdapterConfig(r=2), tmp_path / "adapter"
    lora.add_lora(model, config)
    adapter.mkdir()
    peft_format.save_adapter(model, config, adapter, tiny_model_dir)
    out_file = tmp_path / "new" / "results.json"
    code, out, err = run_script(
        "eval/lm_eval_harness.py", "--checkpoint_dir", tiny_model_dir, "--adapter_dir", adapter, "--limit", 3,
        "--quantize", "bnb.nf4", "--precision", "32-true", "--eval_tasks", f"[{','.join(TASKS)}]",
        "--include_path", tasks, "--save_filepath", out_file, "--bootstrap_iters", 0, env=cut_off,
    )  # fmt: skip
    assert code == 0, err
    assert "Traceback" not in err and "network" not in err
    results = json.loads(out_file.read_text())
    assert sorted(results["results"]) == TASKS and results["config"]["quantize"] == "bnb.nf4"
    assert all(results["n-samples"][name]["effective"] == 3 for name in TASKS)
    perplexity = results["results"]["tiny_text"]["word_perplexity,none"]
    assert f"{perplexity:.4f}" in out and "|tiny_bbq" in out
    assert [path.name for path in out_file.parent.iterdir()] == ["results.json"]


def test_a_mistake_in_a_process(tiny_model_dir, tasks, tmp_path, run_script, cut_off):
    """The index of lm-eval's own tasks is not read, nor the model: the line comes at once."""
    (tasks / "tiny_gsm.jsonl").unlink()
    code, _, err = run_script(
        "eval/lm_eval_harness.py", "--checkpoint_dir", tiny_model_dir, "--eval_tasks", "[tiny_bbq,tiny_gsm]",
        "--include_path", tasks, "--save_filepath", tmp_path / "new" / "results.json", env=cut_off,
    )  # fmt: skip
    last = err.splitlines()[-1]
    assert code == 2 and "Traceback" not in err and not (tmp_path / "new").exists(), err
    assert last.startswith("error: --eval_tasks tiny_gsm cannot be loaded: ") and "tiny_gsm.jsonl" in last


def test_a_broken_run_leaves_no_file(tiny_model_dir, tasks, tmp_path, monkeypatch):
    s = Settings(
        eval_tasks=["tiny_bbq"], checkpoint_dir=tiny_model_dir, include_path=tasks, precision="32-true",
        save_filepath=tmp_path / "results.json",
    )  # fmt: skip
    monkeypatch.setattr(lm_eval_harness.files, "flush", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lm_eval_harness.main(s)
    assert not list(tmp_path.glob("*results.json*"))


def test_the_tokenizer_of_hf_agrees(ours_of, theirs_of):
    for kind in ("llama", "sentencepiece"):
        ours, theirs = ours_of(kind), theirs_of(kind)
        assert ours.prefix_token_id == theirs.prefix_token_id and ours.eot_token_id == theirs.eot_token_id
        assert ours.max_length == theirs.max_length == SMALL["max_position_embeddings"]
        for text in (words(1, 9), " " + words(1, 9), "", ours.writer.tokenizer.bos_token + words(1, 2)):
            for add in (None, False):
                assert ours.tok_encode(text, add) == theirs.tok_encode(text, add), (kind, text, add)
