"""How long a test waits for what must come."""

# Seconds. The machine may be loaded, and its pace is nothing that a test judges: so this bounds a hang, and no more.
PATIENCE = 60.0
