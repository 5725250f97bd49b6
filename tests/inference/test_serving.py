"""The thread that owns the model: prompts in chunks between the steps of others, and steps that are recorded once.

tests/eval/test_helm_server.py asks over HTTP.
"""

import random
import threading
import time

import pytest
import torch
from conftest import Ids
from families.replay import ReplayedDecoder

from generate import Settings
from inference import serving
from inference.decode import CompiledDecoder, Decoder, StaticDecoder
from inference.sampling import Batch, Row
from inference.serving import Engine, Task
from ops.cpp import compiled_library
from weights.checkpoint import load_model

needs_compiler = pytest.mark.skipif(not compiled_library("decode_cpu"), reason="no C++ compiler")
DECODERS = pytest.mark.parametrize(
    "kind", [Decoder, StaticDecoder, pytest.param(CompiledDecoder, marks=needs_compiler)]
)


@pytest.fixture(scope="session")
def model(tiny_checkpoint):
    """A window of 7 in a context of 256. Not to be changed."""
    return load_model(tiny_checkpoint("mistral"), torch.float32)


class Client:
    """Sends tasks to an engine and waits for them. tasks: all of them, in order."""

    def __init__(self, engine):
        self.engine, self.tasks, self.ended = engine, [], {}

    def ask(self, length, tokens, **options):
        """A task with a random prompt, in the queue."""
        return self.ask_for([random.randrange(3, 512) for _ in range(length)], tokens, **options)

    def ask_for(self, prompt, tokens, **options):
        """A task with this prompt, in the queue."""
        s = Settings(checkpoint_dir="any", temperature=0, max_new_tokens=tokens)
        task = Task(prompt, Ids(), s, 0, notify=self.note, **options)
        self.ended[task] = threading.Event()
        self.tasks.append(task)
        self.engine.submit([task])
        return task

    def note(self, task):
        if task.ended:
            self.ended[task].set()

    def wait(self, *tasks):
        for task in tasks or self.tasks:
            assert self.ended[task].wait(60)


@pytest.fixture
def served(model):
    """`served(decoder, rows)`: a `Client` of an engine with room for so many rows."""
    engines = []

    def make(decoder, rows=8):
        engines.append(Engine(decoder, rows, 1000))
        return Client(engines[-1])

    yield make
    for engine in engines:
        engine.close()
        assert not engine.alive


def alone(model, task):
    """What a task's answer would be alone, in the plainest decoder and with its prompt read at once: a `Row`."""
    row, batch = Row(task.prompt, Ids(), task.settings, 0, task.top, task.score_prompt), Batch(Decoder(model))
    batch.add([row])
    while batch.going:
        batch.step()
    return row


def assert_same_scores(got, right):
    assert len(got) == len(right)
    for one, other in zip(got, right, strict=True):
        assert (one is None) == (other is None)
        assert one is None or one.logprob == pytest.approx(other.logprob, abs=1e-4)


class Noting:
    """What a decoder does, in order: "step", or (rows, positions) of a chunk. Each waits until `go` lets it."""

    def __init__(self, decoder, monkeypatch):
        self.events, self.gate, self.fail = [], threading.Semaphore(0), False
        extend, step = decoder.extend, decoder.step

        def noted_extend(tokens, cache, scores=None):
            if scores is not None:  # in a decoding step it is None
                self.note(tuple(tokens.shape))
                if self.fail:
                    raise RuntimeError("broken")
            return extend(tokens, cache, scores)

        def noted_step(ids):
            self.note("step")
            return step(ids)

        monkeypatch.setattr(decoder, "extend", noted_extend)
        monkeypatch.setattr(decoder, "step", noted_step)

    def note(self, event):
        self.gate.acquire()
        self.events.append(event)

    def go(self, times=10**5):
        self.gate.release(times)

    def go_until_chunks(self, number):
        """Go on until so many chunks have been begun: one event at a time."""
        while len(self.chunks()) < number:
            before = len(self.events)
            self.go(1)
            wait_until(lambda before=before: len(self.events) > before)

    def chunks(self):
        return [event for event in self.events if event != "step"]


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@DECODERS
def test_a_long_prompt_is_read_between_the_steps_of_others(model, kind, served, monkeypatch):
    """A chunk and a step in turn; nothing in the answers, nor in the prompt's log-probabilities, shows it."""
    monkeypatch.setattr(serving, "CHUNK_BETWEEN_STEPS", 16)
    decoder = kind(model)
    noted, client = Noting(decoder, monkeypatch), served(decoder)
    first = client.ask(5, 120)
    noted.go_until_chunks(1)
    long = client.ask(150, 20, top=3, score_prompt=True)
    noted.go()
    client.wait()
    assert noted.chunks() == [(1, 5), *[(1, 16)] * 9, (1, 6)]
    begun = noted.events.index((1, 16))
    assert noted.events[begun : begun + 19] == [(1, 16), "step"] * 9 + [(1, 6)]
    for task in (first, long):
        right = alone(model, task)
        assert task.reply.ids == right.reply.ids and len(task.reply.ids) == task.settings.max_new_tokens
        assert_same_scores(task.prompt_scores, right.prompt_scores)
        assert_same_scores(task.scores, right.scores)


def test_prompts_are_read_in_larger_chunks_while_nobody_waits(model, served, monkeypatch):
    monkeypatch.setattr(serving, "CHUNK_BETWEEN_STEPS", 16)
    monkeypatch.setattr(serving, "CHUNK", 50)
    decoder = Decoder(model)
    noted, client = Noting(decoder, monkeypatch), served(decoder)
    noted.go()
    client.wait(client.ask(120, 3))
    assert noted.chunks() == [(1, 50), (1, 50), (1, 20)]


@pytest.mark.parametrize("chunk", [1, 7, 30])
@DECODERS
def test_rows_that_are_read_together(model, kind, chunk):
    """Chunks are of columns: a short prompt may begin in the last one. One row is dropped on the way."""
    lengths = [3, 40, 1, 17, 29]
    s = Settings(checkpoint_dir="any", temperature=0, max_new_tokens=6)
    prompts = [[random.randrange(3, 512) for _ in range(n)] for n in lengths]
    rows = [Row(prompt, Ids(), s, 0, 2, i % 2 == 0) for i, prompt in enumerate(prompts)]
    batch, dropped = Batch(kind(model)), rows[1]
    batch.begin(rows)
    assert batch.read(chunk) == [] and batch.joining == rows
    dropped.dropped = True
    while batch.joining:
        assert not batch.going
        joined = batch.read(chunk)
    assert joined == batch.going == [row for row in rows if row is not dropped]
    while batch.going:
        batch.step()
    assert dropped.reply.ids == []
    for row in joined:
        right = alone(model, row)
        assert row.reply.ids == right.reply.ids
        assert_same_scores(row.prompt_scores, right.prompt_scores)


@DECODERS
def test_a_task_that_is_cancelled_while_its_prompt_is_read(model, kind, served, monkeypatch):
    """No more of it is read, its place is free at once, and the answers beside it go on."""
    monkeypatch.setattr(serving, "CHUNK_BETWEEN_STEPS", 16)
    decoder = kind(model)
    noted, client = Noting(decoder, monkeypatch), served(decoder, rows=2)
    running = client.ask(5, 200)
    noted.go_until_chunks(1)
    cancelled = client.ask(100, 5)
    noted.go_until_chunks(3)
    assert client.engine.running == 2
    client.engine.cancel([cancelled])
    assert client.engine.running == 1
    next = client.ask(9, 5)
    noted.go()
    client.wait(running, next)
    assert cancelled.reply.ids == [] and not client.ended[cancelled].is_set()
    assert noted.chunks().count((1, 16)) <= 3 and noted.chunks()[-1] == (1, 9)
    for task in (running, next):
        assert task.reply.ids == alone(model, task).reply.ids


@DECODERS
def test_a_model_that_fails_while_it_reads_a_prompt(model, kind, served, monkeypatch, capsys):
    """All that are there are told, and later tasks are answered."""
    monkeypatch.setattr(serving, "CHUNK_BETWEEN_STEPS", 16)
    decoder = kind(model)
    noted, client = Noting(decoder, monkeypatch), served(decoder)
    running = client.ask(5, 240)
    noted.go_until_chunks(1)
    long = client.ask(100, 5)
    noted.go_until_chunks(3)
    noted.fail = True
    noted.go()
    client.wait()
    assert "broken" in running.error and "broken" in long.error and "broken" in capsys.readouterr().err
    noted.fail = False
    again = client.ask(40, 9)
    client.wait(again)
    assert again.error is None and again.reply.ids == alone(model, again).reply.ids


def test_closing_ends_a_reading(model, monkeypatch):
    decoder = Decoder(model)
    monkeypatch.setattr(serving, "CHUNK", 16)
    noted, client = Noting(decoder, monkeypatch), Client(Engine(decoder, 4, 10))
    task = client.ask(200, 5)
    noted.go_until_chunks(2)
    closing = threading.Thread(target=client.engine.close)
    closing.start()
    wait_until(lambda: task.dropped)
    noted.go()
    closing.join(60)
    assert not client.engine.alive and task.reply.ids == [] and client.engine.running == 0
    assert len(noted.chunks()) <= 3


def test_rows_that_were_all_dropped_since_the_caller_looked(model):
    s = Settings(checkpoint_dir="any", temperature=0, max_new_tokens=9)
    row, batch = Row([5, 6], Ids(), s, 0), Batch(StaticDecoder(model))
    batch.add([row])
    row.dropped = True
    batch.step()
    assert len(row.reply.ids) == 1 and not batch.going


def test_a_hundred_requests_record_each_layout_once(model, served, monkeypatch):
    """Memory grows a few times, after which each number of slots and size of a slot is recorded, and only replayed."""
    monkeypatch.setattr("inference.slots.LEAST_ROOM", 16)
    decoder = ReplayedDecoder(model)
    client = served(decoder, rows=8)
    changes, take, keep = [], decoder.take, decoder.keep
    monkeypatch.setattr(decoder, "take", lambda *args: changes.append("take") or take(*args))
    monkeypatch.setattr(decoder, "keep", lambda rows: changes.append("keep") or keep(rows))
    for _ in range(100):
        client.ask(random.choice((1, 5, 20, 60, 120)), random.choice((1, 3, 10, 20)))
    client.wait()
    assert len(changes) > 100
    buckets = [(count, room) for count in (1, 2, 4, 8) for room in (16, 32, 64, 128, 256)]
    sizes = sorted({count * room for count, room in buckets})  # memory grows to some of them
    assert len(decoder.layouts) <= 1 + len(sizes)
    for layouts in decoder.layouts:
        assert len(layouts) == len(set(layouts)) and set(layouts) <= set(buckets)
    assert set(decoder.layouts[-1]) == set(decoder.recorded)
    assert sum(map(len, decoder.layouts)) < len(changes) / 2
    for task in random.sample(client.tasks, 20):
        assert task.reply.ids == alone(model, task).reply.ids
