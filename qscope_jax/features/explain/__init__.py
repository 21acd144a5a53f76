"""What features stand for: contexts, words, neighbours, explanations and their scores."""
