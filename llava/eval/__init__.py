"""Programs that ask a trained model questions and score its answers (upstream `llava/eval`).

`benchmarks.py` is the table of benchmarks and `python -m llava.eval` runs any of them. `answering/runner.py` answers
questions in batches; each `model_vqa*` program only says how a row of its benchmark becomes a `Task` and an answer a
row. The `eval_*` programs score answers files, `scoring/submission.py` converts them for servers.
"""
