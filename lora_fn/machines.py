"""What can a machine do? A handful of constants each, as data: what `cost` turns counts into seconds with.

Where a number is published, its source stands beside it; every other one is assumed. None was measured by us on a
Neuron device: put your own in their place (`lora-fn cost --machine trn1 measured.json`, `--set latency=15e-6`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from lora_fn.errors import Problems, SpecError
from lora_fn.values import is_integer, is_number

MAY_BE_INFINITE = ("memory_bandwidth", "bandwidth", "network")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One process of a machine, and what is between it and the others.

    Args:
        flops: FLOP/s that a process sustains in large matrix products of the model's dtype.
        memory_bandwidth: bytes/s between a process and its memory; inf: products take the time of their FLOPs only.
        memory: bytes that a process has.
        latency: Seconds that a collective within a node takes, however small it is.
        bandwidth: bytes/s from a process to its neighbour within a node.
        processes: Of a node.
        network_latency: Seconds that a collective between nodes takes, however small it is.
        network: bytes/s from a node to the others, all of its processes together.

    Raises:
        SpecError: Values that cannot be, all of them at once.

    Example:
        >>> MACHINES["trn1"].link(8)  # seconds, bytes/s
        (2e-05, 60000000000.0)
    """

    flops: float
    memory_bandwidth: float
    memory: float
    latency: float
    bandwidth: float
    processes: int
    network_latency: float
    network: float

    def __post_init__(self) -> None:
        problems = Problems(SpecError)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "processes":
                fits, expected = is_integer(value) and value >= 1, "an integer of at least 1"
            elif f.name.endswith("latency"):
                fits, expected = is_number(value) and 0 <= value < math.inf, "a number of seconds, of at least 0"
            else:
                most = math.inf if f.name in MAY_BE_INFINITE else 1e30
                fits, expected = is_number(value) and 0 < value <= most, "a number above 0"
            if not fits:
                problems.add(f"Machine.{f.name}", f"is {value!r}, expected {expected}.")
        problems.raise_if_any()

    def nodes(self, processes: int) -> int:
        """How many nodes so many processes fill."""
        return -(-processes // self.processes)

    def link(self, size: int, stride: int = 1) -> tuple[float, float]:
        """What is between neighbours of a group.

        Args:
            size: Processes in the group.
            stride: How far apart its members are: 1 for tensor parallel, whose groups are neighbours; its size for
                data parallel.

        Returns:
            Seconds of latency, and bytes/s: between nodes, what is left of the network where every group that spans
            the node sends at the same time.
        """
        if size * stride <= self.processes:
            return self.latency, self.bandwidth
        inside = max(1, self.processes // stride)  # members of a group that one node has
        return self.network_latency, min(self.bandwidth, self.network * inside / self.processes)

    def with_values(self, values: Mapping[str, object], where: str) -> Machine:
        """The machine with other values.

        Args:
            values: Field -> value.
            where: Where they come from, for the error.

        Raises:
            SpecError: Names that are no fields, or values that cannot be.
        """
        return replace(self, **_known(values, where))  # type: ignore[arg-type]


def from_values(values: Mapping[str, object], where: str) -> Machine:
    """A machine of all its fields. Args as for `Machine.with_values`.

    Raises:
        SpecError: Names that are no fields, fields that are missing, values that cannot be.
    """
    known = _known(values, where)
    missing = [f.name for f in fields(Machine) if f.name not in known]
    if missing:
        raise SpecError(
            f"{where}: lacks {', '.join(missing)}; name the machine whose constants these are before it "
            f"(one of {', '.join(MACHINES)})."
        )
    return Machine(**known)  # type: ignore[arg-type]


def _known(values: Mapping[str, object], where: str) -> dict[str, object]:
    names = [f.name for f in fields(Machine)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise SpecError(f"{where}: has {', '.join(unknown)}, expected some of {', '.join(names)}; leave it out.")
    return dict(values)


GiB = 2**30
SUSTAINED = 0.5  # of the peak of matrix products; assumed

MACHINES: Mapping[str, Machine] = {
    # trn1.32xlarge, a process for each of 32 NeuronCores-v2. Peak 190 TFLOPS (bf16), 820 GB/s and 32 GiB per chip of
    # two cores, 800 Gbit/s of EFA per node: AWS Neuron documentation, "Trainium Architecture" and "AWS Trn1/Trn1n
    # Architecture". bandwidth: assumed, between 40 GB/s (its nccom-test example, two ranks) and 80. Latencies: assumed.
    "trn1": Machine(
        flops=SUSTAINED * 95e12,
        memory_bandwidth=410e9,
        memory=16 * GiB,
        latency=20e-6,
        bandwidth=60e9,
        processes=32,
        network_latency=50e-6,
        network=100e9,
    ),
    # trn2.48xlarge, a process for each of 64 logical NeuronCores (LNC 2). Peak 667 TFLOPS (bf16), 2.9 TB/s and 96 GiB
    # per chip of four: AWS Neuron documentation, "Trainium2 Architecture" and "Trainium2 Architecture Guide for NKI".
    # 3.2 Tbit/s of EFA per node: AWS's page of EC2 Trn2. bandwidth and latencies: assumed.
    "trn2": Machine(
        flops=SUSTAINED * 667e12 / 4,
        memory_bandwidth=2.9e12 / 4,
        memory=24 * GiB,
        latency=20e-6,
        bandwidth=100e9,
        processes=64,
        network_latency=50e-6,
        network=400e9,
    ),
    # A node of eight H200. Peak 989 TFLOPS (bf16, dense), 4.8 TB/s, 141 GB, NVLink 900 GB/s both ways: NVIDIA's data
    # sheet. A network of 400 Gbit/s per GPU, and the latencies: assumed.
    "h200": Machine(
        flops=SUSTAINED * 989e12,
        memory_bandwidth=4.8e12,
        memory=141e9,
        latency=15e-6,
        bandwidth=450e9,
        processes=8,
        network_latency=30e-6,
        network=400e9,
    ),
    # Two processes of a two-core x86 machine over gloo, a thread each, float32: 0.35 ms for an all-reduce that is
    # small, 22 GB/s of copying for both, measured; the rest assumed, so that the order of magnitude is right.
    "cpu": Machine(
        flops=50e9,
        memory_bandwidth=11e9,
        memory=8 * GiB,
        latency=350e-6,
        bandwidth=2e9,
        processes=2,
        network_latency=1e-3,
        network=1e9,
    ),
}
