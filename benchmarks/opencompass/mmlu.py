"""OpenCompass: MMLU without examples in the prompt, for a base and for the base with a HydraLoRA adapter.

Usage, from the root of the repository (docs/evaluation_text.md says how to install OpenCompass):

    MODEL=./checkpoints/llama-2-7b ADAPTER=./checkpoints/my_adapter/sft_lora_model PYTHONPATH=. \
        opencompass benchmarks/opencompass/mmlu.py --work-dir ./eval-output/mmlu

What the original's README changes by hand in OpenCompass is set here: the adapter, and a retriever that finds nothing
in place of the five examples of `mmlu_ppl_ac766d`.
"""

import os

from mmengine.config import read_base
from opencompass.openicl.icl_retriever import ZeroRetriever

from benchmarks.opencompass.model import AdaptedModel

with read_base():
    from opencompass.configs.datasets.mmlu.mmlu_ppl_ac766d import mmlu_datasets as datasets
    from opencompass.configs.summarizers.groups.mmlu import mmlu_summary_groups

for dataset in datasets:
    dataset["infer_cfg"]["retriever"] = {"type": ZeroRetriever}

base = {
    "type": AdaptedModel,
    "path": os.environ.get("MODEL", "path_to_llama_model"),
    "tokenizer_path": os.environ.get("TOKENIZER", os.environ.get("MODEL", "path_to_llama_model")),
    "max_seq_len": 2048,
    "max_out_len": 1024,
    "batch_size": 8,
    "run_cfg": {"num_gpus": int(os.environ.get("GPUS", "1"))},
}
adapted = {"peft_path": os.environ.get("ADAPTER", "path_to_output/lora_model/sft_lora_model")}
models = [base | {"abbr": "base"}, base | adapted | {"abbr": "hydralora"}]

summarizer = {
    "dataset_abbrs": ["mmlu", "mmlu-weighted"],
    "summary_groups": mmlu_summary_groups,
}

del os, dataset, base, adapted  # OpenCompass writes out every name that is left
