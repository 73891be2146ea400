"""FLUX.1 [dev] and FLUX.1 Fill over diffusers: the verbs that editing methods use.

Shapes: ``B`` pictures, ``(h, w)`` latent rows and columns (pixels / 8), ``grid`` token rows and columns
(pixels / 16), ``T`` tokens, ``S`` text tokens. Latents are packed ``(B, T, 64)``; sigma is in [0, 1].
"""

import difflib
import gc
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from PIL.Image import Image
from torch import Tensor

from .. import adapters, images, pretrained
from ..errors import UserError
from . import loading, sampling
from .config import FluxConfig
from .gguf_files import FIELDS
from .loading import Variant, Weights

Part = Literal["transformer", "vae", "text"]
"""What takes turns on the device under ``offload``; the two text encoders are one."""
MAIN_MEMORY = torch.device("cpu")


class Posterior(NamedTuple):
    """What the autoencoder says of pictures, each ``(B, 16, h, w)`` float32 in its own units.

    Shift and scale come after the draw, in ``Flux.latents``: only so is the result the references' to the bit.
    """

    mean: Tensor
    std: Tensor


@dataclass(frozen=True, kw_only=True)
class Text:
    """Encoded prompts."""

    prompt_embeds: Tensor
    """T5 states ``(B, S, C)``, padded and unmasked, as FLUX was trained."""
    pooled: Tensor
    """CLIP's pooled vector ``(B, D)``."""


class Flux:
    """FLUX.1 with frozen weights; text encoders and autoencoder are read on demand and can be released."""

    def __init__(
        self,
        weights: Weights,
        transformer: Any,
        scheduler: Any,
        *,
        device: torch.device,
        dtype: torch.dtype,
        offload: bool = False,
    ):
        """``offload``: the transformer waits in main memory until it runs."""
        self.weights = weights
        self.transformer = transformer
        self.scheduler = scheduler
        self.device = device
        self.dtype = dtype
        self._offload = offload
        self._present: set[Part] = set()
        self._staying: set[Part] = set()
        self._vae: Any = None
        self._text: Any = None
        self._vae_config = pretrained.read_json(weights.folder / "vae" / "config.json")
        self._prompts: OrderedDict[tuple[str, int], tuple[Tensor, Tensor]] = OrderedDict()
        if not offload:
            self._bring("transformer")

    @classmethod
    def load(cls, config: FluxConfig, variant: Variant) -> "Flux":
        """Load the transformer that ``config.weights`` names; everything else follows on demand.

        Raises ``UserError`` for weights that are missing, damaged, gated, of another architecture or variant,
        and for a device or attention backend that this machine does not have.
        """
        device = pretrained.choose_device(config.device)
        dtype = pretrained.choose_dtype(config.precision, device)
        pretrained.avoid_cudnn_attention(device)
        backend = check_attention(config.attention)
        weights = loading.locate(config, variant)
        flux = cls(
            weights,
            loading.load_transformer(weights, dtype),
            loading.load_scheduler(weights),
            device=device,
            dtype=dtype,
            offload=config.offload == "model",
        )
        flux._set_attention(backend)
        checkpointing = config.gradient_checkpointing
        if checkpointing is None:
            checkpointing = flux.transformer.num_parameters() >= pretrained.CHECKPOINT_FROM
        if checkpointing:
            flux.transformer.enable_gradient_checkpointing()
        if config.compile:
            flux.transformer.compile_repeated_blocks()
        return flux

    @classmethod
    def outline(cls, config: FluxConfig, variant: Variant) -> "Flux | None":
        """The model's shapes without its weights, on the meta device; ``None`` where they are not on this machine."""
        weights = loading.locate_outline(config, variant)
        if weights is None:
            return None
        transformer, scheduler = loading.outline_transformer(weights), loading.load_scheduler(weights)
        return cls(weights, transformer, scheduler, device=torch.device("meta"), dtype=torch.float32)

    def bare(self) -> "Flux | None":
        """The same model without adapters, on the same weights in memory.

        ``None`` under ``offload``: each of two would move the weights without the other's knowing.
        """
        if self._offload:
            return None
        transformer = adapters.bare(self.transformer)
        return Flux(self.weights, transformer, self.scheduler, device=self.device, dtype=self.dtype)

    def _set_attention(self, backend: str | None) -> None:
        if backend is None:
            return
        try:
            self.transformer.set_attention_backend(backend)
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            raise UserError(f"backbone.attention: {backend!r} is not usable here: {error}") from error

    @property
    def variant(self) -> Variant:
        """ "fill" or "dev"."""
        return self.weights.variant

    @property
    def native_resolution(self) -> int:
        """Pixels that the autoencoder's config calls its sample size: what the model was made for."""
        return int(self._vae_config.get("sample_size", 1024))

    @property
    def latent_channels(self) -> int:
        """Channels of the autoencoder's latents before packing (16 for FLUX.1)."""
        return int(self._vae_config["latent_channels"])

    @property
    def native_text_length(self) -> int:
        """T5 tokens per prompt that the tokenizer's config allows (512 for FLUX.1)."""
        config = pretrained.read_json(self.weights.folder / "tokenizer_2" / "tokenizer_config.json")
        return min(int(config.get("model_max_length", 512)), 512)

    def describe(self) -> dict[str, Any]:
        """What an adapter's file records of its base: no path, no time."""
        return {
            "family": "flux",
            "variant": self.variant,
            "weights": self.weights.name,
            **{FIELDS[part]: file.name for part, file in self.weights.files.items()},
            "digest": self.weights.digest("transformer"),
        }

    def encoder_digest(self) -> str:
        """Changes with the autoencoder, text encoders, tokenizers and precision: for cache keys."""
        return self._encoder_digest

    @cached_property
    def _encoder_digest(self) -> str:
        # Once: the cache asks in every step, and the files are hashed for it.
        parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        return f"{self.weights.digest(*parts)}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def vae(self) -> Any:
        """The autoencoder, on the device; read on first use."""
        if self._vae is None:
            self._vae = loading.load_vae(self.weights, self.dtype)
        self._bring("vae")
        return self._vae

    @property
    def text(self) -> Any:
        """The text encoders and tokenizers as a stock pipeline, on the device; read on first use."""
        if self._text is None:
            self._text = loading.load_text(self.weights, self.dtype)
        self._bring("text")
        return self._text

    def _bring(self, part: Part) -> None:
        """Put a part on the device. Under ``offload`` those that need not stay make room first."""
        leaving = self._present - self._staying - {part} if self._offload else set()
        for other in leaving:
            self._move(other, MAIN_MEMORY)
            self._present.remove(other)
        if leaving:
            self._free_cache()
        if part not in self._present:
            self._move(part, self.device)
            self._present.add(part)

    def _move(self, part: Part, device: torch.device) -> None:
        if part == "text":
            self._text.text_encoder.to(device)
            self._text.text_encoder_2.to(device)
        else:
            (self.transformer if part == "transformer" else self._vae).to(device)

    def release_encoders(self) -> None:
        """Free the text encoders (9 GB for FLUX.1) and the autoencoder; prompts encoded lately stay known.

        Who needs them no more is about to train: from here on the transformer stays on the device, also under ``offload``.
        """
        self._vae = self._text = None
        self._present &= {"transformer"}
        gc.collect()
        self._free_cache()
        self._bring("transformer")
        self._staying = {"transformer"}

    def _free_cache(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Posterior:
        """Posterior of ``(B, 3, H, W)`` pixels in [-1, 1]; H and W are multiples of 16."""
        vae = self.vae
        dist = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        return Posterior(dist.mean.float(), dist.std.float())

    def encode_images(self, pictures: Sequence[Image]) -> Posterior:
        """Posterior of RGB pictures of one size, a multiple of 16 each way."""
        return self.encode_pixels(images.to_tensor(pictures))

    def latents(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """A draw from posteriors ``(B, 16, h, w)`` as FLUX sees it: shifted, scaled and packed."""
        z = mean + std * noise
        return sampling.pack((z - self._vae_config["shift_factor"]) * self._vae_config["scaling_factor"])

    def mask_tokens(self, masks: Sequence[Image]) -> Tensor:
        """``(B, T, 256)`` mask channels of L masks of one size, white where the picture may change."""
        return sampling.pack_mask(images.mask_to_tensor(masks)).to(self.device)

    @torch.no_grad()
    def decode(self, latents: Tensor, size: tuple[int, int]) -> list[Image]:
        """RGB pictures of ``size`` (width, height) from packed latents ``(B, T, 64)``."""
        width, height = size
        vae = self.vae
        z = sampling.unpack(latents, (height // 16, width // 16)).to(vae.dtype)
        z = z / self._vae_config["scaling_factor"] + self._vae_config["shift_factor"]
        return images.from_tensor(vae.decode(z).sample)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], max_length: int) -> Text:
        """Encode prompts as ``FluxPipeline.encode_prompt`` does: CLIP pooled, T5 at ``max_length`` tokens.

        The last prompts are remembered, so that samples drawn while training need no text encoder in memory.
        """

        def encode(missing: list[tuple[str, int]]) -> list[tuple[Tensor, Tensor]]:
            texts = [prompt for prompt, _ in missing]
            embeds, pooled, _ = self.text.encode_prompt(
                texts, device=self.device, max_sequence_length=max_length
            )
            return list(zip(embeds, pooled, strict=True))

        rows = pretrained.remember(self._prompts, [(p, max_length) for p in prompts], encode)
        return Text(prompt_embeds=torch.stack([e for e, _ in rows]), pooled=torch.stack([p for _, p in rows]))

    def velocity(
        self,
        x_t: Tensor,
        sigma: Tensor,
        text: Text,
        *,
        grid: tuple[int, int],
        guidance: float,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Predicted ``noise - x_0`` at ``x_t (B, T, 64)`` and ``sigma (B,)``, in the model's dtype.

        ``grid`` is (rows, columns) of tokens; ``condition (B, T, 320)`` is Fill's latents and mask channels.
        ``guidance`` is the distilled scale, ignored by models without a guidance input (schnell).
        """
        x = x_t if condition is None else torch.cat((x_t.to(condition.dtype), condition), dim=2)
        prompt_embeds = text.prompt_embeds.to(self.device, self.dtype)
        # Through 1000 and the model's dtype as the stock pipelines go, so that rounding is theirs too.
        timestep = (sigma * 1000).to(self.dtype) / 1000
        guided = self.transformer.config["guidance_embeds"]
        self._bring("transformer")
        output: Tensor = self.transformer(
            hidden_states=x.to(self.device, self.dtype),
            timestep=timestep.to(self.device),
            guidance=torch.full((len(x),), float(guidance), device=self.device) if guided else None,
            pooled_projections=text.pooled.to(self.device, self.dtype),
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=self.device),
            img_ids=sampling.image_ids(grid, self.device),
            return_dict=False,
        )[0]
        return output

    def sigmas(self, steps: int, tokens: int) -> Tensor:
        """``(steps + 1,)`` sigmas of sampling, from 1 to 0, with FLUX's shift for so many image tokens."""
        return sampling.sampling_sigmas(self.scheduler, steps, tokens)

    @torch.no_grad()
    def sample(self, velocity: sampling.VelocityFn, noise: Tensor, steps: int) -> Tensor:
        """Euler from packed ``noise (B, T, 64)`` with ``steps`` calls of ``velocity(x_t, sigma (B,), step)``."""
        x = noise.to(self.device, self.dtype)
        return sampling.euler(velocity, x, self.sigmas(steps, noise.shape[1]))


def check_attention(name: str | None) -> str | None:
    """The name of an attention backend as diffusers knows it; ``UserError`` names the nearest one."""
    known = [backend.value for backend in AttentionBackendName]
    if name is None or name.lower() in known:
        return name and name.lower()
    near = difflib.get_close_matches(name.lower(), known, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    raise UserError(f"backbone.attention: there is no backend {name!r}.{meant} Known: {', '.join(known)}")
