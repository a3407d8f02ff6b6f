"""Fine-tuning a language model on instructions with HydraLoRA (`HydraLoRA/fine-tuning.py` of the original).

`arguments.py` holds the options, `samples.py` and `dataset.py` the data, `training.py` the Trainer; the program itself
is `hydralora/finetune.py`.
"""
