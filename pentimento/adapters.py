"""Everything small that is trained on top of a frozen backbone. Only this file and ``moe.py`` import peft.

An adapter is a LoRA (arXiv:2106.09685) on some linear layers of the host, with experts on some of them and a few small modules
trained whole beside it if wanted. Parameters are float32 whatever the host's precision, since steps of 1e-4 would vanish in bfloat16's eight bits.
Files have the layout of diffusers, so that ``load_lora_weights`` of its pipelines reads them.
"""

import copy
import difflib
import math
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from . import adapter_files, moe, specs
from .errors import UserError
from .inspection import WEIGHTS_NAME
from .layers import Dropout, Whole
from .specs import ExpertLoRA as ExpertLoRA
from .specs import LoRA as LoRA
from .specs import spec_of as spec_of

LONGEST = 80
"""Characters of a target in messages."""
SHOWN = 3


def bare(host: nn.Module) -> nn.Module:
    """A host without its adapters, on its very weights: not one of them is in memory twice."""
    shared = {id(tensor): tensor for tensor in (*host.parameters(), *host.buffers())}
    twin = copy.deepcopy(host, shared)
    for path, module in list(twin.named_modules()):
        if isinstance(module, LoraLayer):
            twin.set_submodule(path, module.get_base_layer())
        elif isinstance(module, Whole):
            twin.set_submodule(path, module.original_module)
    vars(twin).pop("peft_config", None)
    return twin


class Adapters:
    """Named adapters in one host module, plus named free tensors such as a learned prompt."""

    def __init__(self, host: nn.Module):
        self.host = host.requires_grad_(False)
        self.specs: dict[str, LoRA] = {}
        self._experts: dict[str, list[str]] = {}
        self._own: dict[str, dict[str, nn.Parameter]] = {}
        self._dropouts: dict[str, Dropout] = {}
        self.tensors: dict[str, nn.Parameter] = {}
        self.trained: tuple[str, ...] = ()
        self._initial: dict[str, Tensor] = {}
        self._modules = dict(host.named_modules())

    def add(self, name: str, spec: LoRA, *, seed: int = 0) -> None:
        """Add an adapter, switched off. Its start depends on ``seed`` and ``name`` alone, not on global random numbers.

        Raises:
            UserError: targets or full modules that the host does not have, with the nearest names.
        """
        self._check_name(name)
        self._check_targets(spec)
        config = LoraConfig(r=spec.rank, target_modules=specs.targets(spec))
        config.lora_alpha = spec.scaled  # type: ignore[assignment]  # declared int, used as a number
        # peft draws a start that `_reset` replaces, and warns of several adapters.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, self.host, adapter_name=name)
            for path, experts in self._expert_layers(spec).items():
                moe.install(self.host.get_submodule(path), name, experts)
        for path, layer in self.host.named_modules():
            if spec.dropout and isinstance(layer, LoraLayer) and name in layer.lora_A:
                layer.lora_dropout[name] = self._dropouts[f"{name} {path}"] = Dropout(spec.dropout)
        for path in spec.full:
            module = self.host.get_submodule(path)
            if not isinstance(module, Whole):
                module = Whole(module)
                self.host.set_submodule(path, module)
            module.add(name)
        self.specs[name], self._experts[name] = spec, list(self._expert_layers(spec))
        for parameter in self._named(name).values():
            parameter.data = parameter.data.float()
        self._reset(name, seed)
        self.use()

    def add_tensor(self, name: str, value: Tensor) -> None:
        """Add a free float32 tensor that stages can train by its name."""
        self._check_name(name)
        self.tensors[name] = nn.Parameter(value.detach().float().clone(), requires_grad=False)
        self._initial[name] = value.detach().float().clone()

    def reset(self, seed: int = 0) -> None:
        """Start all adapters and tensors afresh, as ``add`` does."""
        for name in self.specs:
            self._reset(name, seed)
        for name, value in self._initial.items():
            self.tensors[name].data.copy_(value)

    def parameters(self, *names: str) -> list[nn.Parameter]:
        """Parameters of the named adapters and tensors."""
        found = [p for name in names if name in self.specs for p in self._named(name).values()]
        return found + [self.tensors[name] for name in names if name in self.tensors]

    def train(self, *names: str) -> list[nn.Parameter]:
        """Make exactly these adapters and tensors trainable; returns their parameters.

        Raises:
            UserError: a name that this method does not have.
        """
        known = [*self.specs, *self.tensors]
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"train: there is no adapter {unknown[0]!r}; this method has {', '.join(known)}")
        self.trained = names
        for name in known:
            for parameter in self._trainable(name):
                parameter.requires_grad_(name in names)
        return [parameter for name in names for parameter in self._trainable(name)]

    def use(self, *, frozen: tuple[str, ...] = (), **scales: float) -> None:
        """Switch to exactly these adapters at these scales; the ``frozen`` get no gradient. ``use()``: the base model.

        A scale of 0 switches off. Modules trained whole are blended, see ``Whole``.
        """
        if unknown := sorted({*scales, *frozen} - {*self.specs}):
            raise ValueError(f"there is no adapter {unknown[0]!r}; this method has {', '.join(self.specs)}")
        active = {name: float(scale) for name, scale in scales.items() if scale}
        for layer in self.host.modules():
            if isinstance(layer, LoraLayer):
                layer.enable_adapters(bool(active))
                layer.set_adapter(list(active))
                for name, scale in active.items():
                    layer.set_scale(name, scale)
            elif isinstance(layer, Whole):
                layer.scales = {
                    name: scale for name, scale in active.items() if name in layer.modules_to_save
                }
        for name in self.specs:
            wanted = name in active and name in self.trained and name not in frozen
            for parameter in self._named(name).values():
                parameter.requires_grad_(False)
            for parameter in self._trainable(name) if wanted else ():
                parameter.requires_grad_(True)

    def drop(self, seeds: Sequence[int]) -> None:
        """Leave inputs of LoRAs out at random from here on, where ``LoRA.dropout`` says so; without seeds none.

        ``seeds``: one for each row of a batch. What is left out depends on them and on the layer alone.
        """
        for key, dropout in self._dropouts.items():
            numbers = [zlib.crc32(f"{seed} {key}".encode()) for seed in seeds]
            dropout.seeds = torch.tensor(numbers) if numbers else None

    def routing(self, name: str) -> dict[str, moe.Routing]:
        """What an adapter's routers did in the last forward pass, by layer.

        Raises:
            ValueError: an adapter without experts, or none of them has run yet.
        """
        layers = self._experts[name]
        found = {path: moe.routing(self.host.get_submodule(path), name) for path in layers}
        ran = {path: routing for path, routing in found.items() if routing is not None}
        if not ran:
            raise ValueError(f"adapter {name!r} has {'not run yet' if found else 'no experts'}")
        return ran

    def balance(self, name: str) -> Tensor:
        """Load-balancing loss of the last forward pass, mean over the layers: 1 where all experts get the same.

        To be added to a loss of that pass: once the loss was back-propagated, this is a mere number.
        """
        return torch.stack([routing.balance() for routing in self.routing(name).values()]).mean()

    def expert_usage(self, name: str) -> Tensor:
        """Share of each expert in the last forward pass, mean over the layers: ``(experts,)``, its sum is 1."""
        return torch.stack([routing.share for routing in self.routing(name).values()]).mean(0)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Adapter -> key in its file (without prefix) -> tensor, and ``tensors``."""
        state = {name: {k: p.data for k, p in self._named(name).items()} for name in self.specs}
        return {**state, "tensors": {k: p.data for k, p in self.tensors.items()}}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of ``state_dict``; raises ``ValueError`` unless names and shapes are the same."""
        own = self.state_dict()
        shapes = {name: {k: v.shape for k, v in part.items()} for name, part in own.items()}
        if shapes != {name: {k: v.shape for k, v in part.items()} for name, part in state.items()}:
            raise ValueError("the state belongs to other adapters")
        for name, part in own.items():
            for key, value in part.items():
                value.copy_(state[name][key])

    def save(self, folder: Path, record: Mapping[str, Any] | None = None) -> None:
        """Write ``pytorch_lora_weights.safetensors`` (several adapters: one folder each) and, for each module trained
        whole, ``flux_MODULE.safetensors`` beside it.

        ``record`` says what an edit needs to know later (JSON-able); the adapters' ranks and targets are added to it.
        Equal weights and records give equal bytes. Raises ``OSError`` where it cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        own = {name: specs.described(spec) for name, spec in self.specs.items()}
        for name in self.specs:
            place = self._place(folder, name)
            place.mkdir(exist_ok=True)
            self._write(place / WEIGHTS_NAME, name, {**(record or {}), "adapters": own, "adapter": name})
        if self.tensors:
            adapter_files.write(folder / adapter_files.TENSORS_NAME, self.tensors, record or {})

    def save_one(self, file: Path, name: str, record: Mapping[str, Any], *, called: str) -> None:
        """Write one adapter as the file of a method whose only adapter is ``called`` so; raises ``OSError`` as ``save`` does."""
        own = {called: specs.described(self.specs[name])}
        self._write(file, name, {**record, "adapters": own, "adapter": called})

    def file_tensors(self, name: str) -> dict[str, Tensor]:
        """What ``save`` writes into an adapter's main file."""
        lora = self._published(name, self._parts(name)[""])
        return {adapter_files.PREFIX + key: value.data for key, value in lora.items()}

    def _write(self, file: Path, name: str, record: Mapping[str, Any]) -> None:
        stock = {"lora_adapter_metadata": specs.stock_record(self.specs[name])}
        adapter_files.write(file, self.file_tensors(name), record, stock)
        for module, tensors in self._parts(name).items():
            if not module:
                continue
            adapter_files.write(file.with_name(adapter_files.full_name(module)), tensors, record)

    def load(self, path: Path | str, name: str | None = None) -> None:
        """Load what ``save`` or another tool wrote into the adapters, or into one of them.

        ``path`` is a file, a folder of ``save``, or a run folder. Nothing is left out: every key must fit. A file that
        records no ``full`` modules, and has none beside it, leaves them as in the base model.

        Raises:
            UserError: missing, damaged, or weights that do not fit; the message says what the file seems to be.
        """
        path = Path(path)
        if not path.exists():
            raise UserError(f"{path}: there is no such file or folder")
        if path.is_dir() and (path / "weights").is_dir():
            path = path / "weights"
        names = list(self.specs) if name is None else [name]
        wanted = [*names, *self.tensors] if name is None else names
        if path.is_file() and len(wanted) > 1:
            raise UserError(
                f"{path} holds one adapter, this method has {', '.join(wanted)}; give the folder of them"
            )
        pending: list[tuple[Tensor, Tensor]] = []
        for one in names:
            file = path if path.is_file() else self._place(path, one) / WEIGHTS_NAME
            if len(names) > 1 and not file.exists():
                raise UserError(
                    f"{path} does not hold the adapter {one!r} ({file.relative_to(path)}); this method has {', '.join(names)}"
                )
            pending += self._read(file, one)
        if self.tensors and path.is_dir() and name is None:
            expected = {key: value.data for key, value in self.tensors.items()}
            pending += adapter_files.fit(
                path / adapter_files.TENSORS_NAME,
                "the tensors",
                adapter_files.read_tensors(path / adapter_files.TENSORS_NAME),
                expected,
            )
        for own, value in pending:  # only now, so that an error leaves everything as it was
            own.copy_(value)

    def _read(self, file: Path, name: str) -> list[tuple[Tensor, Tensor]]:
        """Pairs of an adapter's own tensors and what is to be copied into them."""
        tensors, alpha, editinfinity = adapter_files.read_lora(file)
        stored = adapter_files.recorded_adapter(file, name)
        parts = {module: {k: p.data for k, p in part.items()} for module, part in self._parts(name).items()}
        spec = self.specs[name]
        specs.check_experts(file, tensors, stored, spec, name)
        own = self._published(name, parts.pop(""))
        tensors = adapter_files.unflattened(file, tensors, own)
        pending = adapter_files.fit(file, f"adapter {name!r}", tensors, own)
        if alpha is None:
            silent = spec.scaled if editinfinity else float(spec.rank)
            alpha = adapter_files.recorded_alpha(file, default=silent)
        if not math.isclose(alpha, spec.scaled):
            raise UserError(
                f"{file} was trained with alpha {alpha:g}, adapter {name!r} has {spec.scaled:g}; set alpha={alpha:g}"
            )
        recorded = stored.get("full", [])
        for module in parts.keys() | {*recorded} | self._beside(file):
            whole = file.with_name(adapter_files.full_name(module))
            if module not in parts:
                self._refuse_full(whole, module, name, recorded)
            elif whole.is_file() or module in recorded:
                pending += adapter_files.fit(
                    whole, f"module {module}", adapter_files.read_tensors(whole), parts[module]
                )
            else:
                base = dict(self._modules[module].named_parameters())
                pending += [(value, base[key].float()) for key, value in parts[module].items()]
        return pending

    def _refuse_full(self, whole: Path, module: str, name: str, recorded: list[str]) -> None:
        """A module trained whole in the file but not here may be passed over only if it equals the base's."""
        base = {key: value.data for key, value in self._modules[module].named_parameters()}
        found = {} if module in recorded else adapter_files.read_tensors(whole)
        if found.keys() == base.keys() and all(
            # Without weights it cannot be known.
            value.is_meta or torch.equal(found[key].to(value), value)
            for key, value in base.items()
        ):
            return
        raise UserError(
            f"{whole}: {module} was trained too, but adapter {name!r} does not have it; add it to the modules trained whole "
            f"(full: [{module}]; for influxedit train_embedder: true)"
        )

    def _beside(self, file: Path) -> set[str]:
        """Modules of the host whose weights lie beside an adapter's file."""
        stems = {
            p.name: p.name.removeprefix("flux_").removesuffix(".safetensors")
            for p in file.parent.glob("flux_*.safetensors")
        }
        return {
            module
            for name, module in stems.items()
            if module in self._modules and adapter_files.full_name(module) == name
        }

    def _place(self, folder: Path, name: str) -> Path:
        return folder if len(self.specs) == 1 else folder / name

    def _trainable(self, name: str) -> list[nn.Parameter]:
        """A tensor, or the parameters of an adapter that are not fixed: B is under ``init`` orthogonal."""
        if name in self.tensors:
            return [self.tensors[name]]
        fixed = self.specs[name].init == "orthogonal"
        return [p for key, p in self._named(name).items() if not (fixed and ".lora_B." in key)]

    def _named(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters by their keys in a file: ``a.to_q.lora_A.edit.weight`` is ``a.to_q.lora_A.weight``."""
        skipped = (name, "modules_to_save")
        if name not in self._own:  # collected once: adapters are switched in every step
            self._own[name] = {
                ".".join(part for part in key.split(".") if part not in skipped): parameter
                for key, parameter in self.host.named_parameters()
                if name in key.split(".")
            }
        return self._own[name]

    def _parts(self, name: str) -> dict[str, dict[str, nn.Parameter]]:
        """Parameters by file: "" is the LoRA with whole keys, a module's name its own with keys inside the module."""
        parts: dict[str, dict[str, nn.Parameter]] = {
            "": {},
            **{module: {} for module in self.specs[name].full},
        }
        for key, parameter in self._named(name).items():
            module = "" if ".lora_" in key else key.rpartition(".")[0]
            while module not in parts:
                module = module.rpartition(".")[0]
            parts[module][key.removeprefix(f"{module}.")] = parameter
        return parts

    def _published(self, name: str, lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An adapter's LoRA under the names of its file: each expert by itself."""
        spec = self.specs[name]
        return moe.published(lora, spec.experts) if isinstance(spec, ExpertLoRA) else dict(lora)

    def _reset(self, name: str, seed: int) -> None:
        spec = self.specs[name]
        experts = self._expert_layers(spec)
        # Mixed into 32 bits: of a larger seed the CPU's generator would pass over the rest.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        for key, parameter in self._parts(name)[""].items():
            start = torch.zeros(parameter.shape)
            layer, _, factor = key.removesuffix(".weight").rpartition(".")
            if factor == "lora_A" and spec.init == "gaussian":
                rank = experts[layer].expert_rank if layer in experts else spec.rank
                start.normal_(0, 1 / rank, generator=generator)
            elif factor in ("lora_A", "lora_route"):
                wide = factor == "lora_A" and spec.init in ("kaiming", "orthogonal")
                bound = math.sqrt((3 if wide else 1) / parameter[0].numel())
                start.uniform_(-bound, bound, generator=generator)
            elif spec.init == "orthogonal":
                start = torch.linalg.qr(start.normal_(generator=generator)).Q
            parameter.data.copy_(start)
        for module in spec.full:
            trained = self.host.get_submodule(f"{module}.modules_to_save.{name}")
            for key, value in self._modules[module].named_parameters():
                trained.get_parameter(key).data.copy_(value)

    def _check_name(self, name: str) -> None:
        taken = ("frozen", "tensors", "modules_to_save", "original_module", "base_layer")
        if not name.isidentifier() or name in taken:
            raise ValueError(f"{name!r} cannot be the name of an adapter")
        if name in self.specs or name in self.tensors:
            raise ValueError(f"there is an adapter {name!r} already")
        if any(name in path.split(".") for path in self._modules):
            raise ValueError(f"adapter name {name!r} is also a module name of {type(self.host).__name__}")

    def _check_targets(self, spec: LoRA) -> None:
        """Each target must name something, and only layers that a LoRA fits on."""
        for target in (spec.targets,) if isinstance(spec.targets, str) else spec.targets:
            matched = [path for path in self._modules if specs.matches(spec.targets, target, path)]
            if not matched:
                raise UserError(
                    f"lora.targets: nothing in {type(self.host).__name__} is called {target[:LONGEST]!r}{self._nearest(target)}"
                )
            wrong = [path for path in matched if not isinstance(self._modules[path], (nn.Linear, nn.Conv2d))]
            if wrong:
                kind = type(self._modules[wrong[0]]).__name__
                raise UserError(
                    f"lora.targets: {target!r} matches {wrong[0]}, a {kind}; a LoRA fits on linear layers only"
                )
        for path in spec.full:
            if path not in self._modules:
                raise UserError(
                    f"lora.full: there is no module {path!r} in {type(self.host).__name__}{self._nearest(path)}"
                )
            if not all(p.is_floating_point() for p in self._modules[path].parameters()):
                raise UserError(
                    f"lora.full: {path} is packed in a few bits, and so cannot be trained whole; leave it out, or take weights that "
                    "are not packed (for FLUX: without backbone.transformer_file)"
                )
            inside = [p for p in self._modules if p == path or p.startswith(f"{path}.")]
            if any(specs.hit(spec, p) for p in inside):
                raise UserError(
                    f"lora.full: {path} is trained whole and a target of the LoRA too; name it in one of them"
                )
        if isinstance(spec, ExpertLoRA):
            self._check_expert_targets(spec)

    def _check_expert_targets(self, spec: ExpertLoRA) -> None:
        layers = self._expert_layers(spec)
        if not layers:
            raise UserError(
                f"lora.expert_targets: {spec.expert_targets!r} matches none of the layers that lora.targets names; without"
                " experts it is a plain LoRA"
            )
        wrong = [path for path in layers if not isinstance(self._modules[path], nn.Linear)]
        if wrong:
            kind = type(self._modules[wrong[0]]).__name__
            raise UserError(f"lora.expert_targets: {wrong[0]} is a {kind}; experts fit on linear layers only")

    def _expert_layers(self, spec: LoRA) -> dict[str, ExpertLoRA]:
        """Names of the layers that have experts under a spec."""
        if not isinstance(spec, ExpertLoRA):
            return {}
        return {path: spec for path in self._modules if specs.hit_by_experts(spec, path)}

    def strength(self, name: str) -> float | None:
        """How much a plain LoRA changes its layers at scale 1: median of ``|B A| alpha / rank`` over ``|W|``, in Frobenius norm.

        ``None`` where no layer tells, as where all weights are packed.
        """
        found = []
        scale = self.specs[name].scaled / self.specs[name].rank
        factors = self._parts(name)[""]
        for layer in sorted({key.partition(".lora_A.")[0] for key in factors if ".lora_A.weight" in key}):
            weight = self.host.get_submodule(layer).get_parameter("base_layer.weight")
            if weight.is_floating_point() and not weight.is_meta:
                a, b = (factors[f"{layer}.lora_{factor}.weight"] for factor in "AB")
                # |BA|^2 = tr(B'B AA'): two small products instead of one as large as the layer.
                squared = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0)
                found.append(float(scale * squared.sqrt() / weight.float().norm()))
        return sorted(found)[len(found) // 2] if found else None

    def _nearest(self, wanted: str) -> str:
        paths = [p for p, module in self._modules.items() if isinstance(module, (nn.Linear, nn.Conv2d))]
        ends = {".".join(path.split(".")[-n:]) for path in paths for n in range(1, 4)}
        near = difflib.get_close_matches(wanted, sorted(ends), n=SHOWN, cutoff=0.5)
        near = near or sorted({re.sub(r"\.\d+\.", ".*.", path) for path in paths})[:SHOWN]
        return f"; did you mean {', '.join(near)}?"
