"""The JSON objects of OpenAI's API, both ways: what clients ask, checked, and answers as they expect them. No HTTP.

Fields that would change the answer and are not done here are refused; those that would not are passed over.
"""

import time
import uuid
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from inference.serving import answer_tokens, prompt_tokens

LARGEST = 2**24  # tokens: more than any context
StopText = Annotated[str, Field(min_length=1, max_length=200)]
StopTexts = Annotated[
    list[StopText], Field(max_length=16), BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop or [])
]


class StreamOptions(BaseModel):
    include_usage: bool = False


class _Request(BaseModel):
    """What the two kinds of request share. null is as if the field were not there."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = None
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, ge=0, le=1)
    n: int = Field(1, ge=1)
    stop: StopTexts = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)
    logit_bias: dict[str, float] = Field({}, max_length=0)
    user: str = ""
    metadata: Any = None
    store: Any = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, values):
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


class CompletionRequest(_Request):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_new_tokens: int = Field(16, ge=0, alias="max_tokens")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int = Field(1, ge=1, le=1)

    def prompts(self):
        """Each prompt: a text or a list of ids."""
        several = isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]


class ChatRequest(_Request):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def max_new_tokens(self):
        """As many as the context has room for, if nothing is said."""
        return self.max_completion_tokens or self.max_tokens or LARGEST

    @property
    def top(self):
        """How many likely tokens to note beside each; None for no log-probabilities."""
        return self.top_logprobs or 0 if self.logprobs else None

    def dialog(self):
        """The messages as prompts.py has them."""
        texts = [m.content if isinstance(m.content, str) else "".join(p.text for p in m.content) for m in self.messages]
        return [{"role": m.role, "content": text} for m, text in zip(self.messages, texts, strict=True)]


def error(status, message, where=None):
    """OpenAI's error object."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": where, "code": status}}


# ------------------------------------------------------------------------------------------------------------ answers


class News(NamedTuple):
    """What is new in an answer: text, the tokens that made it, and at its end the reason ("stop" or "length")."""

    index: int
    text: str
    tokens: list
    reason: str | None
    error: str | None


class Stream:
    """What of an answer has been told. Of a text that may become a stop text nothing is, until that is known."""

    def __init__(self, tokenizer, task, index):
        self.tokenizer, self.task, self.index = tokenizer, task, index
        self.shown = 0  # characters
        self.told, self.end = 0, 0  # tokens, and the characters in them

    def news(self):
        """The `News` since the last call, or None. Called by the model's thread after each token."""
        reply, ended = self.task.reply, self.task.ended
        text = reply.text[self.shown : reply.safe_length]
        self.shown += len(text)
        first = self.told
        while self.told < len(reply.pieces) and self.end + len(reply.pieces[self.told]) <= self.shown:
            self.end += len(reply.pieces[self.told])
            self.told += 1
        if not (text or ended):
            self.told = first  # they go with the character that they begin
            return None
        tokens = answer_tokens(self.tokenizer, self.task, first)[: self.told - first]
        return News(self.index, text, tokens, finish_reason(self.task) if ended else None, self.task.error)


def finish_reason(task):
    return "stop" if task.reply.stopped else "length"


class _Answer:
    """What the answers to both kinds of request share."""

    def __init__(self, name, body, tokenizer, tasks):
        self.body, self.tokenizer, self.tasks = body, tokenizer, tasks
        self.base = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    def whole(self):
        choices = [self.choice(i, task) for i, task in enumerate(self.tasks)]
        return {**self.base, "object": self.object, "choices": choices, "usage": self.usage()}

    def usage(self):
        read = sum(len(task.prompt) for task in self.tasks[:: self.body.n])
        made = sum(task.reply.length for task in self.tasks)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    def wrap(self, *choices):
        chunk = {**self.base, "object": self.chunk_object, "choices": list(choices)}
        return chunk | {"usage": None} if self.body.stream_options.include_usage else chunk

    def last(self):
        """The chunks after all answers."""
        return [self.wrap() | {"usage": self.usage()}] if self.body.stream_options.include_usage else []


class Completions(_Answer):
    """The answer to /v1/completions. added: for each prompt, how many of its ids are not of its text: a BOS."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, name, body, tokenizer, tasks, added):
        super().__init__(name, body, tokenizer, tasks)
        self.added = added
        self.sent = [0] * len(tasks)  # characters of each choice in the tokens that went out; the text may be ahead
        self.begun = [False] * len(tasks)

    def choice(self, i, task):
        text = self.echoed(i) + task.reply.text
        tokens = self.prompt_tokens(i) + answer_tokens(self.tokenizer, task)
        return self.make(i, text, self.logprobs(tokens, 0), finish_reason(task))

    def make(self, i, text, logprobs, reason):
        return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def echoed(self, i):
        """What a choice begins with: the prompt's text if it is wanted, or nothing."""
        ids = self.tasks[i].prompt[self.added[i // self.body.n] :]
        return self.tokenizer.decode(ids, skip_special=False) if self.body.echo else ""

    def prompt_tokens(self, i):
        if not self.body.echo or self.body.logprobs is None:
            return []
        first = i - i % self.body.n  # of the choices for this prompt: it noted the log-probabilities
        return prompt_tokens(self.tokenizer, self.tasks[first], self.added[i // self.body.n])

    def logprobs(self, tokens, start):
        if self.body.logprobs is None:
            return None
        offsets = [start]
        for token in tokens:
            offsets.append(offsets[-1] + len(token.text))
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [token.top if token.logprob is not None else None for token in tokens],
            "text_offset": offsets[:-1],
        }

    def first(self):
        return []

    def chunk(self, news):
        i, start, text, tokens = news.index, self.sent[news.index], news.text, news.tokens
        if not self.begun[i]:
            text, tokens, self.begun[i] = self.echoed(i) + text, self.prompt_tokens(i) + tokens, True
        self.sent[i] += sum(len(token.text) for token in tokens)
        return self.wrap(self.make(i, text, self.logprobs(tokens, start), news.reason))


class Chat(_Answer):
    """The answer to /v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, i, task):
        message = {"role": "assistant", "content": task.reply.text}
        logprobs = self.logprobs(answer_tokens(self.tokenizer, task))
        return {"index": i, "message": message, "logprobs": logprobs, "finish_reason": finish_reason(task)}

    def logprobs(self, tokens):
        return {"content": [_chat_token(token) for token in tokens]} if self.body.logprobs else None

    def delta(self, i, delta, logprobs=None, reason=None):
        return self.wrap({"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": reason})

    def first(self):
        return [self.delta(i, {"role": "assistant", "content": ""}) for i in range(len(self.tasks))]

    def chunk(self, news):
        delta = {"content": news.text} if news.text else {}
        return self.delta(news.index, delta, self.logprobs(news.tokens), news.reason)


def _chat_token(token):
    one = {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode())}
    top = [{"token": text, "logprob": value, "bytes": list(text.encode())} for text, value in token.top.items()]
    return one | {"top_logprobs": top}
