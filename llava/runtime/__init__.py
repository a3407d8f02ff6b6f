"""What knows nothing of a LLaVA: files, folders, weights, ranges of options, tokenizers, DeepSpeed, a trainer.

Every package may use these modules; none of them imports a model, a benchmark or an extension.
"""
