"""The JSON objects of OpenAI's API: requests, which are checked, and answers in the form that clients expect. No HTTP.

A field that would change the answer and is not supported is refused; one that would not is ignored.
"""

import time
import uuid
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from inference.serving import Task, Token, answer_tokens, prompt_tokens
from text.tokenizer import Tokenizer

LARGEST = 2**24  # tokens: more than any context
StopText = Annotated[str, Field(min_length=1, max_length=200)]
StopTexts = Annotated[
    list[StopText], Field(max_length=16), BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop or [])
]


class StreamOptions(BaseModel):
    """Whether a stream ends with the number of tokens."""

    include_usage: bool = False


class _Request(BaseModel):
    """What the two kinds of request share. A field that is null counts as not given."""

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
    """The body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_new_tokens: int = Field(16, ge=0, alias="max_tokens")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int = Field(1, ge=1, le=1)

    def prompts(self) -> list[str | list[int]]:
        """All prompts, each a text or a list of ids."""
        several = isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]


class TextPart(BaseModel):
    """A part of a message; other kinds, such as images, are not supported."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def max_new_tokens(self) -> int:
        """As many as the context has room for, if the request gives no number."""
        return self.max_completion_tokens or self.max_tokens or LARGEST

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens to return with each token; None for no log-probabilities at all."""
        return self.top_logprobs or 0 if self.logprobs else None

    def dialog(self) -> list[dict[str, str]]:
        """The messages in the form that text/prompts.py takes."""
        texts = [m.content if isinstance(m.content, str) else "".join(p.text for p in m.content) for m in self.messages]
        return [{"role": m.role, "content": text} for m, text in zip(self.messages, texts, strict=True)]


def error(status: int, message: str, where: str | None = None) -> dict:
    """OpenAI's error object. where: the field that is wrong."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": where, "code": status}}


# ------------------------------------------------------------------------------------------------------------ answers


class Delta(NamedTuple):
    """What is new in answer number `index`: text, its tokens, and at its end the reason ("stop" or "length")."""

    index: int
    text: str
    tokens: list[Token]
    reason: str | None
    error: str | None


class Stream:
    """How far an answer has been sent. Text that may be the start of a stop text is held back until that is known."""

    def __init__(self, tokenizer: Tokenizer, task: Task, index: int):
        self.tokenizer, self.task, self.index = tokenizer, task, index
        self.sent_characters = 0
        self.sent_tokens, self.token_characters = 0, 0  # and the number of characters in these tokens

    def next_delta(self) -> Delta | None:
        """What is new since the last call, or None for nothing. Called by the model's thread after each token."""
        reply, ended = self.task.reply, self.task.ended
        text = reply.text[self.sent_characters : reply.safe_length]
        self.sent_characters += len(text)
        if not (text or ended):  # tokens without text are sent with the character that they begin
            return None
        first = self.sent_tokens
        for piece in reply.pieces[first:]:
            if self.token_characters + len(piece) > self.sent_characters:
                break
            self.token_characters += len(piece)
            self.sent_tokens += 1
        tokens = answer_tokens(self.tokenizer, self.task, first)[: self.sent_tokens - first]
        return Delta(self.index, text, tokens, finish_reason(self.task) if ended else None, self.task.error)


def finish_reason(task: Task) -> str:
    """Why an answer ended, in OpenAI's words."""
    return "stop" if task.reply.stopped else "length"


class Answer:
    """What the answers to both kinds of request share: a choice for each task. name: the model's."""

    def __init__(self, name: str, body: _Request, tokenizer: Tokenizer, tasks: list[Task]):
        self.body, self.tokenizer, self.tasks = body, tokenizer, tasks
        self.base = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}

    def complete(self) -> dict:
        """The answer in one object, when all tasks have ended."""
        choices = [self.choice(i, task) for i, task in enumerate(self.tasks)]
        return {**self.base, "object": self.object, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """How many tokens there are; a prompt with several choices counts once."""
        read = sum(len(task.prompt) for task in self.tasks[:: self.body.n])
        made = sum(task.reply.length for task in self.tasks)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    def wrap(self, *choices: dict) -> dict:
        """A chunk of a stream."""
        chunk = {**self.base, "object": self.chunk_object, "choices": list(choices)}
        return chunk | {"usage": None} if self.body.stream_options.include_usage else chunk

    def last(self) -> list[dict]:
        """The chunks after all choices."""
        return [self.wrap() | {"usage": self.usage()}] if self.body.stream_options.include_usage else []


class Completions(Answer):
    """The answer to /v1/completions. added: for each prompt, how many ids were added before its text: 1 for a BOS."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, name: str, body: CompletionRequest, tokenizer: Tokenizer, tasks: list[Task], added: list[int]):
        super().__init__(name, body, tokenizer, tasks)
        self.added = added
        self.sent = [0] * len(tasks)  # characters in the tokens of each choice that were sent; its text may be ahead
        self.begun = [False] * len(tasks)

    def choice(self, i: int, task: Task) -> dict:
        """Choice number i, complete."""
        text = self.echoed(i) + task.reply.text
        tokens = self.prompt_tokens(i) + answer_tokens(self.tokenizer, task)
        return self.make(i, text, self.logprobs(tokens, 0), finish_reason(task))

    def make(self, i: int, text: str, logprobs: dict | None, reason: str | None) -> dict:
        """A choice, or what is new of it."""
        return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def echoed(self, i: int) -> str:
        """What a choice begins with: the prompt's text if the request asks for it, else nothing."""
        ids = self.tasks[i].prompt[self.added[i // self.body.n] :]
        return self.tokenizer.decode(ids, skip_special=False) if self.body.echo else ""

    def prompt_tokens(self, i: int) -> list[Token]:
        """The tokens of that text, if the request asks for log-probabilities."""
        if not self.body.echo or self.body.logprobs is None:
            return []
        first = i - i % self.body.n  # choice of this prompt: its task has the log-probabilities
        return prompt_tokens(self.tokenizer, self.tasks[first], self.added[i // self.body.n])

    def logprobs(self, tokens: list[Token], start: int) -> dict | None:
        """The log-probabilities of tokens, the first of which begins at character `start`; None if not asked for."""
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

    def first(self) -> list[dict]:
        """The chunks before all choices."""
        return []

    def chunk(self, delta: Delta) -> dict:
        """The chunk with what is new of a choice."""
        i, start, text, tokens = delta.index, self.sent[delta.index], delta.text, delta.tokens
        if not self.begun[i]:
            text, tokens, self.begun[i] = self.echoed(i) + text, self.prompt_tokens(i) + tokens, True
        self.sent[i] += sum(len(token.text) for token in tokens)
        return self.wrap(self.make(i, text, self.logprobs(tokens, start), delta.reason))


class Chat(Answer):
    """The answer to /v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, i: int, task: Task) -> dict:
        """Choice number i, complete."""
        message = {"role": "assistant", "content": task.reply.text}
        logprobs = self.logprobs(answer_tokens(self.tokenizer, task))
        return {"index": i, "message": message, "logprobs": logprobs, "finish_reason": finish_reason(task)}

    def logprobs(self, tokens: list[Token]) -> dict | None:
        """The log-probabilities of tokens; None if not asked for."""
        return {"content": [_chat_token(token) for token in tokens]} if self.body.logprobs else None

    def make(self, i: int, delta: dict, logprobs: dict | None = None, reason: str | None = None) -> dict:
        """The chunk with a part of the message of choice number i."""
        return self.wrap({"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": reason})

    def first(self) -> list[dict]:
        """The chunks before all choices: they begin the messages."""
        return [self.make(i, {"role": "assistant", "content": ""}) for i in range(len(self.tasks))]

    def chunk(self, delta: Delta) -> dict:
        """The chunk with what is new of a choice."""
        content = {"content": delta.text} if delta.text else {}
        return self.make(delta.index, content, self.logprobs(delta.tokens), delta.reason)


def _chat_token(token):
    one = {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode())}
    top = [{"token": text, "logprob": value, "bytes": list(text.encode())} for text, value in token.top.items()]
    return one | {"top_logprobs": top}
