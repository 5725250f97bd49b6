"""How adapters over our linear layers lie in PEFT's files, where a family calls the layers otherwise or joins several.

A module that holds several of our layers (query_key_value, gate_up_proj) has one adapter in PEFT. Ours are stacked to
one that computes the same: the rows of their A's one after the other, and each B in its own rows and columns, with
zeros elsewhere. With s = alpha / r the same for all of them:

    s [B1 0; 0 B2] [A1; A2] = [s B1 A1; s B2 A2]

So the rank is the sum of theirs. A layer without an adapter has no columns, and with DoRA the lengths of the base's
rows as magnitudes.

The experts of a layer are two parameters in transformers, gate_up_proj and down_proj, which PEFT adapts by
`target_parameters`: all E experts have their ranks in one A (E * r, in), expert by expert, and one B (out, r * E), in
which the expert is the index that changes fastest.

In PEFT's own files every part of a module has the module's A and its own rows of B (`copied`).
"""

import math
import re
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from lora import AdapterConfig, is_named, match_pattern
from model import Config
from shell.cli import UserError
from weights.names import Names, Piece, rows_in_files, rows_in_memory

MAGNITUDE = "lora_magnitude_vector"
Tensors = dict[str, dict[str, Tensor]]  # those of each adapter, by module and by their own names


class Layout:
    """Where the adapters of a model's linear layers are in PEFT's files.

    config: the model's. linears: the names of its linear layers. in_files: by the names of the model's files, which
    transformers 4 had in memory: there each expert has modules of its own.
    """

    def __init__(self, config: Config, linears: Iterable[str], in_files: bool = False):
        self.config, self.linears = config, [*linears]
        self.names = Names(config, rows_in_files if in_files else rows_in_memory)
        self._pieces: dict[str, Piece] = {}
        self.held: dict[str, dict[int, dict[int, str]]] = {}  # by module, expert (0 if it is of none), and part
        for name in self.linears:
            piece = self.names.piece(f"{name}.weight")
            module = piece.theirs[0].removesuffix(".weight")
            self._pieces[name] = piece._replace(theirs=(module,), row=piece.row._replace(turned=False))
            self.held.setdefault(module, {}).setdefault(piece.expert or 0, {})[piece.index] = name
        self.parameters = [self.module(name) for name, piece in self._pieces.items() if piece.expert is not None]
        self.parameters = [*dict.fromkeys(self.parameters)]

    def module(self, name: str) -> str:
        """PEFT's name of the module, or of experts' parameter, that holds our linear layer `name`."""
        return self._pieces[name].theirs[0]

    def modules(self) -> list[str]:
        """PEFT's names of the modules that are linear layers."""
        return [module for module in self.held if module not in self.parameters]

    def differs(self, names: Iterable[str]) -> bool:
        """Whether one of our linear layers `names` has another name, or is a part of a module."""
        return any(self.module(name) != name for name in names)

    def in_file(self, adapted: Collection[str]) -> dict[str, str]:
        """What the tensors of each module or parameter in `adapted` are called in the file.

        Those of a parameter are called like its module; if gate_up_proj is adapted beside down_proj, PEFT puts it
        inside of what adapts that.
        """
        called = {}
        for module in adapted:
            inner, _, leaf = module.rpartition(".")
            nested = leaf == "gate_up_proj" and f"{inner}.down_proj" in adapted
            called[module] = module if module not in self.parameters else f"{inner}.base_layer" if nested else inner
        return called

    def own_targets(self, target: str) -> list[str]:
        """What a name in --lora_targets is in our names: the family's query_key_value is q_proj, k_proj and v_proj.

        Raises UserError if no linear layer has that name.
        """
        if any(is_named(name, [target]) for name in self.linears):
            return [target]
        found = [name for name in self.linears if is_named(self.module(name), [target])]
        if not found:
            choices = dict.fromkeys(name.rpartition(".")[2] for name in (*self.linears, *self.held))
            raise UserError(f"--lora_targets: the model has no projection {target!r}, only {', '.join(choices)}")
        return ends(found, self.linears)

    # -------------------------------------------------------------------------------------------------- stacked parts

    def stack(self, tensors: Tensors, config: AdapterConfig, base_norms: Callable[[str], Tensor]) -> Tensors:
        """Our adapters' tensors, by our names, as one adapter for each module, by its name in the file.

        base_norms: gives the lengths of the rows of a layer's weight, (out,) fp32, for DoRA's parts without an adapter.
        """
        ranks = self._ranks(config, tensors)
        called = self.in_file(ranks)
        return {called[module]: self._stacked(module, tensors, ranks[module], base_norms) for module in ranks}

    def _stacked(self, module, tensors, ranks, base_norms):
        held, blank = self.held[module], {}
        for name in (name for parts in held.values() for name in parts.values() if name in tensors):
            blank.setdefault(self._pieces[name].index, {key: torch.zeros_like(t) for key, t in tensors[name].items()})
        As, Bs = [], []
        for parts in held.values():
            own = {index: tensors.get(parts[index], blank[index]) for index in ranks}
            As += [part["lora_A"] for part in own.values()]
            columns = [self.spread(parts[index], part["lora_B"]) for index, part in own.items()]
            Bs.append(torch.cat(columns, dim=1))
        stacked = {"lora_A": torch.cat(As), "lora_B": torch.stack(Bs, dim=-1).flatten(1)}  # (E * r, in), (out, r * E)
        if any(MAGNITUDE in part for part in blank.values()):
            names = held[0].values()
            lengths = {name: tensors[name][MAGNITUDE] if name in tensors else base_norms(name) for name in names}
            stacked[MAGNITUDE] = sum(self.spread(name, length) for name, length in lengths.items())
        return stacked

    def spread(self, name: str, tensor: Tensor) -> Tensor:
        """The rows of our layer `name` at their places among those of its module, and zeros elsewhere."""
        return self.names.spread(self._pieces[name], tensor)

    def rows_of(self, name: str, tensor: Tensor, where: str) -> Tensor:
        """Of a module's tensor the rows of our layer `name`. UserError, naming `where`, if it has another number."""
        try:
            return self.names.take(self._pieces[name], [tensor]).contiguous()
        except ValueError as error:
            raise UserError(f"{where}: {error}: it belongs to another base model") from None

    def unstack(self, stored: Tensors, config: AdapterConfig, adapted: Collection[str], where: str) -> Tensors:
        """What `stack` made, by the names in the file, as the tensors of our linear layers `adapted`, bit for bit.

        Raises UserError, naming `where`, if they do not fit, or if what belongs to no adapter is not zero.
        """
        ranks, adapted, tensors = self._ranks(config, adapted), {*adapted}, {}
        for module, called in self.in_file(ranks).items():
            parts = self._unstacked(module, stored[called], ranks[module], f"{where}: {module}")
            own = {name: part for name, part in parts.items() if name in adapted}
            for key in ("lora_A", "lora_B"):
                if sum(part[key].count_nonzero() for part in own.values()) != stored[called][key].count_nonzero():
                    raise UserError(f"{where}: {module}.{key} has values outside of its parts: the file was changed")
            tensors |= own
        return tensors

    def _unstacked(self, module, stored, ranks, where):
        tensors, experts = {}, self._by_expert(module, stored, where)
        if experts[0][0].size(0) != sum(ranks.values()):
            raise UserError(f"{where}: its rank is not that of its parts, {sum(ranks.values())}: the file was changed")
        for parts, (A, B) in zip(self.held[module].values(), experts, strict=True):
            As, Bs = (matrix.split([*ranks.values()], dim) for dim, matrix in enumerate((A, B)))
            for index, A, B in zip(ranks, As, Bs, strict=True):
                tensors[parts[index]] = self._part(parts[index], stored, A, B, where)
        return tensors

    def _by_expert(self, module, stored, where):
        """A (r, in) and B (out, r) of each expert; of a module that is no parameter of experts, of the one that is."""
        E = len(self.held[module])
        A, B = (stored.get(key) for key in ("lora_A", "lora_B"))
        if A is None or B is None or A.dim() != 2 or B.dim() != 2 or len(A) != B.size(1) or len(A) % E:
            raise UserError(f"{where}: lora_A and lora_B do not fit each other: it belongs to another base model")
        return [*zip(A.unflatten(0, (E, -1)), B.unflatten(1, (-1, E)).unbind(-1), strict=True)]

    def _part(self, name, stored, A, B, where):
        """The tensors of the layer `name`: this A, and its rows of B and of whatever else its module has."""
        rest = {key: tensor for key, tensor in stored.items() if key not in ("lora_A", "lora_B")}
        rows = {key: self.rows_of(name, tensor, where) for key, tensor in {"lora_B": B, **rest}.items()}
        return {"lora_A": A.contiguous(), **rows}

    def _ranks(self, config, adapted):
        """{module: {part: its rank}} of the parts that have an adapter. Raises UserError where they do not go together.

        PEFT has one rank for all experts, and one scale for all parts.
        """
        ranks, scales = {}, {}
        for name in adapted:
            (r, _, scale), module, index = _numbers(config, name), self.module(name), self._pieces[name].index
            if ranks.setdefault(module, {}).setdefault(index, r) != r:
                raise UserError(f"{module}: PEFT has one rank for all experts, {name} has {r}: change rank_pattern")
            if not math.isclose(scales.setdefault(module, scale), scale, rel_tol=1e-12):
                raise UserError(f"{module}: PEFT has one scale for all its parts, {name} has another: change its alpha")
        return {module: dict(sorted(parts.items())) for module, parts in ranks.items()}

    def describe(self, config: AdapterConfig, adapted: Collection[str]) -> dict:
        """What adapter_config.json says of our adapters `adapted` when they are stacked: the keys that this decides."""
        ranks, alphas = {}, {}
        for module, parts in self._ranks(config, adapted).items():
            ranks[module] = sum(parts.values())
        for name in adapted:
            (r, alpha, _), module = _numbers(config, name), self.module(name)
            ratio = ranks[module] / r
            alphas[module] = _shortened(alpha * (math.sqrt(ratio) if config.rslora else ratio))
        parameters = [module for module in ranks if module in self.parameters]
        values = {
            "target_modules": ends([module for module in ranks if module not in parameters], self.held),
            "lora_dropout": 0.0 if parameters else config.dropout,  # PEFT has none there
            "rank_pattern": patterns(ranks, config.r),
            "alpha_pattern": patterns(alphas, config.alpha),
            "fan_in_fan_out": any(row.turned and not row.stacked for row in self.names.rows),
        }
        return values | ({"target_parameters": ends(parameters, self.held)} if parameters else {})

    # ----------------------------------------------------------------------------------------------------- PEFT's own

    def copied(self, stored: Tensors, adapted: Collection[str], where: str) -> Tensors:
        """The tensors of PEFT's adapters over the modules `adapted`, by our names: each part gets the whole rank."""
        tensors = {}
        for module, called in self.in_file(adapted).items():
            experts = self._by_expert(module, stored[called], f"{where}: {module}")
            for parts, (A, B) in zip(self.held[module].values(), experts, strict=True):
                for name in parts.values():
                    tensors[name] = self._part(name, stored[called], A, B, f"{where}: {module}")
        return tensors

    def own_config(self, config: AdapterConfig, adapted: Collection[str]) -> AdapterConfig:
        """PEFT's `config`, of adapters over the modules `adapted`, for our linear layers."""
        taken = [name for name in self.linears if self.module(name) in adapted]
        ranks = {name: match_pattern(config.rank_pattern, self.module(name), config.r) for name in taken}
        alphas = {name: match_pattern(config.alpha_pattern, self.module(name), config.alpha) for name in taken}
        covered = [name for name in self.linears if config.covers(name)]
        if covered == taken and all(_numbers(config, n)[:2] == (ranks[n], alphas[n]) for n in taken):
            return config  # it says the same by our names
        return AdapterConfig(
            config.kind, config.r, config.alpha, config.dropout, config.rslora, tuple(ends(taken, self.linears)),
            patterns(ranks, config.r), patterns(alphas, config.alpha), save=config.save, tokens=config.tokens,
        )  # fmt: skip


def _numbers(config, name):
    """Rank, alpha and scale of the adapter over our linear layer `name`."""
    r = match_pattern(config.rank_pattern, name, config.r)
    alpha = match_pattern(config.alpha_pattern, name, config.alpha)
    return r, alpha, alpha / (math.sqrt(r) if config.rslora else r)


def _shortened(number):
    return int(number) if float(number).is_integer() else number


def ends(names: Collection[str], all_names: Iterable[str]) -> list[str]:
    """The shortest ends of `names` that no other of `all_names` has: "dense", or "attention.dense" if need be."""
    others = {end for name in {*all_names}.difference(names) for end in _ends(name)}
    return [*dict.fromkeys(next((end for end in _ends(name) if end not in others), name) for name in names)]


def _ends(name):
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def patterns(values: dict[str, float], default: float) -> dict[str, float]:
    """`rank_pattern` or `alpha_pattern` that gives each name its value, and all others the default."""
    found = {}
    for value in dict.fromkeys(values.values()):
        if value != default:
            named = [name for name, own in values.items() if own == value]
            found |= {re.escape(end): value for end in ends(named, values)}
    return found


def outside_peft(config: Config, kind: str, adapted: Iterable[str]) -> str | None:
    """Why PEFT (0.21) cannot adapt the linear layers `adapted` in this way, if it cannot.

    kind: "lora" or "dora". transformers holds experts as parameters, over which PEFT has no DoRA. And of Qwen3-MoE it
    takes a dense layer's gate_proj for that of an adapter from the time when experts were modules.
    """
    if config.experts and kind == "dora" and any(".experts." in name for name in adapted):
        return "PEFT has no DoRA over experts"
    if config.family == "qwen3_moe" and any(re.search(r"\.mlp\.\w+_proj$", name) for name in adapted):
        return "PEFT takes the dense MLPs of this family for experts"
    return None
