"""The token table of the demo base: the rows that captions use, and noise for all others."""

import torch

VOCABULARY = 49408  # of CLIP's tokenizer


def text_table(rows: torch.Tensor, ids: torch.Tensor, seed: int, std: float) -> torch.Tensor:
    """Rebuild the token table (49408, D) float32 from the rows that were trained.

    rows (K, D) belong to token ids (K,); every other row is normal noise of standard deviation
    `std`, drawn on the CPU by `torch.Generator().manual_seed(seed)`.
    """
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(VOCABULARY, rows.shape[1], generator=generator) * std
    table[ids.long()] = rows.float()
    return table
