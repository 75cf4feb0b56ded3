"""The machines that a run is planned for: how many, how fast, and how they are connected."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config import RunConfig
from megatrain.errors import ConfigError
from megatrain.plan import rules
from megatrain.plan.arithmetic import Rates
from megatrain.plan.hardware import DEVICES, Device, find_device
from megatrain.plan.this_machine import CPU, measured_cpu

_GPUS_PER_NODE = 8
_OF_A_CPU = 0.5
LINK_SHARE = 0.8
"""Of a link's nominal rate that collectives reach, within a node and between nodes (S. Bekman, "Machine Learning
Engineering", "Unidirectional vs Bidirectional"; 361 of 450 GB/s in an all-gather of 8 H200)."""


@dataclass(frozen=True)
class Cluster:
    """What a run is planned for.

    ``network_bytes_per_second``: from one device to other nodes, one way. ``efficiency``: the share of its peak at
    which a device computes where nothing holds it up; None: what follows from the shapes of its products.
    """

    nodes: int
    gpus_per_node: int
    device: Device
    network_bytes_per_second: float
    efficiency: float | None = None

    @classmethod
    def of(
        cls, nodes: int, gpus_per_node: int, device: str, network_gbits: float, efficiency: float | None = None
    ) -> Cluster:
        """A cluster of devices by name, or of CPUs like this machine's, which is measured.

        Raises ConfigError where the table does not know the name.
        """
        found = measured_cpu(gpus_per_node) if device == CPU else find_device(device)
        if found is None:
            known = ", ".join(sorted([CPU, *(each.name for each in DEVICES)]))
            raise ConfigError(f"--device {device}: not a device that megatrain knows; known: {known}.")
        return cls(nodes, gpus_per_node, found, network_gbits * 1e9 / 8, efficiency)

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    def rates(self, precision: str) -> Rates:
        """Of its devices. A CPU's shapes say nothing that is known here: half of its peak, unless it is given."""
        flat = self.efficiency if self.efficiency is not None or self.device.units else _OF_A_CPU
        return Rates(self.device, precision, flat)

    def bandwidth(self, size: int, stride: int) -> float:
        """Bytes a second that a ring of ``size`` ranks, each ``stride`` after the one before, carries one way.

        Where it leaves the node, it has the network ports of all its ranks there.
        """
        link, network = LINK_SHARE * self.device.link_bytes_per_second, LINK_SHARE * self.network_bytes_per_second
        if self._is_in_a_node(size * stride):
            return link
        ranks_in_node = max(1, min(size, self.gpus_per_node // stride))
        return min(ranks_in_node * network, link) if ranks_in_node > 1 else network

    def border_bandwidth(self, size: int, stride: int) -> float:
        """The same from one of such ranks to the next alone, where that is slowest."""
        is_in_a_node = self._is_in_a_node(size * stride)
        return LINK_SHARE * (self.device.link_bytes_per_second if is_in_a_node else self.network_bytes_per_second)

    def _is_in_a_node(self, num_ranks: int) -> bool:
        """Whether each run of so many consecutive ranks, from the first on, has a node to itself."""
        return self.gpus_per_node % num_ranks == 0 or num_ranks <= self.world_size <= self.gpus_per_node


def find_nodes(config: RunConfig, nodes: int | None, gpus_per_node: int | None) -> tuple[int, int]:
    """Nodes, and devices in each, where one or both are left open: as few as one copy of the model needs, 8 a node."""
    needed = rules.model_ranks(config)
    if nodes is None and gpus_per_node is None:
        gpus_per_node = max(count for count in range(1, _GPUS_PER_NODE + 1) if needed % count == 0)
    if gpus_per_node is None:
        return nodes or 1, _GPUS_PER_NODE
    return nodes or -(-needed // gpus_per_node), gpus_per_node
