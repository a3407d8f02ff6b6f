"""Our model in lmms-eval: its manifest, the model class, requests, and the likelihood of given answers."""
