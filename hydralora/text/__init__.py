"""Fine-tuning a language model on instructions with HydraLoRA (`HydraLoRA/fine-tuning.py` of the original).

`options.py` holds the options, `arguments.py` their parser and checks, `samples.py` and `dataset.py` the data,
`training.py` the Trainer; the program itself is `hydralora/finetune.py`.
"""
