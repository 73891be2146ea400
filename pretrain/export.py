"""The last stage: a trained network as the diffusers folder that ships (bf16, each file at most 15 MiB)."""

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline
from safetensors.torch import save_file
from transformers import CLIPTokenizer, T5TokenizerFast

from pentimento.pocket.weights import FOLDED, constant_condition

from . import saving
from .flux import Codec, Network, pack


def share_capitals(net: Network, tokenizer: T5TokenizerFast) -> None:
    """A capitalised word never occurs in training: it gets the vector of the word in small letters."""
    vocab = tokenizer.get_vocab()
    table = net.t5.shared.weight.data
    for word, index in vocab.items():
        small = word.lower()
        if word != small and small in vocab:
            table[index] = table[vocab[small]]


@torch.no_grad()
def write(start: Path, tokenizers: Path, out: Path) -> None:
    codec = Codec(start, torch.device("cpu"))
    t5 = T5TokenizerFast.from_pretrained(str(tokenizers / "tokenizer_2"))
    clip = CLIPTokenizer.from_pretrained(str(tokenizers / "tokenizer"))
    net = Network(len(t5), len(clip))
    net.load_state_dict(saving.load_part(start, "net"))
    share_capitals(net, t5)
    codec.vae.register_to_config(shift_factor=codec.shift, scaling_factor=codec.scale)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    pipe = FluxFillPipeline(
        scheduler=scheduler, vae=codec.vae, text_encoder=net.clip, tokenizer=clip, text_encoder_2=net.t5, tokenizer_2=t5,
        transformer=net.transformer,
    ).to(torch.bfloat16)  # fmt: skip
    pipe.save_pretrained(str(out), max_shard_size="14MB")
    # The constant is what the shipped (bf16) encoder gives, because that is what inference feeds.
    vae = pipe.vae.float()
    grey = vae.encode(torch.zeros(1, 3, 128, 128)).latent_dist.mean
    condition = constant_condition(pack((grey - codec.shift) * codec.scale)[0])
    save_file({"condition": condition.contiguous()}, out / FOLDED)
    index = json.loads((out / "model_index.json").read_text())
    index.pop("_name_or_path", None)
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def unpack(folder: Path, out: Path) -> None:
    """The way back: a shipped folder as a stage's folder, to go on from it (its weights are bf16-rounded)."""
    pipe = FluxFillPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    parts = {"transformer": pipe.transformer, "t5": pipe.text_encoder_2, "clip": pipe.text_encoder}
    net = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    net.setdefault("t5.encoder.embed_tokens.weight", net["t5.shared.weight"].clone())
    saving.save_parts(out, {"net": net, "vae": pipe.vae})
    factors = {name: pipe.vae.config[name] for name in ("shift_factor", "scaling_factor")}
    (out / "vae.json").write_text(json.dumps(factors))
