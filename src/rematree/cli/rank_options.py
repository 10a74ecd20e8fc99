"""Options that say over which ranks a step is distributed, and by which engine."""

from typing import Annotated

import typer

_RANKS = "Several ranks"
RankCount = Annotated[
    int | None,
    typer.Option(
        "--ranks",
        help="Processes that run the step together, each with a device of its own; all bytes are then those of one.",
        show_default=False,
        rich_help_panel=_RANKS,
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        help="What distributes it: ddp (every rank holds the model), fsdp2 (fully_shard: each holds its share), "
        "zero2 (DeepSpeed: each holds its share of gradients and optimizer state) or zero3 (and of weights).",
        show_default=False,
        rich_help_panel=_RANKS,
    ),
]
Reshard = Annotated[
    bool,
    typer.Option(
        "--reshard/--no-reshard",
        help="FSDP2's reshard_after_forward of the blocks; without, weights stay whole until backward.",
        rich_help_panel=_RANKS,
    ),
]
BucketView = Annotated[
    bool,
    typer.Option(
        "--gradient-as-bucket-view", help="DDP's: gradients are views of its buckets.", rich_help_panel=_RANKS
    ),
]
BucketSize = Annotated[
    int | None,
    typer.Option(
        "--reduce-bucket-size",
        help="ZeRO-2's and -3's: elements of the bucket that gradients are reduced in; 500 million by default.",
        min=1,
        show_default=False,
        rich_help_panel=_RANKS,
    ),
]
OverlapComm = Annotated[
    bool,
    typer.Option("--overlap-comm", help="ZeRO-2's: there are two such buckets.", rich_help_panel=_RANKS),
]
Prefetch = Annotated[
    int | None,
    typer.Option(
        "--stage3-prefetch-bucket-size",
        help="ZeRO-3's: elements that are gathered ahead; 50 million unless its config says otherwise.",
        min=0,
        show_default=False,
        rich_help_panel=_RANKS,
    ),
]
Persistence = Annotated[
    int | None,
    typer.Option(
        "--stage3-param-persistence-threshold",
        help="ZeRO-3's: weights of at most so many elements are gathered once a step; 100,000 by default.",
        min=0,
        show_default=False,
        rich_help_panel=_RANKS,
    ),
]
MaxLive = Annotated[
    int | None,
    typer.Option(
        "--stage3-max-live-parameters",
        help="ZeRO-3's: whole elements beyond which nothing is gathered ahead; a billion by default.",
        min=0,
        show_default=False,
        rich_help_panel=_RANKS,
    ),
]
MaxReuse = Annotated[
    int | None,
    typer.Option(
        "--stage3-max-reuse-distance",
        help="ZeRO-3's: a weight that is used again within so many elements stays whole; a billion by default.",
        min=0,
        show_default=False,
        rich_help_panel=_RANKS,
    ),
]
