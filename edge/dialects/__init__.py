"""One file for each HTTP wire format: it parses bodies and encodes messages, and knows nothing else."""
