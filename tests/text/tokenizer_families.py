"""Tokenizers as model families have them, trained small.

`FAMILIES` has a row for each; test_tokenizer_families.py makes every check for every row. The pieces are trained on
made-up words; normaliser, pre-tokeniser, post-processor, decoder, added tokens and settings are the family's.
"""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Punctuation, Sequence, Split
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = CL100K.replace("{1,3}", "")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!-/:-~]?[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s+(?!\S)|\s+",
)

END = "<|endoftext|>"
CHATML = (END, "<|im_start|>", "<|im_end|>")
FIM = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")
GEMMA_TURNS = ("<start_of_turn>", "<end_of_turn>")


class Family(NamedTuple):
    """A row. begins, ends: the tokens at a sequence's ends. write: makes the tokenizer's files in a folder.

    prefix: whether a text gets a dummy prefix, which transformers leaves out before a space. load: the reference.
    """

    begins: tuple[str, ...]
    ends: str
    write: Callable[[Path], None]
    prefix: bool = False
    load: Callable = AutoTokenizer.from_pretrained


def words():
    """Lines of made-up words, with what else texts have: numbers, punctuation, indents and other scripts."""
    made = random.Random(0)
    syllables = [a + b for a in "bdfglmnprst" for b in ("a", "e", "i", "o", "u", "an", "er")]
    names = ["".join(made.choices(syllables, k=made.randint(1, 3))) for _ in range(300)]
    lines = [" ".join(made.choices(names, k=8)).capitalize() + ".\n" for _ in range(150)]
    lines += ["Hello, world! It's 1234567, isn't it?\n\n", "def f(x):\n    return x ** 2  # ok\n", "日本語のテキスト\n"]
    return lines * 3


def write_configs(folder, model_type, special_map, config):
    """config.json with a model_type, special_tokens_map.json and tokenizer_config.json; no file for None."""
    folder.mkdir(exist_ok=True)
    files = {"config": model_type and {"model_type": model_type}, "special_tokens_map": special_map}
    for name, value in (files | {"tokenizer_config": config}).items():
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value))


def byte_level(
    folder, pre, special, *, normalizer=None, post=None, added=(), late=(), ignore_merges=False, model_type=None,
    special_map=None, **config,
):  # fmt: skip
    """tokenizer.json of a byte-level BPE. special: the first ids; late: after the vocabulary; added: not special."""
    write_configs(folder, model_type, special_map, config)
    library = train_byte_level(pre, special, normalizer)
    library.model.ignore_merges = ignore_merges
    late = {token: {} for token in late} if not isinstance(late, dict) else late
    library.add_special_tokens([AddedToken(token, normalized=False, **flags) for token, flags in late.items()])
    library.add_tokens(list(added))
    library.post_processor = post and post(library)
    library.save(str(folder / "tokenizer.json"))


def old_byte_level(folder, special, *, added=(), model_type=None, special_map=None, **config):
    """vocab.json and merges.txt of GPT-2's byte-level BPE, and added_tokens.json."""
    write_configs(folder, model_type, special_map, config)
    library = train_byte_level(GPT2, special)
    library.model.save(str(folder))
    if added:
        ids = {token.content: id for id, token in enumerate(added, library.get_vocab_size())}
        (folder / "added_tokens.json").write_text(json.dumps(ids))


def train_byte_level(pre, special, normalizer=None):
    library = Tokenizer(models.BPE())
    library.normalizer, library.pre_tokenizer, library.decoder = normalizer, pre, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=list(special), initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator(words(), trainer)
    return library


def gemma(folder, *, json_file, **config):
    """SentencePiece's BPE without dummy prefix: tokenizer.json, or tokenizer.model."""
    config |= named(bos="<bos>", eos="<eos>", pad="<pad>", unk="<unk>") | {"tokenizer_class": "GemmaTokenizer"}
    write_configs(folder, "gemma2", None, config)
    names = dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3, eos_piece="<eos>", bos_piece="<bos>")
    user = ("<mask>", *GEMMA_TURNS, "\n", "\n\n", "▁▁", "▁▁▁", "<table>")
    train_sentencepiece(folder, add_dummy_prefix=False, user_defined_symbols=list(user), **names)
    if json_file:
        library = as_library(folder, special=["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *GEMMA_TURNS], added=user)
        library.normalizer = normalizers.Replace(" ", "▁")
        library.pre_tokenizer = Split(" ", "merged_with_previous")
        library.save(str(folder / "tokenizer.json"))


def llama(folder, *, prepend, model_type, late=(), **config):
    """tokenizer.json of SentencePiece's BPE, with a dummy prefix that is prepended or by a Metaspace ("first")."""
    config |= {"tokenizer_class": "LlamaTokenizer", "legacy": prepend, "add_bos_token": True}
    write_configs(folder, model_type, None, config | named(bos="<s>", unk="<unk>"))
    train_sentencepiece(folder, add_dummy_prefix=True, unk_id=0, bos_id=1, eos_id=2)
    library = as_library(folder, special=["<unk>", "<s>", "</s>"], strip=[decoders.Strip(" ", 1, 0)])
    if prepend:
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        library.pre_tokenizer = Metaspace("▁", prepend_scheme="first", split=False)
    library.add_special_tokens([AddedToken(token, normalized=False, **flags) for token, flags in dict(late).items()])
    library.save(str(folder / "tokenizer.json"))


def train_sentencepiece(folder, **how):
    """tokenizer.model: BPE of 700 pieces with byte fallback."""
    corpus, model = folder / "corpus", folder / "tokenizer"
    corpus.write_text("".join(words()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(model), model_type="bpe", vocab_size=700, byte_fallback=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity", split_digits=True,
        allow_whitespace_only_pieces=True, minloglevel=2, **how,
    )  # fmt: skip
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()


def as_library(folder, special, added=(), strip=()):
    """The tokenizer.model in a folder, which is removed, as a `Tokenizer` that begins with BOS."""
    raw = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    (folder / "tokenizer.model").unlink()
    vocab = {raw.id_to_piece(i): i for i in range(raw.get_piece_size())}
    merges = generate_merges(vocab, {piece: raw.get_score(id) for piece, id in vocab.items()}, special)
    library = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    tokens = [
        AddedToken(token, normalized=False, special=token in special)
        for token in {**dict.fromkeys(special), **dict.fromkeys(added)}
    ]
    for token in tokens:
        (library.add_special_tokens if token.special else library.add_tokens)([token])
    library.post_processor = template(raw.id_to_piece(raw.bos_id()))(library)
    return library


def splits(*patterns):
    """A pre-tokeniser that cuts at these patterns, one after the other."""
    cuts = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return Sequence([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])


def template(*begins):
    """A post-processor that puts these tokens before a text."""

    def make(library):
        tokens = [(token, library.token_to_id(token)) for token in begins]
        return processors.TemplateProcessing(
            single=[*begins, "$A"], pair=[*begins, "$A", "$B:1"], special_tokens=tokens
        )

    return make


def after_bytes(*begins):
    """The same after another post-processor, as in Llama 3."""
    return lambda library: processors.Sequence([processors.ByteLevel(trim_offsets=False), template(*begins)(library)])


def trims(library):
    """The post-processor of byte-level BPE without BOS."""
    return processors.ByteLevel(trim_offsets=True)


def named(**names):
    """The keys of tokenizer_config.json that name special tokens."""
    return {f"{name}_token": token for name, token in names.items()}


def as_object(token):
    """A token as special_tokens_map.json writes it; in tokenizer_config.json of 2021 it has a type too."""
    return {"content": token, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def typed(token):
    return {"__type": "AddedToken", **as_object(token)}


def runs(letter, longest):
    return [AddedToken(letter * n, normalized=True, special=False) for n in range(longest, 1, -1)]


def marked(*names):
    return tuple(f"<|{name}|>" for name in names)


def load_json_instead(folder):
    """transformers reads tokenizer.model with protobuf alone: the same vocabulary as a tokenizer.json."""
    FAMILIES["gemma"].write(folder / "json")
    return AutoTokenizer.from_pretrained(folder / "json")


GPT2, NFC = ByteLevel(add_prefix_space=False), normalizers.NFC()
DIGITS = Sequence([Digits(True), GPT2])
FALCON = Sequence([Punctuation("contiguous"), GPT2, Digits(False), Split(Regex("[0-9][0-9][0-9]"), "isolated")])
ONE_END = named(bos=END, eos=END, unk=END)
BOTH_STRIP = {"lstrip": True, "rstrip": True}
NEOX = {"pre": GPT2, "normalizer": NFC, "post": trims, "added": runs(" ", 24)}
SPACES_AND_TABS = [*runs(" ", 31), *runs("\t", 9)]
FALCONS = (">>TITLE<<", ">>ABSTRACT<<", ">>QUESTION<<")
COHERES = ("<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<EOS_TOKEN>")
LLAMA3S = marked("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
DEEPSEEKS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>")
PHI3S, PHI4S = marked("assistant", "system", "end", "user"), marked("im_start", "im_sep", "im_end")
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}

FAMILIES = {
    "gpt-neox": Family((), END, partial(  # Pythia, RedPajama, StableLM
        byte_level, **NEOX, special=(END, "<|padding|>"), model_type="gpt_neox", tokenizer_class="GPTNeoXTokenizerFast",
        add_prefix_space=False, add_bos_token=False, **ONE_END,
    )),
    "mpt-chat": Family((), "<|im_end|>", partial(
        byte_level, **NEOX, special=(END, "<|padding|>"), late=CHATML[1:], model_type="mpt",
        tokenizer_class="GPTNeoXTokenizer", **named(bos=END, eos="<|im_end|>", unk=END),
    )),
    "olmo": Family((), END, partial(
        byte_level, pre=GPT2, normalizer=NFC, post=trims, special=("|||IP_ADDRESS|||", "<|padding|>"), late=(END,),
        added=[AddedToken("|||EMAIL|||"), *runs(" ", 24)], model_type="olmo", tokenizer_class="GPTNeoXTokenizerFast",
        **named(bos=None, eos=END, pad="<|padding|>"),
    )),
    "gpt2": Family((), END, partial(old_byte_level, special=(END,), model_type="gpt2", model_max_length=1024)),
    "gpt2-with-prefix": Family((), END, prefix=True, write=partial(
        old_byte_level, special=(END,), tokenizer_class="GPT2Tokenizer", add_prefix_space=True, **ONE_END,
    )),
    "opt": Family(("</s>",), "</s>", partial(
        old_byte_level, special=("<s>", "<pad>", "</s>", "<unk>"), model_type="opt", tokenizer_class="GPT2Tokenizer",
        errors="replace", add_prefix_space=False, add_bos_token=True, pad_token=typed("<pad>"),
        special_map=named(bos=as_object("</s>"), eos=as_object("</s>"), unk="</s>", pad="<pad>"),
        **named(bos=typed("</s>"), eos=typed("</s>"), unk=typed("</s>")),
    )),
    "codegen": Family((), END, partial(  # Phi-1.5 and 2 before they had a tokenizer.json
        old_byte_level, special=(END,), added=SPACES_AND_TABS, model_type="phi", tokenizer_class="CodeGenTokenizer",
        add_prefix_space=False, **named(bos=typed(END), eos=typed(END), unk=typed(END)),
    )),
    "phi-2": Family((), END, partial(
        byte_level, pre=GPT2, post=trims, special=(), late=(END,), added=SPACES_AND_TABS, model_type="phi",
        tokenizer_class="CodeGenTokenizer", add_prefix_space=False, **ONE_END,
    )),
    "bloom": Family((), "</s>", partial(
        byte_level, pre=splits(BLOOM), post=trims, special=("<unk>", "<s>", "</s>", "<pad>"), model_type="bloom",
        tokenizer_class="BloomTokenizerFast", add_prefix_space=False,
        **named(bos="<s>", eos="</s>", unk="<unk>", pad="<pad>"),
    )),
    "falcon": Family((), END, partial(
        byte_level, pre=FALCON, post=trims, special=(*FALCONS, END), model_type="falcon", **FAST, eos_token=END,
        special_map={"additional_special_tokens": [*FALCONS], "eos_token": END},
    )),
    "gpt-bigcode": Family((), END, partial(  # StarCoder, Granite
        byte_level, pre=DIGITS, post=trims, special=(END, *FIM, "<reponame>"), model_type="gpt_bigcode",
        tokenizer_class="GPT2TokenizerFast", additional_special_tokens=[END, *FIM, "<reponame>"], **ONE_END,
        special_map={"additional_special_tokens": [*map(as_object, FIM)], "eos_token": END},
    )),
    # AutoTokenizer makes its GPT2Tokenizer anew without the file's split of digits, which the model was trained with.
    "starcoder2": Family((), END, load=PreTrainedTokenizerFast.from_pretrained, write=partial(
        byte_level, pre=DIGITS, post=trims, special=(END, *FIM, "<repo_name>", "<file_sep>"), model_type="starcoder2",
        tokenizer_class="GPT2Tokenizer", add_prefix_space=False, **ONE_END,
    )),
    "qwen2": Family((), "<|im_end|>", partial(
        byte_level, pre=splits(QWEN), normalizer=NFC, post=trims, special=(), late=CHATML, model_type="qwen2",
        added=[AddedToken("<tool_call>", normalized=False)], tokenizer_class="Qwen2Tokenizer", add_bos_token=False,
        **named(bos=None, eos="<|im_end|>", pad=END),
    )),
    "llama-3": Family(("<|begin_of_text|>",), "<|eot_id|>", partial(
        byte_level, pre=splits(CL100K), post=after_bytes("<|begin_of_text|>"), ignore_merges=True, special=(),
        late=LLAMA3S, model_type="llama", **FAST, **named(bos="<|begin_of_text|>", eos="<|eot_id|>"),
    )),
    "smollm3": Family((), "<|im_end|>", partial(
        byte_level, pre=splits(CL100K), post=trims, ignore_merges=True, special=(), model_type="smollm3", **FAST,
        late=("<|begin_of_text|>", *CHATML[1:]), added=[AddedToken("<think>"), AddedToken("</think>")],
        **named(bos=None, eos="<|im_end|>"),
    )),
    "phi-4": Family((), "<|im_end|>", partial(
        byte_level, pre=splits(CL100K), post=trims, special=(), model_type="phi3", tokenizer_class="GPT2Tokenizer",
        late={END: BOTH_STRIP, "<|dummy_0|>": BOTH_STRIP, **{token: {} for token in PHI4S}},
        **named(bos=END, eos="<|im_end|>"),
    )),
    "cohere": Family(("<BOS_TOKEN>",), "<|END_OF_TURN_TOKEN|>", partial(
        byte_level, pre=DIGITS, normalizer=NFC, post=template("<BOS_TOKEN>"), special=COHERES, model_type="cohere",
        late=marked("START_OF_TURN_TOKEN", "END_OF_TURN_TOKEN"), tokenizer_class="CohereTokenizerFast",
        add_bos_token=True, add_eos_token=False,
        **named(bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", pad="<PAD>", unk="<UNK>"),
    )),
    "glm-4": Family(("[gMASK]", "<sop>"), END, partial(
        byte_level, pre=splits(CL100K), post=after_bytes("[gMASK]", "<sop>"), ignore_merges=True, special=(),
        late=(END, "[gMASK]", "<sop>", *marked("user", "assistant")), model_type="glm4", **FAST,
        **named(eos=END, pad=END),
    )),
    "tekken": Family(("<s>",), "</s>", partial(  # Mistral-Nemo, Nemotron
        byte_level, pre=splits(TEKKEN), post=template("<s>"), ignore_merges=True,
        special=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), model_type="nemotron", **FAST,
        **named(bos="<s>", eos="</s>", unk="<unk>"),
    )),
    "seed-oss": Family((), "<seed:eos>", partial(
        byte_level, pre=splits(QWEN), post=trims, special=tuple(f"<seed:{name}>" for name in ("bos", "pad", "eos")),
        late=["<seed:think>"], model_type="seed_oss", **FAST, **named(bos="<seed:bos>", eos="<seed:eos>"),
    )),
    "gpt-oss": Family((), "<|return|>", partial(
        byte_level, pre=splits(O200K), post=trims, ignore_merges=True, special=(), model_type="gpt_oss", **FAST,
        late=marked("startoftext", "endoftext", "return", "start", "message", "end"),
        **named(bos="<|startoftext|>", eos="<|return|>", pad=END),
    )),
    "deepseek": Family(DEEPSEEKS[:1], DEEPSEEKS[1], partial(
        byte_level, pre=splits(*DEEPSEEK), post=template(DEEPSEEKS[0]), special=DEEPSEEKS, model_type="llama",
        tokenizer_class="LlamaTokenizerFast", add_bos_token=True, legacy=True,
        **named(bos=typed(DEEPSEEKS[0]), eos=typed(DEEPSEEKS[1])),
    )),
    "gemma": Family(("<bos>",), "<eos>", partial(
        gemma, json_file=True, add_bos_token=True, additional_special_tokens=[*GEMMA_TURNS],
    )),
    "gemma-model": Family(("<bos>",), "<eos>", load=load_json_instead, write=partial(
        gemma, json_file=False, add_bos_token=True, additional_special_tokens=[*GEMMA_TURNS], mask_token="<mask>",
    )),
    "phi-3": Family(("<s>",), END, prefix=True, write=partial(
        llama, prepend=True, model_type="phi3", eos_token=END, pad_token=END,
        late={END: {}, **{token: {"rstrip": True} for token in PHI3S}},
    )),
    "mixtral": Family(("<s>",), "</s>", partial(llama, prepend=True, model_type="mixtral", eos_token="</s>"), True),
    "llama": Family(("<s>",), "</s>", partial(llama, prepend=False, model_type="llama", eos_token="</s>"), True),
}  # fmt: skip
