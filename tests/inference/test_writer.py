"""What a model and its adapter say about prompts, and tokens for which the model has no row."""

import json
import shutil

import pytest
from conftest import CHATML
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library
from tokenizers.processors import TemplateProcessing

from inference.writer import trained_style
from shell.cli import UserError
from text.prompts import encode_prompt
from text.tokenizer import Tokenizer

OWN = "{% for m in messages %}<|im_start|>{{ m.role[0] }}: {{ m.content }}<|im_end|>{% endfor %}A:"


def edit_json(path, **changes):
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in {**values, **changes}.items() if value is not None}))


@pytest.fixture
def folders(tiny_model_dir, tmp_path):
    """A model folder, and a folder for an adapter (here only what it says about prompts matters)."""
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    return tmp_path / "model", tmp_path / "adapter"


def style_and_template(base, adapter, style=None):
    tokenizer = Tokenizer(base)
    return trained_style(base, adapter, tokenizer, style), tokenizer.chat_template


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("base_has_one", [True, False])
def test_the_template_that_an_adapter_brings_is_used(folders, place, base_has_one, capsys):
    base, adapter = folders
    if not base_has_one:
        edit_json(base / "tokenizer_config.json", chat_template=None)
    (adapter / place).write_text(json.dumps({"chat_template": OWN}) if place.endswith("json") else OWN)
    assert style_and_template(base, adapter) == ("checkpoint", OWN)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"note: the chat template is that of {adapter}, not that of {base}"
    assert style_and_template(base, adapter, "checkpoint") == ("checkpoint", OWN)
    assert style_and_template(base, adapter, "alpaca")[0] == "alpaca"
    tokenizer = Tokenizer(base)
    style = trained_style(base, adapter, tokenizer)
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "b"}], style)
    assert tokenizer.decode(ids, skip_special=False).startswith("<|im_start|>u: b<|im_end|>")


def test_what_our_training_says_comes_before_a_template(folders, capsys):
    base, adapter = folders
    (adapter / "chat_template.jinja").write_text(OWN)
    for style in ("alpaca", "checkpoint"):
        edit_json(adapter / "onetune.json", prompt_style=style)
        assert style_and_template(base, adapter) == (style, CHATML)
    assert capsys.readouterr().err == ""


def test_the_same_template_needs_no_note(folders, capsys):
    base, adapter = folders
    assert style_and_template(base, adapter) == ("checkpoint", CHATML)
    (adapter / "chat_template.jinja").write_text(CHATML)
    assert style_and_template(base, adapter) == ("checkpoint", CHATML)
    assert capsys.readouterr().err == ""


def test_a_damaged_template_of_an_adapter(folders):
    base, adapter = folders
    edit_json(adapter / "tokenizer_config.json", chat_template=5)
    with pytest.raises(UserError, match="adapter: its chat template is damaged"):
        style_and_template(base, adapter)


# -------------------------------------------------------------------------------------------- tokens without a row


def add_tokens(folder, texts, special):
    """Add tokens to a tokenizer, as `tokenizer.add_tokens` and `save_pretrained` do; the model stays as it is."""
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.add_tokens([AddedToken(text, special=special) for text in texts])
    library.save(str(folder / "tokenizer.json"))


def put_before(folder, token):
    """Make a tokenizer put a token before each text."""
    library = Library.from_file(str(folder / "tokenizer.json"))
    tokens = [(token, library.token_to_id(token))]
    library.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=tokens)
    library.save(str(folder / "tokenizer.json"))


def test_tokens_without_a_row_do_no_harm_until_they_are_used(folders):
    base, _ = folders
    add_tokens(base, ["<pad>", "<tool>"], special=True)
    tokenizer = Tokenizer(base)
    assert tokenizer.vocab_size == 514
    assert max(tokenizer.encode("a user may write <pad> and <tool>")) < 512
    expected = r"model: the model has 512 rows .*none for '<tool>' \(513\), '<pad>' \(512\): .*resize_token_embeddings"
    with pytest.raises(UserError, match=expected) as error:
        tokenizer.encode("a <tool><tool><pad>", special=True)
    assert "\n" not in str(error.value)


def test_tokens_of_a_users_text_without_a_row(folders):
    base, _ = folders
    add_tokens(base, [f"<{i}>" for i in range(5)], special=False)
    with pytest.raises(UserError, match=r"'<0>' \(512\), '<1>' \(513\), '<2>' \(514\) and 2 more"):
        Tokenizer(base).encode("<0><1><2><3><4>")


def test_a_template_with_a_token_without_a_row(folders):
    base, _ = folders
    add_tokens(base, ["<|user|>"], special=True)
    edit_json(
        base / "tokenizer_config.json", chat_template="{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"none for '<\|user\|>' \(512\)"):
        encode_prompt(Tokenizer(base), [{"role": "user", "content": "b"}], "checkpoint")


@pytest.mark.parametrize("changes", [dict(eos_token="<end>"), dict(bos_token="<end>")])
def test_the_tokens_of_every_sequence_need_a_row(folders, changes):
    base, _ = folders
    add_tokens(base, ["<end>"], special=True)
    edit_json(base / "tokenizer_config.json", **changes)
    if "bos_token" in changes:
        put_before(base, "<end>")
    with pytest.raises(UserError, match=r"none for '<end>' \(512\)"):
        Tokenizer(base)
    (base / "config.json").unlink()
    assert Tokenizer(base).encode("<end>", special=True) == [512]  # nothing says how many rows there are


def test_rows_without_a_token_are_padding(folders):
    base, _ = folders
    edit_json(base / "config.json", vocab_size=1024)
    assert Tokenizer(base).encode("<|im_end|>", special=True) == [2]
