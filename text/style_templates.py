"""Every prompt style as a Jinja chat template, so that other programs render prompts as our training did.

transformers, vLLM and llama.cpp know nothing of `prompts.STYLES`: they render a conversation with the chat template in
the model folder. `save_chat_template` writes there the template of the style that a model was trained in.

What is equal to `prompts.encode_dialog` and `encode_prompt`, token for token (tests/text/test_style_templates.py):

- the prompt up to the first answer, in every style with every tokenizer;
- the whole conversation as well, if no answer begins with white space, with two exceptions. In vicuna, llama2-chat and
  mistral-instruct a space stands before an answer; byte-level BPE joins it to the answer's first word, where training
  has two tokens. In plain, the last token of a question and the first of its answer may become one token, unless the
  question ends in a line break.

What differs on purpose: a special token that a user writes out, such as "</s>", is ordinary text here and a special
token in those programs. And transformers' Llama tokenizer drops a space at the start of a sequence, where SentencePiece
keeps it.
"""

from pathlib import Path

from shell.files import read_json, write_json
from text.messages import Dialog
from text.prompts import STYLES, TOOL_LISTS
from text.tokenizer import Tokenizer
from text.vocabulary import has_tokenizer

# The templates use: `bos`, the text that this tokenizer's sequences begin with, mostly BOS's; `start`, what a sequence
# starts with; `end`, the token that ends an answer; `gap`, the space before an answer that is still to come, empty
# where the tokenizer's dummy prefix takes its place; `listing`, what stands before, between and after listed tools.

_TURNS = r"""
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = none %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}
        {{- raise_exception('user and assistant must take turns, after at most one system message') }}
    {%- endif %}
{%- endfor %}"""

_ONE_QUESTION = r"""
{%- if turns|length > 2 %}
    {{- raise_exception('this prompt style has one question and one answer') }}
{%- endif %}"""

_PLAIN = r"""
{%- if system is not none %}
    {{- raise_exception('this prompt style has no place for a system message') }}
{%- endif %}
{%- set question = turns[0]['content'] %}
{%- set answer = turns[1]['content'] if turns|length > 1 else '' %}
{{- start + (question[:-1] if not gap and not answer and question[-1:] == ' ' else question) }}
{%- if turns|length > 1 %}
    {{- answer + end }}
{%- endif %}"""

_INSTRUCTION = r"""
{{- start + (system or 'Below is an instruction that describes a task. Write a response that appropriately completes the request.') }}
{{- '\n\n### Instruction:\n' + turns[0]['content'] }}
{%- if turns|length > 1 %}
    {{- '\n\n### Response:\n' + turns[1]['content'] + end }}
{%- elif add_generation_prompt %}
    {{- '\n\n### Response:\n' }}
{%- endif %}"""  # noqa: E501

_VICUNA = r"""
{{- start + (system or "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions.") }}
{%- for message in turns %}
    {%- if message['role'] == 'user' %}
        {{- ('USER: ' if loop.index0 else ' USER: ') + message['content'] }}
    {%- else %}
        {{- ' ASSISTANT:' + (' ' if message['content'] else gap) + message['content'] + end }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ' ASSISTANT:' + gap }}
{%- endif %}"""  # noqa: E501

_LLAMA2_CHAT = r"""
{%- for message in turns %}
    {%- if message['role'] == 'user' %}
        {%- set text = message['content'] %}
        {%- if loop.index0 == 0 and system is not none %}
            {%- set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + text %}
        {%- endif %}
        {{- (bos if loop.index0 else start) + '[INST] ' + text|trim + ' [/INST]' }}
    {%- else %}
        {{- (' ' if message['content'] else gap) + message['content'] + end }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- gap }}
{%- endif %}"""

_MISTRAL_INSTRUCT = r"""
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- set ns = namespace(before='assistant') %}
{{- start }}
{%- if tools %}
    {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{%- for message in turns %}
    {%- set role, text = message['role'], message['content'] or '' %}
    {%- if role not in {'assistant': ['user'], 'user': ['assistant'], 'calls': ['tool'], 'tool': ['tool', 'assistant']}[ns.before] %}
        {{- raise_exception('user and assistant must take turns, after at most one system message') }}
    {%- endif %}
    {%- set ns.before = 'calls' if message['tool_calls'] else role %}
    {%- if role == 'user' %}
        {{- '[INST] ' + (system + '\n\n' if system and loop.index0 == 0 else '') + text + ' [/INST]' }}
    {%- elif role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + (text | tojson) }}
        {{- (', "call_id": ' + (message['tool_call_id'] | tojson) if message['tool_call_id'] else '') + '}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- (' ' if text or message['tool_calls'] else gap) + text }}
        {%- if message['tool_calls'] %}
            {{- '[TOOL_CALLS] [' }}
            {%- for call in message['tool_calls'] %}
                {%- set function = call['function'] or call %}
                {{- (', ' if loop.index0 else '') + '{"name": ' + (function['name'] | tojson) }}
                {{- ', "arguments": ' + (function['arguments'] | tojson) }}
                {{- (', "id": ' + (call['id'] | tojson) if call['id'] else '') + '}' }}
            {%- endfor %}
            {{- ']' }}
        {%- endif %}
        {{- end }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- gap }}
{%- endif %}"""  # noqa: E501

# The tools are listed at the end of the system message: `listing` is what stands before and after them.
_WITH_TOOLS = r"""
{{- start }}
{%- if tools %}
    {%- set ns = namespace(text=listing[0]) %}
    {%- for tool in tools %}
        {%- set ns.text = ns.text + (listing[1] if loop.index0 else '') + (tool | tojson) %}
    {%- endfor %}
    {%- set text = ns.text + listing[2] %}
    {%- set has_system = messages[0]['role'] == 'system' %}
    {%- if has_system and messages[0]['content'] %}
        {%- set text = messages[0]['content'] + '\n\n' + text %}
    {%- endif %}
    {%- set messages = [{'role': 'system', 'content': text}] + messages[1 if has_system else 0:] %}
{%- endif %}"""

_CHATML = r"""
{%- for message in messages %}
    {%- set text = message['content'] or '' %}
    {{- ('\n' if loop.index0 else '') + '<|im_start|>' + message['role'] }}
    {{- (' name=' + message['name'] if message['name'] else '') + '\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- set thinking = message['thinking'] or message['reasoning_content'] %}
        {{- ('<think>\n' + thinking + '\n</think>\n\n' if thinking else '') + text }}
        {%- for call in message['tool_calls'] or [] %}
            {%- set function = call['function'] or call %}
            {{- ('\n' if text or loop.index0 else '') + '<tool_call>\n{"name": ' + (function['name'] | tojson) }}
            {{- ', "arguments": ' + (function['arguments'] | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- end }}
    {%- else %}
        {{- text + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\n<|im_start|>assistant\n' }}
{%- endif %}"""

_LLAMA3 = r"""
{%- for message in messages %}
    {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
    {%- set text = message['content'] or '' %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
    {%- if role == 'assistant' %}
        {{- text }}
        {%- for call in message['tool_calls'] or [] %}
            {%- set function = call['function'] or call %}
            {{- ('\n' if text or loop.index0 else '') + '{"name": ' + (function['name'] | tojson) }}
            {{- ', "parameters": ' + (function['arguments'] | tojson) + '}' }}
        {%- endfor %}
        {{- end }}
    {%- else %}
        {{- (text | trim) + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

# A style that is not here is rendered by our own scripts alone; `checkpoint` is the base model's own template.
TEMPLATES = {
    "plain": _TURNS + _ONE_QUESTION + _PLAIN,
    "alpaca": _TURNS + _ONE_QUESTION + _INSTRUCTION,
    "dolly": _TURNS + _ONE_QUESTION + _INSTRUCTION,
    "vicuna": _TURNS + _VICUNA,
    "llama2-chat": _TURNS + _LLAMA2_CHAT,
    "llama3": _WITH_TOOLS + _LLAMA3,
    "mistral-instruct": _MISTRAL_INSTRUCT,
    "chatml": _WITH_TOOLS + _CHATML,
}


def chat_template(tokenizer: Tokenizer, style: str) -> str:
    """The Jinja source of a style of `TEMPLATES`, with this tokenizer's tokens written into it."""
    dialog = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    segments = STYLES[style](tokenizer, Dialog(dialog))
    bos = tokenizer.begin_text
    first = tokenizer.split(segments[0].text, special=segments[0].kind == "template")[0]
    start = "" if bos and first == tokenizer.begin_ids[0] else bos  # a BOS that the style writes is not doubled
    if bos and tokenizer.prefix == "first" and isinstance(first, str):
        start += " "  # the dummy prefix, which those programs leave out after a BOS that is written out
    end = next(segment.text for segment in segments if segment.kind == "end")
    values = {"bos": bos, "start": start, "end": end, "gap": "" if tokenizer.has_prefix else " "}
    if style in TOOL_LISTS:
        text, between = TOOL_LISTS[style]
        before, _, after = text.partition("TOOLS")
        values["listing"] = [before, between, after]
    # ascii() writes a text as both Python and Jinja read it.
    return "".join(f"{{%- set {name} = {text!a} %}}\n" for name, text in values.items()) + TEMPLATES[style].lstrip()


def save_chat_template(folder: Path, style: str | None) -> str:
    """Make the template of the style that a model was trained in the chat template of its folder.

    style: None if it is not known; then, and for `checkpoint`, the base model's template stays as it was copied.
    Returns a line for the user, which says what the template now is. The template goes where the folder has one:
    chat_template.jinja, which all programs prefer to the key in tokenizer_config.json, and otherwise that key.
    """
    if style is None:
        return "chat template: the base model's, since the adapter does not say in which prompt style it was trained"
    if style == "checkpoint":
        return "chat template: the base model's, in which it was trained"
    if style not in TEMPLATES:
        return f"chat template: the base model's, NOT prompt style {style}, for which style_templates.py has none"
    config_path, jinja_path = Path(folder, "tokenizer_config.json"), Path(folder, "chat_template.jinja")
    if not has_tokenizer(folder):
        return f"chat template: none, since there is no tokenizer; the model was trained in prompt style {style}"
    template = chat_template(Tokenizer(folder), style)
    config = read_json(config_path) if config_path.is_file() else None
    if jinja_path.is_file() or config is None:
        jinja_path.write_text(template, encoding="utf-8")
        template = None
    if config is not None:
        config.pop("chat_template", None)
        write_json(config_path, config | ({"chat_template": template} if template else {}))
    return f"chat template: prompt style {style}, in which it was trained"
