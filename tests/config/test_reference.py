import subprocess
import sys
from pathlib import Path

from upsnet.config.original_keys import NO_EFFECT
from upsnet.config.reference import recipe_page
from upsnet.config.schema import recipe_keys

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def test_the_committed_page_is_up_to_date():
    committed = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert committed == recipe_page(), "run: python -m upsnet.config > docs/recipes.md"


def test_the_page_names_every_key():
    page = recipe_page()
    for key in recipe_keys():
        assert f"| `{key}` |" in page or f"| `{key.rpartition('.')[2]}` |" in page
    assert all(f"| `{key}` |" in page for key in NO_EFFECT)


def test_rows_show_defaults_and_choices():
    page = recipe_page()
    assert "| `lr` | required |" in page
    assert "| `bbox_reg_weights` | `[10, 10, 5, 5]` |" in page
    assert "| `backbone_fix_bn` | `true` |" in page
    assert "(`none`, `group_norm`, `batch_norm`)" in page
    assert "| `limit` | `null` |" in page


def test_the_module_prints_the_page():
    command = [sys.executable, "-m", "upsnet.config"]
    printed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout
    assert printed.decode("utf-8") == recipe_page()
