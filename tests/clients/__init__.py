"""Real clients, as their registries have them."""

import pytest

# so that their assertions explain themselves, as those of test modules do
pytest.register_assert_rewrite("tests.clients.contract", "tests.clients.foreign_process")
