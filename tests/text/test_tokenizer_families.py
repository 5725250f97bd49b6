"""Every check for the tokenizer of every family (tokenizer_families.py), against transformers; what is refused."""

import json
import random
import re
import unicodedata
from functools import cache, partial
from pathlib import Path

import pytest
from conftest import write_tiny_tokenizer
from test_tokenizer import CHATML, LEADING_SPACE, LOOK_ALIKES, ORDINARY, assistant, make_llama, system, targets, user

from preparation.rendering import cut_document
from shell.cli import UserError
from text.prompts import STYLES, encode_dialog, encode_prompt, stop_ids
from text.style_templates import TEMPLATES, chat_template
from text.tokenizer import StreamDecoder, Tokenizer

transformers = pytest.importorskip("transformers")

from tokenizer_families import FAMILIES, GPT2, byte_level, named, old_byte_level, template

FRAGMENTS = [
    *(text for text in ORDINARY if len(text) < 100),
    *LOOK_ALIKES,
    "x",
    "9",
    "don't",
    "U.S.",
    "\n\n",
    "1.5",
    "x▁y",
]
SPACES = [" ", "  ", "     ", " " * 40, "\t\t", " \n "]
OWN_TEMPLATES = Path(__file__).with_name("chat_templates")
each_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """`family("opt")`: (the row, our tokenizer, transformers'), each made once."""

    @cache
    def make(name):
        folder = tmp_path_factory.mktemp("family") / name
        FAMILIES[name].write(folder)
        return FAMILIES[name], Tokenizer(folder), FAMILIES[name].load(folder)

    return make


def some_text(more=()):
    return "".join(random.choices([*FRAGMENTS, *SPACES, *more], k=random.randint(1, 8)))


def texts(row, more=()):
    """Nasty texts and random ones. None begins with a space where transformers would leave out the dummy prefix."""
    found = [*ORDINARY, "", *([] if row.prefix else LEADING_SPACE), *(some_text(more) for _ in range(40))]
    return [text.lstrip(" ▁") for text in found] if row.prefix else found


def as_normalised(theirs, text):
    """What a text is after the tokenizer's normaliser: some compose characters."""
    library = theirs.backend_tokenizer
    text = unicodedata.normalize("NFC", text) if type(library.normalizer).__name__ == "NFC" else text
    return text if type(library.decoder).__name__ == "ByteLevel" else text.replace("▁", " ")


def added(theirs, special):
    return [token.content for token in theirs.added_tokens_decoder.values() if token.special is special]


# ------------------------------------------------------------------------------------------------------------ the ids


@each_family
def test_ids_of_texts(name, family):
    row, ours, theirs = family(name)
    special = added(theirs, True)
    for text in texts(row):
        if any(token in text for token in special):  # which is a user's, and stays text: see below
            continue
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == expected, text
        assert ours.encode(text, special=True) == expected, text
        assert ours.with_begin(expected) == theirs.encode(text), text


@each_family
def test_ids_of_template_text(name, family):
    """Special tokens and added ones that are not special, such as runs of spaces, anywhere."""
    row, ours, theirs = family(name)
    special = added(theirs, True)
    tokens = [*special, *(token for token in added(theirs, False) if "▁▁" not in token)]  # SentencePiece's spaces
    for _ in range(60):
        text = "".join(random.choices([*FRAGMENTS, *SPACES, *tokens, *special * 5], k=6))
        for token in special if row.prefix else ():  # transformers has no dummy prefix before a space
            text = re.sub(f"({re.escape(token)})[ ▁]+", r"\1", text).lstrip(" ▁")
        assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False), text


@each_family
def test_special_tokens_and_ends(name, family):
    row, ours, theirs = family(name)
    assert ours.begin_ids == tuple(theirs.convert_tokens_to_ids(list(row.begins)))
    assert ours.begin_text == "".join(row.begins)
    assert (ours.eos_token, ours.eos_id) == (row.ends, theirs.eos_token_id)
    assert ours.eos_ids == {theirs.eos_token_id}
    assert ours.vocab_size == len(theirs)
    special = {id for id in range(ours.vocab_size) if not ours.token_bytes(id, skip_special=True)}
    assert special >= {id for id, token in theirs.added_tokens_decoder.items() if token.special}


@each_family
def test_a_users_text_has_no_special_tokens(name, family):
    _, ours, theirs = family(name)
    special = {id for id, token in theirs.added_tokens_decoder.items() if token.special}
    for token in added(theirs, True):
        for text in (token, f"a{token}b", f"{token}  {token}"):
            for start in (True, False):
                ids = ours.encode(text, start=start)
                assert not special & set(ids), text
                assert ours.decode(ids, start=start) == as_normalised(theirs, text)


@each_family
def test_decode_inverts_encode_and_streams(name, family):
    row, ours, theirs = family(name)
    for text in [*texts(row), *LEADING_SPACE]:
        ids = ours.encode(text)
        stream = StreamDecoder(ours)
        pieces = [stream.push(id) for id in ids]
        assert ours.decode(ids) == "".join(pieces) + stream.flush() == as_normalised(theirs, text)


@each_family
def test_decoding_equals_transformers(name, family):
    row, ours, theirs = family(name)
    decode = partial(theirs.decode, clean_up_tokenization_spaces=False)
    if name == "gpt2-with-prefix":
        pytest.skip("transformers leaves the dummy prefix in a byte-level text")
    tokens = [*added(theirs, True), *added(theirs, False)]
    for text in texts(row, tokens):
        ids = [*ours.encode("a" + text), *ours.encode(some_text(tokens), special=True, start=False), ours.eos_id]
        for skip in (True, False):
            found = ours.decode(ids, skip_special=skip)
            assert found == decode(ids, skip_special_tokens=skip), text


# -------------------------------------------------------------------------------------------------- prompts and answers


@each_family
@pytest.mark.parametrize("style", STYLES)
def test_a_sample_begins_and_ends_as_the_family_has_it(name, style, family, monkeypatch):
    row, ours, theirs = family(name)
    monkeypatch.setattr(ours, "chat_template", CHATML)
    question, answer = some_text(), "A" + some_text().replace("▁", "")
    [(ids, is_target)] = encode_dialog(ours, [user(question), assistant(answer)], style)
    prompt = encode_prompt(ours, [user(question)], style)
    assert ids[: len(prompt)] == prompt and is_target == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    count = len(row.begins)
    assert tuple(prompt[:count]) == ours.begin_ids
    found = targets(ids, is_target)
    assert found[-1] in stop_ids(ours, style)
    assert found[-1] == ours.eos_id or style in ("chatml", "checkpoint") and "<|im_end|>" in ours.end_texts
    for id in {*ours.begin_ids, ours.bos_id, ours.eos_id} - {None}:
        assert id not in found[:-1]
        assert id not in prompt[count:] or row.ends in ("<|im_end|>", "<|eot_id|>")  # which these styles write
    assert ours.decode(found) == as_normalised(theirs, answer)


@each_family
@pytest.mark.parametrize("style", TEMPLATES)
def test_a_styles_template_gives_the_same_prompt_in_transformers(name, style, family):
    _, ours, theirs = family(name)
    source = chat_template(ours, style)
    for _ in range(5):
        messages = [user(random.choice("Aé9日") + "".join(random.choices(ORDINARY[:4], k=3)) + "\n")]
        messages = [system("Be kind."), *messages] if style != "plain" else messages
        expected = theirs.apply_chat_template(
            messages, chat_template=source, add_generation_prompt=True, return_dict=False
        )
        assert encode_prompt(ours, messages, style) == expected


@each_family
def test_many_turns(name, family):
    row, ours, _ = family(name)
    dialog = [system("Be kind."), user("one"), assistant("first"), user("two"), assistant("second")]
    for style in ("vicuna", "llama2-chat", "mistral-instruct"):
        [(ids, is_target)] = encode_dialog(ours, dialog, style)
        assert (
            ours.decode(targets(ids, is_target), skip_special=False).replace(" ", "")
            == f"first{row.ends}second{row.ends}"
        )
        begins = 2 if style == "llama2-chat" else 1
        assert all(ids.count(id) == begins + 2 * (id == ours.eos_id) for id in ours.begin_ids)


@each_family
def test_pieces_of_a_document(name, family):
    _, ours, _ = family(name)
    [(ids, _)] = encode_dialog(ours, [user(""), assistant("Some words. " * 40)], "plain")
    count, seen = len(ours.begin_ids), []
    for piece in cut_document(ids, 16, 0, ours):
        assert tuple(piece.ids[:count]) == ours.begin_ids and piece.is_target == [False] * count + [True] * (
            len(piece.ids) - count
        )
        seen += piece.ids[count:]
    assert seen == ids[count:]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("gemma", "gemma"), ("gemma", "gemma-3"), ("gemma-model", "gemma"), ("phi-3", "phi-3"), ("phi-3", "phi-4-mini"),
        ("phi-4", "phi-4"), ("llama-3", "llama-3"), ("qwen2", "qwen2.5"), ("smollm3", "chatml"),
        ("mixtral", "mistral-v1"), ("cohere", "command-r"), ("mpt-chat", "chatml"),
    ],
)  # fmt: skip
def test_the_familys_chat_template(name, file, family, monkeypatch):
    _, ours, theirs = family(name)
    source = (OWN_TEMPLATES / f"{file}.jinja").read_text()
    monkeypatch.setattr(ours, "chat_template", source)
    for _ in range(5):
        first, second = ("Q" + "".join(random.choices(ORDINARY[:8], k=3)).strip() for _ in range(2))
        dialog = [user(first), assistant("One two."), user(second)]
        for messages in (dialog[:1], dialog):
            expected = theirs.apply_chat_template(
                messages, chat_template=source, add_generation_prompt=True, return_dict=False
            )
            assert encode_prompt(ours, messages, "checkpoint") == ours.with_begin(expected)
        [(ids, is_target)] = encode_dialog(ours, [*dialog, assistant("Three.")], "checkpoint")
        ends = ours.decode(targets(ids, is_target)[-1:], skip_special=False)
        assert ids[: len(ours.with_begin(expected))] == ours.with_begin(expected)
        assert ends in ours.end_texts and ours.decode(targets(ids, is_target)).replace(" ", "") == "Onetwo.Three."


# ------------------------------------------------------------------------------------- older files, and contradictions


def both(folder):
    return Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("says", [True, False, None])
@pytest.mark.parametrize("puts", [True, False])
def test_tokenizer_json_says_what_a_sequence_begins_with(puts, says, tmp_path, capsys):
    post = template("<s>") if puts else None
    config = named(bos="<s>", eos="</s>") | ({} if says is None else {"add_bos_token": says})
    byte_level(tmp_path, GPT2, ("<s>", "</s>"), post=post, tokenizer_class="PreTrainedTokenizerFast", **config)
    ours, theirs = both(tmp_path)
    assert ours.with_begin(ours.encode("a")) == theirs.encode("a") and ours.begin_ids == ((0,) if puts else ())
    note = capsys.readouterr().err
    assert ("add_bos_token" in note and str(tmp_path) in note) is (says is not None and says is not puts)


@pytest.mark.parametrize("lists", [True, False])
def test_special_tokens_map_counts_unless_the_config_lists_tokens(lists, tmp_path):
    listed = {
        "added_tokens_decoder": {"1": {"content": "</s>", "special": True}, "2": {"content": "<e>", "special": True}}
    }
    byte_level(
        tmp_path, GPT2, ("<s>", "</s>", "<e>"), special_map={"eos_token": {"content": "<e>"}}, eos_token="</s>",
        tokenizer_class="PreTrainedTokenizerFast", **(listed if lists else {}),
    )  # fmt: skip
    ours, theirs = both(tmp_path)
    assert ours.eos_id == theirs.eos_token_id == (1 if lists else 2)


def test_no_dummy_prefix_if_the_config_says_so(tmp_path):
    ours, plain = (
        Tokenizer(make_llama(tmp_path / "no", add_prefix_space=False)),
        Tokenizer(make_llama(tmp_path / "yes")),
    )
    assert (ours.prefix, plain.prefix) == ("never", "always")
    for text in ORDINARY:
        assert ours.encode(text) == plain.encode(text, start=False)
        assert ours.decode(ours.encode(text)) == text


def test_white_space_that_a_token_swallows_is_unicodes(tmp_path):
    """Python takes U+001C to U+001F for blanks too."""
    byte_level(tmp_path, GPT2, (), late={"<e>": {"lstrip": True, "rstrip": True}}, eos_token="<e>")
    ours, theirs = both(tmp_path)
    for blank in " \t\n\x0b\x0c\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b\ufeff":
        text = f"a{blank}<e>{blank}b"
        assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False), repr(blank)


def test_gpt2s_files_are_part_of_the_hash(tmp_path):
    old_byte_level(tmp_path, ("<|endoftext|>",), model_type="gpt2")
    before = Tokenizer(tmp_path).file_hash()
    merges = (tmp_path / "merges.txt").read_text().splitlines()
    (tmp_path / "merges.txt").write_text("\n".join(merges[:-1]))
    assert Tokenizer(tmp_path).file_hash() != before


# -------------------------------------------------------------------------------------------------- what is refused


def with_model(folder, **parts):
    write_tiny_tokenizer(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(spec | parts))


def gpt2_files(folder, merges=None, vocab=True, **config):
    old_byte_level(folder, ("<|endoftext|>",), **config)
    if merges:
        (folder / "merges.txt").write_text(merges)
    if not vocab:
        (folder / "vocab.json").unlink()


WORD_PIECE = {
    "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
    "vocab": {"[UNK]": 0, "a": 1},
}  # fmt: skip
WORD_LEVEL = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁a", -1.0]], "byte_fallback": False}
T5_SPLIT = {
    "type": "Sequence",
    "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}],
}
T5 = {"model": UNIGRAM, "pre_tokenizer": T5_SPLIT, "decoder": {"type": "Metaspace", "replacement": "▁"}}
REMOVES = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
REFUSED = {
    "bert": (partial(with_model, model=WORD_PIECE, decoder={"type": "WordPiece"}), "a WordPiece vocabulary"),
    "word-level": (partial(with_model, model=WORD_LEVEL, decoder=None), "a WordLevel vocabulary"),
    "t5": (partial(with_model, **T5), "pre-tokeniser WhitespaceSplit drops"),
    "removes": (partial(with_model, pre_tokenizer=REMOVES), "pre-tokeniser Split drops"),
    "clip": (partial(gpt2_files, tokenizer_class="CLIPTokenizer"), "not for CLIPTokenizer"),
    "of-no-class": (partial(gpt2_files, model_type="bart"), "not for bart"),
    "of-nothing": (gpt2_files, "not for a model without"),
    "merges-alone": (partial(gpt2_files, vocab=False, model_type="gpt2"), "no tokenizer.json, tokenizer.model"),
    "other-merges": (partial(gpt2_files, merges="Q@ @Q\n", model_type="gpt2"), "merges.txt: the tokenizers library"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(kind, tmp_path):
    write, message = REFUSED[kind]
    write(tmp_path)
    with pytest.raises(UserError, match=message) as found:
        Tokenizer(tmp_path)
    assert str(tmp_path) in str(found.value) and "\n" not in str(found.value)
