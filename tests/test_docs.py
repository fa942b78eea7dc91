"""The API reference, built as `make docs` does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mnp_fast

SOURCE = Path(__file__).parents[1] / "docs" / "api"


def build(source, out):
    command = [sys.executable, "-m", "sphinx", "-qEW", "--keep-going", str(source), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def documented(tmp_path_factory):
    """The names that the reference describes."""
    out = tmp_path_factory.mktemp("api")
    done = build(SOURCE, out)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r'id="([\w.-]+)"', (out / "index.html").read_text()))


@pytest.mark.parametrize("name", mnp_fast.__all__)
def test_public_names_are_described(name, documented):
    prefix = "module-" * (type(getattr(mnp_fast, name)) is type(mnp_fast))
    assert f"{prefix}mnp_fast.{name}" in documented


@pytest.mark.parametrize("name", mnp_fast.ops.__all__)
def test_operators_are_described(name, documented):
    assert f"mnp_fast.ops.{name}" in documented


def test_a_warning_is_an_error(tmp_path):
    (tmp_path / "conf.py").write_text((SOURCE / "conf.py").read_text())
    (tmp_path / "index.rst").write_text("Title\n=====\n\nShape (N, *).\n")
    done = build(tmp_path, tmp_path / "out")
    assert done.returncode != 0
    assert "emphasis" in done.stderr
