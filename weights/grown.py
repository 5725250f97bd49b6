"""A larger vocabulary: embedding and head with more rows, the new ones the mean of the old.

As transformers has it in resize_token_embeddings, but for the noise that this adds: of the mean, every new token begins
as likely as the others are on average (Hewitt 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from weights.families import config_from_json
from weights.replaced import EMBEDDING, HEAD

BY_TOKEN = (EMBEDDING, HEAD, "lm_head.bias")  # the parameters that have a row for each token


def grown_config(values: dict, rows: int) -> dict:
    """config.json's values for a vocabulary of so many rows. Raises ValueError if the family has it elsewhere."""
    values = values | {"vocab_size": rows}
    if config_from_json(values).vocab_size != rows:
        raise ValueError("its vocab_size does not say how many rows the embedding has")
    return values


def grown_shapes(shapes: dict[str, tuple], rows: int) -> dict[str, tuple]:
    """A model's shapes with so many rows for tokens."""
    return {name: (rows, *shape[1:]) if name in BY_TOKEN else shape for name, shape in shapes.items()}


def grown(read: Callable[[str], Tensor], tokens: int, rows: int) -> Callable[[str], Tensor]:
    """A function that reads a model's tensors as `read` does, but with `rows` rows for tokens.

    tokens: how many the tokenizer had. Rows after them, which some models have to spare, get the mean too.
    """

    def read_grown(name):
        tensor = read(name)
        if name not in BY_TOKEN:
            return tensor
        old = tensor[: min(tokens, len(tensor))]
        mean = old.double().mean(0).to(tensor.dtype)
        return torch.cat([old, mean.expand(rows - len(old), *mean.shape)])

    return read_grown
