"""HydraLoRA: low-rank experts with one shared A, several B and a router (NeurIPS 2024, arXiv 2404.19245).

`tuner/` is HydraLoRA as a method of PEFT, for any linear layer; importing this package registers it. The rest is its
LLaVA variant, routed blocks in place of the decoder's MLPs and HydraLoRA on attention layers:
`layer.py` holds the mathematics, `config.py` what can be varied, `model.py` and `linears.py` how blocks and updates
enter a model, `flags.py` and `extension.py` how they plug into llava, `convert.py` and `moe_args.py` published
checkpoints in and out.
"""

from hydralora.config import RoutedMLPConfig
from hydralora.layer import RoutedMLP, Routing, expert_balance_loss
from hydralora.model import added_parameters, attach, record_routing, routed_blocks
from hydralora.tuner import HydraLoraConfig, HydraLoraLayer, HydraLoraModel

__all__ = [
    "HydraLoraConfig",
    "HydraLoraLayer",
    "HydraLoraModel",
    "RoutedMLP",
    "RoutedMLPConfig",
    "Routing",
    "added_parameters",
    "attach",
    "expert_balance_loss",
    "record_routing",
    "routed_blocks",
]
