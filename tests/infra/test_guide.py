"""The guide for operators names every error of the endpoint, and every alert."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "infra" / "README.md").read_text()


def test_every_error_of_the_endpoint_is_in_the_guide() -> None:
    code = re.compile(r'\bcode="(\w+)"')
    sources = (ROOT / "cluster" / "serving" / "http").glob("*.py")
    codes = {found for path in sources for found in code.findall(path.read_text())}
    assert {"overloaded", "keys_required", "invalid_api_key"} <= codes
    # What no client can mend is a fault of ours, which the log has.
    assert [code for code in sorted(codes - {"internal"}) if f"`{code}`" not in GUIDE] == []


def test_every_alert_is_in_the_guide() -> None:
    rules = yaml.safe_load((ROOT / "infra" / "monitoring" / "alerts.yaml").read_text())
    names = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    assert [name for name in names if f"| {name} |" not in GUIDE] == []
