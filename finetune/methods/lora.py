"""LoRA: low-rank adapters beside frozen attention projections, through PEFT.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022
(2106.09685): W' = W + (alpha / rank) B A, with B = 0 at the start. Variants as PEFT provides them: DoRA (Liu et al.
2024), rank-stabilised scale alpha / sqrt(rank) (Kalajdzievski 2023), LoHa and LoKr (Yeh et al. 2024), OFT (Qiu et al. 2023).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from finetune.errors import Problem
from finetune.formats import header, lora_peft
from finetune.formats import lora as files
from finetune.formats.lora_keys import layout_of
from finetune.formats.lora_kinds import Adapter, DoraModule, LoraModule
from finetune.formats.lora_positions import places_of
from finetune.methods.base import Group, Loaded, Method, Strength, bytes_per_number, export_dtype, files_of
from finetune.model.base import Base
from finetune.model.conditioning import Cond
from finetune.model.text import add_tokens, encode, encode_cached
from finetune.runs import read_json
from finetune.settings import TrainSettings, setting

TARGETS = {
    "cross-attention": r".*attn2\.(to_q|to_k|to_v|to_out\.0)",
    "attention": r".*attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    "transformer": r".*attentions\..*(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out)",
}
TEXT_TARGETS = r".*self_attn\.(q_proj|k_proj|v_proj|out_proj)"
PLAIN = ("lora", "rslora")


class Settings(TrainSettings):
    """LoRA's own settings and defaults."""

    METHOD: ClassVar[str] = "lora"

    learning_rate: float = setting(1e-4, "peak learning rate", gt=0)
    rank: int = setting(16, "inner width of an adapter; 4 to 32 for a subject", group="method", ge=1)
    alpha: float | None = setting(None, "scale of the adapters is alpha / rank [default: the rank]", group="method", gt=0)
    targets: str = setting("cross-attention", "cross-attention, attention, transformer, or layer names split by commas", group="method")
    text_encoder_rank: int = setting(0, "rank of adapters in the text encoder (both of SDXL); 0 is off", group="method", ge=0)
    variant: Literal["lora", "dora", "rslora", "loha", "lokr", "oft"] = setting("lora", "kind of adapter, as PEFT provides them", group="method")
    dropout: float = setting(0.0, "share of an adapter's input dropped while training", group="method", ge=0, lt=1)


class Lora(Method):
    """Adapters beside the attention projections train."""

    name = "lora"
    title = "LoRA"
    paper = "Hu et al. 2022, arXiv 2106.09685"
    Settings = Settings

    @property
    def alpha(self) -> float:
        """Numerator of the scale."""
        return self.settings.alpha or float(self.settings.rank)

    def facts(self) -> list[tuple[str, str]]:
        rank, root = self.settings.rank, self.settings.variant == "rslora"
        if self.settings.variant not in ("lora", "dora", "rslora"):
            return [("adapters", f"{self.settings.variant} of rank {rank} on {self.settings.targets}")]
        below = f"square root of rank {rank}" if root else f"rank {rank}"
        scale = self.alpha / (rank**0.5 if root else rank)
        return [("adapters", f"{self.settings.variant} on {self.settings.targets}"), ("LoRA scale", f"alpha {self.alpha:g} / {below} = {scale:g}")]

    def attach(self, base: Base) -> list[Group]:
        from peft import inject_adapter_in_model

        target = TARGETS.get(self.settings.targets, self.settings.targets.split(","))
        self._check_targets(base.unet, target)
        self._configs = {"unet": self._config(target, self.settings.rank)}
        if self.settings.text_encoder_rank:
            for part, encoder, _ in base.encoders():
                if self.settings.text_encoder_rank > encoder.config.hidden_size:
                    raise Problem(f"--text-encoder-rank {self.settings.text_encoder_rank} is larger than the layers of the {part}, which are "
                                  f"{encoder.config.hidden_size} wide.", "A larger rank than that adds numbers but no freedom.",
                                  f"Use --text-encoder-rank {encoder.config.hidden_size} or less.")
            self._configs |= {part: self._config(TEXT_TARGETS, self.settings.text_encoder_rank) for part, _, _ in base.encoders()}
        trained: dict[str, nn.Parameter] = {}
        for part, config in self._configs.items():
            module = base.modules()[part]
            inject_adapter_in_model(config, module, adapter_name="default")
            trained.update({f"{part}.{name}": value for name, value in module.named_parameters() if value.requires_grad})
        for value in trained.values():
            value.data = value.data.float()
        base.states.clear()
        return [Group(trained)]

    def _config(self, target: str | list[str], rank: int) -> Any:
        """PEFT's configuration of the chosen variant."""
        import peft

        alpha, dropout = self.alpha / self.settings.rank * rank, self.settings.dropout
        match self.settings.variant:
            case "loha":
                return peft.LoHaConfig(r=rank, alpha=alpha, target_modules=target, module_dropout=dropout)
            case "lokr":
                return peft.LoKrConfig(r=rank, alpha=alpha, target_modules=target, module_dropout=dropout)
            case "oft":
                return peft.OFTConfig(r=0, oft_block_size=rank, target_modules=target, module_dropout=dropout)
            case variant:
                return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=target, lora_dropout=dropout,
                                       use_dora=variant == "dora", use_rslora=variant == "rslora")

    def _check_targets(self, unet: nn.Module, target: str | list[str]) -> None:
        """Refuse names that match no layer, and ranks wider than the narrowest layer."""
        linear = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
        if isinstance(target, str):
            chosen = [module for name, module in linear.items() if re.fullmatch(target, name)]
        else:
            chosen = [module for name, module in linear.items() if any(name == word or name.endswith(f".{word}") for word in target)]
        if not chosen:
            raise Problem(f"--targets {self.settings.targets!r} matches no layer of the UNet.",
                          f"Known words are {', '.join(TARGETS)}; layers are named like {next(iter(linear))}.",
                          "Use one of those, or layer names split by commas such as to_k,to_v.")
        narrow = min(min(module.in_features, module.out_features) if isinstance(module, nn.Linear) else min(module.in_channels, module.out_channels)
                     for module in chosen)  # by the layer's own word: quantized weights are flat
        if self.settings.rank > narrow:
            raise Problem(f"--rank {self.settings.rank} is larger than the narrowest chosen layer, which is {narrow} wide.",
                          "A larger rank than that adds numbers but no freedom.", f"Use --rank {narrow} or less.")

    def condition(self, base: Base, captions: list[str]) -> Cond:
        return encode(base, captions) if self.settings.text_encoder_rank else encode_cached(base, captions)

    def training_modules(self, base: Base) -> list[nn.Module]:
        return [base.modules()[part] for part in self._configs]

    @contextlib.contextmanager
    def detached(self, base: Base) -> Iterator[Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [layer for part in self._configs for layer in base.modules()[part].modules() if isinstance(layer, BaseTunerLayer)]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield self.denoise
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def expected_bytes(self, base: Base) -> int:
        count = sum(value.numel() for part in self._configs for value in base.modules()[part].parameters() if value.requires_grad)
        if self.settings.variant == "oft":  # PEFT's folder, and the whole difference of each layer
            count += sum(layer.weight.numel() for part in self._configs for _, layer, _ in lora_peft.live(base.modules()[part]))
            return count * bytes_per_number(self.settings)
        return count * bytes_per_number(self.settings) * 2  # kohya's layout and PEFT's

    def targets(self) -> tuple[str, ...]:
        return ("diffusers", "webui", "kohya") if self.settings.variant in PLAIN else ("webui", "kohya")

    def export(self, base: Base, folder: Path, metadata: dict[str, str]) -> None:
        """NAME.safetensors, the layout people exchange, and PEFT's form of the same numbers.

        Plain pairs: kohya's layout, and pytorch_lora_weights.safetensors for diffusers. DoRA, LoHa and LoKr: LyCORIS'
        spelling, and PEFT's folders. PEFT's OFT rotates inputs, which no reader knows: its whole difference, and the folders.
        """
        modules = {f"{part}.{name}": module for part in self._configs for name, _, module in lora_peft.live(base.modules()[part])}
        if self.settings.variant in PLAIN:
            files.write_peft(folder / "pytorch_lora_weights.safetensors", modules, metadata, export_dtype(self.settings))
        else:
            self._export_peft(base, folder, metadata)
        weights = {f"{part}.{name}": layer.weight.detach().float().cpu() for part in self._configs
                   for name, layer, module in lora_peft.live(base.modules()[part]) if module.needs_weight}
        modules = {name: files.for_readers(module, weights.get(name)) for name, module in modules.items()}
        files.write_kohya(folder / f"{self.stem}.safetensors", modules, metadata, export_dtype(self.settings))

    def _export_peft(self, base: Base, folder: Path, metadata: dict[str, str]) -> None:
        """PEFT's own form, a folder for each network."""
        from peft import get_peft_model_state_dict

        from finetune.formats.tensors import save_tensors

        for part, config in self._configs.items():
            state = get_peft_model_state_dict(base.modules()[part], adapter_name="default")
            dtypes = {name: torch.float32 if "magnitude" in name else export_dtype(self.settings) for name in state}  # a length is no difference
            state = {name: value.detach().to(dtypes[name]).cpu().contiguous() for name, value in state.items()}
            config.inference_mode = True
            (folder / part).mkdir(parents=True, exist_ok=True)
            config.save_pretrained(folder / part)
            save_tensors(folder / part / "adapter_model.safetensors", state, {"format": "pt", **metadata})

    @classmethod
    def find(cls, path: Path) -> Path | None:
        if path.is_dir() and (path / "unet" / "adapter_config.json").is_file():
            return path
        return next((file for file in files_of(path) if file.suffix == ".safetensors"
                     and any(layout_of(key) is not None for key in header.read_header(file).tensors)), None)

    @classmethod
    def load(cls, base: Base, path: Path, strength: float) -> Loaded:
        """Fold the adapters into the weights: W + strength * change(W), computed in float32. Any kind, any layout.

        Where the strength is 0 the weights are not touched: adding zeros would still turn -0 into 0.
        """
        strength = Strength.of(strength)
        networks = {part: network for part, network in base.modules().items() if part != "vae"}
        adapters = files.read_adapters(path, places={part: places_of(network) for part, network in networks.items()})
        layers = {f"{part}.{name.removeprefix('text_model.')}": layer for part, network in networks.items() for name, layer in network.named_modules()}
        for name, module in adapters.modules.items():
            try:
                layer, share = layers[name], strength.on(name.partition(".")[0])
                change = share * _first(module, strength.rank).change(layer.weight.data)
                if share:
                    layer.weight.data += change.to(layer.weight)
                if share and getattr(module, "bias", None) is not None:
                    layer.bias.data += (share * module.bias.float()).to(layer.bias)
            except (KeyError, AttributeError, RuntimeError):
                raise Problem(f"The LoRA {path} does not fit the model {base.name!r}.", f"Its module {name} is not there or has another width.",
                              "Load it on a base of the family it was trained from.") from None
        if strength.on("text_encoder"):
            _learn_words(base, path, adapters.rows())
        base.states.clear()
        told = read_json(path / "artifact.json") if (path / "artifact.json").is_file() else {}
        return Loaded(cls.name, adapters.metadata.get("finetune.trigger") or told.get("trigger"), path, adapters.metadata)


def _learn_words(base: Base, path: Path, words: Mapping[str, list[Tensor]]) -> None:
    """Words that were learned together with the LoRA and lie in its file, with rows for each text encoder."""
    widths = [encoder.get_input_embeddings().embedding_dim for _, encoder, _ in base.encoders()]
    for word, rows in words.items():
        if [own.shape[-1] for own in rows] != widths:
            raise Problem(f"The LoRA {path} holds the word {word!r} for another model than {base.name!r}.",
                          f"Its rows are {', '.join(str(own.shape[-1]) for own in rows)} wide, the text encoders' {', '.join(map(str, widths))}.",
                          "Load it on a base of the family it was trained from.")
        add_tokens(base, word, *rows)


def _first(module: Adapter, rank: int | None) -> Adapter:
    """A pair's first inner dimensions with its scale unchanged, as the web UI's fourth argument; other kinds as they are."""
    if isinstance(module, DoraModule):
        return replace(module, pair=_first(module.pair, rank))
    if rank is None or not isinstance(module, LoraModule) or rank >= module.rank:
        return module
    return LoraModule(module.down[:rank], module.up[:, :rank], module.scale * rank)
