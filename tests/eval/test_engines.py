"""Several engines behind one port: they answer as one would, and what becomes of requests when one is killed."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import operator
import os
import random
import shutil
import signal
import threading
from types import SimpleNamespace

import prometheus_client
import psutil
import pytest
import torch
from fastapi import HTTPException
from safetensors.torch import load_file, save_file
from test_helm_server import (
    GREEDY,
    LONG,
    USER,
    C,
    D,
    H,
    P,
    T,
    ask,
    child,
    metrics,
    random_text,
    send,
    serve,
    wait_until,
)

from eval import engines, front, helm_server
from eval.front import Asked, Front, Held
from shell.cli import UserError

FLAGS = ("--precision", "32-true", "--engines", 2, "--max_batch_size", 8, "--max_queue", 1000)


@pytest.fixture(scope="module")
def endless(tiny_model_dir, tmp_path_factory):
    """The tiny model with a context of 32,768, whose likeliest token never is one that ends an answer."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 2**15}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][:3] = 0  # those of the special tokens
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def two(endless):
    """A front with two engines, in processes. Tests kill engines: each waits until both are there."""
    with child("--checkpoint_dir", endless, *FLAGS) as (process, place):
        place.process = process
        yield place


@pytest.fixture
def both(two):
    wait_until(lambda: states(two) == ["ok", "ok"])
    return two


@pytest.fixture(scope="module")
def lone(endless):
    with serve(endless, max_queue=1000) as place:
        yield place


def states(place):
    return [engine["status"] for engine in ask(place, "/health")[1]["engines"]]


def engines_of(process):
    """The processes of the engines, in the order in which they were started."""
    children = psutil.Process(process.pid).children()
    found = [one for one in children if "spawn_main" in " ".join(one.cmdline())]
    return sorted(found, key=lambda one: one.create_time())


def are_gone(processes):
    return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes)


def text_of(place, path, body):
    """(status, headers, the texts of all choices); a stream's texts joined, None in their place if it ends in error."""
    status, answer, headers = ask(place, path, body)
    if status != 200:
        return status, headers, answer
    if body.get("stream"):
        return status, headers, stream_text(answer)
    choices = answer.get("choices") or answer.get("samples") or [answer]
    return status, headers, [choice["message"]["content"] if path == H else choice["text"] for choice in choices]


def stream_text(answer):
    assert answer.endswith("\n\n")
    events = [event.removeprefix("data: ") for event in answer[:-2].split("\n\n")]
    if "error" in events[-1]:
        problem = json.loads(events[-1])["error"]
        assert problem["code"] == 503 and "ask again" in problem["message"] and "[DONE]" not in events
        events = [*events[:-1], "[DONE]"]
        ended = False
    else:
        ended = True
    assert events[-1] == "[DONE]"
    texts = {}
    for chunk in map(json.loads, events[:-1]):
        for choice in chunk["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
    return [text for _, text in sorted(texts.items())] if ended else None


def random_request(tokens=40):
    """(path, body) of a request whose answer is known beforehand: greedy, or with a seed."""
    prompt, how = random_text(random.randint(1, 50)), random.choice(({"temperature": 0}, {"seed": 7, "top_k": 9}))
    n = random.randint(1, 2)
    kind = random.choice(("process", "text", "stream", "chat", "chat stream"))
    if kind == "process":
        return P, {"prompt": prompt, "max_new_tokens": tokens, "num_samples": n, "echo_prompt": False, **how}
    more = {"max_tokens": tokens, "n": n, "stream": "stream" in kind, **how}
    return (
        (H, {"messages": [{"role": "user", "content": prompt}], **more})
        if "chat" in kind
        else (C, {"prompt": prompt, **more})
    )


# --------------------------------------------------------------------------------------------------------- as one would


def test_they_answer_as_one_would(both, lone):
    requests = [random_request() for _ in range(40)]
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda request: text_of(both, *request), requests))
        expected = list(pool.map(lambda request: text_of(lone, *request), requests))
    for (status, _, text), (_, _, right) in zip(answers, expected, strict=True):
        assert status == 200 and text == right
    said = metrics(both)
    assert min(said[f'onetune_engine_generated_tokens_total{{engine="{n}"}}'] for n in (0, 1)) > 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (T, {"text": "the answer"}),
        (D, {"tokens": [300, 301]}),
        (C, {"prompt": ""}),
        (C, {"prompt": "a", "model": "gpt-4"}),
        (C, {"prompt": "a", "n": 10**9}),
        (C, {"prompt": "a", "n": True}),
        (C, [1]),
        (C, b"{"),
        (C, b'{"a":' * 50_000),
        (C, b"a" * (2**20 + 1)),
        (H, {"messages": USER, "tool_choice": "required"}),
        (P, {}),
        (C, None),
        ("/nowhere?a=b", None),
        ("/v1/models/org%2Fname", None),
        ("/openapi.json", None),
    ],
)
def test_every_path_is_passed_on(both, lone, path, body):
    """Status, and what is said: also of mistakes."""
    (status, answer, headers), (right, expected, theirs) = (ask(place, path, body) for place in (both, lone))
    for one in (answer, expected):
        one.pop("request_time", None)
    assert status == right and answer == expected
    assert headers["content-type"] == theirs["content-type"] and headers["allow"] == theirs["allow"]
    models = [ask(place, "/v1/models")[1]["data"][0]["id"] for place in (both, lone)]
    assert models[0] == models[1] and ask(both, f"/v1/models/{models[0]}")[1]["id"] == models[0]


def test_a_redirection_is_to_the_front(both):
    response = send(both, f"{T}/?a=b", {"text": "a"}).getresponse()
    assert response.status == 307
    assert response.headers["location"] == f"http://127.0.0.1:{both.port}{T}?a=b"


def test_a_prompt_goes_where_its_beginning_is(both):
    """One request after the other, so that both engines are idle each time."""
    beginnings = [random_text(400) for _ in range(2)]
    before = metrics(both)
    for number in range(6):
        body = {"prompt": f"{beginnings[number % 2]} {random_text(3)}", "max_tokens": 1}
        assert ask(both, C, body)[0] == 200
    after = metrics(both)
    hits = [
        after[name] - before[name] for name in ("onetune_prefix_cache_hits_total", "onetune_prefix_cache_prompts_total")
    ]
    assert hits == [4, 6]
    tokens = after["onetune_prefix_cache_tokens_total"] - before["onetune_prefix_cache_tokens_total"]
    reused = after["onetune_prefix_cache_reused_tokens_total"] - before["onetune_prefix_cache_reused_tokens_total"]
    assert 0.6 * tokens < reused < 0.67 * tokens and after["onetune_prefix_cache_bytes"] > 0


def test_metrics_are_sums_and_by_engine(both):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ask(both, C, {"prompt": random_text(5), "max_tokens": 20}), range(8)))
    said = metrics(both)
    for name in (
        "prompt_tokens_total",
        "generated_tokens_total",
        "queue_length",
        "batch_size",
        "prefix_cache_hits_total",
    ):
        each = [said[f'onetune_engine_{name}{{engine="{number}"}}'] for number in (0, 1)]
        assert said[f"onetune_{name}"] >= sum(each)  # engines that have ended count, too
    assert [said[f'onetune_engine_up{{engine="{number}"}}'] for number in (0, 1)] == [1, 1]
    assert said[f'onetune_requests_total{{path="{C}",status="200"}}'] >= 8
    assert said["onetune_queue_length"] == said["onetune_batch_size"] == 0
    assert len([name for name in said if name.startswith("onetune_requests_total")]) < 20


def test_a_client_that_leaves_frees_its_place(both):
    body = {"prompt": "the", "max_tokens": 30_000, "temperature": 0}
    connections = [send(both, C, body), send(both, C, body | {"stream": True})]
    wait_until(lambda: metrics(both)["onetune_batch_size"] == 2)
    for connection in connections:
        connection.close()
    wait_until(lambda: metrics(both)["onetune_batch_size"] == 0)
    said = metrics(both)
    assert [said[f'onetune_engine_answers{{engine="{number}"}}'] for number in (0, 1)] == [0, 0]


# ---------------------------------------------------------------------------------------------- engines that are killed


def test_two_hundred_clients_and_an_engine_is_killed(both, lone):
    """Each gets the right answer, or 503 and when to come back; a stream that has begun may end in an error event."""
    requests = [random_request() for _ in range(200)]
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        expected = list(pool.map(lambda request: text_of(lone, *request), requests))
    begun, starts = threading.Semaphore(0), metrics(both)
    victim = random.choice(engines_of(both.process))

    def client(request):
        answer = text_of(both, *request)
        begun.release()
        return answer

    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        answers = [pool.submit(client, request) for request in requests]
        for _ in range(30):
            begun.acquire()
        assert not all(answer.done() for answer in answers)
        victim.kill()
        answers = [answer.result(timeout=100) for answer in answers]
    counts = {"right": 0, "503": 0, "cut": 0}
    for (status, headers, text), (_, _, right) in zip(answers, expected, strict=True):
        if status == 503:
            assert int(headers["Retry-After"]) >= 1 and "again" in str(text)
        else:
            assert status == 200 and text in (right, None)
        counts["503" if status == 503 else "right" if text else "cut"] += 1
    assert counts["right"] > 100
    wait_until(lambda: states(both) == ["ok", "ok"])
    said, name = metrics(both), "onetune_engine_starts_total"
    assert sum(said[f'{name}{{engine="{n}"}}'] - starts[f'{name}{{engine="{n}"}}'] for n in (0, 1)) == 1
    assert [text_of(both, *request)[2] for request in requests[:5]] == [text for _, _, text in expected[:5]]


def test_a_request_that_has_no_answer_yet_is_asked_again(both, lone):
    """Of whichever engine it was at."""
    body = {"prompt": "the", "max_tokens": 800, "temperature": 0}
    right = text_of(lone, C, body)[2]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(text_of, both, C, body) for _ in range(2)]
        wait_until(lambda: metrics(both)["onetune_batch_size"] == 2)
        random.choice(engines_of(both.process)).kill()
        for answer in answers:
            status, _, text = answer.result(timeout=100)
            assert status == 200 and text == right


def test_without_any_engine(both):
    """A stream that has begun ends with an error event; others get 503 until the engines are there again."""
    streams = [send(both, C, {"prompt": "the", "max_tokens": 30_000, "temperature": 0, "stream": True}) for _ in "ab"]
    responses = [stream.getresponse() for stream in streams]
    assert all(response.readline().startswith(b"data: {") for response in responses)
    waiting = send(both, C, {"prompt": "the", "max_tokens": 30_000, "temperature": 0})
    wait_until(lambda: metrics(both)["onetune_batch_size"] == 3)
    before = metrics(both)
    for engine in engines_of(both.process):
        engine.kill()
    for response in responses:
        rest = response.read().decode()
        assert json.loads(rest[:-2].rpartition("data: ")[2])["error"]["code"] == 503 and "[DONE]" not in rest
    response = waiting.getresponse()
    assert response.status == 503 and int(response.headers["Retry-After"]) >= 1
    wait_until(lambda: states(both) == ["starting", "starting"])
    assert ask(both, "/health")[0] == 503
    for path, body in ((P, LONG), (C, {"prompt": "a"}), ("/v1/models", None)):
        status, answer, headers = ask(both, path, body)
        assert status == 503 and int(headers["Retry-After"]) >= 1 and "try again in" in json.dumps(answer)
    assert metrics(both)["onetune_prompt_tokens_total"] == before["onetune_prompt_tokens_total"]
    wait_until(lambda: states(both) == ["ok", "ok"], 120)
    assert ask(both, "/health")[0] == 200 and ask(both, C, {"prompt": "a"})[0] == 200
    assert metrics(both)["onetune_prompt_tokens_total"] > before["onetune_prompt_tokens_total"]


# ---------------------------------------------------------------------------------------------------- the end of it all


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_is_in_progress_and_all_processes(endless, number):
    """A terminal sends Ctrl-C to the engines, too. The token is asked for, and the metrics have it."""
    flags = ("--checkpoint_dir", endless, *FLAGS, "--api_key_env", "KEY")
    with child(*flags, env={"KEY": "sesame-öffne"}) as (process, place):
        place.key = "sesame-öffne".encode().decode("latin-1")
        assert ask(place, "/v1/models", headers={"Authorization": "Bearer no"})[0] == 401
        assert ask(place, "/metrics", headers={"Authorization": "Bearer no"})[0] == 401
        body = {**GREEDY, "prompt": "the", "max_new_tokens": 300, "echo_prompt": False}
        expected = ask(place, P, body)[1]["text"]
        found = engines_of(process)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(ask, place, P, body) for _ in range(4)]
            wait_until(lambda: metrics(place)["onetune_batch_size"] > 0 or all(answer.done() for answer in answers))
            for engine in found if number == signal.SIGINT else ():
                engine.send_signal(number)
            process.send_signal(number)
            for answer in answers:
                status, content, _ = answer.result()
                assert status == 200 and content["text"] == expected
        assert process.wait(30) == 0 and are_gone(found)
        _, err = process.communicate()
        assert err == "", err
    with pytest.raises(OSError):
        ask(place, "/health")


def test_a_front_that_is_killed_leaves_no_engine(endless):
    with child("--checkpoint_dir", endless, *FLAGS) as (process, place):
        found = psutil.Process(process.pid).children(recursive=True)
        assert len(engines_of(process)) == 2
        connection = send(place, C, {"prompt": "the", "max_tokens": 30_000, "temperature": 0})
        wait_until(lambda: metrics(place)["onetune_batch_size"] == 1)
        process.kill()
        wait_until(lambda: are_gone(found), 20)
        with pytest.raises((http.client.HTTPException, OSError)):
            connection.getresponse()


# --------------------------------------------------------------------------------------------------- parts of the front


@pytest.fixture
def idle(tiny_model_dir):
    """`idle(engines=3)`: a front whose engines count as there, without processes."""

    def make(**flags):
        made = Front(helm_server.Settings(checkpoint_dir=tiny_model_dir, **flags), None)
        for engine in made.engines:
            engine.up = True
        return made

    return make


def test_the_queue_is_one_for_all(idle):
    """As many may wait as for one engine, whichever they wait for."""
    some = idle(engines=2, max_batch_size=4, max_queue=10)
    for answers, fits in (((0, 0), 10), ((4, 4), 10), ((7, 4), 7), ((7, 9), 2), ((9, 9), 0), ((20, 0), 0)):
        some.answers = list(answers)
        for more in range(1, 11):
            refused = contextlib.nullcontext() if more <= fits else pytest.raises(HTTPException)
            with refused as caught:
                some.check_queue(Asked(more, []))
            assert more <= fits or caught.value.status_code == 429 and caught.value.headers["Retry-After"] == "1"
    some.check_queue(Asked(11, []))  # more than ever fits: the engine says what is wrong
    some.check_queue(Asked(0, []))


def test_the_fewest_answers_then_the_longest_beginning(idle):
    some = idle(engines=3)
    some.held[1].add([1, 2])
    some.held[2].add([1, 2, 3])
    cases = (((0, 0, 0), [1, 2, 3, 4], 2), ((0, 0, 0), [9], 0), ((0, 0, 1), [1, 2, 3], 1), ((1, 2, 2), [1, 2, 3], 0))
    for answers, steps, number in cases:
        some.answers = list(answers)
        assert some.choose(Asked(1, steps), set()).number == number
    some.answers = [0, 0, 0]
    assert some.choose(Asked(1, [1, 2, 3]), {some.engines[2]}).number == 1
    some.engines[1].up = some.engines[0].up = False
    assert some.choose(Asked(1, []), set()).number == 2
    assert some.choose(Asked(1, []), {some.engines[2]}) is None


@pytest.mark.parametrize(
    ("body", "answers"),
    [
        ({"prompt": "a"}, 1),
        ({"prompt": ["a", "b"], "n": 3}, 6),
        ({"prompt": [1, 2]}, 1),
        ({"prompt": [[1], [2]]}, 2),
        ({"prompt": "a", "num_return_sequences": 4}, 4),
        ({"messages": [{}, {}], "n": 2}, 2),
        ({"prompt": "a", "n": "x"}, 1),
        ({"prompt": []}, 1),
        ({"text": "a"}, 0),
        (5, 0),
    ],
)
def test_how_many_answers_are_asked_for(body, answers):
    assert front.read(json.dumps(body).encode()).answers == answers


def test_prompts_that_begin_alike_have_steps_in_common():
    shared = random_text(300)
    one, other, third = (
        front.read(json.dumps({"prompt": p}).encode()).steps for p in (shared, shared + " x", "y" + shared)
    )
    assert len(one) >= 4 and other[: len(one)] == one and not set(third) & set(one)
    assert front.read(json.dumps({"prompt": shared, "model": "a"}).encode()).steps[0] != one[0]
    held = Held()
    held.add(one)
    assert (held.of(other), held.of(third), held.of([])) == (len(one), 0, 0)


def test_what_was_held_longest_ago_is_forgotten(monkeypatch):
    monkeypatch.setattr(front, "STEPS_KEPT", 5)
    held = Held()
    for steps in ([1, 2], [3, 4, 5], [1, 2], [6]):
        held.add(steps)
    assert [held.of(steps) for steps in ([1, 2], [3, 4, 5], [6])] == [2, 2, 1]


def test_counters_do_not_fall_when_an_engine_ends(idle):
    some = idle(engines=2).metrics

    def said(tokens, length):
        own = prometheus_client.CollectorRegistry()
        prometheus_client.Counter("onetune_prompt_tokens", "Tokens.", registry=own).inc(tokens)
        prometheus_client.Gauge("onetune_queue_length", "Wait.", registry=own).set(length)
        return prometheus_client.generate_latest(own).decode()

    def shown(name):
        return some.registry.get_sample_value(f"onetune_{name}")

    some.take(0, said(5, 2))
    some.take(1, said(7, 1))
    assert (shown("prompt_tokens_total"), shown("queue_length")) == (12, 3)
    some.end(0)
    assert (shown("prompt_tokens_total"), shown("queue_length")) == (12, 1)
    some.end(1)
    assert (shown("prompt_tokens_total"), shown("queue_length")) == (12, 0)
    some.take(1, said(0, 1))
    some.take(0, said(1, 0))
    assert (shown("prompt_tokens_total"), shown("queue_length")) == (13, 1)


def test_each_engine_has_its_part_of_the_machine(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert engines.environments(3) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert engines.environments(9) == [{"OMP_NUM_THREADS": "1"}] * 9
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert engines.environments(2) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-77")
    assert engines.environments(2) == [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "GPU-77"}]
    with pytest.raises(UserError, match="--engines 3: each needs a GPU of its own, and there are 2"):
        engines.environments(3)


def test_what_is_inherited_is_put_back(monkeypatch):
    monkeypatch.setenv("ONETUNE_A", "before")
    monkeypatch.delenv("ONETUNE_B", raising=False)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with engines.inherited({"ONETUNE_A": "1", "ONETUNE_B": "2"}):
        assert (os.environ["ONETUNE_A"], os.environ["ONETUNE_B"]) == ("1", "2")
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert os.environ["ONETUNE_A"] == "before" and "ONETUNE_B" not in os.environ
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


async def mistaken(text):
    raise UserError(text)


def test_an_engine_that_does_not_start_is_tried_again(monkeypatch, capfd):
    engine = engines.EngineProcess(1, operator.is_, None, {})  # it says nothing, and ends
    with pytest.raises(engines.StartFailed) as caught:
        asyncio.run(engine.start())
    assert caught.value.status == 0 and not engine.up
    pauses = []

    async def note_pause(seconds):
        pauses.append(seconds)
        engine.up = len(pauses) >= 3

    # Not that of the module: a server in a thread of this process sleeps, too.
    own = SimpleNamespace(sleep=note_pause, Event=asyncio.Event, get_running_loop=asyncio.get_running_loop)
    monkeypatch.setattr(engines, "asyncio", own)
    asyncio.run(engine.start_again())
    assert pauses == [1, 2, 4]
    with monkeypatch.context() as broken:
        engine.up = False
        broken.setattr(engine, "start", lambda: mistaken("model/config.json is gone"))
        asyncio.run(engine.start_again())
    lines = capfd.readouterr().err
    assert "note: engine 1: model/config.json is gone; it is started again in 1 s\n" in lines
    assert lines.count("note: engine 1: has ended with status 0 before it was ready;") == 3
