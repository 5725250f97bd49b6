"""eval/helm_server.py over real connections: against the plain model, with many clients, and badly treated."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import openai
import pytest
import torch
import uvicorn
from conftest import ROOT, write_tiny_tokenizer

import lora
from eval import helm_server, http_server, openai_api
from generate import Settings as Sampled
from inference.sampling import Batch, Reply, Row
from inference.several import use
from inference.writer import Voice
from text.messages import Dialog
from text.prompts import STYLES, encode_prompt
from weights import peft_format
from weights.checkpoint import load_model

GREEDY = {"temperature": 0, "max_new_tokens": 6}
USER = [{"role": "user", "content": "what"}]
WORDS = ["the", "answer", "to", "question", "is", "42", "and", "this", "what", "it", "was", "all", "about", ".", ","]


# -------------------------------------------------------------------------------------------------- a server to talk to


@contextlib.contextmanager
def serve(model_dir, **flags):
    """A server in threads of this process, on a free port."""
    flags = {"max_batch_size": 8, "precision": "32-true", **flags}
    settings = helm_server.Settings(checkpoint_dir=model_dir, **flags)
    service = helm_server.Service(settings)
    sock = http_server.bind("127.0.0.1", 0)
    server = uvicorn.Server(http_server.make_config(helm_server.make_app(service), settings))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
    thread.start()
    place = SimpleNamespace(service=service, port=sock.getsockname()[1], model=service.writer.model)
    place.tokenizer, place.key = service.tokenizer, flags.get("api_key")
    try:
        wait_until(lambda: server.started)
        yield place
    finally:
        server.should_exit = True
        thread.join()
        service.engine.close()


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def server(tiny_model_dir):
    with serve(tiny_model_dir) as place:
        yield place


def ask(place, path, body=None, headers=None):
    """(status, the parsed answer, headers) of a POST of `body` (JSON, or bytes as they are), or of a GET."""
    connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=120)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **(headers or {})}
    if place.key:
        headers.setdefault("Authorization", f"Bearer {place.key}")
    connection.request("GET" if body is None else "POST", path, content, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, json.loads(text) if text[:1] in "{[" else text, response.headers


def process(place, prompt, **fields):
    status, answer, _ = ask(place, "/process", {"prompt": prompt, **fields})
    assert status == 200, answer
    return answer


def random_text(words):
    return " ".join(random.choices(WORDS, k=words))


def plain(place, ids, n):
    """The greedy continuation of ids by the whole forward pass: all ids, and log-probabilities (T, V) after each."""
    ids, stops = list(ids), place.service.writer.stop_ids
    with torch.no_grad():
        for _ in range(n):
            ids.append(place.model(torch.tensor([ids]))[0, -1].argmax().item())
            if ids[-1] in stops:
                break
        return ids, place.model(torch.tensor([ids]))[0].log_softmax(-1)


def check_tokens(place, answer, ids, logprobs, added=0):
    """The tokens of an answer to /process are these ids, with the plain model's log-probabilities."""
    shown = ids[added : added + len(answer["tokens"])]
    for place_in_text, (token, id) in enumerate(zip(answer["tokens"], shown, strict=True), added):
        if place_in_text == 0:
            assert token["logprob"] == 0 and token["top_logprob"] == {}
            continue
        before = logprobs[place_in_text - 1]
        assert token["logprob"] == pytest.approx(before[id].item(), abs=1e-4)
        (best,) = token["top_logprob"].values()
        assert best == pytest.approx(before.max().item(), abs=1e-4)
        (text,) = token["top_logprob"]
        assert text == place.tokenizer.token_bytes(before.argmax().item()).decode("utf-8", "replace")
    assert "".join(token["text"] for token in answer["tokens"]) == answer["text"]
    assert answer["logprob"] == pytest.approx(sum(token["logprob"] for token in answer["tokens"]))
    assert answer["request_time"] > 0


# ------------------------------------------------------------------------------------------------ the challenge's API


@pytest.mark.parametrize("words", [1, 5, 60])
def test_process_is_the_plain_model(server, words):
    """Prompt and answer, token for token."""
    prompt = random_text(words)
    ids, logprobs = plain(server, server.tokenizer.encode(prompt), 6)
    answer = process(server, prompt, **GREEDY)
    assert answer["text"].startswith(prompt) and len(answer["tokens"]) >= len(server.tokenizer.encode(prompt))
    check_tokens(server, answer, ids, logprobs)
    assert "samples" not in answer


def test_only_false_strips_the_prompt(server):
    prompt = random_text(4)
    echoed = process(server, prompt, **GREEDY)
    for value in (True, None):
        again = process(server, prompt, **GREEDY, echo_prompt=value)
        assert again["text"] == echoed["text"] and again["tokens"] == echoed["tokens"]
    stripped = process(server, prompt, **GREEDY, echo_prompt=False)
    assert prompt + stripped["text"] == echoed["text"]
    length = len(server.tokenizer.encode(prompt))
    assert [t["text"] for t in stripped["tokens"]] == [t["text"] for t in echoed["tokens"][length:]]
    assert stripped["logprob"] == pytest.approx(sum(t["logprob"] for t in echoed["tokens"][length:]), abs=1e-3)


@pytest.mark.parametrize("echo", [True, False])
def test_no_new_tokens_scores_the_prompt_alone(server, echo):
    prompt = random_text(9)
    answer = process(server, prompt, max_new_tokens=0, echo_prompt=echo)
    ids, logprobs = plain(server, server.tokenizer.encode(prompt), 0)
    assert answer["text"] == (prompt if echo else "") and len(answer["tokens"]) == len(ids) * echo
    check_tokens(server, answer, ids, logprobs)


def test_a_prompt_may_fill_the_context_to_be_scored_but_not_to_be_continued(server):
    ids = [random.randrange(300, 500) for _ in range(256)]
    status, answer, _ = ask(server, "/v1/completions", {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0})
    assert status == 200 and len(answer["choices"][0]["logprobs"]["tokens"]) == 256
    status, answer, _ = ask(server, "/v1/completions", {"prompt": ids, "max_tokens": 1})
    assert status == 400 and "256" in answer["error"]["message"]
    status, answer, _ = ask(server, "/v1/completions", {"prompt": ids[:250], "max_tokens": 100, "temperature": 0})
    assert status == 200 and answer["usage"]["total_tokens"] <= 256


def test_a_prompt_is_read_once(server, monkeypatch):
    seen, real = [], server.model.hidden_states

    def counting(tokens, *rest):
        seen.append(tokens.numel())
        return real(tokens, *rest)

    monkeypatch.setattr(server.model, "hidden_states", counting)
    prompt = random_text(12)
    process(server, prompt, max_new_tokens=1)
    assert seen == [len(server.tokenizer.encode(prompt))]


def test_both_sets_of_names(server):
    """The challenge's, and those that HELM's client sends; what is not known is passed over."""
    prompt = random_text(3)
    sampled = {"seed": 5, "max_new_tokens": 8, "temperature": 1.3}
    ours = process(server, prompt, num_samples=2, **sampled)
    theirs = process(server, prompt, num_return_sequences=2, top_k_per_token=3, **sampled, embedding=False)
    assert [x["text"] for x in ours["samples"]] == [x["text"] for x in theirs["samples"]] and len(ours["samples"]) == 2
    counts = [max(len(token["top_logprob"]) for token in answer["tokens"]) for answer in (ours, theirs)]
    assert counts == [1, 3]  # fewer at a token where several candidates are unfinished characters
    helm = {"temperature": 1e-7, "num_return_sequences": 1, "max_new_tokens": 6, "top_p": 1, "echo_prompt": False}
    helm |= {"top_k_per_token": 1, "stop_sequences": []}
    assert prompt + process(server, prompt, **helm)["text"] == process(server, prompt, **GREEDY)["text"]
    assert process(server, prompt)["text"].startswith(prompt)  # the organisers' health check sends nothing else


def test_samples_have_seeds_of_their_own(server):
    prompt, settings = random_text(3), {"temperature": 1.5, "top_k": 0, "max_new_tokens": 10}
    several = process(server, prompt, num_samples=3, seed=40, **settings)
    assert {key: several[key] for key in ("text", "tokens", "logprob")} == several["samples"][0]
    assert len({sample["text"] for sample in several["samples"]}) == 3
    for i, sample in enumerate(several["samples"]):
        assert process(server, prompt, seed=40 + i, **settings)["text"] == sample["text"]
    assert (
        process(server, prompt, seed=-(2**63), **settings)["text"]
        == process(server, prompt, seed=-(2**63), **settings)["text"]
    )
    free = {process(server, prompt, **settings)["text"] for _ in range(4)}
    assert len(free) > 1


def test_stop_sequences_cut_text_and_tokens(server):
    """In the middle of a token, too. The stop text and all after it is gone."""
    for _ in range(5):
        prompt = random_text(3)
        whole = process(server, prompt, **GREEDY, echo_prompt=False)
        text = whole["text"]
        if len(text) < 4:
            continue
        at = random.randrange(1, len(text) - 1)
        stop = text[at : at + 2]
        answer = process(server, prompt, **GREEDY, echo_prompt=False, stop_sequences=["nowhere to be found", stop])
        assert answer["text"] == text[: text.index(stop)]
        assert "".join(token["text"] for token in answer["tokens"]) == answer["text"]
        assert len(answer["tokens"]) <= len(whole["tokens"])
        assert process(server, prompt, **GREEDY, stop_sequences=[stop])["text"] == prompt + answer["text"]


def test_tokenize_and_decode(server):
    text = "Zürich — 日本! " + random_text(20)
    status, answer, _ = ask(server, "/tokenize", {"text": text})
    assert status == 200 and answer["tokens"] == server.tokenizer.encode(text) and answer["request_time"] >= 0
    assert ask(server, "/decode", {"tokens": answer["tokens"]})[1]["text"] == text
    cut = ask(server, "/tokenize", {"text": text, "max_length": 7})[1]["tokens"]
    assert cut == answer["tokens"][:7]
    assert ask(server, "/tokenize", {"text": text, "max_length": 7, "truncation": False})[1] == {
        **answer, "request_time": pytest.approx(0, abs=60),
    }  # fmt: skip
    long = "the " * 3000
    assert len(ask(server, "/tokenize", {"text": long})[1]["tokens"]) == 2048
    assert ask(server, "/tokenize", {"text": ""})[1]["tokens"] == []
    assert ask(server, "/decode", {"tokens": []})[1]["text"] == ""


# ------------------------------------------------------------------------------------------------------- SentencePiece


@pytest.fixture(scope="module")
def sentencepiece_server(tiny_checkpoint, tmp_path_factory):
    """The tiny model with a SentencePiece tokenizer of 512 pieces, byte fallback and a BOS."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("sp") / "model"
    shutil.copytree(tiny_checkpoint("mistral"), folder)
    text = folder.parent / "text"
    text.write_text("".join(random_text(30) + "\n" for _ in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=320, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    with serve(folder) as place:
        yield place


def test_sentencepiece_keeps_its_spaces(sentencepiece_server):
    """The texts of tokens joined are the text; BOS is none of them, so each has a log-probability."""
    place = sentencepiece_server
    assert place.tokenizer.has_prefix and place.tokenizer.begin_ids
    for prompt in (random_text(6), " two  spaces", "日本 Zürich"):
        ids = [place.tokenizer.bos_id, *place.tokenizer.encode(prompt)]
        all_ids, logprobs = plain(place, ids, 8)
        answer = process(place, prompt, temperature=0, max_new_tokens=8)
        check_tokens(place, answer, all_ids, logprobs, added=1)
        assert answer["text"].startswith(prompt)
        stripped = process(place, prompt, temperature=0, max_new_tokens=8, echo_prompt=False)
        assert prompt + stripped["text"] == answer["text"]
        assert all(token["top_logprob"] for token in answer["tokens"])
    tokens = [token["text"] for token in process(place, "the answer", max_new_tokens=0)["tokens"]]
    assert "".join(tokens) == "the answer" and any(text.startswith(" ") for text in tokens)


def test_sentencepiece_tokenize_has_bos_and_decode_has_not(sentencepiece_server):
    place, text = sentencepiece_server, "the answer is"
    tokens = ask(place, "/tokenize", {"text": text, "truncation": False})[1]["tokens"]
    assert tokens == [place.tokenizer.bos_id, *place.tokenizer.encode(text)]
    assert ask(place, "/decode", {"tokens": tokens})[1]["text"] == text
    assert process(place, "", max_new_tokens=2)["text"] is not None  # there is BOS to go on from


# --------------------------------------------------------------------------------------------------------- OpenAI's API


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)


def test_models(client, server):
    (model,) = client.models.list().data
    assert model.id == server.service.name and model.object == "model"
    assert "/" in model.id and client.models.retrieve(model.id) == model
    assert ask(server, f"/v1/models/{model.id}")[1]["id"] == model.id
    for other in ("gpt-4", "org/gpt-4", model.id + "/"):
        with pytest.raises(openai.NotFoundError, match="not served here") as caught:
            client.models.retrieve(other)
        assert caught.value.type == "invalid_request_error"


def test_completions(client, server):
    prompt, name = random_text(5), server.service.name
    answer = client.completions.create(model=name, prompt=prompt, max_tokens=6, temperature=0)
    expected = process(server, prompt, **GREEDY, echo_prompt=False)
    (choice,) = answer.choices
    assert choice.text == expected["text"] and answer.object == "text_completion"
    assert choice.finish_reason == ("length" if len(expected["tokens"]) == 6 else "stop")
    assert answer.usage.prompt_tokens == len(server.tokenizer.encode(prompt))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_completions_of_texts_and_ids_with_n(client, server):
    prompts, name = [random_text(n) for n in (1, 7, 3)], server.service.name
    kwargs = dict(model=name, max_tokens=7, temperature=1.2, seed=11, n=2)
    batch = client.completions.create(prompt=prompts, **kwargs)
    ids = client.completions.create(prompt=[server.tokenizer.encode(prompt) for prompt in prompts], **kwargs)
    assert [choice.index for choice in batch.choices] == list(range(6))
    assert [choice.text for choice in batch.choices] == [choice.text for choice in ids.choices]
    for i, prompt in enumerate(prompts):
        alone = client.completions.create(prompt=prompt, **kwargs)
        assert [c.text for c in alone.choices] == [c.text for c in batch.choices[2 * i : 2 * i + 2]]
    one = client.completions.create(prompt=server.tokenizer.encode(prompts[1]), **kwargs)
    assert one.choices[0].text == batch.choices[2].text
    read = sum(len(server.tokenizer.encode(prompt)) for prompt in prompts)
    assert batch.usage.prompt_tokens == ids.usage.prompt_tokens == read


def test_completions_echo_and_log_probabilities(client, server):
    prompt = random_text(4)
    ids, logprobs = plain(server, server.tokenizer.encode(prompt), 5)
    answer = client.completions.create(
        model=server.service.name, prompt=prompt, max_tokens=5, temperature=0, logprobs=3, echo=True, n=2
    )
    for choice in answer.choices:
        found = choice.logprobs
        assert choice.text.startswith(prompt) and "".join(found.tokens) == choice.text
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        for i, (value, top) in enumerate(zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True)):
            assert value == pytest.approx(logprobs[i, ids[i + 1]].item(), abs=1e-4)
            assert max(top.values()) == pytest.approx(logprobs[i].max().item(), abs=1e-4) and 1 <= len(top) <= 3
        assert [
            choice.text[at:][: len(t)] for at, t in zip(found.text_offset, found.tokens, strict=True)
        ] == found.tokens


@pytest.mark.parametrize("stop", [None, 1])
@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_of_completions_is_the_whole(client, server, stop, echo):
    prompts = [random_text(n) for n in (2, 9)]
    kwargs = dict(model=server.service.name, prompt=prompts, max_tokens=12, temperature=1.1, seed=3, n=2, logprobs=1)
    kwargs |= {"echo": echo}
    if stop:
        text = client.completions.create(**kwargs | {"echo": False}).choices[0].text
        kwargs["stop"] = [text[3:5], text[6:8]]
    whole = client.completions.create(**kwargs)
    texts, tokens, values, offsets, reasons = ({i: [] for i in range(4)} for _ in range(5))
    for chunk in client.completions.create(**kwargs, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            assert chunk.id.startswith("cmpl-") and chunk.object == "text_completion"
            texts[choice.index].append(choice.text)
            tokens[choice.index] += choice.logprobs.tokens
            values[choice.index] += choice.logprobs.token_logprobs
            offsets[choice.index] += choice.logprobs.text_offset
            reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
        usage = chunk.usage
    for choice in whole.choices:
        i = choice.index
        assert "".join(texts[i]) == choice.text and reasons[i] == [choice.finish_reason]
        assert "".join(tokens[i]) == "".join(choice.logprobs.tokens) == choice.text
        assert offsets[i][: len(choice.logprobs.text_offset)] == choice.logprobs.text_offset
        for mine, theirs in zip(values[i], choice.logprobs.token_logprobs, strict=False):
            assert mine == theirs or mine == pytest.approx(theirs, abs=1e-4)
    assert usage == whole.usage


def test_chat(client, server):
    """The prompt is rendered as in training; parts of a content are joined."""
    dialog = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "what is the answer"}]
    ids = encode_prompt(server.tokenizer, dialog, "checkpoint")
    expected, logprobs = plain(server, ids, 8)
    new = [id for id in expected[len(ids) :] if id not in server.service.writer.stop_ids]
    kwargs = dict(model=server.service.name, temperature=0, logprobs=True, top_logprobs=2)
    answer = client.chat.completions.create(messages=dialog, max_completion_tokens=8, **kwargs)
    (choice,) = answer.choices
    assert choice.message.content == server.tokenizer.decode(new) and choice.message.role == "assistant"
    assert answer.usage.prompt_tokens == len(ids) and answer.object == "chat.completion"
    for i, token in enumerate(choice.logprobs.content):
        assert token.logprob == pytest.approx(logprobs[len(ids) + i - 1, new[i]].item(), abs=1e-4)
        assert bytes(token.bytes).decode() == token.token and 1 <= len(token.top_logprobs) <= 2
    parts = [dialog[0], {"role": "user", "content": [{"type": "text", "text": t} for t in ("what is ", "the answer")]}]
    again = client.chat.completions.create(messages=parts, max_tokens=8, **kwargs)
    assert again.choices[0].message == choice.message


def test_a_stream_of_a_chat_is_the_whole(client, server):
    kwargs = dict(
        model=server.service.name, messages=[{"role": "user", "content": "what"}], max_tokens=9, temperature=1.0, n=2,
        seed=2, logprobs=True,
    )  # fmt: skip
    whole = client.chat.completions.create(**kwargs)
    chunks = list(client.chat.completions.create(**kwargs, stream=True, stream_options={"include_usage": True}))
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].object == "chat.completion.chunk"
    assert [chunk.usage for chunk in chunks] == [None] * (len(chunks) - 1) + [whole.usage] and not chunks[-1].choices
    for i, choice in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == i]
        assert mine[0].delta.role == "assistant" and mine[-1].finish_reason == choice.finish_reason
        assert "".join(part.delta.content or "" for part in mine) == choice.message.content
        tokens = [token.token for part in mine if part.logprobs for token in part.logprobs.content]
        assert "".join(tokens) == "".join(token.token for token in choice.logprobs.content)
    assert not any(c.usage for c in client.chat.completions.create(**kwargs, stream=True))


def test_a_chat_without_a_limit_ends_with_the_context(client, server):
    answer = client.chat.completions.create(
        model=server.service.name, messages=[{"role": "user", "content": "what"}], temperature=0
    )
    assert answer.usage.total_tokens <= 256
    assert answer.usage.total_tokens == 256 or answer.choices[0].finish_reason == "stop"


def test_errors_are_those_that_the_client_knows(client, server):
    name = server.service.name
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="max_tokens") as caught:
        client.completions.create(model=name, prompt="a", max_tokens=-1)
    assert caught.value.param == "max_tokens" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="context is 256"):
        client.completions.create(model=name, prompt="the answer " * 300)
    with pytest.raises(openai.BadRequestError, match="forces a function") as caught:
        client.chat.completions.create(model=name, messages=USER, tools=[], tool_choice="required")
    assert caught.value.param == "tool_choice"
    with pytest.raises(openai.BadRequestError, match="role is user"):
        client.chat.completions.create(model=name, messages=[*USER, {"role": "system", "content": "a"}])


# -------------------------------------------------------------------------------------- several adapters over one base


@pytest.fixture(scope="module")
def folders(tiny_model_dir, tmp_path_factory):
    """Two adapters, trained in different styles."""
    top, configs = (
        tmp_path_factory.mktemp("several"),
        {"poet": lora.AdapterConfig(r=3), "cook": lora.AdapterConfig(r=5)},
    )
    for (name, config), style in zip(configs.items(), ("alpaca", "chatml"), strict=True):
        model = load_model(tiny_model_dir, torch.float32)
        lora.add_lora(model, config)
        for adapter in lora.adapters(model).values():
            adapter.lora_B.data.normal_(std=0.3)
        (top / name).mkdir()
        peft_format.save_adapter(model, config, top / name, tiny_model_dir)
        notes = {"prompt_style": style, "checkpoint_dir": str(tiny_model_dir)}
        (top / name / "onetune.json").write_text(json.dumps(notes))
    return {name: top / name for name in ("poet", "cook")}


@pytest.fixture(scope="module")
def several(folders):
    with serve(None, adapters=[f"{name}={folder}" for name, folder in folders.items()]) as place:
        yield place


def test_models_are_the_adapters_and_the_base(several):
    _, listed, _ = ask(several, "/v1/models")
    assert [model["id"] for model in listed["data"]] == ["poet", "cook", "base"]
    assert ask(several, "/v1/models/cook")[1]["id"] == "cook"
    status, answer, _ = ask(several, "/v1/models/baker")
    assert status == 404 and "'baker' is not served here, poet, cook, base are" in answer["error"]["message"]


def test_a_request_names_its_adapter(several, folders, tiny_model_dir):
    """At the same time, in one batch: each gets what a server with this adapter alone gives."""
    prompt, expected = random_text(5), {}
    for name in ("poet", "cook", "base"):
        alone = {"adapter_dir": folders[name]} if name in folders else {}
        with serve(tiny_model_dir, **alone) as place:
            chat = ask(place, "/v1/chat/completions", {"messages": USER, "temperature": 0, "max_tokens": 8})[1]
            sampled = {"prompt": prompt, "seed": 3, "max_tokens": 8, "logprobs": 1, "echo": True}
            text = ask(place, "/v1/completions", sampled)[1]
            read = process(place, prompt, **GREEDY)
            expected[name] = chat["choices"][0]["message"], text["choices"][0]["text"], read["text"]
    assert len(set(map(str, expected.values()))) == 3

    def asked(name):
        chat = {"messages": USER, "temperature": 0, "max_tokens": 8, "model": name}
        text = ask(several, "/v1/completions", sampled | {"model": name})[1]
        answer = ask(several, "/v1/chat/completions", chat)[1]
        read = process(several, prompt, adapter=name, **GREEDY)
        assert answer["model"] == text["model"] == (name or "poet")
        return answer["choices"][0]["message"], text["choices"][0]["text"], read["text"]

    names = ["cook", "base", "poet", None] * 3
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        for name, answer in zip(names, pool.map(asked, names), strict=True):
            assert answer == expected[name or "poet"]


def test_an_ensemble_is_a_model(several):
    body = {"messages": USER, "temperature": 0, "max_tokens": 8}

    def said(name):
        status, answer, _ = ask(several, "/v1/chat/completions", body | {"model": name})
        assert status == 200 and answer["model"] == name
        return answer["choices"][0]["message"]["content"]

    assert said("ensemble:cook+cook") == said("cook")
    voices = several.service.writer.voices("ensemble:cook+base")
    dialog = Dialog(USER)
    logits, ids = [], [voice.encode(dialog) for voice in voices]
    with torch.no_grad():
        for voice, prompt in zip(voices, ids, strict=True):
            use(several.model, torch.tensor([voice.number]))
            logits.append(several.model(torch.tensor([prompt]))[0, -1].softmax(-1))
    best = torch.stack(logits).mean(0).argmax().item()
    ended = best in voices[0].stop_ids | voices[1].stop_ids
    assert said("ensemble:cook+base").startswith("" if ended else several.tokenizer.decode([best]))
    text = {"prompt": "what", "model": "ensemble:cook+base", "max_tokens": 3}
    status, answer, _ = ask(several, "/v1/completions", text | {"logprobs": 2})
    assert status == 200 and len(answer["choices"][0]["logprobs"]["tokens"]) <= 3
    status, answer, _ = ask(several, "/v1/completions", text | {"logprobs": 2, "echo": True})
    assert status == 400 and "ensemble" in answer["error"]["message"]


@pytest.mark.parametrize(
    "path, field", [("/v1/chat/completions", "model"), ("/v1/completions", "model"), ("/process", "adapter")]
)
@pytest.mark.parametrize("name", ["baker", "ensemble:cook+baker", "", "ensemble:"])
def test_an_adapter_that_is_not_served(several, server, path, field, name):
    body = {"messages": USER} if "chat" in path else {"prompt": "what"}
    for place in (several, server):
        status, answer, _ = ask(place, path, body | {field: name})
        assert status == 404 and "is not served here" in str(answer)


def test_an_ensemble_larger_than_the_batch(several):
    body = {"prompt": "what", "model": "ensemble:" + "+".join(["cook"] * 9)}
    status, answer, _ = ask(several, "/v1/completions", body)
    assert status == 400 and "9 adapters, at most 8" in answer["error"]["message"]
    full = {"prompt": "what", "model": "ensemble:" + "+".join(["cook"] * 8), "temperature": 0, "max_tokens": 4}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(several, "/v1/completions", full)[1]["choices"][0]["text"], range(4)))
    assert answers == [ask(several, "/v1/completions", full | {"model": "cook"})[1]["choices"][0]["text"]] * 4


# ------------------------------------------------------------------------------------------ what clients send by habit

FIXED = {"temperature": 1.0, "seed": 7, "n": 2, "max_tokens": 6}
HARMLESS = [
    {"response_format": {"type": "text"}}, {"logit_bias": {}}, {"user": "me"}, {"safety_identifier": "me"},
    {"metadata": {"run": "5"}}, {"store": True}, {"service_tier": "auto"}, {"prompt_cache_key": "k"},
    {"prompt_cache_retention": "24h"}, {"frequency_penalty": 0, "presence_penalty": 0, "min_p": 0, "top_k": 0},
    {"stop": None, "logit_bias": None, "tools": None, "anything": None}, {"modalities": ["text"]},
    {"prediction": {"type": "content", "content": "the"}}, {"repetition_penalty": 1.0, "top_p": 1},
]  # fmt: skip
HARMLESS_IN_CHATS = [
    {"tools": []}, {"tool_choice": "none"}, {"tool_choice": "auto"}, {"parallel_tool_calls": False},
    {"parallel_tool_calls": True, "tools": []}, {"functions": [], "function_call": "none"}, {"audio": None},
    {"max_completion_tokens": 6, "max_tokens": None}, {"chat_template_kwargs": {}}, {"top_logprobs": None},
    {"messages": [{"role": "user", "content": "what", "name": None, "tool_calls": []}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "wh"}, {"type": "text", "text": "at"}]}]},
]  # fmt: skip


def texts(place, path, body):
    """The choices that a request is answered with, less their log-probabilities."""
    code, answer, _ = ask(place, path, {**FIXED, **body})
    assert code == 200, answer
    return [choice.get("message") or choice["text"] for choice in answer["choices"]]


@pytest.mark.parametrize("more", [*HARMLESS, *HARMLESS_IN_CHATS], ids=str)
def test_what_does_not_change_an_answer_is_taken(server, more):
    assert texts(server, H, {"messages": USER, **more}) == texts(server, H, {"messages": USER})
    if more in HARMLESS:
        assert texts(server, C, {"prompt": "the", **more}) == texts(server, C, {"prompt": "the"})


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("response_format", {"type": "json_object"}, "response_format json_object is not supported: only text is"),
        ("response_format", {"type": "json_schema", "json_schema": {}}, "response_format json_schema is not supported"),
        ("logit_bias", {"50256": -100}, "logit_bias is not supported"),
        ("tool_choice", "required", "tool_choice that forces a function is not supported"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}, "tool_choice that forces a function"),
        ("modalities", ["text", "audio"], "modalities ['text', 'audio'] is not supported"),
        ("functions", [{"name": "f"}], "functions is not supported: name them under tools"),
        ("function_call", {"name": "f"}, "function_call is not supported"),
        ("reasoning_effort", "low", "reasoning_effort is not supported: a template's variables are in chat_template"),
        ("verbosity", "low", "verbosity is not supported"),
        ("audio", {"voice": "ash"}, "audio is not supported"),
        ("web_search_options", {}, "web_search_options is not supported"),
        ("guided_json", {}, "guided_json is not a field that this server knows"),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "image_url"),
        ("messages", [{"role": "user", "content": "a", "mood": "b"}], "mood"),
        ("messages", [{"role": "tool", "tool_call_id": "x", "content": "a", "tool_calls": [{"name": "f"}]}], "tool"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words_of_its_own(server, field, value, words):
    """Never in those of the validator."""
    code, answer, _ = ask(server, H, {"messages": USER, field: value})
    problem = answer["error"]
    assert code == 400 and problem["param"] == field and words in problem["message"]
    assert problem["type"] == "invalid_request_error" and "xtra" not in problem["message"]


def test_every_field_in_the_tables_is_in_the_page():
    page = (ROOT / "docs" / "serving.md").read_text()
    fields = {*openai_api.IGNORED, *openai_api.ONE_VALUE}
    for request in (openai_api.ChatRequest, openai_api.CompletionRequest):
        fields |= {field.alias or name for name, field in request.model_fields.items()}
    assert [name for name in sorted(fields) if f"`{name}`" not in page] == []


def test_roles_and_contents_in_any_form_are_one_prompt(server, prompts):
    """A developer is the system; content may be parts; names and thinking reach a prompt whose style has them."""
    plain = [{"role": "system", "content": "be kind"}, *USER]
    parts = [{"role": "developer", "content": [{"type": "text", "text": "be kind"}]}, *USER]
    for messages in (plain, parts):
        assert ask(server, H, {"messages": messages, "max_tokens": 1})[0] == 200
    assert prompts[0] == prompts[1] and "system\nbe kind" in prompts[0]


@pytest.fixture
def prompts(monkeypatch):
    """The text of each prompt that a server in this process encodes for a chat."""
    texts, encode = [], Voice.encode

    def note(self, dialog):
        ids = encode(self, dialog)
        texts.append(self.tokenizer.decode(ids, skip_special=False))
        return ids

    monkeypatch.setattr(Voice, "encode", note)
    return texts


def test_what_a_template_has_no_place_for_is_refused(server):
    """Never dropped: a call made before, the result of a tool, tools; the tiny model's template has none of them."""
    called = [*USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    result = {"role": "tool", "tool_call_id": "call_1", "content": "wet"}
    for body in ({"messages": [*called, result]}, {"messages": [*called, *USER]}, {"messages": USER, "tools": TOOLS}):
        code, answer, _ = ask(server, H, body)
        assert code == 400 and "tool" in answer["error"]["message"], answer
    code, answer, _ = ask(server, H, {"messages": [*called, {**result, "tool_call_id": "call_2"}]})
    assert code == 400 and "call_2" in answer["error"]["message"] and answer["error"]["param"] == "messages"


def test_the_last_message_of_the_assistant_is_continued(server, prompts):
    begun = [*USER, {"role": "assistant", "content": "the answer"}]
    code, answer, _ = ask(server, H, {"messages": begun, "temperature": 0, "max_tokens": 8})
    assert code == 200 and prompts[0].endswith("<|im_start|>assistant\nthe answer")
    ids = encode_prompt(server.tokenizer, begun, "checkpoint")
    new = [id for id in plain(server, ids, 8)[0][len(ids) :] if id not in server.service.writer.stop_ids]
    assert answer["choices"][0]["message"]["content"] == server.tokenizer.decode(new)


def test_a_continued_answer_keeps_its_space(sentencepiece_server, monkeypatch):
    """Where an answer begins, SentencePiece's first space is none of the text; where one is continued it is."""
    says(monkeypatch, sentencepiece_server, "the answer is")
    begun = [*USER, {"role": "assistant", "content": "so"}]
    for messages, text in ((USER, "the answer is"), ([*USER, {"role": "assistant", "content": ""}], "the answer is"),
                           (begun, " the answer is")):  # fmt: skip
        answer = ask(sentencepiece_server, H, {"messages": messages})[1]
        assert answer["choices"][0]["message"]["content"] == text


def test_penalties_and_min_p_reach_the_sampling(server):
    """Greedy: a presence penalty of 2 and min_p of 1 against what the settings of a row do by themselves."""
    body = {"prompt": [300, 301], "max_tokens": 30, "temperature": 0}
    for more in ({}, {"presence_penalty": 2}, {"frequency_penalty": 2}, {"frequency_penalty": -2}):
        s = Sampled(checkpoint_dir="any", temperature=0, max_new_tokens=30, **more)
        row = Row([300, 301], Reply(server.tokenizer, server.service.writer.stop_ids, start=False), s, 1)
        batch = Batch(server.service.writer.decoder)
        batch.add([row])
        while batch.going:
            batch.step()
        code, answer, _ = ask(server, C, {**body, **more})
        assert code == 200 and answer["choices"][0]["text"] == row.reply.text
    greedy = texts(server, C, {"prompt": "the", "temperature": 0})
    assert texts(server, C, {"prompt": "the", "temperature": 2, "min_p": 1}) == greedy


# --------------------------------------------------------------------------------------------------------------- tools

CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "of a city", "parameters": CITY, "strict": True},
    },
    {"type": "function", "function": {"name": "clock"}},
]
TEMPLATES = ROOT / "tests" / "text" / "chat_templates"
OSLO = '"arguments": {"city": "Oslo"}'
WRITTEN = {  # by style or template: how its models write a call
    "chatml": f'<tool_call>\n{{"name": "weather", {OSLO}}}\n</tool_call>',
    "qwen3": f'<tool_call>\n{{"name": "weather", {OSLO}}}\n</tool_call>',
    "llama3": '{"name": "weather", "parameters": {"city": "Oslo"}}',
    "llama-3.1": '<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo"}}',
    "mistral-instruct": f'[TOOL_CALLS] [{{"name": "weather", {OSLO}}}]',
    "mistral-v3": f'[TOOL_CALLS] [{{"name": "weather", {OSLO}}}]',
}
MARKS = [
    "<|python_tag|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[TOOL_CALLS]",
    "[INST]",
    "[/INST]",
]


@pytest.fixture(scope="module")
def serving(tiny_model_dir, tmp_path_factory):
    """`serving("qwen3")`: a server that renders with this style, or checkpoint's template, in a context of 4096."""
    with contextlib.ExitStack() as stack:
        places = {}

        def start(kind):
            if kind not in places:
                folder = tmp_path_factory.mktemp(kind) / "model"
                shutil.copytree(tiny_model_dir, folder)
                config = json.loads((folder / "config.json").read_text())
                (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
                names = json.loads((folder / "tokenizer_config.json").read_text())
                vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
                names["added_tokens_decoder"] = {  # in the place of bytes that no text has: 0xF8 and on are not UTF-8
                    str(vocabulary[chr(0xF8 + i)]): {"content": text, "special": True} for i, text in enumerate(MARKS)
                }
                if kind not in STYLES:
                    names["chat_template"] = (TEMPLATES / f"{kind}.jinja").read_text()
                (folder / "tokenizer_config.json").write_text(json.dumps(names))
                style = kind if kind in STYLES else "checkpoint"
                places[kind] = stack.enter_context(serve(folder, prompt_style=style))
            return places[kind]

        yield start


def says(monkeypatch, place, *texts):
    """Let the model write one text after the other, whatever it is asked; special tokens in them count."""
    scripts = [[*place.tokenizer.encode(text, special=True), place.tokenizer.eos_id] for text in texts]
    left = {}  # generator of a row: the ids that it is to write

    def choose(logits, settings, generators):
        for generator in generators:
            if generator not in left:
                left[generator] = list(scripts.pop(0) if len(scripts) > 1 else scripts[0])
        return torch.tensor([left[generator].pop(0) if left[generator] else 0 for generator in generators])

    monkeypatch.setattr("inference.sampling.choose", choose)


def chat(place, **fields):
    """The first choice of a chat's answer, by OpenAI's client."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{place.port}/v1", api_key="none", max_retries=0)
    return client.chat.completions.create(model=place.service.name, **fields)


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_call_its_result_and_the_answer(serving, monkeypatch, prompts, kind):
    """As an agent does it: what the client gets, it sends back; the model is shown call and result as in training."""
    place = serving(kind)
    says(monkeypatch, place, WRITTEN[kind], "It rains.")
    messages = [{"role": "user", "content": "the weather in Oslo?"}]
    (choice,) = chat(place, messages=messages, tools=TOOLS).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "weather",
        {"city": "Oslo"},
    )
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "it is wet"}]
    (choice,) = chat(place, messages=messages, tools=TOOLS).choices
    assert (choice.finish_reason, choice.message.content) == ("stop", "It rains.") and not choice.message.tool_calls
    first, second = prompts
    assert "weather" in first and "of a city" in first and "clock" in first and "strict" not in first
    assert "it is wet" in second and second.count("Oslo") == first.count("Oslo") + 1


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("before", ["", "Let me see.\n"])
def test_a_stream_with_calls_is_the_whole(serving, monkeypatch, kind, before):
    """Two answers, one calls and one does not. Nothing of a call is shown as text."""
    place = serving(kind)
    monkeypatch.setattr("uuid.uuid4", lambda: SimpleNamespace(hex="0123456789abcdef"))
    fields = dict(messages=USER, tools=TOOLS, n=2, seed=1, logprobs=True)
    written = (before + WRITTEN[kind], before + "No <tool or {name here. [TOOL")
    says(monkeypatch, place, *written)
    whole = chat(place, **fields)
    says(monkeypatch, place, *written)
    chunks = list(chat(place, **fields, stream=True))
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        text = "".join(part.delta.content or "" for part in mine)
        assert text == (choice.message.content or "") and mine[-1].finish_reason == choice.finish_reason
        calls = [call for part in mine for call in part.delta.tool_calls or []]
        assert [call.index for call in calls] == list(range(len(calls)))
        expected = [call.model_dump() for call in choice.message.tool_calls or []]
        assert [call.model_dump(exclude={"index"}) for call in calls] == expected
        tokens = [token.token for part in mine if part.logprobs for token in part.logprobs.content]
        assert "".join(tokens) == "".join(token.token for token in choice.logprobs.content)
    assert {choice.finish_reason for choice in whole.choices} == {"tool_calls", "stop"}
    assert {choice.message.content for choice in whole.choices} == {before.rstrip() or None, written[1]}


@pytest.mark.parametrize("stream", [False, True])
def test_text_that_is_no_call_stays_text(serving, monkeypatch, stream):
    place = serving("chatml")
    for text in (
        '<tool_call>\n{"name": "weather", "arguments": \n</tool_call>', "<tool_call>", '{"name": "weather"',
        '{"name": "Bob", "parameters": {}}', "a < b", f"<think>\n{WRITTEN['chatml']}\n</think>\n\nNo.",
    ):  # fmt: skip
        says(monkeypatch, place, text)
        answer = chat(place, messages=USER, tools=TOOLS, stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        messages = [choice.delta if stream else choice.message for choice in choices]
        assert "".join(message.content or "" for message in messages) == text
        assert choices[-1].finish_reason == "stop" and not any(message.tool_calls for message in messages)


def test_calls_are_looked_for_only_where_tools_are_shown(serving, monkeypatch, prompts):
    """Not without tools, nor with the tool_choice none, which shows the model none; one alone where it is asked so."""
    place, written = serving("chatml"), WRITTEN["chatml"]
    two = f"{written}\n{written}"
    says(monkeypatch, place, two)
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}):
        (choice,) = chat(place, messages=USER, **fields).choices
        assert choice.message.content == two and not choice.message.tool_calls and "weather" not in prompts[-1]
    for fields, number in (({}, 2), ({"parallel_tool_calls": False}, 1)):
        (choice,) = chat(place, messages=USER, tools=TOOLS, **fields).choices
        assert len(choice.message.tool_calls) == number and choice.message.content is None


def test_a_call_that_is_cut_off_is_text_and_its_end_the_length(serving, monkeypatch):
    """Also after a call that is whole: so the client knows that there was more to come."""
    place, written = serving("chatml"), WRITTEN["chatml"]
    says(monkeypatch, place, f"{written}\n{written}")
    first = len(place.tokenizer.encode(written))
    for tokens, calls in ((first // 2, 0), (first + 9, 1)):
        (choice,) = chat(place, messages=USER, tools=TOOLS, max_tokens=tokens).choices
        assert choice.finish_reason == "length" and len(choice.message.tool_calls or []) == calls
        assert written.startswith(choice.message.content.strip()) and choice.message.content


def test_variables_of_the_template(serving, prompts):
    place = serving("qwen3")
    for body in ({}, {"chat_template_kwargs": {"enable_thinking": False}}):
        assert ask(place, H, {"messages": USER, "max_tokens": 1, **body})[0] == 200
    assert prompts[1] == prompts[0] + "<think>\n\n</think>\n\n"


# ------------------------------------------------------------------------------------------------------- bad requests

P, T, D, C, H = "/process", "/tokenize", "/decode", "/v1/completions", "/v1/chat/completions"
BAD = [
    (P, b"{", 422, "JSON"),
    (P, b"", 422, "required"),
    (P, b"[1]", 422, "object"),
    (P, b"[" * 100_000, 4, ""),
    (P, b'{"prompt": "\xff"}', 4, ""),
    (P, b'{"prompt": "\\ud83d"}', 400, "surrogate"),
    (P, {}, 422, "prompt"),
    (P, {"prompt": 5}, 422, "prompt"),
    (P, {"prompt": None}, 422, "prompt"),
    (P, {"prompt": ""}, 400, "empty"),
    (P, {"prompt": "a", "max_new_tokens": -1}, 422, "max_new_tokens"),
    (P, {"prompt": "a", "max_new_tokens": "5"}, 422, "max_new_tokens"),
    (P, {"prompt": "a", "max_new_tokens": 1.5}, 422, "max_new_tokens"),
    (P, {"prompt": "a", "temperature": -0.1}, 422, "temperature"),
    (P, b'{"prompt": "a", "temperature": NaN}', 422, "temperature"),
    (P, b'{"prompt": "a", "temperature": 1e999}', 422, "temperature"),
    (P, {"prompt": "a", "top_p": 1.1}, 422, "top_p"),
    (P, {"prompt": "a", "top_k": -1}, 422, "top_k"),
    (P, {"prompt": "a", "num_samples": 0}, 422, "num_samples"),
    (P, {"prompt": "a", "num_samples": 10**9}, 400, "answers"),
    (P, {"prompt": "a", "seed": 2**63}, 422, "seed"),
    (P, {"prompt": "a", "stop_sequences": [""]}, 422, "stop_sequences"),
    (P, {"prompt": "a", "stop_sequences": [5]}, 422, "stop_sequences"),
    (P, {"prompt": "a", "echo_prompt": 1}, 422, "echo"),
    (P, {"prompt": "a " * 300}, 400, "256"),
    (T, {"text": 5}, 422, "text"),
    (T, {"text": "a", "max_length": -1}, 422, "max"),
    (D, {"tokens": [512]}, 400, "512"),
    (D, {"tokens": [-1]}, 400, "-1"),
    (D, {"tokens": ["a"]}, 422, "tokens"),
    (D, {"tokens": [True]}, 422, "tokens"),
    (D, {}, 422, "tokens"),
    (C, {"prompt": ""}, 400, "empty"),
    (C, {"prompt": []}, 400, ""),
    (C, {"prompt": [[]]}, 400, "empty"),
    (C, {"prompt": [1, "a"]}, 400, "prompt"),
    (C, {"prompt": [600]}, 400, "600"),
    (C, {"prompt": "a", "n": 0}, 400, "n"),
    (C, {"prompt": ["a"] * 300}, 400, "300 answers"),
    (C, {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
    (C, {"prompt": "a", "stop": [1]}, 400, "stop"),
    (C, {"prompt": "a", "suffix": "b"}, 400, "suffix is not supported"),
    (C, {"prompt": "a", "best_of": 2}, 400, "best_of is not supported"),
    (C, {"prompt": "a", "presence_penalty": 2.1}, 400, "presence_penalty"),
    (C, {"prompt": "a", "frequency_penalty": -2.1}, 400, "frequency_penalty"),
    (C, {"prompt": "a", "min_p": 1.1}, 400, "min_p"),
    (C, {"prompt": "a", "logit_bias": {"5": 1}}, 400, "logit_bias is not supported"),
    (C, {"prompt": "a", "stream_options": {"include_all": True}}, 400, "stream_options.include_all"),
    (P, {"prompt": "a", "frequency_penalty": 3}, 422, "frequency_penalty"),
    (C, b"nonsense", 400, "JSON"),
    (C, b'{"prompt": "a", "\\ud83d": 1}', 400, ""),
    (C, {"prompt": "a", "x" * 9000: 1}, 400, "is not a field that this server knows"),
    (C, {"prompt": "a", "max_new_tokens": 1}, 400, "max_new_tokens is not a field that this server knows"),
    (H, b'{"messages": [{"role": "user", "content": "\\udfff"}]}', 400, "surrogate"),
    (H, {"messages": []}, 400, "messages"),
    (H, {"messages": "hi"}, 400, "messages"),
    (H, {"messages": [{"role": "robot", "content": "a"}]}, 400, "role"),
    (H, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, 400, "content"),
    (H, {"messages": [{"role": "user"}]}, 400, "content"),
    (H, {"messages": USER, "chat_template_kwargs": {"speed": 1}}, 400, "no variable 'speed'"),
    (H, {"messages": USER, "chat_template_kwargs": {"messages": []}}, 400, "'messages' follows from"),
    (H, {"messages": USER, "chat_template_kwargs": {"bos_token": "a"}}, 400, "'bos_token' follows from"),
    (H, {"messages": USER, "chat_template_kwargs": {"message": "\ud83d"}}, 400, "surrogate"),
    (H, {"messages": USER, "tools": [5]}, 400, "tool 1 is 5"),
    (H, {"messages": USER, "tools": [{"type": "web_search"}]}, 400, "web_search"),
    (H, {"messages": USER, "parallel_tool_calls": 1}, 400, "parallel_tool_calls"),
    ("/nowhere", {}, 404, "Not Found"),
    ("/v1/nowhere", {}, 404, "Not Found"),
    ("/health", {}, 405, "Method"),
]


@pytest.mark.parametrize("path, body, status, word", BAD, ids=range(len(BAD)))
def test_a_bad_request_is_answered_with_the_reason(server, path, body, status, word):
    """In one JSON object, with a status of 4xx; and the server goes on."""
    code, answer, _ = ask(server, path, body)
    assert code == status or status == 4 and 400 <= code < 500, answer
    message = answer["error"]["message"] if path.startswith("/v1") else answer["detail"]
    assert isinstance(message, str) and word in message and len(message) < 500, answer
    assert answer.keys() == {"error" if path.startswith("/v1") else "detail"}


def test_after_all_of_them_it_is_well(server):
    assert ask(server, "/health")[:2] == (200, {"status": "ok"})
    assert process(server, "the", **GREEDY)["text"].startswith("the")


def test_other_content_types_are_told_so(server):
    code, answer, _ = ask(server, P, b'{"prompt": "a"}', {"Content-Type": "text/plain"})
    assert code == 422 and "application/json" in answer["detail"]


def test_metrics(server):
    before = metrics(server)
    process(server, "the answer", max_new_tokens=3, temperature=0, echo_prompt=False)
    ask(server, "/nowhere/at/all", {})
    after = metrics(server)
    key = 'onetune_requests_total{path="/process",status="200"}'
    assert after[key] == before.get(key, 0) + 1
    assert after["onetune_prompt_tokens_total"] > before["onetune_prompt_tokens_total"]
    assert 0 < after["onetune_generated_tokens_total"] - before["onetune_generated_tokens_total"] <= 3
    assert after["onetune_queue_length"] == after["onetune_batch_size"] == 0
    assert after['onetune_request_seconds_count{path="/process"}'] > 0
    assert not any("nowhere" in key for key in after)  # what strangers ask for makes no new lines


def metrics(place):
    lines = [line for line in ask(place, "/metrics")[1].splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


# ----------------------------------------------------------------------------------------------- limits, and hanging up


@pytest.fixture
def held(tiny_model_dir, monkeypatch):
    """A server for one answer at a time with one that may wait, and the gate that its steps wait at."""
    gate = threading.Event()
    gate.set()
    with serve(tiny_model_dir, max_batch_size=1, max_queue=1) as place:
        decoder = place.service.writer.decoder
        real = decoder.step
        monkeypatch.setattr(decoder, "step", lambda ids: gate.wait(60) and real(ids))
        yield place, gate
        gate.set()


LONG = {"prompt": "the", "temperature": 1.0, "max_new_tokens": 200, "top_k": 0}


def send(place, path, body):
    """An open connection on which a request was sent."""
    connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection


def test_a_full_queue_is_429_and_a_hang_up_frees_the_place(held):
    place, gate = held
    engine = place.service.engine
    gate.clear()
    first = send(place, P, LONG)
    wait_until(lambda: engine.running == 1)
    second = send(place, P, LONG)
    wait_until(lambda: len(engine.waiting) == 1)
    for path, body in ((P, LONG), (C, {"prompt": "a"}), (H, {"messages": [{"role": "user", "content": "a"}]})):
        code, answer, headers = ask(place, path, body)
        assert code == 429 and int(headers["Retry-After"]) >= 1
        assert "again" in (answer["error"]["message"] if path != P else answer["detail"])
    second.close()
    wait_until(lambda: not engine.waiting)  # also while the model is busy
    first.close()
    wait_until(lambda: engine.running == 0)
    gate.set()
    assert process(place, "the", **GREEDY)["text"].startswith("the")
    made = metrics(place)
    assert made["onetune_generated_tokens_total"] < 20
    assert made['onetune_requests_total{path="/process",status="499"}'] == 2


def test_a_stream_that_is_hung_up_on_frees_its_place(held):
    place, gate = held
    engine = place.service.engine
    body = {"prompt": "the", "max_tokens": 250, "stream": True, "temperature": 1.0, "seed": 1}
    connection = send(place, C, body)
    response = connection.getresponse()
    assert response.status == 200 and response.read(5) == b"data:"
    gate.clear()
    waiting = send(place, C, body)
    wait_until(lambda: len(engine.waiting) == 1)
    waiting.close()
    wait_until(lambda: not engine.waiting)
    response.close()
    connection.close()
    wait_until(lambda: engine.running == 0)
    gate.set()
    assert process(place, "the", **GREEDY)["text"].startswith("the")


def test_more_answers_than_may_wait_are_refused(held):
    place, _ = held
    code, answer, _ = ask(place, P, {"prompt": "a", "num_samples": 2})
    assert code == 400 and "at most 1" in answer["detail"]


def test_a_failing_model_answers_500_and_works_again(held, monkeypatch):
    place, _ = held
    decoder = place.service.writer.decoder
    with monkeypatch.context() as broken:
        broken.setattr(decoder, "step", lambda ids: 1 / 0)
        code, answer, _ = ask(place, P, {"prompt": "the", "max_new_tokens": 5})
        assert code == 500 and "division by zero" in answer["detail"]
        code, answer, _ = ask(place, C, {"prompt": "the", "max_tokens": 5, "stream": True})
        assert code == 200 and "division by zero" in answer and "[DONE]" not in answer
    assert process(place, "the", **GREEDY)["text"].startswith("the")
    assert ask(place, "/health")[0] == 200


@pytest.fixture(scope="module")
def guarded(tiny_model_dir):
    with serve(tiny_model_dir, api_key="sesame-öffne", max_body_bytes=1000) as place:
        place.key = None
        yield place


def test_a_token_is_asked_for(guarded):
    right = {"Authorization": "Bearer sesame-öffne".encode().decode("latin-1")}
    for path, body in (
        (P, {"prompt": "a"}),
        (T, {"text": "a"}),
        (D, {"tokens": [1]}),
        (C, {"prompt": "a"}),
        (H, {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/models", None),
        ("/metrics", None),
        ("/openapi.json", None),
        ("/docs", None),
        ("/redoc", None),
        ("/x", None),
    ):
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "sesame-öffne".encode().decode("latin-1")},
        ):
            code, answer, _ = ask(guarded, path, body, headers)
            assert code == 401 and "token" in json.dumps(answer)
        assert ask(guarded, path, body, right)[0] in (200, 404), path
    assert ask(guarded, "/health")[0] == 200


def test_every_path_but_health_is_guarded(guarded):
    """Those of the app itself, so that a new one is in this test, with every method."""
    paths = {route.path for route in helm_server.make_app(guarded.service).routes}
    assert paths >= {"/health", "/metrics", "/openapi.json", P, T, D, C, H, "/v1/models"}
    for path in (paths | {"/health/", "//health", "/Health"}) - {"/health"}:
        for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE"):
            assert talk(guarded, f"{method} {path} HTTP/1.1\r\nHost: a\r\n\r\n").startswith("HTTP/1.1 401 "), path
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: abc\r\n"
    assert talk(guarded, f"GET {P} HTTP/1.1\r\nHost: a\r\n{upgrade}\r\n").startswith("HTTP/1.1 401 ")


def test_no_page_that_loads_scripts_from_elsewhere(server):
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert ask(server, path)[0] == 404
    code, schema, _ = ask(server, "/openapi.json")
    assert code == 200 and {P, T, D, C, H, "/health", "/metrics", "/v1/models"} <= schema["paths"].keys()


def test_a_large_body_is_413(guarded):
    headers = {"Authorization": "Bearer sesame-öffne".encode().decode("latin-1")}
    assert ask(guarded, P, {"prompt": "a " * 50, "max_new_tokens": 1}, headers)[0] == 200
    for path in (P, C):
        code, answer, _ = ask(guarded, path, {"prompt": "a" * 1000}, headers)
        assert code == 413 and "1000 bytes" in json.dumps(answer)
        assert chunked(guarded, path, [b'{"prompt": "', *[b"a" * 100] * 11, b'"}'], headers) == 413
    assert chunked(guarded, P, [b'{"prompt": "the"', b', "max_new_tokens": 1}'], headers) == 200


def chunked(place, path, chunks, headers):
    """The status that a body without a length gets."""
    connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=60)
    connection.request("POST", path, iter(chunks), {"Content-Type": "application/json", **headers}, encode_chunked=True)
    status = connection.getresponse().status
    connection.close()
    return status


# ------------------------------------------------------------------------------------------ requests that are too slow


@pytest.fixture(scope="module")
def impatient(tiny_model_dir):
    with serve(tiny_model_dir, request_seconds=0.6) as place:
        yield place


def talk(place, *parts, pause=0.0):
    """What the server answers, until it closes the connection, to parts of a request sent with pauses between them."""
    with socket.create_connection(("127.0.0.1", place.port), timeout=30) as sock:
        sock.settimeout(30)
        for part in parts:
            with contextlib.suppress(ConnectionError):  # it may have closed it by now
                sock.sendall(part.encode())
            time.sleep(pause)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while b"\r\n\r\n" not in answer or b"408" in answer:
                received = sock.recv(10_000)
                if not received:
                    break
                answer += received
    return answer.decode()


HEADER = "POST /process HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
BODY = '{"prompt": "the", "max_new_tokens": 2}'


@pytest.mark.parametrize(
    "parts",
    [
        [""],
        ["P"],
        [HEADER],
        [f"{HEADER}Content-Length: {len(BODY)}\r\n\r\n"],
        [f"{HEADER}Content-Length: {len(BODY)}\r\n\r\n{BODY[:-1]}"],
        [f"{HEADER}Transfer-Encoding: chunked\r\n\r\n5\r\n{BODY[:5]}\r\n"],
        [*HEADER[:20]],
        [f"{HEADER}Content-Length: {len(BODY)}\r\n\r\n", *BODY[:20]],
    ],
    ids=[
        "nothing",
        "a letter",
        "half a header",
        "no body",
        "half a body",
        "a chunk",
        "drops of header",
        "drops of body",
    ],
)
def test_a_request_that_does_not_arrive_in_time_is_408(impatient, parts):
    """A byte now and then does not prolong the time."""
    started = time.monotonic()
    answer = talk(impatient, *parts, pause=0.1 if len(parts) > 1 else 0)
    assert 0.5 < time.monotonic() - started < 15
    head, _, body = answer.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 408 Request Timeout\r\n") and "connection: close" in head
    assert json.loads(body) == {"detail": "the request did not arrive within 0.6 s"}
    assert ask(impatient, "/health")[0] == 200


def test_408_has_openai_s_form_where_the_path_is_known(impatient):
    answer = talk(impatient, "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n{")
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["code"] == 408


def test_a_refused_request_whose_body_never_ends_is_closed(impatient):
    """The answer is sent before the body has arrived; the rest of it must not keep the connection open."""
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=30) as sock:
        sock.sendall(f"{HEADER}Content-Length: 5000000\r\n\r\n".encode())
        started, answer = time.monotonic(), b""
        with contextlib.suppress(ConnectionError):
            while received := sock.recv(10_000):
                answer += received
                sock.sendall(b"a")
        assert time.monotonic() - started < 15 and answer.startswith(b"HTTP/1.1 413 ")
        assert b"408" not in answer


def test_only_the_arrival_is_limited(impatient, monkeypatch):
    """Not the time of the answer, nor that of later requests on the same connection."""
    decoder = impatient.service.writer.decoder
    real = decoder.step
    monkeypatch.setattr(decoder, "step", lambda ids: time.sleep(0.3) or real(ids))
    connection = http.client.HTTPConnection("127.0.0.1", impatient.port, timeout=60)
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        body = {"prompt": "the", "max_new_tokens": 5, "temperature": 1.0, "top_k": 0, "seed": 5}
        connection.request("POST", P, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200 and json.load(response)["tokens"]
        seconds.append(time.monotonic() - started)
        time.sleep(0.3)  # idle for a while, then the next on the same connection
    assert max(seconds) > 0.6
    connection.sock.sendall(HEADER.encode())  # the next one stays half-sent: a clock of its own
    started = time.monotonic()
    assert connection.sock.recv(10_000).startswith(b"HTTP/1.1 408 ") and 0.5 < time.monotonic() - started < 15
    connection.close()


def test_a_pipelined_half_request_is_closed_after_the_first_is_answered(impatient):
    first = f"{HEADER}Content-Length: {len(BODY)}\r\n\r\n{BODY}"
    with socket.create_connection(("127.0.0.1", impatient.port), timeout=30) as sock:
        sock.sendall(f"{first}{HEADER}Content-Length: 100\r\n\r\n{{".encode())
        answer = b""
        with contextlib.suppress(ConnectionError):
            while received := sock.recv(10_000):
                answer += received
        assert answer.startswith(b"HTTP/1.1 200 ") and answer.count(b"HTTP/1.1 408 ") == 1


def test_many_half_sent_requests_leave_the_server_well(impatient):
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        slow = [pool.submit(talk, impatient, HEADER[: random.randrange(len(HEADER))]) for _ in range(50)]
        assert process(impatient, "the", **GREEDY)["text"].startswith("the")
        assert all("408" in answer.result() for answer in slow)


# ------------------------------------------------------------------------------------------------------------- the load


def test_a_hundred_clients_get_what_each_would_get_alone(server):
    """Prompts and answers of mixed lengths, 20 of them hanging up; greedy in fp32."""
    lengths = random.Random(3)
    bodies = [
        {"prompt": random_text(lengths.randint(1, 50)), "temperature": 0, "max_new_tokens": lengths.randint(0, 25),
         "echo_prompt": lengths.random() < 0.3}
        for _ in range(100)
    ]  # fmt: skip
    leaving = set(lengths.sample(range(100), 20))
    sizes = []

    def client(i):
        if i in leaving:
            connection = send(server, P, bodies[i])
            time.sleep(lengths.random() * 0.05)
            connection.close()
            return None
        answer = process(server, **bodies[i])
        sizes.append(server.service.engine.running)
        return answer

    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(client, range(100)))
    assert max(sizes) > 1
    wait_until(lambda: server.service.engine.running == 0 and not server.service.engine.waiting)
    for body, answer in zip(bodies, answers, strict=True):
        if answer is not None:
            alone = process(server, **body)
            assert answer["text"] == alone["text"]
            for mine, theirs in zip(answer["tokens"], alone["tokens"], strict=True):
                assert mine["text"] == theirs["text"] and mine["logprob"] == pytest.approx(theirs["logprob"], abs=1e-3)


def test_sampled_answers_do_not_depend_on_who_else_asks(server):
    bodies = [
        {"prompt": random_text(1 + i % 7), "temperature": 0.5 + 0.1 * i, "top_k": i % 4 * 20, "top_p": 1 - i % 3 * 0.2,
         "repetition_penalty": 1 + i % 2 * 0.3, "seed": i, "max_new_tokens": 12, "num_samples": 1 + i % 2}
        for i in range(16)
    ]  # fmt: skip
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda body: process(server, **body), bodies))
    for body, answer in zip(bodies, together, strict=True):
        assert process(server, **body)["text"] == answer["text"]


# ----------------------------------------------------------------------------------------------------------- a process


@contextlib.contextmanager
def child(*args, env=None):
    """The script as a process, and the port that it says it has."""
    command = [sys.executable, str(ROOT / "eval" / "helm_server.py"), *map(str, args), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
        env={**os.environ, **(env or {})},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        match = re.fullmatch(r"serving (.+) on http://127\.0\.0\.1:(\d+)\n", line)
        assert match, line + process.stderr.read()
        yield process, SimpleNamespace(port=int(match[2]), key=(env or {}).get("KEY"))
    finally:
        process.kill()
        process.communicate()


def test_sigterm_ends_what_is_in_progress(tiny_model_dir):
    flags = ("--checkpoint_dir", tiny_model_dir, "--precision", "32-true", "--api_key_env", "KEY")
    with child(*flags, env={"KEY": "open"}) as (process, place):
        assert ask(place, "/health")[0] == 200
        assert ask(place, "/v1/models", headers={"Authorization": "Bearer no"})[0] == 401
        body = {**LONG, "seed": 3, "max_new_tokens": 240, "echo_prompt": False}
        expected = ask(place, P, body)[1]["text"]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(ask, place, P, body) for _ in range(4)]
            wait_until(lambda: metrics(place)["onetune_batch_size"] > 0 or all(a.done() for a in answers))
            process.send_signal(signal.SIGTERM)
            for answer in answers:
                status, content, _ = answer.result()
                assert status == 200 and content["text"] == expected
        assert process.wait(30) == 0
        out, err = process.communicate()
        assert "Traceback" not in err, err
    with pytest.raises(OSError):
        ask(place, "/health")


def test_a_port_that_is_taken(run_script, tiny_model_dir):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = run_script("eval/helm_server.py", "--checkpoint_dir", tiny_model_dir, "--port", port)
    assert code == 2 and err.startswith("error: ") and str(port) in err and err.count("\n") == 1, err


def test_it_listens_to_this_machine_alone_unless_told(tiny_model_dir):
    assert helm_server.Settings(checkpoint_dir=tiny_model_dir).host == "127.0.0.1"
    sock = http_server.bind("::1", 0) if socket.has_ipv6 and has_loopback_6() else http_server.bind("127.0.0.1", 0)
    assert sock.getsockname()[0] in ("::1", "127.0.0.1")
    sock.close()


def has_loopback_6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


def test_a_model_without_bos_or_chat_template(tiny_checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("qwen2"), folder)
    write_tiny_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with serve(folder) as place:
        status, answer, _ = ask(place, H, {"messages": [{"role": "user", "content": "the"}], "temperature": 0})
        assert status == 200 and answer["usage"]["prompt_tokens"] == len(place.tokenizer.encode("the"))
        status, answer, _ = ask(
            place, H, {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}
        )
        assert status == 400 and "system" in answer["error"]["message"]
