"""The mathematics of Dynamic-LLaVA (arXiv 2412.00876): predictors, decisions, losses, temperature.

A predictor gives each token two logits, channel 0 for keeping and channel 1 for dropping it. Training decides with
straight-through Gumbel-softmax or by the k best under noise, inference by the larger logit or the k best. Modules carry
the original's parameter names (`VisionPredictor` and `TextPredictor` in `dynamic_modeling_llama.py`). Imports torch
alone.

Shape letters: B batch, n tokens that are judged, D width of the decoder, d width of a predictor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEEP = 0
"""Channel of a predictor's output that speaks for keeping the token."""


def _as_weights(x: Tensor, module: nn.Module) -> Tensor:
    """`x` in the dtype of the parameters of `module`: predictors in float32 judge a decoder in half precision."""
    return x.to(next(module.parameters()).dtype)


class PredictorAttention(nn.Module):
    """Bidirectional multi-head attention over all tokens, (B, n, d) -> (B, n, d)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Attend from every token to every token, or to those only that `visible` (B, 1, 1, n) bool marks."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, n, C) each
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # (B, n, d)


class PredictorMLP(nn.Module):
    """Two linear layers with GELU between them, (B, n, d) -> (B, n, d)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the two layers to each token."""
        return self.fc2(F.gelu(self.fc1(x)))


class PredictorBlock(nn.Module):
    """Pre-norm transformer block, (B, n, d) -> (B, n, d)."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = PredictorAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = PredictorMLP(width, inner)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Attention, then MLP, each added to its input; `visible` as for the attention."""
        x = x + self.attn(self.norm1(x), visible)
        return x + self.mlp(self.norm2(x))


class VisionPredictor(nn.Module):
    """Judges the tokens of one image in the light of all of them.

    Args:
        width: D of the decoder.
        inner_width: d of the predictor, a multiple of 4 and of `heads`.
        heads: attention heads.
        feedforward: inner width of the blocks' MLPs.
        blocks: number of transformer blocks.
    """

    def __init__(self, width: int, inner_width: int, heads: int, feedforward: int, blocks: int) -> None:
        super().__init__()
        d = inner_width
        self.down_mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, d), nn.GELU())
        self.transformer = nn.ModuleList(PredictorBlock(d, heads, feedforward) for _ in range(blocks))
        self.output_mlp = nn.Sequential(
            nn.Linear(d, d // 2), nn.GELU(), nn.Linear(d // 2, d // 4), nn.GELU(), nn.Linear(d // 4, 2)
        )

    def forward(self, x: Tensor, mask: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """Logits (B, n, 2) of tokens `x` (B, n, D).

        Args:
            x: hidden states of the tokens of one image per row.
            mask: (B, n, 1), 0 where a token is to count as nothing: its embedding becomes zero and the pooled half
                leaves it out, while attention still sees the zero (as the original); None is all ones.
            valid: (B, n) bool, False at padding behind a shorter image, which nothing sees; None is all True. A row
                of padding alone gives finite logits without meaning.
        """
        h = self.down_mlp(_as_weights(x, self))  # (B, n, d)
        if mask is not None:
            h = h * mask
        visible = None
        if valid is not None:
            valid = valid | ~valid.any(dim=1, keepdim=True)
            visible = valid[:, None, None]  # (B, 1, 1, n)
            mask = valid[..., None].to(h.dtype) if mask is None else mask * valid[..., None]
        for block in self.transformer:
            h = block(h, visible)
        local, pooled = h.chunk(2, dim=-1)  # (B, n, d / 2) each
        if mask is None:
            pooled = pooled.mean(dim=1, keepdim=True)  # (B, 1, d / 2)
        else:
            pooled = (pooled * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
        return self.output_mlp(torch.cat([local, pooled.expand_as(local)], dim=-1))


class TextPredictor(nn.Module):
    """Judges each text token by itself.

    Args:
        width: D of the decoder.
        inner_width: d of the predictor, a multiple of 4.
    """

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        d = inner_width
        self.output_mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, d),
            nn.GELU(),
            nn.Linear(d, d // 2),
            nn.GELU(),
            nn.Linear(d // 2, d // 4),
            nn.GELU(),
            nn.Linear(d // 4, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (..., 2) of tokens `x` (..., D)."""
        return self.output_mlp(_as_weights(x, self))


def reset_predictor(predictor: nn.Module, std: float = 0.02) -> None:
    """Draw initial values as the original does: linear weights N(0, std), biases 0, LayerNorm 1 and 0."""
    for module in predictor.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()


def gumbel_noise(shape: torch.Size | tuple[int, ...], device: torch.device | str | None = None) -> Tensor:
    """Standard Gumbel noise, `-log E` with E exponential, float32 of `shape`."""
    return -torch.empty(shape, dtype=torch.float32, device=device).exponential_().log()


def gumbel_keep(logits: Tensor, noise: Tensor, tau: float) -> Tensor:
    """Straight-through Gumbel-softmax decision: 1 for kept tokens and 0 for dropped ones, up to rounding.

    The gradient is that of the softmax of `(log p + noise) / tau`.

    Args:
        logits: (..., 2).
        noise: of the same shape, from `gumbel_noise`.
        tau: temperature, positive.

    Returns:
        (...), float32.
    """
    soft = torch.softmax((F.log_softmax(logits.float(), dim=-1) + noise) / tau, dim=-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(dim=-1, keepdim=True), 1.0)  # `one_hot` looks at the values
    return (hard - soft.detach() + soft)[..., KEEP]


def hard_keep(logits: Tensor) -> Tensor:
    """True (...) for tokens whose keep logit is strictly the larger one; `logits` is (..., 2)."""
    return logits[..., KEEP] > logits[..., 1 - KEEP]


def top_keep(logits: Tensor, count: int) -> Tensor:
    """Indices (B, count), ascending, of the `count` tokens with the highest probability of being kept.

    Args:
        logits: (B, n, 2); tokens are ranked by the difference of the two, not by the first alone.
        count: at most n.
    """
    scores = F.log_softmax(logits.float(), dim=-1)[..., KEEP]  # (B, n)
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def top_keep_mask(logits: Tensor, keep_rate: float, valid: Tensor) -> Tensor:
    """What `top_keep` keeps of each row, as a mask; rows may have different lengths.

    Args:
        logits: (B, n, 2).
        keep_rate: share of each row's valid tokens; the number is that of `kept_count`.
        valid: (B, n) bool, False at padding.

    Returns:
        (B, n) bool, False at padding.
    """
    scores = F.log_softmax(logits.float(), dim=-1)[..., KEEP].masked_fill(~valid, -torch.inf)  # (B, n)
    ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (ranks < _kept_counts(valid, keep_rate)[:, None]) & valid


def _kept_counts(valid: Tensor, keep_rate: float) -> Tensor:
    """`kept_count` of each row of `valid` (B, n), (B,) int64; 0 for a row without tokens."""
    lengths = valid.sum(dim=-1)  # (B,)
    return torch.minimum(lengths, (lengths.double() * keep_rate).long().clamp(min=1))


def gumbel_top_keep(logits: Tensor, noise: Tensor, keep_rate: float, valid: Tensor, tau: float) -> Tensor:
    """The k best of each row under noise, with a straight-through gradient at the threshold.

    The score of a token is `keep logit - drop logit + tau * noise`, which without noise ranks as `top_keep` does. With
    tau 1 that draws k tokens without replacement, by weights p(keep) / p(drop); the smaller tau, the closer to what
    inference keeps. The gradient is that of `sigmoid((score - threshold) / tau)`, where the threshold, the mean of the
    k-th and the (k + 1)-th score, counts as constant. A row whose tokens all stay has no gradient.

    Args:
        logits: (B, n, 2).
        noise: (B, n), from `gumbel_noise`.
        keep_rate: share of each row's valid tokens; the number k is that of `kept_count`.
        valid: (B, n) bool, False at padding.
        tau: temperature, positive.

    Returns:
        (B, n) float32, exactly 1 for kept tokens and exactly 0 for all others.
    """
    scores = logits[..., KEEP].float() - logits[..., 1 - KEEP].float() + tau * noise  # (B, n)
    counts = _kept_counts(valid, keep_rate)[:, None]  # (B, 1)
    ranked, order = scores.detach().masked_fill(~valid, -torch.inf).sort(dim=-1, descending=True, stable=True)
    hard = (order.argsort(dim=-1) < counts) & valid
    # The two scores around the gap; padding ranks last, so a row that keeps all of its tokens has no second one.
    last_in = ranked.gather(-1, (counts - 1).clamp(min=0))  # (B, 1)
    first_out = ranked.gather(-1, counts.clamp(max=valid.shape[-1] - 1))  # (B, 1)
    chooses = counts < valid.sum(dim=-1, keepdim=True)  # (B, 1)
    threshold = ((last_in + first_out) / 2).where(chooses, 0.0)
    soft = torch.sigmoid((scores - threshold) / tau)
    soft = soft.where(valid & chooses, soft.detach())
    return hard.float() + (soft - soft.detach())  # the bracket is exactly 0


def keep_rate_loss(
    kept: Tensor,
    keep_rate: float,
    valid: Tensor | None = None,
    at_least: int = 0,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Mean over samples of `(keep_rate - share of kept tokens)^2`, the paper's constraint on the number of kept tokens.

    Args:
        kept: (B, n) decisions with their gradient.
        keep_rate: the share aimed at.
        valid: (B, n) bool, False at padding; None: all tokens count.
        at_least: a sample with fewer valid tokens, or with none, contributes 0 but still counts in the mean.
        row_weights: (B,) weights to sum the rows with, where they are not one sample each; None: 1 / B.

    Returns:
        Scalar float32, not yet weighted.
    """
    kept = kept.float()
    weights = torch.ones_like(kept) if valid is None else valid.to(kept.dtype)
    lengths = weights.sum(dim=-1)  # (B,)
    share = (kept * weights).sum(dim=-1) / lengths.clamp(min=1)  # (B,)
    counts = (lengths >= max(at_least, 1)).to(kept.dtype)
    deviations = counts * (keep_rate - share).square()  # (B,)
    return deviations.mean() if row_weights is None else (row_weights * deviations).sum()


def temperature(step: int, total_steps: int, start: float, end: float) -> float:
    """Temperature of the decisions after `step` of `total_steps` updates: exponential from `start` to `end`."""
    return start * (end / start) ** (step / total_steps)
