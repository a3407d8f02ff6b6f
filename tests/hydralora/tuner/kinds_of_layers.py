"""Models and layers of kinds that a Llama does not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4, pad_token_id=0)).eval()


def tiny_mamba() -> MambaForCausalLM:
    return MambaForCausalLM(MambaConfig(vocab_size=80, hidden_size=32, num_hidden_layers=1, state_size=4))


class PackedLinear(nn.Module):
    """A linear layer with two 4-bit numbers in each byte and a scale for each output, as quantization packs them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 7
        codes = ((linear.weight.detach() / scales).round() + 8).to(torch.uint8)  # (out, in)
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", codes[:, ::2] * 16 + codes[:, 1::2])

    def unpacked(self) -> Tensor:
        codes = torch.stack([self.qweight // 16, self.qweight % 16], dim=-1).flatten(1)
        return (codes.float() - 8) * self.scales

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.unpacked().T.to(x.dtype)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv2d(1, 1, 3)
