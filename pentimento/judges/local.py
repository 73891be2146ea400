"""A vision model on this machine, through transformers: any that answers to pictures and text in a chat."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..errors import UserError
from ..pretrained import HUB_NAME, choose_device, choose_dtype, quiet_loading
from . import Verdict, wording

NEW_TOKENS = 256
"""A digit and a sentence; models that think aloud first need most of it."""


@dataclass(frozen=True, kw_only=True)
class Local:
    """Asks a model in memory, greedily: equal pictures get equal verdicts."""

    name: str
    model: Any
    processor: Any

    @classmethod
    def load(cls, model: str, *, device: str = "auto", precision: str = "auto") -> "Local":
        """A folder, or a model of the hub.

        Raises:
            UserError: nothing there, another architecture, incomplete weights, or a library that its processor needs.
        """
        path = Path(model).expanduser()
        if not path.is_dir() and not HUB_NAME.fullmatch(model):
            raise UserError(
                f"judge_model={model}: there is no such folder; give the folder of a vision model in transformers' format"
                " (with config.json), or a hub id such as Qwen/Qwen2.5-VL-7B-Instruct"
            )
        try:
            place = choose_device(device)
        except UserError as error:
            raise UserError(
                f"judge_device={device}: not usable here; use auto, cpu, cuda, cuda:1 or mps"
            ) from error
        where = path if path.is_dir() else model
        processor = _read(model, AutoProcessor, where)
        if getattr(processor, "image_processor", None) is None or not processor.chat_template:
            raise UserError(
                f"judge_model={model}: is no vision model that chats: its processor lacks "
                + ("a chat template" if getattr(processor, "image_processor", None) else "pictures")
            )
        loaded, info = _read(
            model,
            AutoModelForImageTextToText,
            where,
            dtype=choose_dtype(precision, place),
            output_loading_info=True,
        )
        if info["missing_keys"]:
            raise UserError(
                f"judge_model={model}: the weights lack {min(info['missing_keys'])}; copy or download them again"
            )
        return cls(
            name=f"local {path.resolve().name if path.is_dir() else model}",
            model=loaded.eval().to(place),
            processor=processor,
        )

    def compare(self, source: Image, first: Image, second: Image, instruction: str) -> Verdict:
        """Ask which candidate is better; once more if the answer names none."""
        parts: list[dict[str, Any]] = [_text(wording.ROLE)]
        for caption, picture in zip(wording.ORDER, (first, second, source), strict=True):
            parts += [_text(caption), {"type": "image", "image": wording.shown(picture)}]
        messages = [{"role": "user", "content": [*parts, _text(wording.question(instruction))]}]
        raw = ""
        for _ in range(2):
            try:
                raw = self._answer(messages)
            except torch.OutOfMemoryError:
                return Verdict(choice=None, reason="the judge's model ran out of memory", raw=raw)
            answer = wording.read(raw)
            if answer is not None:
                return Verdict(choice=answer[0], reason=answer[1], raw=raw)
            messages += [
                {"role": "assistant", "content": [_text(raw or "...")]},
                {"role": "user", "content": [_text(wording.AGAIN)]},
            ]
        return Verdict(choice=None, reason=f"the answer names neither candidate: {raw[:200]!r}", raw=raw)

    @torch.inference_mode()
    def _answer(self, messages: list[dict[str, Any]]) -> str:
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device, dtype=self.model.dtype)
        # The settings of sampling that many models ship are unset: they mean nothing to a greedy answer.
        made = self.model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, temperature=None, top_p=None, top_k=None
        )
        new = made[:, inputs["input_ids"].shape[1] :]
        return str(self.processor.batch_decode(new, skip_special_tokens=True)[0])


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _read(model: str, kind: Any, where: Path | str, **options: Any) -> Any:
    try:
        with quiet_loading():
            return kind.from_pretrained(where, **options)
    except ImportError as error:
        needs = "torchvision" if "torchvision" in str(error).lower() else "another library"
        raise UserError(
            f"judge_model={model}: its processor needs {needs}, which is not installed: {_line(error)}"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"judge_model={model}: cannot be loaded as a vision model ({kind.__name__}): {_line(error)}"
        ) from error


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
