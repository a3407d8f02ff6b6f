"""`--push_to_hub`: a finished folder with a model card, uploaded once, in one commit.

`access` checks before the training that the upload will be allowed, `staging` collects the files, `card` writes the
README.md, `upload` pushes. Nothing here knows a model.
"""
