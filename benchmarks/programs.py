"""Which programs are compared? Each trains the same Llama-shaped model, with the same weights and factors.

"frozen" has no adapter, and its gradient goes through the model to the input, as it does in all others: so as in any
layer but the first. "torch" is what one would write: a module whose forward is F.linear, two products and an addmm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float64": "fp64"}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCABULARY = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model shaped as Llama: intermediate features are 8/3 of the hidden ones."""

    hidden: int
    layers: int
    tokens: int
    heads: int = 8
    key_value_heads: int = 4

    @property
    def intermediate(self) -> int:
        """Features inside of an MLP, a multiple of 32."""
        return round(self.hidden * 8 / 3 / 32) * 32

    def config(self) -> Any:
        """For transformers."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=max(2048, self.tokens),
            attn_implementation="sdpa",
            use_cache=False,
            pad_token_id=0,
            tie_word_embeddings=False,
        )


TINY = Shape(hidden=32, layers=2, tokens=16)
H128 = Shape(hidden=128, layers=8, tokens=128)
H512 = Shape(hidden=512, layers=8, tokens=512)
H1024 = Shape(hidden=1024, layers=4, tokens=1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all programs of a case have in common."""

    shape: Shape
    dtype: str = "float32"
    rank: int = 16
    dropout: float = 0.0
    device: str = "cpu"

    def __str__(self) -> str:
        shape, dropout = self.shape, f", dropout {self.dropout:g}" if self.dropout else ""
        return (
            f"h{shape.hidden} L{shape.layers} {shape.tokens} tokens {SHORT[self.dtype]} r{self.rank}{dropout}"
            f"{'' if self.device == 'cpu' else f' on {self.device}'}"
        )

    @property
    def alpha(self) -> int:
        """Twice the rank."""
        return 2 * self.rank


# ------------------------------------------------------------------------------------------- what all begin with


def llama(setup: Setup) -> Any:
    """The base, the same each time; drawn in fp32."""
    from transformers import LlamaForCausalLM

    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = LlamaForCausalLM(setup.shape.config())
    torch.set_rng_state(state)
    return model.to(DTYPES[setup.dtype]).to(setup.device).requires_grad_(False).train()


def adapted_paths(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that get an adapter: all but the head."""
    return {path: module for path, module in model.named_modules() if path.rpartition(".")[2] in LINEARS}


def drawn(model: nn.Module, rank: int, seed: int = 1) -> dict[str, Tensor]:
    """Factors in fp32, both of them filled, "PATH.lora_A" and "PATH.lora_B" of each adapted layer.

    They are numbers of bf16, so that a program that holds them in it has the same.
    """
    generator, found = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for path, module in adapted_paths(model).items():
        out, inside = module.out_features, module.in_features
        found[f"{path}.lora_A"] = torch.randn(rank, inside, generator=generator) / math.sqrt(inside)
        found[f"{path}.lora_B"] = torch.randn(out, rank, generator=generator) * 0.1 / math.sqrt(rank)
    return {name: factor.bfloat16().float() for name, factor in found.items()}


def batch(setup: Setup) -> dict[str, Tensor]:
    """One row: embeddings [1, T, h] that want a gradient, and labels [1, T]."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, setup.shape.tokens, setup.shape.hidden, generator=generator)
    labels = torch.randint(0, VOCABULARY, (1, setup.shape.tokens), generator=generator)
    x = x.to(DTYPES[setup.dtype]).to(setup.device).requires_grad_()
    return {"inputs_embeds": x, "labels": labels.to(setup.device)}


# ------------------------------------------------------------------------------------------------------ programs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Program:
    """A model in training.

    Args:
        model: Which.
        trained: Its parameters that are trained, by name.
        inputs: What it is called with.
        before: Called before each forward, with the number of the step: gives dropout's key.
    """

    model: Any
    trained: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    before: Callable[[int], object] = lambda number: None
    number: list[int] = field(default_factory=lambda: [0])

    def loss(self) -> Tensor:
        """A forward."""
        self.before(self.number[0])
        self.number[0] += 1
        return self.model(**self.inputs).loss

    def step(self) -> Tensor:
        """A forward and a backward; gives the loss."""
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def clear(self) -> None:
        """Forget the gradients."""
        for p in (*self.trained.values(), self.inputs["inputs_embeds"]):
            p.grad = None

    def found(self) -> dict[str, Tensor]:
        """The loss and every gradient, without dropout."""
        self.clear()
        self.model.eval()
        loss = self.step()
        self.model.train()
        trained = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
        grads = trained | {"x": self.inputs["inputs_embeds"].grad}
        self.clear()
        return {"loss": loss} | {name: grad for name, grad in grads.items() if grad is not None}


class PlainLora(nn.Module):
    """Linear and LoRA in plain operators, for autograd: factors are cast to the input's dtype."""

    def __init__(self, base: Any, rank: int, alpha: float, dropout: float, dtype: torch.dtype):
        super().__init__()
        self.base, self.scaling, self.dropout = base, alpha / rank, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=dtype, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, dtype=dtype, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y, dropped = self.base(x), F.dropout(x, self.dropout, self.training) if self.dropout else x
        h = self.scaling * F.linear(dropped, self.lora_A.to(x.dtype))
        up = self.lora_B.to(x.dtype)
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), up.T).view(y.shape)


def filled(trained: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Parameters, with these values in them."""
    assert trained.keys() == values.keys()
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(values[name])
    return trained


def frozen(setup: Setup) -> Program:
    """No adapter."""
    return Program(model=llama(setup), trained={}, inputs=batch(setup))


def full(setup: Setup) -> Program:
    """All linear layers are trained; no adapter."""
    model = llama(setup)
    trained = {f"{path}.weight": module.weight.requires_grad_() for path, module in adapted_paths(model).items()}
    return Program(model=model, trained=trained, inputs=batch(setup))


def plain(setup: Setup) -> Program:
    """Stock torch."""
    model = llama(setup)
    values = drawn(model, setup.rank)
    wide = torch.promote_types(DTYPES[setup.dtype], torch.float32)
    for path, base in adapted_paths(model).items():
        owner, _, name = path.rpartition(".")
        layer = PlainLora(base, setup.rank, setup.alpha, setup.dropout, wide)
        setattr(model.get_submodule(owner), name, layer)
    names = {name: model.get_parameter(name) for name in values}
    return Program(model=model.train(), trained=filled(names, values), inputs=batch(setup))


def ours(setup: Setup, *, dtype: torch.dtype | None = None, recompute: str | None = None) -> Program:
    """`adapters.wrap`."""
    import adapters
    import lora_fn

    model = llama(setup)
    values = drawn(model, setup.rank)
    spec = lora_fn.LoraSpec(
        rank=setup.rank, alpha=setup.alpha, dropout=setup.dropout, target_modules=tuple(adapted_paths(model))
    )
    wide = torch.promote_types(DTYPES[setup.dtype], torch.float32)
    adapters.wrap(model, spec, dtype=dtype or wide, recompute=recompute)
    trained = {f"{path}.{name}": p for path, of in adapters.factors(model).items() for name, p in of.items()}
    # Made before, as in a training loop; given as a scalar, XLA would take one for a number of the graph that is alike.
    keys = [torch.tensor([number], device=setup.device).reshape(()) for number in range(64)]

    def before(number: int) -> None:
        if setup.dropout:
            adapters.set_dropout_key(model, keys[number % len(keys)])

    return Program(model=model.train(), trained=filled(trained, values), inputs=batch(setup), before=before)


def peft(setup: Setup, *, autocast: bool = True) -> Program:
    """Stock PEFT; its default has the factors of a bf16 model in fp32, and casts the input up to them."""
    from peft import LoraConfig, get_peft_model

    model = llama(setup)
    values = drawn(model, setup.rank)
    config = LoraConfig(
        r=setup.rank, lora_alpha=setup.alpha, lora_dropout=setup.dropout, target_modules=list(adapted_paths(model))
    )
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=autocast)
    trained = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): p
        for name, p in wrapped.named_parameters()
        if p.requires_grad
    }
    return Program(model=wrapped.train(), trained=filled(trained, values), inputs=batch(setup))


FROZEN, FULL = "frozen", "full fine-tuning"  # those without an adapter
PROGRAMS: Mapping[str, Callable[[Setup], Program]] = {
    FROZEN: frozen,
    "ours": ours,
    "PEFT": peft,
    "PEFT, no autocast": lambda setup: peft(setup, autocast=False),
    "torch": plain,
    FULL: full,
}


def reference(setup: Setup) -> dict[str, Tensor]:
    """The loss and every gradient of the plain program in float64, of the weights that the setup's dtype has."""
    program = plain(replace(setup, dtype="float64", dropout=0.0))
    _with_values_of(setup, program.model, program.inputs["inputs_embeds"])
    return program.found()


def dense(setup: Setup, dtype: str = "float64") -> dict[str, Tensor]:
    """The loss without an adapter, and its gradients: of the input, and of the weight of each layer that can have one.

    Plain autograd's, in some dtype, of the weights that the setup's dtype has.
    """
    chosen = replace(setup, dtype=dtype)
    model, inputs = llama(chosen).eval(), batch(chosen)
    _with_values_of(setup, model, inputs["inputs_embeds"])
    wanted = {f"{path}.weight": module.weight.requires_grad_() for path, module in adapted_paths(model).items()}
    wanted["x"] = inputs["inputs_embeds"]
    loss = model(**inputs).loss
    return {"loss": loss.detach(), **dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))}


def _with_values_of(setup: Setup, model: nn.Module, x: Tensor) -> None:
    """Put the weights and the input of a setup into a model of another dtype."""
    weights = {name.replace(".base.", "."): p for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in llama(setup).named_parameters():
            weights[name].copy_(p)
        x.copy_(batch(setup)["inputs_embeds"])
