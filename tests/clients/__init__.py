"""Real clients, as their registries have them."""

import pytest

# so that their assertions explain themselves, as those of test modules do
for module in ("contract", "foreign_process", "installation"):
    pytest.register_assert_rewrite(f"tests.clients.{module}")
