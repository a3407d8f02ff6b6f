"""Plain LoRA of an adapter or of routed blocks, for programs that serve LoRA: one folder for each choice of weights.

With weights w_e that hold for every token, `s * sum_e w_e B_e A` is the update of a LoRA of the same rank.
"""

from hydralora.tuner.export.models import LoraExport, save_as_lora, save_clusters_as_lora, save_tasks_as_lora

__all__ = ["LoraExport", "save_as_lora", "save_clusters_as_lora", "save_tasks_as_lora"]
