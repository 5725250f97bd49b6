"""The JSON objects of the LLM Efficiency Challenge's API: requests, which are checked, and answers. No HTTP."""

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from eval.openai_api import Sampling, StopTexts
from inference.serving import Task, answer_tokens, prompt_tokens
from text.tokenizer import Tokenizer


class Strict(BaseModel):
    """A body whose fields have the right types. Unknown fields are ignored: HELM's client sends more than these."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ProcessRequest(Sampling):
    """The body of POST /process, with the challenge's names and those that HELM's client uses.

    HELM's top_k_per_token is the number of likeliest tokens to return for each position (helm.common.request), 1 unless
    a scenario asks for more. It does not limit the sampling, as top_k does.

    adapter is ours: which of several is to answer, by name.
    """

    prompt: str
    adapter: str | None = None
    n: int = Field(1, ge=1, validation_alias=AliasChoices("num_samples", "num_return_sequences"))
    max_new_tokens: int = Field(50, ge=0)
    temperature: float = Field(0.8, ge=0)
    top_k: int = Field(200, ge=0)
    top_k_per_token: int = Field(1, ge=0, le=100)
    echo_prompt: bool | None = None
    stop: StopTexts = Field([], validation_alias=AliasChoices("stop_sequences", "stop"))

    @property
    def echo(self) -> bool:
        """Whether the answer begins with the prompt: unless echo_prompt is false, so also where it is null."""
        return self.echo_prompt is not False


class TokenizeRequest(Strict):
    """The body of POST /tokenize."""

    text: str
    truncation: bool = True
    max_length: int = Field(2048, ge=0)


class DecodeRequest(Strict):
    """The body of POST /decode."""

    tokens: list[int]


def process_answer(tokenizer: Tokenizer, body: ProcessRequest, tasks: list[Task], added: int) -> dict:
    """text, tokens and logprob of the first sample, which is all that HELM reads; of all in "samples", if several.

    added: how many ids were added before the prompt's text: 1 for a BOS, which is not among the tokens. Without a BOS
    no distribution predicts the first token of a prompt: its logprob is 0 and its top_logprob empty.
    """
    before = prompt_tokens(tokenizer, tasks[0], added) if body.echo else []
    samples = []
    for task in tasks:
        tokens = [
            {"text": token.text, "logprob": token.logprob or 0.0, "top_logprob": token.top}
            for token in (*before, *answer_tokens(tokenizer, task))
        ]
        text = (body.prompt if body.echo else "") + task.reply.text
        samples.append({"text": text, "tokens": tokens, "logprob": sum(token["logprob"] for token in tokens)})
    return samples[0] | ({"samples": samples} if len(samples) > 1 else {})
