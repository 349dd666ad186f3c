"""How is a canonical dimension laid out over the processes? An invertible map, described as data.

A dimension is made of named parts (the q, k, v of a fused projection; most have one). A part is cut into equal blocks;
its blocks, in some order and perhaps several times, fill slots; and every process holds equally many consecutive slots
of every part, one part after the other. That covers what neuronx-distributed and Optimum Neuron do:

    a plain cut                 as many blocks as processes; the last may be short or empty, and is padded
    fused layers                several parts
    stride s                    s times as many blocks, dealt out like cards
    key-value heads, m copies   a block a head, every one in m slots: [K0..Kn][K0..Kn] (trn1) or [K0 K0]..[Kn Kn] (trn2)
    query heads beside them     as many blocks as key-value slots, in the order that puts each beside its own head

`to_local`, `to_canonical` and the copies' bookkeeping are all derived from the same numbers.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_fn.errors import Problems, SpecError

ORDERS = ("tiled", "adjacent")
Place = TypeVar("Place", int, Tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A named piece of a dimension, and the slots that its blocks fill.

    Args:
        name: "q", "gate", ...; empty for the only part.
        size: Canonical size.
        blocks: How many blocks it is cut into, each of ceil(size / blocks); what is missing at the end is padding.
        stride: Blocks are dealt out: the slots 0, 1, 2, ... hold the blocks 0, n, 2n, ..., 1, n + 1, ... where
            n = blocks / stride.
        replication: How many slots every block fills.
        order: Of the copies. "tiled": all blocks, then all again; "adjacent": every block and its copies side by side.
    """

    name: str = ""
    size: int
    blocks: int
    stride: int = 1
    replication: int = 1
    order: str = "tiled"

    @property
    def block(self) -> int:
        """The size of a block."""
        return -(-self.size // self.blocks)

    @property
    def slots(self) -> int:
        """How many slots its blocks fill, on all processes together."""
        return self.blocks * self.replication

    def block_of(self, slot: Place) -> Place:
        """The block that a slot holds; of one slot, or of a tensor of them."""
        dealt = slot % self.blocks if self.order == "tiled" else slot // self.replication
        return dealt % self.stride * (self.blocks // self.stride) + dealt // self.stride


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive elements of a part, and where a process holds them.

    Args:
        part: Its name.
        start, stop: In the part.
        at: In the process's local dimension.
    """

    part: str
    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A canonical dimension over the processes of an axis.

    Args:
        parts: In canonical order, which is also the local one.
        processes: How many.

    Raises:
        SpecError: Numbers that do not divide, or two parts of a name, all of them at once.

    Example:
        >>> layout = plain(6, 2)
        >>> [layout.to_local(torch.arange(6), index).tolist() for index in range(2)]
        [[0, 1, 2], [3, 4, 5]]
    """

    parts: tuple[Part, ...]
    processes: int

    def __post_init__(self) -> None:
        problems = Problems(SpecError)
        for part in self.parts:
            where = f"layout of {part.size}" + (f" ({part.name})" if part.name else "")
            numbers = (part.size, part.blocks, part.stride, part.replication, self.processes)
            if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in numbers) or part.order not in ORDERS:
                problems.add(where, f"is {part} over {self.processes}, expected integers of at least 1.")
                continue
            if part.slots % self.processes:
                problems.add(where, f"{part.slots} blocks cannot be dealt to {self.processes} processes evenly.")
            if part.blocks % part.stride:
                problems.add(where, f"{part.blocks} blocks cannot be dealt with stride {part.stride}.")
        if len({part.name for part in self.parts}) < len(self.parts) or not self.parts:
            problems.add("layout", f"has parts {[part.name for part in self.parts]}, expected one or more of a name.")
        problems.raise_if_any()

    @property
    def size(self) -> int:
        """The canonical size, padding cut off."""
        return sum(part.size for part in self.parts)

    @property
    def local_size(self) -> int:
        """The size on one process, padding included."""
        return sum(self.local_sizes.values())

    @property
    def local_sizes(self) -> dict[str, int]:
        """Part -> its size on one process."""
        return {part.name: part.slots // self.processes * part.block for part in self.parts}

    @property
    def has_copies(self) -> bool:
        """Whether something lies in more than one place."""
        return any(part.replication > 1 for part in self.parts)

    def offset(self, name: str) -> int:
        """Where a part begins in the canonical dimension."""
        names = [part.name for part in self.parts]
        return sum(part.size for part in self.parts[: names.index(name)])

    def part(self, name: str) -> Layout:
        """The layout of one part alone.

        Raises:
            SpecError: No such part.
        """
        found = tuple(part for part in self.parts if part.name == name)
        if not found:
            raise SpecError(f"layout: has no part {name!r}, only {[part.name for part in self.parts]}.")
        return Layout(parts=found, processes=self.processes)

    def pieces(self, index: int) -> tuple[Piece, ...]:
        """What process `index` holds, in local order; neighbours that lie together in a part are one piece.

        Raises:
            SpecError: No such process.
        """
        if not 0 <= index < self.processes:
            raise SpecError(f"layout: index is {index}, expected 0 to {self.processes - 1}; give a place on the axis.")
        return _pieces(self, index)

    def to_local(self, x: Tensor, index: int, *, dim: int = 0) -> Tensor:
        """What process `index` holds of a canonical tensor: a new tensor, zeros where it is padded.

        Raises:
            SpecError: Another size than the layout's.
        """
        dim = dim % x.dim()
        if x.shape[dim] != self.size:
            raise SpecError(f"layout: dimension {dim} has size {x.shape[dim]}, expected {self.size}.")
        shape = list(x.shape)
        shape[dim] = self.local_size
        local = x.new_zeros(shape)
        for piece in self.pieces(index):
            length = piece.stop - piece.start
            start = self.offset(piece.part) + piece.start
            local.narrow(dim, piece.at, length).copy_(x.narrow(dim, start, length))
        return local

    def to_canonical(self, locals_: Sequence[Tensor], *, dim: int = 0) -> Tensor:
        """The canonical tensor, out of what all processes hold, in order; padding is cut off.

        Raises:
            SpecError: Another number of tensors or another size, or copies that differ.
        """
        if len(locals_) != self.processes:
            raise SpecError(f"layout: found {len(locals_)} parts, expected {self.processes}; give one per process.")
        dim = dim % locals_[0].dim()
        for local in locals_:
            if local.shape[dim] != self.local_size:
                raise SpecError(f"layout: dimension {dim} has size {local.shape[dim]}, expected {self.local_size}.")
        shape = list(locals_[0].shape)
        shape[dim] = self.size
        whole = locals_[0].new_empty(shape)
        filled: set[tuple[str, int]] = set()
        for index, local in enumerate(locals_):
            for piece in _blocks(self, index):
                length = piece.stop - piece.start
                there = whole.narrow(dim, self.offset(piece.part) + piece.start, length)
                here = local.narrow(dim, piece.at, length)
                if (piece.part, piece.start) not in filled:
                    there.copy_(here)
                    filled.add((piece.part, piece.start))
                elif not same_bits(there, here):
                    raise SpecError(
                        f"the copies of {piece.part or 'one part'}, elements {piece.start} to {piece.stop - 1}, differ "
                        f"between processes; call sync_gradients before each optimizer step."
                    )
        return whole

    def places(self, index: int | Tensor) -> Tensor:
        """Where the elements of process `index` are in the canonical dimension; ends of short blocks are past a part.

        Args:
            index: A number, or an int tensor of any shape (data, on a device that traces one graph for all).

        Returns:
            int64 [*index.shape, local_size].
        """
        at = torch.as_tensor(index)[..., None]
        found = []
        for part in self.parts:
            per_process = part.slots // self.processes
            slots = at * per_process + torch.arange(per_process, device=at.device)
            inside = torch.arange(part.block, device=at.device)
            start = self.offset(part.name) + part.block_of(slots) * part.block
            found.append((start[..., None] + inside).flatten(-2))
        return torch.cat(found, -1)

    def sources(self) -> Tensor:
        """int64 [size]: for every canonical element, the first of its places in all processes' local ones in a row."""
        sources = torch.zeros(self.size, dtype=torch.int64)
        for index in reversed(range(self.processes)):
            for piece in reversed(_blocks(self, index)):
                start, length = self.offset(piece.part) + piece.start, piece.stop - piece.start
                sources[start : start + length] = index * self.local_size + piece.at + torch.arange(length)
        return sources

    def copies(self) -> Tensor:
        """int64 [local_size]: in how many places each element of a process lies (the same for every process)."""
        return torch.cat([torch.full((self.local_sizes[part.name],), part.replication) for part in self.parts])

    def to_json(self) -> str:
        """The layout as JSON."""
        return json.dumps({"processes": self.processes, "parts": [asdict(part) for part in self.parts]})

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """The layout that `to_json` wrote.

        Raises:
            SpecError: Not such JSON, unknown keys, or numbers that cannot be.
        """
        try:
            values = json.loads(text)
            _refuse_unknown({*values} - {"processes", "parts"})
            return cls(processes=values["processes"], parts=tuple(Part(**_known(part)) for part in values["parts"]))
        except (json.JSONDecodeError, AttributeError, KeyError, RecursionError, TypeError) as error:
            raise SpecError(f"layout: {text[:80]!r} is not one ({error}); use what to_json wrote.") from error


def _known(values: Mapping[str, Any]) -> Mapping[str, Any]:
    _refuse_unknown(set(values) - {f.name for f in fields(Part)})
    return values


def _refuse_unknown(keys: set[str]) -> None:
    if keys:
        raise SpecError(f"layout: unknown keys {sorted(keys)}; remove them, or use the version that wrote them.")


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise SpecError(f"layout: {name} is {number}, expected at least 1.")


def plain(size: int, processes: int, *, name: str = "", pad: bool = False, stride: int = 1) -> Layout:
    """Consecutive parts of equal size; with a stride, as NxD's layers with `stride` have them.

    Raises:
        SpecError: The size does not divide and is not to be padded.
    """
    _at_least_one(size=size, processes=processes, stride=stride)
    if not pad and size % (processes * stride):
        raise SpecError(
            f"layout: {size} cannot be cut into {processes * stride} equal parts; pad it, or choose others."
        )
    return Layout(parts=(Part(name=name, size=size, blocks=processes * stride, stride=stride),), processes=processes)


def fuse(*layouts: Layout) -> Layout:
    """Several dimensions as one: every process holds its part of each, one after the other.

    Raises:
        SpecError: Layouts over different numbers of processes, or two parts of a name.
    """
    over = sorted({each.processes for each in layouts})
    if len(over) != 1:
        raise SpecError(f"layout: cannot fuse layouts over {over} processes; give one or more over the same.")
    return Layout(parts=tuple(part for each in layouts for part in each.parts), processes=over[0])


def least_multiplier(kv_heads: int, processes: int) -> int:
    """How many copies of the key-value heads the processes need at least, so that each has equally many."""
    return math.lcm(kv_heads, processes) // kv_heads


def key_value_heads(
    size: int, kv_heads: int, processes: int, *, multiplier: int, order: str = "tiled", name: str = ""
) -> Layout:
    """Key or value heads, each in `multiplier` slots.

    Args:
        size: kv_heads * head_dim; any multiple of kv_heads.
        kv_heads: How many heads.
        processes: How many.
        multiplier: Copies of each head; NxD's `kv_size_multiplier`.
        order: "tiled" (trn1) or "adjacent" (trn2).
        name: Of the part.

    Raises:
        SpecError: Numbers that do not divide.

    Source: neuronx-distributed, modules/qkv_linear.py.
    """
    _at_least_one(size=size, kv_heads=kv_heads, processes=processes, multiplier=multiplier)
    if size % kv_heads:
        raise SpecError(f"layout: size {size} cannot be cut into {kv_heads} key-value heads.")
    part = Part(name=name, size=size, blocks=kv_heads, replication=multiplier, order=order)
    return Layout(parts=(part,), processes=processes)


def query_heads(
    size: int, kv_heads: int, processes: int, *, multiplier: int, order: str = "tiled", name: str = ""
) -> Layout:
    """Query heads (and o_proj's inputs), in the order that puts each on the process that has its key-value head.

    Args, raises: As `key_value_heads`; the query heads of one key-value head are shared out among its copies.

    Example:
        8 query heads, 2 key-value heads, 4 processes, multiplier 2:

        >>> layout = query_heads(8, 2, 4, multiplier=2)
        >>> [layout.to_local(torch.arange(8), index).tolist() for index in range(4)]
        [[0, 1], [4, 5], [2, 3], [6, 7]]

    Source: Optimum Neuron, models/training/transformations_utils.py, `compute_query_indices_for_rank`.
    """
    _at_least_one(size=size, kv_heads=kv_heads, processes=processes, multiplier=multiplier)
    blocks = kv_heads * multiplier
    if size % blocks:
        raise SpecError(f"layout: size {size} cannot be cut into {blocks} groups of query heads.")
    stride = kv_heads if order == "tiled" else 1
    return Layout(parts=(Part(name=name, size=size, blocks=blocks, stride=stride),), processes=processes)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, NaN included."""
    if a.dtype.itemsize == 1:  # torch.equal has none of 8 bits
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


@functools.lru_cache(maxsize=1024)
def _blocks(layout: Layout, index: int) -> tuple[Piece, ...]:
    """A piece per block that process `index` holds, short or left out where it is padding."""
    found, at = [], 0
    for part in layout.parts:
        per_process = part.slots // layout.processes
        for slot in range(index * per_process, (index + 1) * per_process):
            start = part.block_of(slot) * part.block
            stop = min(start + part.block, part.size)
            if start < stop:
                found.append(Piece(part.name, start, stop, at))
            at += part.block
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def _pieces(layout: Layout, index: int) -> tuple[Piece, ...]:
    found: list[Piece] = []
    for piece in _blocks(layout, index):
        last = found[-1] if found else None
        if (
            last
            and last.part == piece.part
            and last.stop == piece.start
            and last.at + last.stop - last.start == piece.at
        ):
            found[-1] = Piece(last.part, last.start, piece.stop, last.at)
        else:
            found.append(piece)
    return tuple(found)
