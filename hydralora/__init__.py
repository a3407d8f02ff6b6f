"""HydraLoRA: low-rank experts with one shared A, several B and a router (NeurIPS 2024, arXiv 2404.19245).

`layer.py` holds the mathematics, `config.py` what can be varied, `model.py` how the blocks enter a decoder,
`extension.py` how they plug into llava, `convert.py` and `moe_args.py` published checkpoints in and out.
"""

from hydralora.config import RoutedMLPConfig
from hydralora.layer import RoutedMLP, Routing, expert_balance_loss
from hydralora.model import added_parameters, attach, record_routing, routed_blocks

__all__ = [
    "RoutedMLP",
    "RoutedMLPConfig",
    "Routing",
    "added_parameters",
    "attach",
    "expert_balance_loss",
    "record_routing",
    "routed_blocks",
]
