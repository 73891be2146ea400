"""What a picture shows, said by a captioning model of the hub, for pictures that nobody has described."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from . import pretrained
from .errors import UserError

AUTO = "auto"
DEFAULT = "Salesforce/blip-image-captioning-base"
"""Licence BSD-3-Clause."""
DOWNLOAD = ["*.json", "*.txt", "*.safetensors"]
PICKLED = "pytorch_model.bin"
"""Weights of models that have no others; torch reads plain data out of it and refuses the rest."""
LONGEST = 40
"""Tokens of a caption."""


class Captioner:
    """A captioning model, read when the first caption is asked for."""

    def __init__(self, name: str):
        """``name``: a folder, a hub id, or ``auto``."""
        self.name = DEFAULT if name == AUTO else name

    def caption(self, picture: Image) -> str:
        """What an RGB picture shows, on one line, the likeliest words.

        Raises:
            UserError: no such model, one that cannot caption, or nothing to say.
        """
        processor, words, model = self._parts
        pixels = processor(images=picture, return_tensors="pt").pixel_values
        with torch.no_grad():
            made = model.generate(pixel_values=pixels, max_new_tokens=LONGEST, do_sample=False)
        text = " ".join(words.decode(made[0], skip_special_tokens=True).split())
        if not text:
            raise UserError(
                f'--caption: {self.name} says nothing of this picture; say it with --source "..."'
            )
        return text

    @cached_property
    def _parts(self) -> tuple[Any, Any, Any]:
        folder = Path(self.name).expanduser()
        if not folder.is_dir():
            if not pretrained.HUB_NAME.fullmatch(self.name):
                raise UserError(
                    f"--caption: there is no folder {self.name!r}; give auto ({DEFAULT}), a hub id or a folder"
                )
            folder = pretrained.fetch(self.name, DOWNLOAD, "--caption", "the captioner needs 1 GB")
            if not any(folder.glob("*.safetensors")):
                folder = pretrained.fetch(self.name, [PICKLED], "--caption", "the captioner needs 1 GB")
        with pretrained.explained(folder, "a captioner"), pretrained.quiet_loading():
            processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        model = pretrained.read_model(AutoModelForImageTextToText, folder, "", torch.float32, folder)
        return processor, pretrained.read_tokenizer(folder), model
