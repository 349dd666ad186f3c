"""What is an axis? A named dimension of the device mesh, and what ties it to processes.

An axis is unbound at birth: a name and a size, which is all that a file needs. Bound, it also knows the process group
that spans it. Unbound with a batched `index`, it is a dimension that `torch.vmap` maps over (see collectives).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_fn.errors import SpecError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A dimension of the device mesh.

    Args:
        name: Its name in the mesh, e.g. "tp".
        size: How many processes it spans.
        index: This process's place on it; None while unbound.
        group: The name of the process group that spans it (torch's registry of groups resolves it); None while unbound.
        groups: The global ranks of every group of the mesh along this axis: XLA's replica groups. None while unbound.
    """

    name: str = "tp"
    size: int = 1
    index: int | None = None
    group: str | None = None
    groups: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SpecError(
                f"axis {self.name!r}: size is {self.size}, expected at least 1; give the number of processes."
            )
        if self.index is not None and not 0 <= self.index < self.size:
            raise SpecError(f"axis {self.name!r}: index is {self.index}, expected 0 to {self.size - 1}.")

    @property
    def bound(self) -> bool:
        """Whether a process group (or XLA's replica groups) stands behind the name."""
        return self.group is not None or self.groups is not None

    @property
    def unbound(self) -> Axis:
        """The name and the size alone."""
        return Axis(name=self.name, size=self.size)

    def bind(self, mesh: DeviceMesh) -> Axis:
        """This axis tied to the mesh dimension of the same name.

        Args:
            mesh: A `torch.distributed.device_mesh.DeviceMesh` with named dimensions.

        Raises:
            SpecError: The mesh has no such dimension, or one of another size.
        """
        names = mesh.mesh_dim_names or ()
        if self.name not in names:
            raise SpecError(
                f"axis {self.name!r}: the mesh has {list(names)}; name one of its dimensions {self.name!r}."
            )
        dim = names.index(self.name)
        if mesh.size(dim) != self.size:
            raise SpecError(
                f"axis {self.name!r}: the spec says {self.size} processes, the mesh has {mesh.size(dim)}; "
                f"make them equal."
            )
        groups = tuple(map(tuple, mesh.mesh.movedim(dim, -1).reshape(-1, self.size).tolist()))
        if mesh.device_type == "xla":  # torch makes no process groups for it, and its collectives need none
            rank = mesh.get_rank()
            [index] = [group.index(rank) for group in groups if rank in group]
            return replace(self, index=index, groups=groups)
        group = mesh.get_group(self.name).group_name
        return replace(self, index=mesh.get_local_rank(self.name), group=group, groups=groups)


def axis_of_mesh(mesh: DeviceMesh, name: str) -> Axis:
    """The mesh's dimension `name`, bound."""
    names = mesh.mesh_dim_names or ()
    size = mesh.size(names.index(name)) if name in names else 1
    return Axis(name=name, size=size).bind(mesh)


def axis_of_group(group: ProcessGroup, *, name: str = "tp") -> Axis:
    """An axis over one process group (its replica groups for XLA are not known from it)."""
    return Axis(name=name, size=group.size(), index=group.rank(), group=group.group_name)
