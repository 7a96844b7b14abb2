"""An adapter's tensors between a model and its files."""

import dataclasses
import math
import os
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lowbit import models
from lowbit.adapted import Adapted, adapted_modules, base_keys, base_of, buffers_of, changed, module_names
from lowbit.files import hub
from lowbit.lowrank import is_decomposing
from lowbit.modules import has_quantized_weights, is_quantized, replace_modules

from .adapters import AdapterOperations
from .base_tensors import of_base, warn_of_other_base, whole_embeddings
from .config import LoraConfig, QLoRAConfig
from .files import PREFIX, by_own_keys, fit, model_card, read_adapter, save_adapter
from .layers import DEFAULT, LoRABaseLayer, LoRAExperts
from .training import trainable_biases
from .wrap import Plan, adapter_of, check_base


class StoredAdapters(AdapterOperations):
    """What :class:`~lowbit_lora.LoraModel` does with files and state dicts of its adapters."""

    config_class: type[LoraConfig] = LoraConfig
    #: The base's buffers before training.
    _start: dict[str, torch.Tensor]

    def adapter_state_dict(self, name: str | None = None) -> dict[str, torch.Tensor]:
        """What the file of an adapter (default: the active one) holds, by PEFT's keys; the tensors are the model's."""
        return {PREFIX + key: tensor for key, tensor in self._tensors(self._named(name)).items()}

    def load_adapter_state_dict(self, tensors: dict[str, torch.Tensor], name: str | None = None) -> None:
        """Give an adapter (default: the active one) the values of :meth:`adapter_state_dict`, in the memory it has.

        ``tensors``: by PEFT's keys, with or without their prefix, on any device.

        Raises:
            ValueError: no adapter of a name; a key or a shape does not fit. Nothing has changed then.
        """
        name = self._named(name)
        self._check_not_merged(name)
        targets = self._tensors(name)
        _fill(targets, fit(tensors, targets, self.model, "tensors"))

    def base_state_dict(self) -> dict[str, torch.Tensor]:
        """The base's parameters and buffers by the names that they have without adapters; the tensors are its own."""
        tensors = self.model.state_dict()
        return {name: tensors[key] for name, key in base_keys(self.model) if key in tensors}

    def save_base(self, folder: str | os.PathLike, **options: Any) -> None:
        """Write the base without adapters, as the ``save_pretrained`` of its class does.

        An adapter that began with what quantization took away (:meth:`lowbit_lora.QLoRAModel.calibrated`) fits this
        base only: load both, ``QLoRAModel.from_pretrained(AutoModel....from_pretrained(folder), adapter_folder)``.

        Args:
            options: of that method; of a quantized base also ``format``, "lowbit" or "bitsandbytes".

        Raises:
            TypeError: the base has no such method; ``base_state_dict()`` returns its tensors.
            ValueError: adapters are merged, or the base is one that this wrapper quantized without data, which the
                dense model and the adapter's file determine.
            OSError: the files cannot be written.
        """
        self._unmerged_parts()
        write = getattr(self.model, "save_pretrained", None)
        if write is None:
            raise TypeError(
                f"save_base: expected a model with save_pretrained, got {type(self.model).__name__}; take "
                "base_state_dict()"
            )
        if has_quantized_weights(self.model) and not is_quantized(self.model):
            raise ValueError(
                "save_base: expected a base that is dense, calibrated, or was loaded with a LowbitConfig; got one that "
                "QLoRAModel quantized, and quantizes again from the dense model"
            )
        places = [
            (parent, key, child)
            for parent in self.model.modules()
            for key, child in parent._modules.items()
            if isinstance(child, Adapted)
        ]
        try:
            for parent, key, child in places:
                parent._modules[key] = base_of(child)
            write(folder, **options)
        finally:
            for parent, key, child in places:
                parent._modules[key] = child

    def _named(self, name: str | None) -> str:
        """The name, if there is such an adapter, or that of the only active one."""
        if name is not None:
            return self._known([name])[0]
        if len(self._active) != 1:
            raise ValueError(f"adapter: expected a name where {len(self._active)} are active")
        return self._active[0]

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        return tensors_of(self.model, name, self.configs[name].bias)

    def _check_not_merged(self, name: str) -> None:
        if any(name in part.merged for part in self._parts().values()):
            raise ValueError(f"adapter: expected one that is not merged, got {name!r}; unmerge first")

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        *,
        adapters_to_save: Iterable[str] | None = None,
        is_main_process: bool = True,
        save_embedding_layers: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
        **_: Any,
    ) -> None:
        """Write the adapters (LoRA, modules to save, trained biases), not the base, in PEFT's two files each.

        The adapter "default" goes into ``folder``, any other into a folder of its name in it. Buffers that training has
        moved (batch norm's statistics) are saved too, and a README.md if there is none. Several processes may save into
        one folder. A save that fails leaves what was there; one that is killed leaves that, the new files, or (between
        two renames) files that do not belong together, as loading them says.

        Args:
            adapters_to_save: their names; by default all.
            is_main_process: False writes nothing, for the other ranks of a distributed run. Under FSDP2 all ranks have
                to call this: their parts are gathered.
            save_embedding_layers: save the embedding and the output layer whole: for those that were resized.
            state_dict: this model's, whole: Trainer gathers it under FSDP2, and lets the main process alone save.
            _: other keywords, of which Hugging Face's Trainer passes some, are ignored.

        Raises:
            OSError: the files cannot be written.
            ValueError: the adapters have been merged; a parameter is spread over ranks by ZeRO-3 or FSDP1.
        """
        self._parts()
        own = dict(self.named_parameters()) if state_dict else {}
        gathered = {own[name]: tensor for name, tensor in (state_dict or {}).items() if name in own}
        for name in list(self.configs) if adapters_to_save is None else self._known(list(adapters_to_save)):
            tensors = changed(self._start, buffers_of(self.model))
            tensors |= whole_embeddings(self.model) if save_embedding_layers else {}
            tensors |= self._tensors(name)
            whole = {key: _whole(key, gathered.get(tensor, tensor)) for key, tensor in tensors.items()}
            config = as_plain_lora(self.model, name, self.configs[name], whole)
            if is_main_process:
                save_adapter(self.model, config, whole, folder if name == DEFAULT else os.path.join(folder, name))
        if is_main_process and os.path.isdir(folder):
            hub.write_card(folder, model_card(self.model, os.path.basename(os.path.abspath(folder))))

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **options: Any
    ) -> Any:
        """Upload the adapters, and a model card if the repository has none, to the hub. The base stays here.

        Args:
            repo_id: "owner/name"; made if it is not there.
            private, token: as huggingface_hub's HfApi takes them.
            options: adapters_to_save, save_embedding_layers; and those of ``HfApi.upload_folder`` (commit_message,
                revision, create_pr...), whose result, where the commit is, is returned.
        """
        ours = {key: options.pop(key) for key in ("adapters_to_save", "save_embedding_layers") if key in options}
        options = {"commit_message": "Upload adapter"} | options
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **ours)
            return hub.upload(folder, repo_id, lambda name: model_card(self.model, name), private, token, **options)

    def load_adapter(
        self,
        folder: str | os.PathLike,
        name: str,
        *,
        is_trainable: bool = False,
        strict: bool = True,
        settings_from: str | None = None,
        lora_dtype: str = "float32",
    ) -> None:
        """Add a saved adapter, by lowbit or PEFT. It is not active: ``set_adapter(name)`` makes it so.

        Args:
            folder: what save_pretrained wrote, or a hub name.
            name: a new one, or one that is there, whose values it takes in place (hot-swapping): no memory is
                allocated anew, and what was captured in a CUDA graph or compiled computes with the new values. With the
                first adapter come the buffers that training moves (batch norm's statistics).
            is_trainable: let it train once it is active. What trains besides is left as it is.
            strict, settings_from: see :meth:`from_pretrained`; hot-swapping is strict.
            lora_dtype: of the factors, whatever the file's is; hot-swapping keeps that of the memory.

        Raises:
            OSError: files that are missing (FileNotFoundError) or broken, or that do not belong together.
            ValueError, TypeError: the adapter does not fit the model. Nothing has changed then.
        """
        options = {"lora_dtype": lora_dtype}
        config, tensors, file = read_adapter(self.model, folder, LoraConfig, options, settings_from)
        if name in self.configs:
            self._check_not_merged(name)
            targets, base = self._tensors(name), of_base(self.model, self._parts())
            values = without_initial(self.model, name, by_own_keys(tensors, targets, self.model))
            values = padded(self.model, name, config, values, file)
            values = fit(values, targets, self.model, file, optional=base)
            if name == next(iter(self.configs)):  # the buffers are what this one was trained with
                targets |= buffers_of(self.model)
                values = self._start | values
            warn_of_other_base(values, {key: tensor for key, tensor in base.items() if key not in targets}, file)
            _fill(targets, values)
            return
        config = with_saved_of_file(self.model, dataclasses.replace(config, bias="none"), tensors)
        fresh = self._add(name, config, listed=True)
        try:
            targets, base = self._tensors(name), of_base(self.model, self._parts())
            values = fit(tensors, targets, self.model, file, optional=base, strict=strict)
            _fill(targets, values)
        except BaseException:
            self.delete_adapter(name)
            replace_modules(self.model, {part: part.base for part in fresh if not part.adapters})
            raise
        warn_of_other_base(values, base, file)
        for part in self._parts().values():
            for parameter in part.adapter_parameters(name):
                parameter.requires_grad_(is_trainable and parameter.is_floating_point())

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        folder: str | os.PathLike,
        *,
        adapter_name: str = DEFAULT,
        is_trainable: bool = False,
        strict: bool = True,
        settings_from: str | None = None,
        **overrides: Any,
    ) -> "StoredAdapters":
        """Put a saved adapter, by lowbit or PEFT, onto ``model``.

        Args:
            model: a fresh dense base; QLoRAModel quantizes it as it was when the adapter was saved.
            folder: what save_pretrained wrote, or a hub name.
            adapter_name: the adapter's name in the model.
            is_trainable: train on; otherwise every parameter is frozen, and the model is left in eval mode.
            strict: False: keys that are missing or unexpected in the file are a warning, and no error.
            settings_from: "weights" or "config": which file to follow where the two do not belong together: a save was
                interrupted (the weights know their settings), or adapter_config.json was edited on purpose.
            overrides: quantization, double_quant, block_size, scale (an adapter by PEFT says nothing of them),
                lora_dropout, lora_dtype (fp32, whatever the file's is), gradient_checkpointing.

        Raises:
            OSError: files that are missing (FileNotFoundError) or broken, or that do not belong together.
            ValueError, TypeError: the adapter does not fit ``model``; nothing has been changed then.
        """
        check_base(model)
        config, tensors, file = read_adapter(model, folder, cls.config_class, overrides, settings_from)
        plan = Plan(model, with_saved_of_file(model, config, tensors), adapter_name, listed=True)
        base = plan.of_base()
        values = fit(tensors, plan.tensors(), model, file, optional=base, strict=strict)
        wrapper = cls.__new__(cls)
        nn.Module.__init__(wrapper)
        wrapper._adopt(plan, is_trainable)
        _fill(base | wrapper._tensors(adapter_name), values)
        return wrapper if is_trainable else wrapper.eval()


@torch.no_grad()
def _fill(targets: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """Copy the values into those targets that they have values for."""
    for key in targets.keys() & values.keys():
        targets[key].copy_(values[key])


def tensors_of(model: nn.Module, name: str, bias: str) -> dict[str, torch.Tensor]:
    """What an adapter's file holds, by PEFT's keys without their prefix; the tensors are the model's own."""
    tensors: dict[str, torch.Tensor] = dict(trainable_biases(model, bias))
    for module_name, part in adapted_modules(model).items():
        tensors |= {f"{module_name}.{key}": tensor for key, tensor in part.adapter_tensors(name).items()}
    return tensors


def as_plain_lora(model: nn.Module, name: str, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> LoraConfig:
    """The config to save of an adapter; ``tensors``, those to save, change where it is not the adapter's own.

    Where the factors were taken out of a dense base (PiSSA, OLoRA), what is saved is the difference to the first ones:
    plain LoRA of twice the rank, which fits the base as it was.
    """
    if not is_decomposing(config.init_lora_weights) or isinstance(config, QLoRAConfig):
        return config
    for layer_name, part in adapted_modules(model).items():
        if isinstance(part, LoRABaseLayer) and name in part.initial:
            (key_a, a), (key_b, b) = list(part.adapter_tensors(name).items())[:2]
            first_a, first_b = part.initial[name]
            tensors[f"{layer_name}.{key_a}"] = torch.cat([a.detach(), first_a.view(a.shape).to(a)])
            tensors[f"{layer_name}.{key_b}"] = torch.cat([b.detach(), -first_b.view(b.shape).to(b)], 1)
    factor = math.sqrt(2) if config.use_rslora else 2
    return dataclasses.replace(
        config,
        rank=2 * config.rank,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in (config.rank_pattern or {}).items()},
        alpha_pattern={key: factor * alpha for key, alpha in (config.alpha_pattern or {}).items()},
        init_lora_weights="default",
    )


def _whole(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is spread over ranks, gathered: all ranks have to ask. ValueError for one that cannot be."""
    if hasattr(tensor, "gathered"):  # a part that hf.parallel has made
        return tensor.gathered()
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    if ".lora_" in key and (tensor.numel() == 0 or (tensor.dim() < 2 and ("_A." in key or "_B.weight" in key))):
        raise ValueError(
            f"{key}: expected a whole parameter, got one rank's part of shape {tuple(tensor.shape)}; save inside "
            "FSDP.summon_full_params(model) or deepspeed.zero.GatheredParameters(...)"
        )
    return tensor


def with_saved_of_file(model: nn.Module, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> LoraConfig:
    """``config`` with those modules to save whose values are in an adapter's file.

    PEFT's files list ends of names ("classifier" also means "pre_classifier") and names that a model does not have, and
    may hold whole embeddings that no list names (``save_embedding_layers``).
    """
    keys = {key.removeprefix(PREFIX) for key in tensors}
    listed = tuple(config.modules_to_save or ())
    embeddings = {base_of(module) for module in models.embeddings(model)}
    saved = []
    for module, names in module_names(model).items():
        base = base_of(module)
        for name in names:
            if base in embeddings or name.endswith(listed):
                own = {f"{name}.{key}" for key in base.state_dict()}
                if own and own <= keys:
                    saved.append(name)
                    break
    return dataclasses.replace(config, modules_to_save=saved or None)


def without_initial(model: nn.Module, name: str, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The values of a saved adapter, by own keys, without the first factors that :func:`as_plain_lora` added to them.

    Adapter ``name`` still has these factors, as in training that goes on. Where it has others, all is as it was.
    """
    values = dict(values)
    for layer_name, part in adapted_modules(model).items():
        if isinstance(part, LoRABaseLayer) and name in part.initial:
            key_a, key_b = (f"{layer_name}.{key}" for key in list(part.adapter_tensors(name))[:2])
            first_a, first_b = part.initial[name]
            rank, a, b = len(first_a), values.get(key_a), values.get(key_b)
            if a is None or b is None or len(a) != 2 * rank or b.shape[1] != 2 * rank:
                continue
            added_a, added_b = a[rank:].flatten(1), b[:, rank:].flatten(1)
            if torch.equal(added_a, first_a.to(a)) and torch.equal(added_b, -first_b.to(b)):
                values |= {key_a: a[:rank], key_b: b[:, :rank]}
    return values


def padded(
    model: nn.Module, name: str, config: LoraConfig, values: dict[str, torch.Tensor], file: str
) -> dict[str, torch.Tensor]:
    """The values of a saved adapter with this config, by own keys, as the memory of adapter ``name`` takes them.

    Where the ranks are smaller, the rest is zeros. Each layer's scaling stays, so that nothing that was captured with
    it (a CUDA graph) changes; B takes up the difference. ValueError where a rank is larger.
    """
    values = dict(values)
    for layer_name, part in adapted_modules(model).items():
        if not isinstance(part, LoRABaseLayer) or name not in part.adapters:
            continue
        rank, scaling = part.adapters[name].rank, part.adapters[name].scaling
        for own, target in part.adapter_tensors(name).items():
            key = f"{layer_name}.{own}"
            value = values.get(key)
            if value is None or value.dim() != target.dim():
                continue
            fits = all(size <= space for size, space in zip(value.shape, target.shape, strict=True))
            is_exact = isinstance(part, LoRAExperts)  # by whose rank the experts lie in the memory
            if not fits or (is_exact and value.shape != target.shape):
                raise ValueError(
                    f"{file}: {key}: expected {'exactly' if is_exact else 'at most'} the shape {tuple(target.shape)}, "
                    f"by the rank of adapter {name!r}, {rank}, whose memory it would take, got {tuple(value.shape)}"
                )
            if own.startswith(("lora_B", "lora_embedding_B")):
                value = value * (adapter_of(config, layer_name, part).scaling / scaling)
            values[key] = value.new_zeros(target.shape)
            values[key][tuple(slice(size) for size in value.shape)] = value
    return values
