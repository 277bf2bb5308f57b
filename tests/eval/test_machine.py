from __future__ import annotations

import torch

from eval.machine import describe_machine, read_bandwidth


def test_machine_facts() -> None:
    machine = describe_machine(measure_bandwidth=False)
    assert machine.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert machine.threads == torch.get_num_threads() and machine.ram_bytes > 2**28
    assert machine.cpu and machine.read_bandwidth is None


def test_bandwidth_is_of_a_plausible_size() -> None:
    assert 1e8 < read_bandwidth(megabytes=32, repeats=2) < 1e13
