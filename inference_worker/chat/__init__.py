"""A conversation: the template's input, and what the model's output is made of."""
