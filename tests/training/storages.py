"""What is in memory while a block runs on a CPU, and what is read of files, counted by the storages of its tensors."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from weights.stored import Weights


class Storages(TorchDispatchMode):
    """peak: the most bytes that storages which live at one time had, without those that are views of files.

    read: the bytes that operations took of files, of each tensor there at most once. What an operation takes inside of
    it is not seen.
    """

    def __init__(self):
        super().__init__()
        self.peak, self._live, self._read, self._files = 0, {}, {}, {}

    @property
    def read(self):
        return sum(self._read.values())

    def __enter__(self):
        self._before = Weights._mapped, Weights.read
        mapped, read = self._before

        def note_view(weights, *args):
            with _disable_current_modes():
                tensor = mapped(weights, *args)
            self._files[tensor.untyped_storage()._cdata] = tensor  # kept, so that no other gets its address
            return tensor

        def note_read(weights, name):
            tensor = read(weights, name)
            self._read[name] = tensor.nbytes
            return tensor

        Weights._mapped, Weights.read = note_view, note_read
        return super().__enter__()

    def __exit__(self, *error):
        Weights._mapped, Weights.read = self._before
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made, given = list(self._storages(result)), list(self._storages((args, kwargs)))
        for storage, _ in made:
            if storage._cdata not in self._files:
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if not any(storage._cdata in self._files for storage, _ in made):  # or it is a view
            for storage, nbytes in given:
                if (place := storage._cdata) in self._files:
                    self._read[place] = max(nbytes, self._read.get(place, 0))
        self._live = {place: each for place, each in self._live.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._live.values()))
        return result

    def _storages(self, tree):
        for leaf in tree_leaves(tree):
            tensor = getattr(leaf, "_local_tensor", leaf)  # FSDP's
            if torch.is_tensor(tensor) and tensor.device.type == "cpu":
                yield tensor.untyped_storage(), tensor.nbytes
