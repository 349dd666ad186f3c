"""Which adapter is the difference of two models? The nearest of its rank, by a truncated SVD that streams.

Source: Halko, Martinsson, Tropp, "Finding structure with randomness" (2011), algorithms 4.4 and 5.1: a random range
finder with power iterations, here over blocks of rows read from disk, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.merge import FLOATS, blocks
from lora_fn import FileError, LayerSpec, LoraSpec, checkpoint, peft_format
from lora_fn.checkpoint import TensorFiles
from lora_fn.errors import Problems

OVERSAMPLING = 8  # columns of the sketch beyond the rank
ITERATIONS = 4  # of the power method: two reads each


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """What an adapter holds of a difference.

    Args:
        norms: {path: Frobenius norm of the layer's difference}.
        errors: {path: norm of what the adapter leaves of it, relative to it}.
        dropped: Names of tensors whose difference was left out, as asked.
    """

    norms: dict[str, float]
    errors: dict[str, float]
    dropped: tuple[str, ...]

    @property
    def error(self) -> float:
        """Over all layers: the norm of what is left of the difference, relative to it."""
        left = math.sqrt(sum((self.errors[path] * norm) ** 2 for path, norm in self.norms.items()))
        return left / math.sqrt(sum(norm**2 for norm in self.norms.values()))

    def rows(self) -> list[list[Any]]:
        """A table, its head first."""
        each = [[path, f"{norm:.4g}", f"{self.errors[path]:.3g}"] for path, norm in self.norms.items()]
        total = math.sqrt(sum(norm**2 for norm in self.norms.values()))
        return [["layer", "|difference|", "relative error"], *each, ["all", f"{total:.4g}", f"{self.error:.3g}"]]


def extract(
    base: Path,
    tuned: Path,
    output: Path,
    *,
    rank: int,
    targets: Sequence[str] = (),
    drop: Sequence[str] = (),
    quiet: bool = False,
) -> Extracted:
    """Write the adapter of a rank that brings one model nearest to another.

    The singular values are shared: half of each (its root) is in A and half in B, and the scaling is 1.

    Args:
        base: Directory of a Hugging Face model.
        tuned: Directory of a model of the same tensors.
        output: A directory that does not exist yet; it becomes a PEFT adapter for the base.
        rank: Of every layer.
        targets: Names of layers, or their ends, that may be adapted; embeddings too. Empty: every linear layer.
        drop: Names of layers or tensors, or their ends, whose difference may be lost.
        quiet: No progress bar.

    Returns:
        The error that is left, per layer.

    Raises:
        FileError: A damaged or missing file, models of other tensors, a difference that the adapter cannot hold and
            that is not dropped, one that is not finite, no difference at all, an output that exists or cannot be
            written. Nothing is written then.
    """
    from tqdm import tqdm

    if output.exists():
        raise FileError(f"{output}: exists; choose another --output.")
    if rank < 1:
        raise FileError(f"{output}: cannot have rank {rank}; choose one of at least 1.")
    checkpoint.check_above(output)
    before, after = checkpoint.open_model(base), checkpoint.open_model(tuned)
    kinds = _kinds(base)
    names = _common(before, after, base, tuned)
    with tqdm(total=len(names), unit="tensor", desc="compare", disable=quiet) as bar:
        norms = {name: _Difference(before, after, name, tuned).norm(bar) for name in names}
    differing = {name: norm for name, norm in norms.items() if norm}
    paths, dropped = _choose(differing, before, kinds, targets=targets, drop=drop, base=base, tuned=tuned)
    specs, tree, errors = {}, {}, {}
    with tqdm(total=len(paths), unit="layer", desc="extract", disable=quiet) as bar:
        for path in paths:
            name, kind = f"{path}.weight", kinds[path]
            difference = _Difference(before, after, name, tuned)
            left, right = (factor.float() for factor in _factors(difference, rank))
            errors[path] = difference.left_by(left, right) / norms[name]
            rows, columns = difference.shape
            turned = kind != "linear"
            inside, out = (rows, columns) if turned else (columns, rows)
            specs[path] = LayerSpec(
                kind="embedding" if kind == "embedding" else "linear",
                in_features=inside,
                out_features=out,
                rank=rank,
                alpha=rank,
                fan_in_fan_out=kind == "transposed",
            )
            a, b = (left.T, right.T) if turned else (right, left)
            tree[path] = {"lora_A": a.contiguous(), "lora_B": b.contiguous()}
            bar.update()
    spec = LoraSpec(rank=rank, alpha=rank, task_type="CAUSAL_LM", base_model_name_or_path=str(base))
    turned = any(of.fan_in_fan_out for of in specs.values())
    config = peft_format.to_config(spec, list(paths), list(kinds), fan_in_fan_out=turned)
    try:
        with checkpoint.replacing(output) as beside:
            checkpoint.save_adapter(beside, config, peft_format.to_state_dict(tree, specs))
    except OSError as error:
        raise FileError(f"{output}: cannot be written ({error}); choose another place.") from error
    return Extracted(norms={path: differing[f"{path}.weight"] for path in paths}, errors=errors, dropped=dropped)


def _kinds(directory: Path) -> dict[str, str]:
    """Path -> "linear", "transposed" (transformers' Conv1D) or "embedding", of the stock model's layers."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    named = {torch.nn.Linear: "linear", Conv1D: "transposed", torch.nn.Embedding: "embedding"}
    checkpoint.read_json(directory / "config.json")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever its parts raise
        found = " ".join(str(error).split())
        raise FileError(f"{directory / 'config.json'}: transformers does not take it ({found}); mend it.") from error
    return {path: named[type(module)] for path, module in model.named_modules() if type(module) in named}


def _common(before: TensorFiles, after: TensorFiles, base: Path, tuned: Path) -> list[str]:
    """The names of both models' tensors: floating, and of the same shapes."""
    problems = Problems(FileError)
    for name in sorted(set(before.shapes) ^ set(after.shapes)):
        here, there = (base, tuned) if name in before.shapes else (tuned, base)
        problems.add(str(there), f"has no {name!r}, which {here} has; give two models of the same tensors.")
    names = [name for name in before.shapes if name in after.shapes]
    for name in names:
        if before.shapes[name] != after.shapes[name]:
            problems.add(
                str(tuned),
                f"{name!r} has shape {list(after.shapes[name])}, {base} has {list(before.shapes[name])}; "
                f"give two models of the same tensors.",
            )
        for directory, files in ((base, before), (tuned, after)):
            if files.dtypes[name] not in FLOATS:
                problems.add(
                    str(directory),
                    f"{name!r} is {files.dtypes[name]}, expected one of {', '.join(FLOATS)}; dequantize it.",
                )
    problems.raise_if_any()
    return names


def _choose(
    differing: dict[str, float],
    before: TensorFiles,
    kinds: dict[str, str],
    *,
    targets: Sequence[str],
    drop: Sequence[str],
    base: Path,
    tuned: Path,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The paths to adapt and the tensors to leave out; every difference is in one of them."""
    problems = Problems(FileError)
    for option, ends, known in (("--target-modules", targets, list(kinds)), ("--drop", drop, list(before.shapes))):
        for end in ends:
            if not any(_fits(name, end) for name in known):
                problems.add(str(base), f"{option} {end!r} is the end of no name in it; correct it or leave it out.")
    tied = checkpoint.read_json(base / "config.json").get("tie_word_embeddings", "lm_head.weight" not in before.shapes)
    paths, dropped = [], []
    for name in differing:
        path, _, parameter = name.rpartition(".")
        kind = kinds.get(path)
        asked = any(_fits(path, end) for end in targets) if targets else kind in ("linear", "transposed")
        if any(_fits(name, end) for end in drop):
            dropped.append(name)
        elif parameter != "weight" or kind is None:
            problems.add(
                str(tuned), f"{name!r} differs, which no LoRA adapter holds; add it to --drop to go on without it."
            )
        elif tied and (kind == "embedding" or path == "lm_head"):
            problems.add(
                str(tuned), f"{name!r} differs and is shared by two layers, which no adapter holds; add it to --drop."
            )
        elif not asked:
            problems.add(str(tuned), f"{name!r} differs and is not adapted; add it to --target-modules, or to --drop.")
        else:
            paths.append(path)
    if {"linear", "transposed"} <= {kinds[path] for path in paths}:
        problems.add(
            str(tuned), "differs in weights [in, out] and [out, in], which one adapter does not hold; --drop one kind."
        )
    problems.raise_if_any()
    if not paths:
        raise FileError(f"{tuned}: differs from {base} in nothing that is to be adapted; give the tuned model.")
    return tuple(paths), tuple(dropped)


def _fits(name: str, end: str) -> bool:
    """Whether `end` is a name of a tensor or of its layer, or the end of one."""
    return any(whole == end or whole.endswith("." + end) for whole in (name, name.rpartition(".")[0]))


class _Difference:
    """tuned - base of one tensor as a matrix that is never whole in memory.

    Args:
        before, after: The models' files.
        name: Of the tensor.
        tuned: The second model's place, for messages.
    """

    def __init__(self, before: TensorFiles, after: TensorFiles, name: str, tuned: Path):
        self.before, self.after, self.name, self.tuned = before, after, name, tuned
        self.shape = checkpoint.as_matrix(before.shapes[name])

    def pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, rows start to stop in float64)."""
        for start, stop in blocks(self.shape):
            raw = torch.empty(8 * (stop - start) * self.shape[1], dtype=torch.uint8)
            rows = self.after.read_rows(self.name, start, stop, buffer=raw).double()
            yield start, stop, rows.sub_(self.before.read_rows(self.name, start, stop, buffer=raw))

    def norm(self, bar: Any) -> float:
        """Its Frobenius norm.

        Raises:
            FileError: It is not finite.
        """
        found = self._norm(lambda start, stop, rows: rows)
        if not math.isfinite(found):
            raise FileError(f"{self.tuned}: {self.name!r} differs by what is not finite; give a whole model.")
        bar.update()
        return found

    def left_by(self, left: Tensor, right: Tensor) -> float:
        """The norm of what two factors [rows, r] and [r, columns] leave of it."""
        right = right.double()
        return self._norm(lambda start, stop, rows: rows.addmm_(left[start:stop].double(), right, alpha=-1))

    def _norm(self, change: Callable[[int, int, Tensor], Tensor]) -> float:
        return math.sqrt(sum(float(change(start, stop, rows).square().sum()) for start, stop, rows in self.pieces()))

    def times(self, x: Tensor) -> Tensor:
        """[rows, k], of x [columns, k]."""
        return torch.cat([rows @ x for _, _, rows in self.pieces()])

    def transposed_times(self, x: Tensor) -> Tensor:
        """[columns, k], of x [rows, k]."""
        found = x.new_zeros(self.shape[1], x.shape[1])
        for start, stop, rows in self.pieces():
            found.addmm_(rows.T, x[start:stop])
        return found


def _factors(difference: _Difference, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest [rows, rank] @ [rank, columns], zeros where the rank is more than it has."""
    rows, columns = difference.shape
    width = min(rank + OVERSAMPLING, rows, columns)
    sketch = torch.randn(columns, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = _orthogonal(difference.times(sketch))
    for _ in range(ITERATIONS):
        basis = _orthogonal(difference.times(_orthogonal(difference.transposed_times(basis))))
    u, s, vh = torch.linalg.svd(difference.transposed_times(basis).T, full_matrices=False)
    kept = min(rank, width)
    half = s[:kept].sqrt()
    left, right = basis.new_zeros(rows, rank), basis.new_zeros(rank, columns)
    left[:, :kept] = basis @ u[:, :kept] * half
    right[:kept] = half[:, None] * vh[:kept]
    return left, right


def _orthogonal(x: Tensor) -> Tensor:
    return torch.linalg.qr(x).Q
