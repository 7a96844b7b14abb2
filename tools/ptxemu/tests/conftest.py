"""The proofs' options are in pyproject.toml, so their plugin has to be there where these tests run alone."""

pytest_plugins = ["ptxemu.proofs"]
