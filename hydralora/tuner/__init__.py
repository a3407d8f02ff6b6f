"""HydraLoRA as a method of PEFT, for the linear layers of any model.

`peft.get_peft_model(model, HydraLoraConfig(target_modules=[...]))`; adapters are saved, loaded, switched and combined
as PEFT's own. `config.py` says what can be varied, `linear.py` holds the layer, `model.py` how it enters a model.
"""

from hydralora.tuner.balance.losses import BalanceForm
from hydralora.tuner.balance.trainer import set_gradient_scale
from hydralora.tuner.config import HydraLoraConfig, RoutingUnit
from hydralora.tuner.export import LoraExport, save_as_lora, save_clusters_as_lora, save_tasks_as_lora
from hydralora.tuner.groups import parameter_groups
from hydralora.tuner.hotswap import register_hotswap
from hydralora.tuner.initialization import Initialization
from hydralora.tuner.linear import HydraLoraLayer, Linear
from hydralora.tuner.merging import MergeReport
from hydralora.tuner.model import HydraLoraModel, hydralora_layers
from hydralora.tuner.progress import set_step
from hydralora.tuner.registration import register
from hydralora.tuner.routing.ablation import Ablation, ablate_experts
from hydralora.tuner.routing.calls import forced_routing
from hydralora.tuner.routing.from_loras import from_loras
from hydralora.tuner.scaling import rescale

__all__ = [
    "Ablation",
    "BalanceForm",
    "HydraLoraConfig",
    "HydraLoraLayer",
    "HydraLoraModel",
    "Initialization",
    "Linear",
    "LoraExport",
    "MergeReport",
    "RoutingUnit",
    "ablate_experts",
    "forced_routing",
    "from_loras",
    "hydralora_layers",
    "parameter_groups",
    "rescale",
    "save_as_lora",
    "save_clusters_as_lora",
    "save_tasks_as_lora",
    "set_gradient_scale",
    "set_step",
]

register(HydraLoraConfig, HydraLoraModel)
register_hotswap()
