"""How much memory training takes is counted before it begins."""

from __future__ import annotations

from typing import Any

import pytest

from sepme.train import TrainOptions, memory


@pytest.mark.parametrize("options", [{"batch": 2}, {"objective": "fmn", "edit": "both", "batch": 1}], ids=["gcirs", "fmn"])
def test_counted_as_it_is(demo_host: Any, options: dict[str, Any]) -> None:
    """The tensors that a step really makes take as many bytes as is counted without making them, but for torch's scalars."""
    chosen = TrainOptions.for_mode(**options)
    empty = demo_host.encode([""])
    with memory._Peak() as real:
        memory._step(demo_host, empty, chosen)
    counted = memory.step_bytes(demo_host, empty, chosen)
    assert counted == pytest.approx(real.most, rel=0.02)
    need = memory.needed(demo_host, 10**9, empty, chosen)
    assert need.total - 10**9 == max(counted, memory.peak_bytes(lambda: memory._run(demo_host, empty, chosen)))
    assert memory.told(need, 64, chosen).endswith(f"1.0 GB for the model, {memory.in_words(need.step)} for a step.")
