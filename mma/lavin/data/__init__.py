"""LaVIN's data: ScienceQA in its prompt formats, the chatbot mixture, and how both become token ids and labels."""
