"""``python -m pretrain STAGE ...``: see pretrain/README.md."""

import argparse
from pathlib import Path

import torch


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
        ),
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="folder of the stage before")
    parser.add_argument("--tokenizers", type=Path, help="folder that the stage `tokenizers` wrote")
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
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    elif args.stage not in ("autoencoder", "decoder"):
        from . import flux

        flux.run(
            args.stage,
            args.out,
            args.start,
            args.tokenizers,
            seconds=args.seconds,
            batch=args.batch,
            pool=args.pool,
            again=args.again,
            device=device,
            peak=args.lr,
            muon=args.muon,
        )
    else:
        from . import autoencoder

        autoencoder.train(
            args.out, args.seconds, args.batch, args.pool, device, args.start, args.stage == "decoder"
        )


if __name__ == "__main__":
    main()
