"""Pickled weights, PyTorch's .bin and .pth: unpickled without running code, memory-mapped, read tensor by tensor."""

import pickle
import zipfile
from pathlib import Path

import torch

from shell.cli import UserError
from weights.stored import DTYPES, Weights, shard_paths


class BinWeights(Weights):
    """The tensors of pytorch_model*.bin files, memory-mapped; otherwise as `Weights`."""

    def __init__(self, folder: Path):
        self.where, self._places = folder, {}
        for path in shard_paths(folder, "pytorch_model.bin.index.json", "pytorch_model*.bin"):
            for name, tensor in unpickle(path).items():
                if name in self._places:
                    raise UserError(f"{path}: tensor {name} is in {self._places[name][0].name} too")
                self._places[name] = path, tensor
        self.shapes = {name: tuple(tensor.shape) for name, (_, tensor) in self._places.items()}
        known = DTYPES.values()
        self.dtypes = {name: t.dtype if t.dtype in known else None for name, (_, t) in self._places.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, as stored. Raises UserError if it holds NaN or infinity."""
        path, tensor = self._places[name]
        if not tensor.isfinite().all():
            raise UserError(f"{path}: tensor {name} holds NaN or infinity")
        return tensor

    def view(self, name: str) -> torch.Tensor:
        """As in `Weights`."""
        return self._places[name][1]


def unpickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled file by name, memory-mapped. Raises UserError if it is damaged or holds other things."""
    try:
        tensors = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        advice = "it was not unpickled, as that could run code; take the model's safetensors"
        raise UserError(f"{path} is damaged or holds other things than tensors: {advice}") from None
    except Exception as error:  # the library's reader raises anything for a damaged file
        raise UserError(f"{path} is damaged ({str(error).partition('. ')[0]}): download it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(n, str) and torch.is_tensor(t) for n, t in tensors.items()):
        raise UserError(f"{path} does not hold a model's tensors by name")
    for name, tensor in tensors.items():
        # With strides of 0 a few bytes would be a tensor of any size.
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: tensor {name} is not stored whole")
    return tensors
