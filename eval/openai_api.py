"""The JSON objects of OpenAI's API: requests, which are checked, and answers in the form that clients expect. No HTTP.

A field that would change the answer and is not supported is refused, in words of its own (`ONE_VALUE`); one that would
not is ignored (`IGNORED`). docs/serving.md lists them all.
"""

import time
import uuid
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from inference.sampling import Reply
from inference.serving import Task, Token, answer_tokens, prompt_tokens
from shell.cli import UserError
from text.messages import Dialog, read_messages, read_tools
from text.tokenizer import Tokenizer
from text.tool_calls import Parsed, parse_calls, settled

LARGEST = 2**24  # tokens: more than any context
StopText = Annotated[str, Field(min_length=1, max_length=200)]
StopTexts = Annotated[
    list[StopText], Field(max_length=16), BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop or [])
]

IGNORED = {  # fields that do not change an answer: what they are for
    "user": "names the user to OpenAI",
    "safety_identifier": "names the user to OpenAI",
    "metadata": "notes of the client on an answer that OpenAI stores",
    "store": "whether OpenAI stores the answer: nothing is stored here",
    "service_tier": "how soon OpenAI answers, at what price",
    "prompt_cache_key": "which requests OpenAI's cache of prompts takes together",
    "prompt_cache_retention": "how long that cache keeps a prompt",
    "prediction": "what the answer may repeat: OpenAI is faster then",
}
ONE_VALUE = {  # fields that have one meaning here: the values that have it, and what is said to any other
    "logit_bias": ([{}], "logit_bias is not supported"),
    "suffix": ([""], "suffix is not supported: the model writes on at the end of a prompt"),
    "best_of": ([1], "best_of is not supported: n answers are made, and none is chosen among them"),
    "response_format": ([{"type": "text"}], "response_format VALUE is not supported: only text is"),
    "modalities": ([["text"]], "modalities VALUE is not supported: only text is"),
    "tool_choice": (["auto", "none"], "tool_choice that forces a function is not supported: only auto and none are"),
    "functions": ([[]], "functions is not supported: name them under tools"),
    "function_call": (["auto", "none"], "function_call is not supported: there is tool_choice, auto or none"),
    "reasoning_effort": ([], "reasoning_effort is not supported: a template's variables are in chat_template_kwargs"),
    "verbosity": ([], "verbosity is not supported"),
    "audio": ([], "audio is not supported: only text is"),
    "web_search_options": ([], "web_search_options is not supported"),
}


class Sampling(BaseModel):
    """How tokens are chosen, as both APIs have it. The defaults of temperature and top_k differ."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    top_p: float = Field(1.0, ge=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)


class StreamOptions(BaseModel):
    """Whether a stream ends with the number of tokens. include_obfuscation (OpenAI's padding of chunks) is ignored."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class _Request(Sampling):
    """What the two kinds of request share. A field that is null counts as not given."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    temperature: float = Field(1.0, ge=0)
    top_k: int = Field(0, ge=0)
    n: int = Field(1, ge=1)
    stop: StopTexts = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, values):
        """Leave out what is null or ignored; refuse what is unknown or not supported."""
        if not isinstance(values, dict):
            return values
        known = {field.alias or name for name, field in cls.model_fields.items()}
        given = {name: value for name, value in values.items() if value is not None}
        for name, value in given.items():
            if name in ONE_VALUE:
                _check_value(name, value)
            elif name not in known and name not in IGNORED:
                raise _mistake(name, f"{_short(name)} is not a field that this server knows")
        return {name: value for name, value in given.items() if name in known}


def _check_value(name, value):
    """Raise an error of the validator in words of our own unless a field has a value that is supported."""
    values, words = ONE_VALUE[name]
    if not any(value == one and type(value) is type(one) for one in values):
        kind = value.get("type") if isinstance(value, dict) else value
        raise _mistake(name, words.replace("VALUE", _short(kind)))


def _short(value):
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("ascii", "backslashreplace").decode()  # the client chose it: it may be anything
    return text if len(text) <= 80 else text[:77] + "..."


def _mistake(field, message):
    """An error for pydantic, with the words that the client is to read, and the field that is wrong."""
    return PydanticCustomError("mistake", "{message}", {"message": message, "field": _short(field)})


def _reader(field, read):
    """A validator that reads a field by a function of text/messages.py."""

    def reading(value):
        try:
            return read(value)
        except UserError as error:
            raise _mistake(field, str(error)) from None

    return BeforeValidator(reading)


class CompletionRequest(_Request):
    """The body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_new_tokens: int = Field(16, ge=0, alias="max_tokens")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False

    def prompts(self) -> list[str | list[int]]:
        """All prompts, each a text or a list of ids."""
        several = isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions. chat_template_kwargs (vLLM's name): for the checkpoint's template."""

    messages: Annotated[list[dict[str, Any]], _reader("messages", read_messages)]
    tools: Annotated[list[dict[str, Any]], _reader("tools", read_tools)] = []
    tool_choice: Literal["auto", "none"] = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = {}
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

    @property
    def tool_names(self) -> list[str]:
        """Of the tools that the model is shown: with the tool_choice "none" it sees none, so that it calls none."""
        return [tool["function"]["name"] for tool in self.dialog.tools]

    @property
    def dialog(self) -> Dialog:
        """What the model is to answer."""
        tools = [] if self.tool_choice == "none" else [_without_strict(tool) for tool in self.tools]
        return Dialog(self.messages, tools, self.chat_template_kwargs)


def _without_strict(tool):
    """A tool without OpenAI's `strict`: nothing here holds arguments to their schema, and the model need not know."""
    function = {key: value for key, value in tool["function"].items() if key != "strict"}
    return {**tool, "function": function}


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

    def can_be_sent(self, reply: Reply, sent: int) -> int:
        """How many characters of an answer so far can be sent, if so many have been: what may be a stop text waits."""
        return reply.safe_length

    def wrap(self, *choices: dict) -> dict:
        """A chunk of a stream."""
        chunk = {**self.base, "object": self.chunk_object, "choices": list(choices)}
        return chunk | {"usage": None} if self.body.stream_options.include_usage else chunk

    def last(self) -> list[dict]:
        """The chunks after all choices."""
        return [self.wrap() | {"usage": self.usage()}] if self.body.stream_options.include_usage else []


class Stream:
    """How far choice number `index` of an answer has been sent."""

    def __init__(self, answer: Answer, index: int):
        self.answer, self.index, self.task = answer, index, answer.tasks[index]
        self.sent_characters = 0
        self.sent_tokens, self.token_characters = 0, 0  # and the number of characters in these tokens

    def next_delta(self) -> Delta | None:
        """What is new since the last call, or None for nothing. Called by the model's thread after each token."""
        reply, ended = self.task.reply, self.task.ended
        end = len(reply.text) if ended else self.answer.can_be_sent(reply, self.sent_characters)
        text = reply.text[self.sent_characters : end]
        self.sent_characters += len(text)
        if not (text or ended):  # tokens without text are sent with the character that they begin
            return None
        first = self.sent_tokens
        for piece in reply.pieces[first:]:
            if self.token_characters + len(piece) > self.sent_characters:
                break
            self.token_characters += len(piece)
            self.sent_tokens += 1
        tokens = answer_tokens(self.answer.tokenizer, self.task, first)[: self.sent_tokens - first]
        return Delta(self.index, text, tokens, finish_reason(self.task) if ended else None, self.task.error)


def finish_reason(task: Task) -> str:
    """Why an answer ended, in OpenAI's words."""
    return "stop" if task.reply.stopped else "length"


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
    """The answer to /v1/chat/completions. A thought stays in the content, as the model writes it."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, name: str, body: ChatRequest, tokenizer: Tokenizer, tasks: list[Task]):
        super().__init__(name, body, tokenizer, tasks)
        self.tool_names = body.tool_names
        self.sent = [0] * len(tasks)  # characters of each content

    def choice(self, i: int, task: Task) -> dict:
        """Choice number i, complete."""
        content, calls = self.parse(task)
        message = {"role": "assistant", "content": content}
        if calls:
            message = {"role": "assistant", "content": content or None, "tool_calls": calls}
        logprobs = self.logprobs(answer_tokens(self.tokenizer, task))
        reason = _reason(finish_reason(task), calls)
        return {"index": i, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def parse(self, task: Task) -> Parsed:
        """The text and the calls of an answer that has ended. Without tools there are no calls to look for."""
        if not self.tool_names:
            return Parsed(task.reply.text, [])
        content, calls = parse_calls(task.reply.text, self.tool_names)
        return Parsed(content, calls if self.body.parallel_tool_calls else calls[:1])

    def can_be_sent(self, reply: Reply, sent: int) -> int:
        """As in `Answer`; with tools, what may be a call waits too, until the answer has ended."""
        safe = super().can_be_sent(reply, sent)
        return max(sent, settled(reply.text[:safe], sent)) if self.tool_names else safe

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
        """The chunk with what is new of a choice; the last has all its calls."""
        i, text, calls = delta.index, delta.text, []
        if delta.reason:
            content, calls = self.parse(self.tasks[i])
            text = content[self.sent[i] :]
        self.sent[i] += len(text)
        message = {"content": text} if text else {}
        if calls:
            message["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
        return self.make(i, message, self.logprobs(delta.tokens), _reason(delta.reason, calls))


def _reason(reason, calls):
    """The finish_reason of a message: "tool_calls" in the place of "stop" if it has some."""
    return "tool_calls" if calls and reason == "stop" else reason


def _chat_token(token):
    one = {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode())}
    top = [{"token": text, "logprob": value, "bytes": list(text.encode())} for text, value in token.top.items()]
    return one | {"top_logprobs": top}
