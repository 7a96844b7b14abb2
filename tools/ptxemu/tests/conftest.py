"""The options of proofs are in pyproject.toml, so their plugin has to be loaded when these tests run alone."""

pytest_plugins = ["ptxemu.proofs"]
