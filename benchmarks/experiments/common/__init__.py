"""What experiments share: data, tiny models, steps that resume, tables."""
