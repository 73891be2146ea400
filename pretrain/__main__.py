"""``python -m pretrain STAGE ...``: see pretrain/README.md."""

import argparse
from pathlib import Path

import torch

from pentimento.pocket import weights


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pretrain", description="Pretraining of the pocket models, in stages."
    )
    parser.add_argument(
        "stage",
        choices=(
            "tokenizers",
            "autoencoder",
            "decoder",
            "base",
            "fill",
            "distil",
            "preview",
            "export",
            "unpack",
            "accept",
            "bsq",
            "bsq-decoder",
            "infinity",
            "infinity-accept",
            "infinity-export",
        ),
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="folder of the stage before")
    parser.add_argument(
        "--tokenizers",
        type=Path,
        help="folder that `tokenizers` wrote; for Infinity one with the text encoder too",
    )
    parser.add_argument(
        "--again", type=int, default=0, help="repetition of the stage, from 0: other scenes, other noise"
    )
    parser.add_argument("--count", type=int, default=48, help="pictures per acceptance number")
    parser.add_argument("--photos", type=Path, help="folder of photographs for the autoencoder's number")
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pool", type=int, default=200_000)
    parser.add_argument("--lr", type=float, help="peak learning rate; the stage's own if not given")
    parser.add_argument(
        "--muon", action="store_true", help="Muon for the matrices of blocks instead of AdamW"
    )
    parser.add_argument("--eager", action="store_true", help="do not compile (Infinity's stages)")
    return parser.parse_args()


def network_stage(args: argparse.Namespace, text: Path, device: torch.device) -> None:
    """A stage of the loop that all networks but FLUX's autoencoder share."""
    from . import bsq, flux, infinity
    from .optimise import Budget

    budget = Budget(
        seconds=args.seconds, batch=args.batch, pool=args.pool, again=args.again, device=device,
        peak=args.lr, muon=args.muon, eager=args.eager,
    )  # fmt: skip
    if args.stage == "infinity":
        infinity.run(args.out, args.start, text, budget)
    elif args.stage in ("bsq", "bsq-decoder"):
        bsq.train(args.stage, args.out, args.start, budget)
    else:
        flux.run(args.stage, args.out, args.start, args.tokenizers, budget)


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = args.tokenizers or weights.folder("pocket-fill")
    if args.stage == "tokenizers":
        from . import tokenizers

        tokenizers.write(args.out)
    elif args.stage == "accept":
        from . import accept

        accept.main(args.start, args.out / "acceptance.json", args.photos, args.count)
    elif args.stage == "export":
        from . import export

        export.write(args.start, args.tokenizers, args.out)
    elif args.stage == "unpack":
        from . import export

        export.unpack(args.start, args.out)
    elif args.stage == "preview":
        from . import preview

        preview.main(args.start, args.tokenizers, args.out, device, args.batch, (1.0, 3.5, 30.0, 50.0))
    elif args.stage == "infinity-accept":
        from . import infinity_accept

        infinity_accept.main(args.start, text, args.out, device, args.count)
    elif args.stage == "infinity-export":
        from . import infinity

        infinity.export(args.start, args.out)
    elif args.stage in ("autoencoder", "decoder"):
        from . import autoencoder

        autoencoder.train(
            args.out, args.seconds, args.batch, args.pool, device, args.start, args.stage == "decoder"
        )
    else:
        network_stage(args, text, device)


if __name__ == "__main__":
    main()
