"""Meta's own format, and Mistral's: consolidated.*.pth or consolidated*.safetensors, params.json, tokenizer files.

Meta's .pth files are the shards of tensor parallelism: each holds a slice of every tensor (`ConsolidatedWeights`).
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor

from shell.cli import UserError
from shell.files import write_json
from weights.bin_format import unpickle
from weights.byte_level_bpe import RankedVocabulary, is_tiktoken, read_tekken, read_tiktoken
from weights.params_json import config_json, read_params
from weights.replaced import EMBEDDING, HEAD
from weights.safetensors_format import read_tensors
from weights.stored import CHECKPOINT_AGAIN, DTYPES, Weights, note_once, shard_paths

NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attention_norm": "input_layernorm", "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip
NOT_PARAMETERS = ("rope.freqs",)  # the frequencies of RoPE, which rope_theta gives
WEIGHTS_AND_THEIR_INDEX = r"consolidated[^/]*\.(pth|safetensors|safetensors\.index\.json)"
FOLDERS = ("", "original")  # of a repository or folder: where such files are, the first one that has them


def find_folder(source: Path) -> Path | None:
    """The folder with weights in this format: `source`, or original/ in it, as in Meta's repositories; or None."""
    for folder in (source / name for name in FOLDERS):
        if any(folder.glob("consolidated*.pth")) or any(folder.glob("consolidated*.safetensors")):
            return folder
    return None


def files_to_fetch(names: set[str]) -> list[str]:
    """Which files of a repository are a model in this format, weights first; [] if none is."""
    for prefix in (f"{folder}/" if folder else "" for folder in FOLDERS):
        found = [name for name in sorted(names) if re.fullmatch(re.escape(prefix) + WEIGHTS_AND_THEIR_INDEX, name)]
        weights = [name for name in found if not name.endswith(".pth")] or found
        if weights:
            beside = re.escape(prefix) + r"(params\.json|tekken\.json|tokenizer\.model[^/]*)"
            return weights + [name for name in sorted(names) if re.fullmatch(beside, name)]
    return []


def open_folder(source: Path) -> tuple[Weights, dict, Callable[[Path], None]]:
    """The weights, config.json as a dict, and a function that writes the tokenizer, of a folder in this format.

    Raises UserError for what is damaged, incomplete or not supported.
    """
    folder = find_folder(source)
    params = read_params(folder / "params.json")
    weights = ConsolidatedWeights(folder, params)
    config = config_json(folder / "params.json", params, weights)
    vocabulary = read_vocabulary(folder, since_llama_3_1=params.get("use_scaled_rope", False))
    if vocabulary is None:
        print(f"note: {folder} has no tokenizer.model or tekken.json: copy the model's there before you use it")
        return weights, config, lambda out: None
    if vocabulary.size > config["vocab_size"]:
        raise UserError(f"{folder}: {vocabulary.size} tokens are more than the {config['vocab_size']} of the model")
    bos, *ends = vocabulary.special_ids()
    config |= {"bos_token_id": bos, "eos_token_id": ends[0]}

    def write(out):
        vocabulary.write(out)
        write_json(out / "generation_config.json", {"bos_token_id": bos, "eos_token_id": sorted(ends)})

    return weights, config, write


# ------------------------------------------------------------------------------------------------------- tensors


class ConsolidatedWeights(Weights):
    """The tensors of a folder in this format, whole, under Hugging Face's names and in its row order.

    A head that is the embedding is left out of `shapes` and `dtypes`. The files are memory-mapped; beside them `read`
    takes memory for the one tensor that it joins. Raises UserError for shards that do not fit each other.
    """

    has_our_names = True

    def __init__(self, folder: Path, params: dict[str, Any]):
        self.folder = self.where = folder
        self._params = params
        self._paths, shards = _read_shards(folder)
        self._slices = {
            self._hugging_face_name(name): (name, [tensors[name] for tensors in shards])
            for name in shards[0]
            if name not in NOT_PARAMETERS
        }
        self._axes = {name: self._axis(name) for name in self._slices}
        self.shapes = {name: self._shape(name) for name in self._slices}
        known = DTYPES.values()
        self.dtypes = {name: s[0].dtype if s[0].dtype in known else None for name, (_, s) in self._slices.items()}
        self._check_number_of_shards()
        if params.get("tied_embeddings") is not False and self._head_is_embedding():
            del self.shapes[HEAD], self.dtypes[HEAD]

    def view(self, name: str) -> Tensor:
        """As in `Weights`, but joined in memory."""
        return self.read(name)

    def read(self, name: str) -> Tensor:
        """The tensor `name`, as stored. Raises UserError if it holds NaN or infinity, or is of another type."""
        own_name, slices = self._slices[name]
        if self.dtypes[name] is None:
            raise UserError(f"{self._paths[0]}: tensor {own_name} is {slices[0].dtype}, not in {', '.join(DTYPES)}")
        for path, part in zip(self._paths, slices, strict=True):
            if not all(extreme.isfinite() for extreme in part.aminmax()):
                raise UserError(f"{path}: tensor {own_name} holds NaN or infinity")
        axis = self._axes[name]
        if axis is None:
            self._check_equal(own_name, slices)
            return slices[0]
        heads = self._heads(name)
        if heads is None and len(slices) == 1:
            return slices[0]
        whole, start = torch.empty(self.shapes[name], dtype=self.dtypes[name]), 0
        # Row by row into its place: a copy of the whole in Meta's order would take the memory twice.
        places = half_split(torch.arange(len(whole)), heads).argsort() if heads else None
        for part in slices:
            size = part.size(axis)
            if heads:
                whole[places[start : start + size]] = part
            else:
                whole.narrow(axis, start, size).copy_(part)
            start += size
        return whole

    def _hugging_face_name(self, name):
        module = name.removesuffix(".weight")
        layer = re.fullmatch(r"layers\.(\d+)\.([\w.]+)", module)
        if module != name and layer and layer[2] in LAYER_NAMES:
            return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.weight"
        if module != name and module in NAMES:
            return f"{NAMES[module]}.weight"
        raise UserError(f"{self._paths[0]}: tensor {name[:100]} is not known: it is of another kind of model")

    def _heads(self, name):
        """How many heads a projection has whose rows are in Meta's order; None if they are not."""
        heads = self._params["n_heads"]
        kv_heads = self._params.get("n_kv_heads") or heads
        return {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])

    def _axis(self, name):
        """Along which axis the shards hold slices of a tensor; None: each has it whole."""
        own_name, slices = self._slices[name]
        dim, module = self._params["dim"], own_name.split(".")[-2]  # of layers.0.attention.wq.weight it is wq
        if module.endswith("norm"):
            return None
        if module == "tok_embeddings":  # Llama 1 and 2 cut it into columns, Llama 3 into rows
            return 0 if slices[0].shape[1:] == (dim,) else 1
        return 1 if module in ("wo", "w2") else 0

    def _shape(self, name):
        """The shape of the whole tensor."""
        (own_name, slices), axis = self._slices[name], self._axes[name]
        first = slices[0]
        if len({part.dtype for part in slices}) > 1 or len({part.shape for part in slices}) > 1:
            raise UserError(f"{self.folder}: {own_name} has another shape or dtype in some shards: download them again")
        if axis is None or axis >= first.dim():
            return tuple(first.shape)
        return tuple(size * len(slices) if i == axis else size for i, size in enumerate(first.shape))

    def _check_number_of_shards(self):
        """Name a part that is not there: its slices would be missing in all tensors."""
        rows = self.shapes.get("model.layers.0.self_attn.q_proj.weight", (0,))[0]
        head_dim = self._params.get("head_dim", self._params["dim"] // self._params["n_heads"])
        whole, here = self._params["n_heads"] * head_dim, len(self._paths)
        if self._paths[0].suffix == ".pth" and 0 < rows < whole and whole * here % rows == 0:
            raise UserError(f"{self.folder} has {here} of {whole * here // rows} shards consolidated.*.pth: get all")

    def _check_equal(self, own_name, slices):
        for path, part in zip(self._paths, slices, strict=True):
            if not torch.equal(part, slices[0]):
                raise UserError(
                    f"{path}: {own_name} differs from that in {self._paths[0].name}: they are of two models"
                )

    def _head_is_embedding(self):
        if not {HEAD, EMBEDDING} <= self._slices.keys() or self.dtypes[HEAD] != self.dtypes[EMBEDDING]:
            return False
        # In Llama 1 and 2 the shards cut the two in different ways, and none is tied.
        return all(map(torch.equal, self._slices[HEAD][1], self._slices[EMBEDDING][1]))


def half_split(rows: Tensor, heads: int) -> Tensor:
    """The rows of q or k from Meta's RoPE layout (pairs 2i, 2i + 1 of a head) to Hugging Face's (i, i + d/2)."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `half_split`."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _read_shards(folder):
    """(paths, what each holds: {Meta's name: tensor})."""
    pickled = {path.name for path in folder.glob("consolidated*.pth")}
    if any(folder.glob("consolidated*.safetensors")):
        if pickled:
            note_once(f"{folder}: left aside: {', '.join(sorted(pickled))}")
        return _read_safetensors(folder)
    names = [f"consolidated.{number:02d}.pth" for number in range(len(pickled))]
    if pickled != set(names):
        absent = next(name for name in names if name not in pickled)
        raise UserError(f"{folder}: {absent} is missing, and {min(pickled - set(names))} is there: get all shards")
    shards = [unpickle(folder / name) for name in names]
    for name, tensors in zip(names, shards, strict=True):
        other = next(iter(tensors.keys() ^ shards[0].keys()), None)
        if other is not None:
            raise UserError(f"{folder}: tensor {other} is in one of {names[0]} and {name} only: download both again")
    return [folder / name for name in names], shards


def _read_safetensors(folder):
    """As `_read_shards`: these files hold whole tensors, so all of them are one shard."""
    index = "consolidated.safetensors.index.json"
    if not any((folder / name).is_file() for name in ("consolidated.safetensors", index)):
        raise UserError(f"{folder}: {index} is missing: download it too")
    paths, tensors = shard_paths(folder, index, "consolidated*.safetensors"), {}
    for path in paths:
        for name, tensor in read_tensors(path, CHECKPOINT_AGAIN).items():
            if name in tensors:
                raise UserError(f"{path}: tensor {name} is in another file too")
            tensors[name] = tensor
    return [paths[0] if len(paths) == 1 else folder], [tensors]


# ----------------------------------------------------------------------------------------------------- tokenizer


class SentencePieceVocabulary:
    """A SentencePiece model, as it is in the file. Raises UserError if it is damaged or has no BOS or EOS."""

    def __init__(self, path: Path):
        self._content = path.read_bytes()
        try:
            model = sentencepiece.SentencePieceProcessor()
            model.LoadFromSerializedProto(self._content)
            self.size, self._ids = model.get_piece_size(), (model.bos_id(), model.eos_id())
            bos, eos = map(model.id_to_piece, self._ids)
            self._names = {"bos_token": bos, "eos_token": eos}
        except (IndexError, RuntimeError) as error:
            raise UserError(
                f"{path} is no SentencePiece model and not tiktoken's ({error}): download it again"
            ) from None

    def special_ids(self) -> tuple[int, ...]:
        """The id of BOS, then those that end a text."""
        return self._ids

    def write(self, folder: Path) -> None:
        """Write tokenizer.model, and tokenizer_config.json that says how it is used."""
        (folder / "tokenizer.model").write_bytes(self._content)
        settings = {
            "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False,
            "clean_up_tokenization_spaces": False, **self._names,
        }  # fmt: skip
        write_json(folder / "tokenizer_config.json", settings)


def read_vocabulary(folder: Path, since_llama_3_1: bool) -> RankedVocabulary | SentencePieceVocabulary | None:
    """The vocabulary in a folder: tekken.json, else the newest tokenizer.model* (Mistral's end in .v3 and so on).

    since_llama_3_1: whether special tokens are Llama 3.1's, if it is tiktoken's file. None if there is no such file.
    Raises UserError if it is damaged.
    """
    if (folder / "tekken.json").is_file():
        return read_tekken(folder / "tekken.json")
    paths = [path for path in folder.glob("tokenizer.model*") if path.is_file()]
    if not paths:
        return None
    path = max(paths, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])
    return read_tiktoken(path, since_llama_3_1) if is_tiktoken(path) else SentencePieceVocabulary(path)
