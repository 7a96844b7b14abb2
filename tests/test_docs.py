"""What the pages say is there is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tests_that_a_page_names_exist():
    """A reader who looks for the proof of a feature would find none."""
    for page in [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for file, test in re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?`", page.read_text()):
            path = ROOT / "tests" / file
            path = path if path.exists() else ROOT / "tools" / "ptxemu" / "tests" / file
            assert path.exists(), f"{page.name}: {file}"
            assert not test or f"def {test}(" in path.read_text(), f"{page.name}: {file}::{test}"
