"""Would the laws notice? Each one-line defect, put into a copy of lora_fn, must turn at least one law red.

A defect is (file, text, other text); the text must occur exactly once, so that a defect cannot rot. One subprocess
(this file, run as a script) imports every copy in turn and asks the laws of test_laws.py on fixed cases: of each defect
the one that NOTICED_BY names, on layers of one row, for all laws in every copy would take minutes.
"""

import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "lora_fn"
RELOADED = ("lora_fn", "mapped", "strategies", "test_laws", "test_many")

DEFECTS = {
    "sum of partial gradients left out": (
        "gradients.py",
        "if sharding.partial(spec, name):\n        return collectives.copy",
        "if False:\n        return collectives.copy",
    ),
    "column: dA's sum left out": (
        "sharding.py",
        '"lora_A": _whole_always,',
        '"lora_A": _whole,',
    ),
    "row: dB summed under sequence parallel only": (
        "sharding.py",
        "lora_B=Rule(Replicate(), ALWAYS),",
        "lora_B=Rule(Replicate(), SEQUENCE),",
    ),
    "row: bias gradient's sum left out": (
        "sharding.py",
        "bias=_whole_sequence,\n        lora_A=_columns,",
        "bias=_whole,\n        lora_A=_columns,",
    ),
    "output gathered: bias gradient summed": (
        "sharding.py",
        "bias=_whole,\n        lora_A=_whole_always,",
        "bias=_whole_always,\n        lora_A=_whole_always,",
    ),
    "a reduction's gradient summed again": ("collectives.py", '"reduce": "copy",', '"reduce": "reduce",'),
    "summed gradients summed again by the sync": (
        "gradients.py",
        'return spec.gradients == "deferred" and name',
        "return name",
    ),
    "replicated: partial gradients left as they are": (
        "gradients.py",
        'if spec.gradients != "summed":',
        'if spec.gradients != "summed" or spec.kind == "replicated":',
    ),
    "tokens: the partial sums of their rows left out": (
        "sharding.py",
        "**_of_column, trainable_tokens_delta=_whole_always",
        "**_of_column, trainable_tokens_delta=_whole",
    ),
    "tokens: as if every process had the first outputs": (
        "layers.py",
        "rows = rows + collectives.place(at.spec.axis, at.index) * y.shape[-1]",
        "rows = rows + 0",
    ),
    "tokens: looked for among the rows of a process": (
        "layers.py",
        "is_token, which = _found(ids, spec)",
        "is_token, which = _found(rows, spec)",
    ),
    "tokens: merged as if every process had the first rows": (
        "merge.py",
        "numbers = numbers + collectives.place(spec.axis, index) * rows.shape[0]",
        "numbers = numbers + 0",
    ),
    "sync forgets the adapter's partial sums": (
        "gradients.py",
        "name in sharding.summed_names(spec)",
        'name in sharding.summed_names(spec) - {"lora_A"}',
    ),
    "the gradient of a gathered input summed": (
        "layers.py",
        'if at.spec.input == "replicated" else x',
        "if True else x",
    ),
    "by rank: the part of another process": (
        "layers.py",
        "whole.unflatten(-1, (self.spec.axis.size, -1))",
        "whole.unflatten(-1, (self.spec.axis.size, -1)).roll(1, -2)",
    ),
    "by rank: gathered over the tokens": (
        "layers.py",
        'how: dict[str, Any] = {"dim": -1, "dtype"',
        'how: dict[str, Any] = {"dim": -2, "dtype"',
    ),
    "by rank: the gradients of H left unsummed": (
        "layers.py",
        "collectives.gather_partial, [torch.cat(hs, -1)], **how",
        "collectives.gather, [torch.cat(hs, -1)], dim=-1",
    ),
    "by rank: H left unsummed": (
        "layers.py",
        "self.collective(collectives.reduce_scatter, hs, **how)",
        "self.collective(collectives.split, hs, dim=-1)",
    ),
    "by rank: each part's H behind the other's": (
        "layers.py",
        "return [h.flatten(-2) for h in each]",
        "return [h.flatten(-2) for h in each[::-1]]",
    ),
    "scale left out": ("product.py", "return (wide * scale).to(dtype)", "return wide.to(dtype)"),
    "scale twice": (
        "layers.py",
        "return spec.scaling_of(spec.updates[number])",
        "return spec.scaling_of(spec.updates[number]) ** 2",
    ),
    "embedding: scale left out": (
        "layers.py",
        '[at.scaled(look_up(params["lora_A"].T).to(y.dtype), 0)]',
        '[look_up(params["lora_A"].T).to(y.dtype)]',
    ),
    "scale of the adapter's bias left out": (
        "layers.py",
        'at.scaled(params["lora_B_bias"].to(y.dtype), 0)',
        'params["lora_B_bias"].to(y.dtype)',
    ),
    "merge: scale twice": (
        "merge.py",
        "up @ down * scaling",
        "up @ down * scaling ** 2",
    ),
    "rank-stabilised scale confused": (
        "layer_spec.py",
        "alpha / math.sqrt(rank) if use_rslora",
        "alpha / rank if use_rslora",
    ),
    "row: bias added on every process": (
        "layers.py",
        "at.updated(params, x, weight, None, features_cut=True)",
        'at.updated(params, x, weight, params.get("bias"), features_cut=True)',
    ),
    "input channels: bias added on every process": (
        "layers.py",
        'lambda x: form.base(x, params["weight"], spec), features_cut=True',
        'lambda x: _base_biased(form.base(x, params["weight"], spec), params, at), features_cut=True',
    ),
    "conv2d: channels are the last dimension": ("layers.py", "features=-3, base=_conv2d", "features=-1, base=_conv2d"),
    "conv2d: output channels gathered with their padding": (
        "layers.py",
        "return y.narrow(form.features, 0, spec.out_features)",
        "return y",
    ),
    "conv2d: lora_A without the padding": (
        "layers.py",
        "base=_conv2d, down=_conv2d",
        "base=_conv2d, down=lambda x, f, s: _conv2d(F.pad(x, (0, 0, 1, -1)), f, s)",
    ),
    "conv2d: merged without its scale": (
        "merge.py",
        "down.flatten(1) * scaling",
        "down.flatten(1)",
    ),
    "experts: each has the next one's lora_B": (
        "layers.py",
        'torch.einsum("e...r,eor->e...o", h, factor)',
        'torch.einsum("e...r,eor->e...o", h, factor.roll(1, 0))',
    ),
    "experts: merged untransposed": (
        "merge.py",
        "return product.mT if",
        "return product.mT.contiguous().view(product.shape) if",
    ),
    "raw: lora_A's gradient is left partial": (
        "layers.py",
        "own = summed(params, spec, index=index)",
        "own = dict(params)",
    ),
    "raw: unscaled": ("layers.py", "_scaled(spec, scaling, down, 0).to(weight.dtype)", "down.to(weight.dtype)"),
    "experts: gate and up one after the other": (
        "sharding.py",
        "pad=spec.pad, stride=spec.stride)",
        "pad=spec.pad)",
    ),
    "column: sequence dimension swapped": (
        "layers.py",
        "[x, *update], dim=at.spec.sequence_dim",
        "[x, *update], dim=1 - at.spec.sequence_dim",
    ),
    "row: sequence dimension swapped": (
        "layers.py",
        "[y, *update],\n            dim=spec.sequence_dim",
        "[y, *update],\n            dim=1 - spec.sequence_dim",
    ),
    "embedding: index of the next process": (
        "layers.py",
        "rows = ids - collectives.place(spec.axis, at.index) *",
        "rows = ids - (collectives.place(spec.axis, at.index) + 1) *",
    ),
    "embedding: rows of other processes unmasked": (
        "layers.py",
        "return found if inside is None else torch.where(inside[..., None], found, 0)",
        "return found",
    ),
    "embedding: padding row gets a gradient": ("layers.py", "if spec.padding_idx is not None:", "if False:"),
    "output gathered: padding not cut off": (
        "layers.py",
        "_base_biased(y[..., : spec.out_features], params",
        "_base_biased(y, params",
    ),
    "dropout: tokens numbered by process": (
        "layers.py",
        "numbers = (numbers + place * x.shape[dim]).to(torch.int32) if cut else numbers",
        "numbers = numbers",
    ),
    "dropout: tokens numbered by local strides": (
        "layers.py",
        "stride = wrap(stride * TOKEN_STRIDE)",
        "stride = wrap(stride * x.shape[dim])",
    ),
    "dropout: features numbered by process": (
        "layers.py",
        "features = (features + place * x.shape[-1]).to(torch.int32)",
        "features = features",
    ),
    "dropout: features numbered past the order of the heads": (
        "layers.py",
        "if features_cut and self.spec.heads is not None:",
        "if False:",
    ),
    "dropout: one mask for all parts": (
        "layers.py",
        "key = fold_in(self.key, number) if self.spec.parts else self.key",
        "key = self.key",
    ),
    "fused: every part gets the first part's H": ("layers.py", "hs[0 if spec.share_A else number]", "hs[0]"),
    "fused: weights of the parts swapped": (
        "layers.py",
        "dict(zip(layout.local_sizes, y.split",
        "dict(zip(reversed(layout.local_sizes), y.split",
    ),
    "copies: gradients not summed": (
        "gradients.py",
        "return p if layout is None else collectives.share(",
        "return p if True else collectives.share(",
    ),
    "copies: gradients not summed by the sync": (
        "gradients.py",
        "name in sharding.summed_names(spec)",
        "sharding.partial(spec, name)",
    ),
    "copies: each counts in the norm": ("gradients.py", "-1) / copies)", "-1))"),
    "heads: queries in their own order": (
        "layout.py",
        'stride = kv_heads if order == "tiled" else 1',
        "stride = 1",
    ),
    "heads: copies tiled that are to be adjacent": (
        "layout.py",
        'if self.order == "tiled" else slot // self.replication',
        'if self.order == "tiled" else slot % self.blocks',
    ),
    "dropout: one key for all": ("dropout.py", "wide(key.to(torch.int32))", "wide(0 * key.to(torch.int32))"),
    "dropout: one key for all layers": (
        "dropout.py",
        "mix(key.to(torch.int32) ^ mix(",
        "mix(0 * key.to(torch.int32) ^ mix(",
    ),
    "dropout: kept elements not scaled up": ("dropout.py", "x * (1 / (1 - probability))", "x"),
    "product: the gradient of x without its mask": (
        "product.py",
        "(x_grad.addcmul_ if own else x_grad.addcmul)(h_grad.T @ factor, keep)",
        "x_grad + h_grad.T @ factor",
    ),
    "product: lora_A learns of what was dropped": ("product.py", "h_grad @ _seen(x, keep)", "h_grad @ x"),
    "product: the backward is not scaled": (
        "product.py",
        "of_h = _times(turned, scale, probability, x.dtype) @ across",
        "of_h = turned.to(x.dtype) @ across",
    ),
    "product: kept elements not scaled up": (
        "product.py",
        "scale * (1 / (1 - probability)) if probability else scale",
        "scale",
    ),
    "product: h a constant to a second backward": ("product.py", "if torch.is_grad_enabled():", "if False:"),
    "dropout: another mask in the backward": (
        "dropout.py",
        "_Dropout.apply(grad, *ctx.saved_tensors, ctx.probability)",
        "_Dropout.apply(grad, ctx.saved_tensors[0] + 1, ctx.saved_tensors[1], ctx.probability)",
    ),
    "unshard: parts in another order": ("layout.py", "in enumerate(locals_)", "in enumerate(locals_[::-1])"),
    "shard: everybody gets the first part": (
        "layout.py",
        "for piece in self.pieces(index):",
        "for piece in self.pieces(0):",
    ),
    "unshard: padding stays": (
        "layout.py",
        "stop = min(start + part.block, part.size)",
        "stop = start + part.block",
    ),
    "factor cast late: the activation is cast up": (
        "product.py",
        "F.linear(seen, _times(down, scale, probability, x.dtype))",
        "F.linear(seen.to(down.dtype), _times(down, scale, probability, down.dtype))",
    ),
    "norm: replicated parameters counted by every process": (
        "gradients.py",
        "if cut else [total.reshape(1)]",
        "if True else [total.reshape(1)]",
    ),
    "norm: sharded parameters counted on one process": (
        "gradients.py",
        "if cut else [total.reshape(1)]",
        "if False else [total.reshape(1)]",
    ),
    "clip: small gradients scaled up": ("gradients.py", "(norm + 1e-6), max=1.0)", "(norm + 1e-6))"),
    "every level of vmap is the axis": (
        "collectives.py",
        "if lane is not None or index_at is None:",
        "if lane is not None or info.batch_size != axis.size:",
    ),
    "init: fan-in of one process": (
        "initialize.py",
        'uniform("lora_A", inside * window / of_blocks)',
        'uniform("lora_A", inside * window / of_blocks / spec.axis.size)',
    ),
    "dora: norms not summed over the axis": ("dora.py", "if _inputs_cut(spec) and not whole:", "if False:"),
    "dora: the norm has a gradient": ("dora.py", "{name: p.detach() for name", "{name: p for name"),
    "dora: the norm is its square": ("dora.py", "torch.where(squares > 0, squares, empty).sqrt()", "squares"),
    "dora: the norm is the base's alone": (
        "dora.py",
        "quantize.plain(w, up.dtype) + b @ down",
        "quantize.plain(w, up.dtype)",
    ),
    "dora: the update is not multiplied": (
        "layers.py",
        "params[up] = params[up] * gain.reshape",
        "params[up] = params[up] * torch.ones_like(gain).reshape",
    ),
    "dora: the base is multiplied twice": (
        "layers.py",
        "return self.gained(y, gain) if dropped is x",
        "return self.gained(y, gain * gain) if dropped is x",
    ),
    "dora: dropout leaves the base's product alone": (
        "layers.py",
        "if dropped is x else y + self.gained(product(dropped), gain - 1)",
        "if True else y",
    ),
    "dora: gains of the bias too": (
        "layers.py",
        "    return y if bias is None else y + bias\n\n\ndef _linear",
        "    return y if bias is None else y + at.gained(bias, next(iter(at.gains.values())))\n\n\ndef _linear",
    ),
    "dora: a magnitude's gradient summed under sequence parallel only": (
        "sharding.py",
        "lora_magnitude_vector=_whole_always,\n        lora_diag=_whole_always,\n    ),\n    # By rank",
        "lora_magnitude_vector=_whole_sequence,\n        lora_diag=_whole_always,\n    ),\n    # By rank",
    ),
    "dora: merged without gains": ("merge.py", "if gain is not None:", "if False:"),
    "dora: padding divides by zero": ("dora.py", "empty: float = 1.0", "empty: float = 0.0"),
    "kasa: the diagonal left out": ("kasa.py", "p * ups[name] if name in ups", "p if name in ups"),
    "kasa: the diagonal's sum left out": ("sharding.py", '"lora_diag": _whole_always,', '"lora_diag": _whole,'),
    "qalora: the number of groups left out": ("qalora.py", "spec.in_features / group**2", "1 / group"),
    "qalora: groups of every so manieth input": (
        "qalora.py",
        "p[..., None].expand(*p.shape, group)",
        "p[..., None, :].expand(*p.shape[:-1], group, p.shape[-1])",
    ),
    "bdlora: blocks counted on each process": (
        "bdlora.py",
        "at = layout.places(collectives.place(spec.axis, index)).to(p.device)",
        "at = torch.arange(p.shape[0])",
    ),
    "bdlora: a lora_A cut with the inputs": (
        "bdlora.py",
        "here = columns.places(collectives.place(spec.axis, index))",
        "here = columns.places(0)",
    ),
    "bdlora: dA's sum left out": (
        "sharding.py",
        "return _whole_always if base == spec.block_diagonal",
        "return _whole if base == spec.block_diagonal",
    ),
    "alora: the gate of other tokens": (
        "layers.py",
        "if cut is not None:",
        "if False:",
    ),
    "alora: its bias for all tokens": (
        "layers.py",
        'return y + at.gated(bias, cut=None if at.spec.kind == "column" else at.spec.sequence_dim)',
        "return y + bias",
    ),
    "merge writes into its argument": (
        "merge.py",
        "whole = base.to(dtype) + update.to(dtype)",
        "whole = base.to(dtype).add_(update.to(dtype))",
    ),
    "residual: the update added": (
        "merge.py",
        "-delta(params, spec, part=part.name, **told)",
        "delta(params, spec, part=part.name, **told)",
    ),
    "quantized: the backward multiplies as the forward does": (
        "quantize.py",
        "return _Product.apply(grad, packed, scale, ctx.how, not ctx.turned)",
        "return _Product.apply(grad, packed, scale, ctx.how, ctx.turned)",
    ),
    "quantized: scales of the first block": (
        "quantize.py",
        "* scale.unsqueeze(2)).flatten(1)",
        "* scale[:, :1, None]).flatten(1)",
    ),
    "quantized: the halves of a byte swapped": (
        "quantize.py",
        "[(upper, lower) for upper in",
        "[(lower, upper) for upper in",
    ),
    "quantized: the scale of a row layer cut as its outputs": (
        "sharding.py",
        "weight=_columns,\n        weight_scale=_columns,",
        "weight=_columns,\n        weight_scale=_rows,",
    ),
    "quantized: heads cut packed inputs as plain ones": (
        "sharding.py",
        'groups = {"lora_A": spec.group_size, "weight": _packed(spec)}',
        'groups = {"lora_A": spec.group_size}',
    ),
    "quantized: a scale of all parts is the first part's": (
        "quantize.py",
        "scales = [scale] * len(sizes) if how.scale",
        "scales = [scale * (1 + n) for n in range(len(sizes))] if how.scale",
    ),
    "dora, quantized: the norm of the scales left out": (
        "quantize.py",
        "return dequantize(weight, dtype) if isinstance",
        "return weight.packed.to(dtype) if isinstance",
    ),
    "pissa: scale left out": ("factorize.py", "s[: given.rank] / given.scaling, vh", "s[: given.rank], vh"),
    "pissa: the singular values in one factor": (
        "factorize.py",
        "return root[:, None] * vh, u * root",
        "return vh, u * s",
    ),
    "mica: the largest singular values": ("factorize.py", "u[:, -given.rank :]", "u[:, : given.rank]"),
    "olora: the last rows of R": ("factorize.py", "return r[: given.rank], q", "return r[-given.rank :], q"),
    "corda: what is known is learned": ("factorize.py", 'corda_method"] == "ipm"', 'corda_method"] == "kpm"'),
    "corda: not turned back": ("factorize.py", "vh[kept] @ inverse)", "vh[kept])"),
    "lora_ga: both factors of the same singular vectors": (
        "factorize.py",
        "return torch.arange(r, 2 * r), torch.arange(r)",
        "return torch.arange(r), torch.arange(r)",
    ),
    "fused: every part starts from the first rows": (
        "factorize.py",
        "narrow(0, _offset(spec, part), part.size)",
        "narrow(0, 0, part.size)",
    ),
    "a transposed weight starts as it lies": (
        "factorize.py",
        'return weight.mT if spec.kind == "embedding" or spec.fan_in_fan_out else weight',
        "return weight",
    ),
    "low rank: the iteration left out": ("factorize.py", "for _ in range(steps):", "for _ in range(0):"),
    "LoRA-FA: the sum over the axis left out": (
        "optimizers.py",
        "sums = collectives.reduce_flat([products[at] for at in cut], axis, index)",
        "sums = [products[at] for at in cut]",
    ),
    "LoRA-FA: the product of a whole lora_A summed too": (
        "optimizers.py",
        "if specs[path].axis == axis and sharding.layout(specs[path], down) is not None",
        "if specs[path].axis == axis",
    ),
    "LoRA-FA: scale once": ("optimizers.py", "inverse / scaling**2", "inverse / scaling"),
    "LoRA-FA: every part gets the first part's lora_A": (
        "optimizers.py",
        '"lora_A" if spec.share_A else part.param("lora_A")',
        '"lora_A" if spec.share_A else spec.updates[0].param("lora_A")',
    ),
    "LoRA+: lora_B moves as lora_A does": (
        "optimizers.py",
        "lr_embedding, lr * lr_ratio, lr * lr_ratio",
        "lr_embedding, lr, lr * lr_ratio",
    ),
    "many: rows without an adapter get the first one's": (
        "many.py",
        "torch.where(_beside(shown[..., _number(name, spec)], chosen), chosen, 0)",
        "chosen",
    ),
    "many: everybody's partial sums left out, plain": (
        "many.py",
        "(summed(stacked, spec, index=index), {}) if bare",
        "(stacked, {}) if bare",
    ),
    "many: the backward of groups is not scaled": (
        "grouped.py",
        "h_grad = _scaled(h_grad, scales)",
        "h_grad = 1 * h_grad",
    ),
    "many: gains of no adapter": ("many.py", "torch.where(_beside(shown[:, 0, number], g), g, 1)", "g"),
    "many: everybody's partial sums left out": (
        "many.py",
        "layers.prepared(base | summed(factors, spec, index=index),",
        "layers.prepared(base | factors,",
    ),
    "many: the first adapter's key for all": (
        "many.py",
        '"key": _picked(key, sets)[:, 0]',
        '"key": key[:1].expand(len(sets))',
    ),
    "many: rows in another order": ("many.py", "t.flatten(rows, rows + 1)", "t.flip(rows).flatten(rows, rows + 1)"),
    "many: what adds up is not scaled": (
        "many.py",
        'scaled = (chosen * times).to(chosen.dtype) if name.startswith("lora_A") else chosen',
        "scaled = chosen",
    ),
    "many: what adds up is paired with another's": (
        "many.py",
        "return scaled.movedim(1, 1 + dim).flatten(1 + dim, 2 + dim)",
        "return scaled.movedim(1, 1 + dim).flip(1 + dim if dim else 0).flatten(1 + dim, 2 + dim)",
    ),
    "siblings: each is brought another's H": ("siblings.py", "brought = iter(rest)", "brought = iter(rest[::-1])"),
    "siblings: dropout numbers the tokens of a part": (
        "layers.py",
        "gate, part_of=sequence_dim).down(",
        "gate).down(",
    ),
    "siblings: what rides back is not summed": (
        "collectives.py",
        "_ADJOINT[ctx.op], ctx.dim",
        '"split" if ctx.op == "gather_partial" else _ADJOINT[ctx.op], ctx.dim',
    ),
    "siblings: what rides back gets another's gradient": (
        "collectives.py",
        "for (i, _), part in zip(given, parts, strict=True):",
        "for (i, _), part in zip(given, parts[:1] + parts[:0:-1], strict=True):",
    ),
    "shard shares memory with its argument": ("reshard.py", "return p.clone() if layout", "return p if layout"),
}

# Law -> row of the rules table ("" where it asks of none) -> the defects that it notices on a layer of that row.
NOTICED_BY = {
    "law_1_no_update_is_the_base": {
        "column": (
            "column: sequence dimension swapped",
            "unshard: padding stays",
            "dora: the norm is its square",
            "dora: padding divides by zero",
            "alora: the gate of other tokens",
        ),
        "row": (
            "row: sequence dimension swapped",
            "shard: everybody gets the first part",
            "dora: norms not summed over the axis",
            "quantized: the scale of a row layer cut as its outputs",
            "quantized: heads cut packed inputs as plain ones",
        ),
        "linear": ("dora, quantized: the norm of the scales left out",),
        "column, output gathered": ("output gathered: padding not cut off",),
        "column, fused": (
            "fused: weights of the parts swapped",
            "dora: gains of the bias too",
            "quantized: a scale of all parts is the first part's",
        ),
    },
    "law_2_unshard_inverts_shard": {
        "experts, column": ("experts: gate and up one after the other",),
        "qkv": (
            "heads: queries in their own order",
            "heads: copies tiled that are to be adjacent",
        ),
        "column": ("unshard: parts in another order",),
    },
    "law_3_all_equals_the_oracle": {
        "column, by rank": ("by rank: the part of another process", "by rank: the gradients of H left unsummed"),
        "row, by rank": ("by rank: gathered over the tokens", "by rank: H left unsummed"),
        "column, fused, by rank": ("by rank: each part's H behind the other's",),
        "linear": (
            "sum of partial gradients left out",
            "summed gradients summed again by the sync",
            "scale left out",
            "scale twice",
            "scale of the adapter's bias left out",
            "rank-stabilised scale confused",
            "dropout: tokens numbered by process",
            "dropout: tokens numbered by local strides",
            "dropout: one key for all",
            "product: the gradient of x without its mask",
            "product: lora_A learns of what was dropped",
            "product: the backward is not scaled",
            "product: kept elements not scaled up",
            "dora: the norm has a gradient",
            "dora: the norm is the base's alone",
            "dora: the update is not multiplied",
            "dora: dropout leaves the base's product alone",
        ),
        "column": (
            "column: dA's sum left out",
            "sync forgets the adapter's partial sums",
            "the gradient of a gathered input summed",
            "kasa: the diagonal left out",
            "kasa: the diagonal's sum left out",
            "bdlora: blocks counted on each process",
            "alora: its bias for all tokens",
        ),
        "row": (
            "row: dB summed under sequence parallel only",
            "row: bias gradient's sum left out",
            "a reduction's gradient summed again",
            "row: bias added on every process",
            "dropout: features numbered by process",
            "dropout: features numbered past the order of the heads",
            "dora: a magnitude's gradient summed under sequence parallel only",
            "qalora: the number of groups left out",
            "bdlora: a lora_A cut with the inputs",
            "bdlora: dA's sum left out",
            "quantized: the backward multiplies as the forward does",
            "quantized: scales of the first block",
            "quantized: the halves of a byte swapped",
        ),
        "column, output gathered": ("output gathered: bias gradient summed",),
        "embedding, vocabulary": (
            "embedding: scale left out",
            "embedding: index of the next process",
            "embedding: rows of other processes unmasked",
            "embedding: padding row gets a gradient",
        ),
        "conv2d, input channels": (
            "input channels: bias added on every process",
            "dropout: kept elements not scaled up",
            "dropout: another mask in the backward",
        ),
        "conv2d, output channels": (
            "conv2d: channels are the last dimension",
            "conv2d: output channels gathered with their padding",
            "conv2d: lora_A without the padding",
        ),
        "experts, column": ("experts: each has the next one's lora_B",),
        "column, fused": (
            "dropout: one mask for all parts",
            "dropout: one key for all layers",
            "fused: every part gets the first part's H",
        ),
        "qkv": (
            "copies: gradients not summed",
            "copies: gradients not summed by the sync",
        ),
    },
    "law_siblings_share_a_gather": {
        "": (
            "siblings: each is brought another's H",
            "siblings: dropout numbers the tokens of a part",
            "siblings: what rides back is not summed",
            "siblings: what rides back gets another's gradient",
        ),
    },
    "law_gradients_have_gradients": {
        "linear": ("product: h a constant to a second backward",),
    },
    "test_law_3_in_bf16": {
        "row": ("factor cast late: the activation is cast up",),
    },
    "law_a_raw_parameter_is_a_layer": {
        "experts, column": ("raw: lora_A's gradient is left partial",),
        "linear": ("raw: unscaled",),
    },
    "law_5_merge_is_apply": {
        "linear": (
            "merge: scale twice",
            "dora: the base is multiplied twice",
            "dora: merged without gains",
            "merge writes into its argument",
        ),
        "conv2d, output channels": ("conv2d: merged without its scale",),
        "experts, column, transposed": ("experts: merged untransposed",),
        "row": ("qalora: groups of every so manieth input",),
    },
    "law_6_init_knows_no_axis": {
        "linear": ("init: fan-in of one process",),
    },
    "law_6_factorized_knows_no_axis": {
        "column": ("residual: the update added",),
    },
    "law_starts_are_the_papers": {
        "column": (
            "pissa: scale left out",
            "pissa: the singular values in one factor",
            "mica: the largest singular values",
            "olora: the last rows of R",
            "corda: what is known is learned",
            "corda: not turned back",
            "lora_ga: both factors of the same singular vectors",
        ),
        "qkv": ("fused: every part starts from the first rows",),
        "linear": ("a transposed weight starts as it lies",),
    },
    "law_low_rank_is_the_first_singular_vectors": {
        "": ("low rank: the iteration left out",),
    },
    "law_8_adapters_are_a_batch": {
        "column": ("every level of vmap is the axis",),
    },
    "law_8_rows_are_alone": {
        "column": (
            "many: everybody's partial sums left out, plain",
            "many: the first adapter's key for all",
            "many: rows in another order",
            "many: what adds up is not scaled",
            "many: what adds up is paired with another's",
        ),
        "row": (
            "many: rows without an adapter get the first one's",
            "many: gains of no adapter",
            "many: everybody's partial sums left out",
        ),
        "linear": ("many: the backward of groups is not scaled",),
    },
    "law_9_arguments_stay": {
        "linear": ("shard shares memory with its argument",),
    },
    "law_norm_is_the_dense_models": {
        "": (
            "copies: each counts in the norm",
            "norm: replicated parameters counted by every process",
            "norm: sharded parameters counted on one process",
            "clip: small gradients scaled up",
        ),
    },
    "test_trained_tokens_are_rows_of_the_weight": {
        "column": (
            "tokens: the partial sums of their rows left out",
            "tokens: as if every process had the first outputs",
            "tokens: merged as if every process had the first rows",
        ),
        "embedding, vocabulary": ("tokens: looked for among the rows of a process",),
    },
    "law_lorafa_is_the_nearest_update": {
        "linear": ("LoRA-FA: the product of a whole lora_A summed too", "LoRA-FA: scale once"),
        "row": ("LoRA-FA: the sum over the axis left out",),
        "column, fused": ("LoRA-FA: every part gets the first part's lora_A",),
    },
    "law_loraplus_knows_no_axis": {"linear": ("LoRA+: lora_B moves as lora_A does",)},
    "test_replicated_layers_are_summed_or_synced": {
        "sharded": ("replicated: partial gradients left as they are",),
    },
}


# Of lora_fn/algebra.py, whose laws take the module, so that no other need be asked.
ALGEBRA_DEFECTS = {
    "the sign of a weight in both factors": (
        'up = mixed("lora_B", ups, roots)',
        'up = mixed("lora_B", ups, [math.copysign(root, w) for root, w in zip(roots, both, strict=True)])',
    ),
    "the sign of a weight left out": ("math.copysign(root, w) for root", "root for root"),
    "a weight that has no root": ("math.sqrt(abs(w)) for w in both", "abs(w) for w in both"),
    "the adapters' scalings left out": ("pair.weight * pair.scaling for pair", "pair.weight for pair"),
    "updates without their scalings": ("b @ a * pair.scaling for a", "b @ a for a"),
    "side by side without weights": ("torch.cat([d * w for d, w", "torch.cat([d for d, w"),
    "the result has a scaling": ("alpha=float(ranks[p.name] or 1)", "alpha=1.0"),
    "the smallest elements are kept": ("sizes > least, sizes == least", "sizes < least, sizes == least"),
    "one element less is kept": ("x.numel() - kept + 1", "x.numel() - kept + 2"),
    "all equal elements are kept": ("at.cumsum(0) <= kept - above.sum()", "at.cumsum(0) > 0"),
    "the majority has weights": ("votes = each if", "votes = weighted if"),
    "the majority by number is by sum": ('how.majority_sign_method == "total" else', "True else"),
    "the minority counts": ("votes.sum(0) >= 0, 1.0, -1.0", "votes.sum(0) >= 0, -1.0, 1.0"),
    "divided by all": ("counts.sum(0).clamp(min=1)", "len(each)"),
    "one mask for all adapters": ('f"{name}.{number}.{i}") for i', 'f"{name}.{number}") for i'),
    "one mask for all experts": ('f"{name}.{number}.{i}") for i', 'f"{name}.{i}") for i'),
    "as many are dropped as are to be kept": ("columns, 1 - density)", "columns, density)"),
    "the singular values in both factors": (
        "up, down = (u * s)[:, :rank], vh[:rank]",
        "up, down = (u * s)[:, :rank], s[:rank, None] * vh[:rank]",
    ),
    "the last singular vectors": (
        "up, down = (u * s)[:, :rank], vh[:rank]",
        "up, down = (u * s)[:, -rank:], vh[-rank:]",
    ),
    "the norm without weights": (
        "(pair.weight * pair.scaling) for pair in given], 1)",
        "pair.scaling for pair in given], 1)",
    ),
    "a bias without its scaling": (
        "(pair.bias[number] * pair.scaling, pair.weight)",
        "(pair.bias[number], pair.weight)",
    ),
    "a clamp at the largest": ("place = quantile * (elements.numel() - 1)", "place = elements.numel() - 1"),
    "every expert has the first one's": (
        "pair.down[number] for pair in given], [",
        "pair.down[0] for pair in given], [",
    ),
}


def mutate(root, text, other):
    """Put a defect into the copy of a file."""
    source = root.read_text()
    assert source.count(text) == 1, f"{root.name}: {text!r} occurs {source.count(text)} times, expected 1"
    root.write_text(source.replace(text, other))


def noticing(defect):
    """The (law, row) that notices a defect; () for one that NOTICED_BY does not name, of which all are asked."""
    return next(((law, row) for law, of in NOTICED_BY.items() for row, some in of.items() if defect in some), ())


class Noticed(Exception):
    """A law is red; no other need be asked."""


def defective_laws(only=()):
    """The law that is red on fixed cases and the row of its case, with the reason, of the lora_fn that is imported now.

    Args:
        only: Of which law, and of which row, to ask; () for all.

    Returns:
        {(law, row): reason}, {} where all are green. The row is "" where a law has none.
    """
    red = {}
    with contextlib.suppress(Noticed):
        ask_all(red, only)
    return red


def ask_all(red, only):
    """Ask law after law; note the first that is red.

    Raises:
        Noticed: One is.
    """
    import dataclasses

    import test_laws as laws
    import test_many as many
    import torch
    from strategies import ADAPTED, UNCUT, case, fixed_spec

    import lora_fn
    from lora_fn import sharding

    def row_of(asked, *_):
        """The row that a law is asked of."""
        if isinstance(asked, str):
            return asked
        spec = asked if isinstance(asked, lora_fn.LayerSpec) else getattr(asked, "spec", None)
        return "" if spec is None else sharding.row_name(spec)

    def ask(law, *args, **kwargs):
        named = law.__name__, row_of(*args)
        if only and only != named:
            return
        try:
            law(*args, **kwargs)
        except Exception as problem:
            red[named] = f"{type(problem).__name__}: {problem}"[:300]
            raise Noticed from problem

    def attributes(row):
        some = {"dropout": 0.25, "gradients": "summed"}
        if row.startswith("embedding"):
            return some | {"padding_idx": 5, "pad": row == "embedding, vocabulary", "in_features": 13}
        padded = ("column", "column, output gathered", "conv2d, output channels")
        size = {"out_features": 22, "pad": True} if row in padded else {}
        return some | {"bias": True, "lora_bias": True, "use_rslora": True} | size

    specs = []
    for row in ADAPTED:
        for sequence_dim in (None, 1):
            if row not in UNCUT or sequence_dim is None:
                specs.append(fixed_spec(row, **attributes(row), sequence_dim=sequence_dim))
    specs.append(fixed_spec("column", **attributes("column"), input="gathered"))
    specs.append(fixed_spec("conv2d, output channels", **attributes("conv2d, output channels"), gather_output=True))
    heads = lora_fn.Heads(query=4, key_value=2, order="adjacent")
    specs.append(fixed_spec("row", **attributes("row"), heads=dataclasses.replace(heads, order="tiled")))
    specs.append(fixed_spec("qkv", **attributes("qkv"), heads=heads, fuse_qkv=False))
    for row in ("linear", "column", "column, fused", "qkv", "row", "embedding, vocabulary"):
        some = {name: value for name, value in attributes(row).items() if name != "lora_bias"}
        for sequence_dim in (None, 1):
            specs.append(fixed_spec(row, **some, sequence_dim=sequence_dim, variant="dora"))
    of_b = {"variant": "bdlora", "block_diagonal": "lora_B", "blocks": 3}
    for row, options in {
        "column": [{"variant": "kasa"}, of_b, {"variant": "alora", "lora_bias": True}],
        "row": [
            {"variant": "kasa"},
            {"variant": "qalora", "group_size": 3},
            of_b | {"block_diagonal": "lora_A"},
            {"variant": "alora", "lora_bias": True},
        ],
    }.items():
        specs += [fixed_spec(row, sequence_dim=1, **some) for some in options]
    nf4 = lora_fn.Quantization(code="nf4", block=2)
    few_bits = [
        fixed_spec("row", quantization=nf4, in_features=32, heads=heads, sequence_dim=1),
        fixed_spec("row", quantization=nf4, sequence_dim=1, in_features=16),
        fixed_spec("linear", quantization=nf4, variant="dora"),
        fixed_spec("column, fused", quantization=lora_fn.Quantization(code="int8", scale="tensor"), variant="dora"),
        fixed_spec("qkv", quantization=lora_fn.Quantization(code="fp8"), sequence_dim=1, fuse_qkv=False),
    ]
    specs += few_bits
    deferred = [fixed_spec(row, gradients="deferred") for row in ("column", "row", "qkv")]
    cases = [case(spec, (3, 8), seed, key=11) for seed, spec in enumerate([*specs, *deferred])]
    for each in cases:
        ask(laws.law_1_no_update_is_the_base, laws.dataclasses.replace(each, params=dict(each.params)))
    for seed, each in enumerate(cases):
        each = case(each.spec, (3, 8), seed, key=11)
        ask(laws.law_2_unshard_inverts_shard, each)
        ask(laws.law_3_all_equals_the_oracle, each)
        ask(laws.law_4_replicas_agree, each)
        ask(laws.law_5_merge_is_apply, each)
        ask(laws.law_6_init_knows_no_axis, each.spec, 1, True)
        ask(laws.law_9_arguments_stay, each)
    for row, attributes in (("column", {}), ("qkv", {}), ("linear", {"fan_in_fan_out": True})):
        each = laws.starts_of(row, **attributes)
        ask(laws.law_starts_are_the_papers, each, 3)
        for how in laws.FACTORED:
            ask(laws.law_6_factorized_knows_no_axis, each, 3, how)
    ask(laws.law_low_rank_is_the_first_singular_vectors, 5)
    ask(laws.law_gradients_have_gradients, case(fixed_spec("linear", size=1), (3,), 1, key=11))
    ask(laws.test_law_3_in_bf16, "row", 2, 0, "float32", torch.float32)
    for row in ("linear", "row", "column, fused", "embedding, vocabulary"):
        ask(laws.law_lorafa_is_the_nearest_update, case(fixed_spec(row), (), 1))
        ask(laws.law_loraplus_knows_no_axis, case(fixed_spec(row), (), 1))
    each = case(fixed_spec("column", sequence_dim=1, dropout=0.25), (3, 8), 0, key=11)
    ask(laws.law_siblings_share_a_gather, laws.siblings_of(each, 0))
    for row in laws.RAW:
        ask(laws.law_a_raw_parameter_is_a_layer, case(fixed_spec(row), (3, 8), 1))
    for row in ("column", "row"):
        each = case(fixed_spec(row, dropout=0.5), (3, 8), 1)
        adapters = [{n: p for n, p in case(each.spec, (), k).params.items() if "lora" in n} for k in range(4)]
        ask(laws.law_8_adapters_are_a_batch, each, adapters, [1, 2, 3, 4], axis_outside=True, per_row=True)
        ask(laws.law_9_the_key_decides, each)
    model = {str(k): case(spec, (3, 8), k, key=11) for k, spec in enumerate([*specs[:6], *deferred])}
    ask(laws.law_norm_is_the_dense_models, model)
    for row in ("column", "embedding, vocabulary"):
        ask(laws.test_trained_tokens_are_rows_of_the_weight, row, 4, None)
    ask(laws.test_replicated_layers_are_summed_or_synced, "sharded", "summed")
    ask(many.law_8_rows_are_alone, *many.fixed_batch("column", [[2], [-1], [0]], dropout=0.5))
    ask(many.law_8_rows_are_alone, *many.fixed_batch("column", [[2, 0], [-1, 1]]))
    ask(many.law_8_rows_are_alone, *many.fixed_batch("linear", [[2], [-1], [0]], sequence_dim=None))
    for options in ({}, {"variant": "dora"}):
        ask(many.law_8_rows_are_alone, *many.fixed_batch("row", [[2], [-1], [0]], **options))


def main(folder, noticed_by):
    """Ask the laws of every copy of lora_fn in a folder; print {name of the copy: [[law, row, reason]]} as JSON."""
    import torch

    torch.set_num_threads(1)
    sys.path[:0] = [str(folder), str(TESTS)]
    found = {}
    for copy in sorted(folder.iterdir()):
        for name in [name for name in sys.modules if name.split(".")[0] in RELOADED]:
            del sys.modules[name]
        sys.path[0] = str(copy)
        red = defective_laws(tuple(noticed_by.get(copy.name, ())))
        found[copy.name] = [(*named, reason) for named, reason in red.items()]
        import lora_fn

        assert Path(lora_fn.__file__).parent.parent == copy
    print(json.dumps(found))


@pytest.fixture(scope="module")
def red(tmp_path_factory):
    """{defect, or "none": [[law, row, reason]]}."""
    folder = tmp_path_factory.mktemp("defects")
    names = dict(enumerate(DEFECTS))
    for number in ["none", *names]:
        shutil.copytree(PACKAGE, folder / str(number) / "lora_fn", ignore=shutil.ignore_patterns("__pycache__"))
        if number != "none":
            file, text, other = DEFECTS[names[number]]
            mutate(folder / str(number) / "lora_fn" / file, text, other)
    noticed_by = {number: noticing(name) for number, name in names.items()}
    command = [sys.executable, "-B", __file__, str(folder), json.dumps(noticed_by)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {"none": found["none"]} | {name: found[str(number)] for number, name in names.items()}


def test_without_a_defect_all_laws_are_green(red):
    assert red["none"] == []


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_turns_a_law_red(red, defect):
    assert red[defect], f"{noticing(defect) or 'no law'} does not notice: {defect}"
    assert noticing(defect), f"write into NOTICED_BY, that the next run be short: {red[defect]}"


def test_every_defect_that_is_noticed_is_there():
    assert {defect for of in NOTICED_BY.values() for some in of.values() for defect in some} <= DEFECTS.keys()


def with_defect(tmp_path, monkeypatch, *edit):
    """lora_fn.algebra with an edit."""
    file = Path(shutil.copy(PACKAGE / "algebra.py", tmp_path))
    mutate(file, *edit)
    spec = importlib.util.spec_from_file_location("edited_algebra", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("defect", ALGEBRA_DEFECTS)
def test_a_defect_of_the_algebra_turns_a_law_red(tmp_path, monkeypatch, defect):
    import test_algebra as laws

    module = with_defect(tmp_path, monkeypatch, *ALGEBRA_DEFECTS[defect])
    with pytest.raises((AssertionError, RuntimeError)):
        laws.ask_all(module)


def test_an_edit_of_the_algebra_that_is_none_leaves_its_laws_green(tmp_path, monkeypatch):
    import test_algebra as laws

    laws.ask_all(with_defect(tmp_path, monkeypatch, "FACTORS, UPDATES", "FACTORS, UPDATES"))


def test_a_defect_that_fits_nowhere_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("b = 1\nb = 1\n")
    for text, count in (("b = 1", 2), ("c = 1", 0)):
        with pytest.raises(AssertionError, match=f"occurs {count} times, expected 1"):
            mutate(tmp_path / "a.py", text, "")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
