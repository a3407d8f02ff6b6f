"""From a row of questions to a row of answers: prompts, batches, generation, answers files, several processes."""
