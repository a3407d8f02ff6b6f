"""Training from the command line (upstream `llava/train`)."""
