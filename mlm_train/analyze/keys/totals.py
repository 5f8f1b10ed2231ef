"""What one pass over all tokens collects of a layer's coefficients."""

import torch
from torch import Tensor


class Totals:
    """Top keys of each token, top tokens of each key, and sums; `add` takes tokens in any order.

    Of a token: token_keys int32 and token_values fp32 [vocabulary, top], its largest |c_k| in descending
    order, with sign; norm, ||c||; effective, the number of keys (sum c^2)^2 / sum c^4; share, of the energy
    sum c^2 in its top keys; all fp32 [vocabulary]. Of a key: key_tokens int32 and key_values fp32 [keys,
    top] likewise; sum and sum_abs of c_k over tokens, fp64 [keys].
    """

    def __init__(self, vocab_size: int, keys: int, top: int) -> None:
        self.vocab_size, self.top = vocab_size, min(top, keys)
        self.token_keys = torch.zeros(vocab_size, self.top, dtype=torch.int32)
        self.token_values = torch.zeros(vocab_size, self.top)
        self.norm, self.effective, self.share = (torch.zeros(vocab_size) for _ in range(3))
        self.key_tokens = torch.full((keys, min(top, vocab_size)), -1, dtype=torch.int32)
        self.key_values = torch.zeros(self.key_tokens.shape)
        self._least = torch.full(self.key_tokens.shape, -1.0)  # |key_values|; below 0: not yet filled
        self.sum, self.sum_abs = (torch.zeros(keys, dtype=torch.float64) for _ in range(2))

    def add(self, ids: Tensor, c: Tensor) -> None:
        """Take the coefficients c fp32 [n, keys] of ids int64 [n]."""
        size, energy = c.abs(), c.square()
        self.sum += c.sum(0, dtype=torch.float64)
        self.sum_abs += size.sum(0, dtype=torch.float64)
        whole = energy.sum(1)
        chosen = size.topk(self.top, dim=1).indices
        self.token_keys[ids] = chosen.int()
        self.token_values[ids] = c.gather(1, chosen)
        self.norm[ids] = whole.sqrt()
        self.share[ids] = (energy.gather(1, chosen).sum(1) / whole).nan_to_num(0.0)
        # Parts of the whole first: c^4 may leave fp32's range.
        self.effective[ids] = (1 / (energy / whole[:, None]).square().sum(1)).nan_to_num(0.0)
        self._merge(ids, c, size)

    def _merge(self, ids: Tensor, c: Tensor, size: Tensor) -> None:
        """Keep the largest of each key's tokens so far and these."""
        self._least, best = torch.cat([self._least, size.T], dim=1).topk(self.key_tokens.shape[1], dim=1)
        held = self.key_tokens.shape[1]
        new = (best - held).clamp(min=0)
        is_new = best >= held
        old = best.clamp(max=held - 1)
        self.key_tokens = torch.where(is_new, ids.int()[new], self.key_tokens.gather(1, old))
        self.key_values = torch.where(is_new, c.T.gather(1, new), self.key_values.gather(1, old))

    @property
    def mean_abs(self) -> Tensor:
        """Mean |c_k| over tokens, fp64 [keys]."""
        return self.sum_abs / self.vocab_size

    @property
    def usage(self) -> Tensor:
        """How many tokens have a key among their top keys, int32 [keys]."""
        return torch.bincount(self.token_keys.flatten(), minlength=len(self.sum)).int()

    @property
    def variation(self) -> float:
        """The sum of ||c - mean||^2 over tokens."""
        return float(self.norm.double().square().sum() - self.sum.square().sum() / self.vocab_size)


def outliers(mean_abs: Tensor) -> Tensor:
    """Keys, ascending, whose mean |c_k| is over median + 6 * 1.4826 * MAD of all keys' means.

    1.4826 * MAD (the median distance from the median) is the standard deviation of a normal distribution.
    """
    median = mean_abs.quantile(0.5)
    deviation = 1.4826 * (mean_abs - median).abs().quantile(0.5)
    return (mean_abs > median + 6 * deviation).nonzero().flatten()
