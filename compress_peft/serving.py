"""Several tenants on one backbone: every row of a batch is answered with an adapter of its own.

    tenants = Tenants(backbone)
    tenants.add("law", "runs/law/adapter")      # PARA, (IA)3 or LoRA, as Hugging Face peft saved it
    tenants.add("news", "runs/news/adapter")
    tokens = tenants.generate(**tokenizer(prompts, padding=True, return_tensors="pt"), adapters=["law", "news", None])

The backbone stays bare, dense or compressed. A request brings hooks, which take all that they know with them when it
ends: (IA)3 multiplies outputs or inputs of linear layers, PARA multiplies outputs by vectors made from the row's
prompt (Liu et al. 2025, equations 3-6), LoRA adds scale * B A x. A row without an adapter is multiplied by exactly 1.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from compress_peft.adapters.para_layer import SCALED, scaled_linears
from compress_peft.adapters.tenant_folder import Generator, Tenant, read_tenant
from compress_peft.errors import ConfigError, DataError, ModelError, Problem, did_you_mean
from compress_peft.models.prompts import last_real_token


class Tenants:
    """A backbone and the adapters that its requests may name; one request runs at a time.

    Raises:
        ModelError: the backbone carries an adapter already.
    """

    def __init__(self, backbone: nn.Module):
        if hasattr(backbone, "peft_config"):
            what = f"{type(backbone).__name__} carries an adapter already"
            raise ModelError(Problem("backbone", what, "give the bare model, and the adapter's folder to add()"))
        self.backbone: Any = backbone
        self._tenants: dict[str, Tenant] = {}
        self._busy = threading.Lock()

    @property
    def names(self) -> list[str]:
        return list(self._tenants)

    def add(self, name: str, folder: str | Path) -> None:
        """Reads an adapter's folder onto the backbone's device, in float32.

        Raises:
            ConfigError: the name is taken; the method or one of its settings cannot be mixed.
            MissingRequirement: there is no adapter in the folder.
            ModelError: the adapter was made for another backbone; names all layers that do not fit.
        """
        if name in self._tenants:
            raise ConfigError(Problem(name, "there is a tenant of this name", "choose another, or remove() it first"))
        self._tenants[name] = read_tenant(self.backbone, Path(folder))

    def remove(self, name: str) -> None:
        self._check([name])
        del self._tenants[name]

    @contextmanager
    def request(self, adapters: Sequence[str | None], attention_mask: Tensor) -> Iterator[None]:
        """One request to the backbone: its first forward call processes whole prompts, later ones go on from there.

        adapters: the tenant of each row, None for the bare backbone. attention_mask: (rows, T) of the prompts.
        Batches of a multiple of `rows` hold each row several times in succession (beams).

        Raises:
            ConfigError: tenants that do not exist.
            DataError: not one adapter for each row.
        """
        self._check(adapters)
        if len(adapters) != attention_mask.shape[0]:
            what = f"{len(adapters)} names for {attention_mask.shape[0]} rows"
            raise DataError(Problem("adapters", what, "give one name, or None, for each row"))
        with self._busy:
            running = _Request(self.backbone, self._tenants, adapters, last_real_token(attention_mask))
            try:
                yield
            finally:
                running.end()

    def generate(
        self,
        input_ids: Tensor,
        adapters: Sequence[str | None],
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """transformers' generate. input_ids: (rows, T); attention_mask: (rows, T), all ones when left out.

        Raises: as `request`.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with self.request(adapters, mask):
            # a compiled decoding step would not see the hooks
            return self.backbone.generate(input_ids, attention_mask=mask, **{"disable_compile": True, **options})

    def _check(self, adapters: Sequence[str | None]) -> None:
        unknown = sorted({name for name in adapters if name is not None and name not in self._tenants})
        if unknown:
            fixes = [did_you_mean(name, self._tenants) if self._tenants else "add() it first" for name in unknown]
            raise ConfigError(
                Problem("adapters", f'unknown tenant "{name}"', fix) for name, fix in zip(unknown, fixes, strict=True)
            )


class _Request:
    """The hooks of one request and their tensors, by the full name of the linear layer.

    scales: (batch, 1, out). input_scales: (batch, 1, in). updates: rows (n,), A (n, in, r), B (n, r, out).
    """

    def __init__(
        self, backbone: nn.Module, tenants: dict[str, Tenant], adapters: Sequence[str | None], prompt_end: Tensor
    ):
        self.adapters = [tenants[name] if name is not None else Tenant() for name in adapters]
        self.prompt_end = prompt_end
        self.batch = 0
        self.scales: dict[str, Tensor] = {}
        self.input_scales: dict[str, Tensor] = {}
        self.updates: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.generators: dict[str, list[tuple[list[int], Generator]]] = {}
        self.waiting: set[str] = set()
        self.scaled: dict[str, list[str]] = {}
        outputs: set[str] = set()
        inputs: set[str] = set()
        for tenant in self.adapters:
            outputs |= tenant.output_scales.keys() | tenant.low_rank.keys()
            inputs |= tenant.input_scales.keys()
        for block in {name: None for tenant in self.adapters for name in tenant.generators}:
            found = scaled_linears(block, backbone.get_submodule(block))[0]
            self.scaled[block] = [f"{block}.{found[role][0]}" for role in SCALED]
            outputs |= set(self.scaled[block])
        # the first hook of all sets the batch's tensors up
        self.hooks = [backbone.register_forward_pre_hook(self._start, with_kwargs=True)]
        for name in self.scaled:
            hook: Any = lambda module, args, kwargs, name=name: self._make_vectors(name, args, kwargs)  # noqa: E731
            self.hooks.append(backbone.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        for name in inputs:
            before: Any = lambda module, args, name=name: self._before(name, args)  # noqa: E731
            self.hooks.append(backbone.get_submodule(name).register_forward_pre_hook(before))
        for name in outputs:
            after: Any = lambda module, args, output, name=name: self._after(name, args, output)  # noqa: E731
            self.hooks.append(backbone.get_submodule(name).register_forward_hook(after))

    def end(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        if tokens.shape[0] == self.batch:
            return
        rows = len(self.adapters)
        if tokens.shape[0] % rows:
            what = f"{tokens.shape[0]} rows in the batch for {rows} in the request"
            raise DataError(Problem("adapters", what, "repeat whole rows (beams)"))
        if self.batch and not self.waiting and tokens.shape[0] % self.batch == 0:
            self._repeat(tokens.shape[0] // self.batch)  # beams that go on from prompts which they share
        else:
            self._prepare(tokens.shape[0])

    def _repeat(self, times: int) -> None:
        """The tensors of each row several times in succession."""
        self.batch *= times
        for scales in (self.scales, self.input_scales):
            scales.update({name: scale.repeat_interleave(times, dim=0) for name, scale in scales.items()})
        for name, (rows, *pair) in self.updates.items():
            beside = torch.arange(times, device=rows.device)
            a, b = (matrix.repeat_interleave(times, dim=0) for matrix in pair)
            self.updates[name] = ((rows[:, None] * times + beside).flatten(), a, b)

    def _prepare(self, batch: int) -> None:
        """Gathers the tensors of all rows, once for a request."""
        rows = len(self.adapters)
        self.batch = batch
        device = self.prompt_end.device
        tenants = [tenant for tenant in self.adapters for _ in range(batch // rows)]
        self.scales = _stack_scales([tenant.output_scales for tenant in tenants])
        self.input_scales = _stack_scales([tenant.input_scales for tenant in tenants])
        self.updates = {}
        for name in {name: None for tenant in self.adapters for name in tenant.low_rank}:
            places = [row for row, tenant in enumerate(tenants) if name in tenant.low_rank]
            pairs = [tenants[row].low_rank[name] for row in places]
            rank = max(a.shape[1] for a, _ in pairs)
            a = torch.stack([nn.functional.pad(a, (0, rank - a.shape[1])) for a, _ in pairs])
            b = torch.stack([nn.functional.pad(b, (0, 0, 0, rank - b.shape[0])) for _, b in pairs])
            self.updates[name] = (torch.tensor(places, device=device), a, b)
        self.generators = {}
        for block in self.scaled:
            groups: dict[int, tuple[list[int], Generator]] = {}
            for row, tenant in enumerate(tenants):
                if block in tenant.generators:
                    groups.setdefault(id(tenant), ([], tenant.generators[block]))[0].append(row)
            self.generators[block] = list(groups.values())
        self.waiting = set(self.scaled)

    def _make_vectors(self, block: str, args: tuple, kwargs: dict[str, Any]) -> None:
        """Eq. 6 for the rows whose tenants have PARA, at the prompt; hidden states (batch, T, d) enter the block."""
        if block not in self.waiting:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        end = self.prompt_end.to(hidden.device).repeat_interleave(self.batch // len(self.adapters))
        if int(end.max()) >= hidden.shape[1]:
            what = f"{hidden.shape[1]} positions arrive first, and a prompt ends at position {int(end.max())}"
            raise DataError(Problem(block, what, "let the first call of a request process whole prompts, not chunks"))
        for rows, generator in self.generators[block]:
            places = torch.tensor(rows, device=hidden.device)
            with torch.autocast(hidden.device.type, enabled=False):
                pooled = hidden[places, end[places]].float()
                vectors = ACT2FN[generator.activation](pooled @ generator.down) @ generator.up + generator.bias
            for name, part in zip(self.scaled[block], vectors.split(generator.widths, dim=-1), strict=True):
                scale = self.scales.get(name)
                if scale is None:
                    scale = part.new_ones(self.batch, 1, part.shape[1])
                self.scales[name] = scale.index_copy(0, places, part[:, None])
        self.waiting.discard(block)

    def _before(self, name: str, args: tuple) -> tuple:
        return ((args[0] * self.input_scales[name]).to(args[0].dtype), *args[1:])

    def _after(self, name: str, args: tuple, output: Tensor) -> Tensor:
        if name in self.updates:
            rows, a, b = self.updates[name]
            x = args[0] if len(rows) == self.batch else args[0][rows]
            update = torch.bmm(torch.bmm(x.to(a.dtype), a), b)
            if len(rows) == self.batch:
                output = (output + update).to(output.dtype)
            else:
                output = output.index_add(0, rows, update.to(output.dtype))
        if name in self.scales:
            output = (output * self.scales[name]).to(output.dtype)
        return output


def _stack_scales(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """{name: (batch, 1, width)}, one where a row has no scale of this name."""
    stacked = {}
    for name, example in {name: scale for scales in rows for name, scale in scales.items()}.items():
        ones = torch.ones_like(example)
        stacked[name] = torch.stack([scales.get(name, ones) for scales in rows])[:, None]
    return stacked
