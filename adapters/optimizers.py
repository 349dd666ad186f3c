"""Which optimizer moves the factors, and which process holds its state? AdamW, whole or sharded over "dp" (ZeRO-1).

Sharded, it is torch's own ZeroRedundancyOptimizer: every process of the axis "dp" has the whole gradients, moves the
parameters that are its own, and sends them to the others. The arithmetic of a parameter is the same, so the bits are.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_fn import SpecError
from lora_fn.manifest import MOMENTS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def adamw(
    groups: Sequence[Mapping[str, Any]], *, betas: tuple[float, float], dp: ProcessGroup | None
) -> torch.optim.Optimizer:
    """AdamW over groups of parameters, its learning rates tensors.

    Its state is there from the start: made in the first step, it would make that another graph than the others'.

    Args:
        groups: Each {"params", "initial_lr", "weight_decay", ...}.
        betas: Of AdamW.
        dp: The processes that the state is sharded over; None: this one holds all of it.

    Raises:
        SpecError: Parameters of several dtypes, which the sharded one does not take.
    """
    parameters = [p for group in groups for p in group["params"]]
    device = parameters[0].device
    # (Given as a scalar, XLA writes 0 and 1 into its graphs: others are compiled.)
    own = [dict(g, lr=torch.tensor([g["initial_lr"]], device=device).reshape(())) for g in groups]
    options: dict[str, Any] = {"betas": betas, "foreach": False, "capturable": device.type != "cpu"}
    if dp is None:
        made = TracedAdamW if device.type == "xla" else torch.optim.AdamW
        optimizer: torch.optim.Optimizer = made(own, **options)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13 scripts its own functions there
            from torch.distributed.optim import ZeroRedundancyOptimizer

        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
        if len(dtypes) > 1:
            raise SpecError(
                f"--zero1: what is trained is of {' and '.join(dtypes)}, expected one dtype; "
                f"leave --zero1 out, or give --dtype float32."
            )
        optimizer = ZeroRedundancyOptimizer(own, torch.optim.AdamW, process_group=dp, **options)
    held = holder(optimizer)
    for group in held.param_groups:
        for p in group["params"]:
            moments = {name: torch.zeros_like(p) for name in MOMENTS}
            held.state[p] = {"step": steps_done(0, device), **moments}
    return optimizer


class TracedAdamW(torch.optim.AdamW):
    """torch's AdamW, but that nothing is computed in place: for XLA, where torch_xla 2.9 takes 100 times as long to
    trace `lerp_`, `addcmul_` and `addcdiv_` as what gives a new tensor, for each parameter and in every step.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101), algorithm 2.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move what has a gradient. The groups' learning rates are tensors []."""
        assert closure is None
        for group in self.param_groups:
            assert not (group["amsgrad"] or group["maximize"])
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group)

    def _move(self, p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        held, (first, second) = self.state[p], group["betas"]
        number = held["step"] + 1
        mean = torch.lerp(held["exp_avg"], grad, 1 - first)
        square = torch.addcmul(held["exp_avg_sq"] * second, grad, grad, value=1 - second)
        size = (square / (1 - second**number)).sqrt() + group["eps"]
        kept = p * (1 - group["lr"] * group["weight_decay"])
        moved = kept - group["lr"] / (1 - first**number) * (mean / size)
        for old, new in ((held["step"], number), (held["exp_avg"], mean), (held["exp_avg_sq"], square), (p, moved)):
            old.copy_(new)


def steps_done(number: int, device: torch.device | str) -> Tensor:
    """The number of steps, [], as AdamW's state has it, of each parameter its own.

    (Given as a scalar, XLA takes those that are alike for one: a resumed run's first step would be another graph.)
    """
    return torch.tensor([float(number)], device=device).reshape(())


def is_sharded(optimizer: torch.optim.Optimizer) -> bool:
    """Whether other processes hold a part of an optimizer's state. (By its name: its module is imported if needed.)"""
    return type(optimizer).__name__ == "ZeroRedundancyOptimizer"


def holder(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that holds this process's state, of the parameters that this process moves."""
    return optimizer.optim if is_sharded(optimizer) else optimizer  # type: ignore[attr-defined]


def whole_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> Mapping[Tensor, Mapping[str, Tensor]]:
    """The state of every parameter; every process of "dp" calls it.

    Args:
        optimizer: From `adamw`.
        keep: Whether this process wants it: of a sharded one, only the first may, which then has a copy on the host.

    Returns:
        {parameter: {name: tensor}}; {} where it is not wanted.
    """
    if not is_sharded(optimizer):
        return optimizer.state if keep else {}
    optimizer.consolidate_state_dict(to=0)  # type: ignore[attr-defined]
    if not keep:
        return {}
    state = optimizer.state_dict()["state"]
    optimizer._all_state_dicts.clear()  # type: ignore[attr-defined]  # it would keep the copy until the next one
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {p: state[number] for number, p in enumerate(parameters)}
