"""Language models with vision (upstream `llava/model/language_model`)."""
