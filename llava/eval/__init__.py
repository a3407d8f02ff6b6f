"""Programs that ask a trained model questions and score its answers (upstream `llava/eval`).

`runner.py` answers question files in batches; each `model_vqa*` program only says how a row of its benchmark becomes a
`Task` and how an answer becomes a row. `score.py` compares answers with labels.
"""
