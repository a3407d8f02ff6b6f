"""Training data that are read as streams: rows come in order, none is looked up, and nothing is indexed or copied."""
