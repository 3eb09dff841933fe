"""The demo itself, on two of its eighteen concepts: figures, report, exactness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sepme.demo.quick import run_quick
from sepme.demo.run import run_demo
from sepme.hosts.diffusers import DiffusersHost

CONCEPTS, IMAGES = 2, 2


@pytest.fixture(scope="module")
def told(demo_host: DiffusersHost, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("demo")
    return run_demo(demo_host, out, IMAGES, CONCEPTS), out


@pytest.mark.parametrize("key", ["gcirs", "closed_form"])
def test_erases_keeps_and_restores(told: tuple[dict[str, Any], Path], key: str) -> None:
    metrics = told[0] if key == "gcirs" else told[0]["closed_form"]
    assert metrics["stock_accuracy"] >= 0.9
    assert metrics["erased_accuracy_single"] <= told[0]["chance_accuracy"] + 0.05
    assert metrics["erased_accuracy_all"] <= told[0]["chance_accuracy"] + 0.05
    assert metrics["kept_accuracy_drop"] <= 0.01
    assert metrics["restored_bit_identical"] == 1
    assert metrics["untouched_bit_identical"] >= 0.99
    assert metrics["restored_bit_identical_bf16"] == 1
    assert metrics["untouched_bit_identical_bf16"] >= 0.99
    assert metrics["leakage_gated_max"] == 0
    assert metrics["delta_bytes_max"] <= 500_000
    assert metrics["gate_off"]["leakage_gated_max"] > 0


def test_report_is_complete(told: tuple[dict[str, Any], Path]) -> None:
    metrics, out = told
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") >= 5 * CONCEPTS + CONCEPTS + 4 + 1
    assert "http://" not in html
    assert "https://" not in html
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert len(list((out / "deltas").glob("*/*.safetensors"))) == 2 * CONCEPTS


def test_the_quick_page_is_written_as_it_goes(demo_host: DiffusersHost, tmp_path: Path) -> None:
    said: list[str] = []
    seen: list[tuple[bool, int]] = []  # the page still waits, pictures on it

    def look(what: str, done: int, total: int) -> None:
        page = tmp_path / "report.html"
        if page.exists():
            html = page.read_text(encoding="utf-8")
            seen.append(("http-equiv" in html, html.count("data:image/png;base64,")))

    metrics = run_quick(demo_host, tmp_path, 2, 2, look, said.append)
    assert [part for part in ("first.png", "report.html") if part in " ".join(said)] == ["first.png", "report.html"]
    assert seen == sorted(seen, key=lambda s: s[1])
    assert seen[0] == (True, 0)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 2 * 5 + 2
    assert "http-equiv" not in html
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert metrics["restored_bit_identical"] == metrics["untouched_bit_identical"] == 1
    assert metrics["erased_accuracy_single"] <= 0.5 < metrics["stock_accuracy"]
    assert len(list((tmp_path / "deltas").glob("*/*.safetensors"))) == 4
