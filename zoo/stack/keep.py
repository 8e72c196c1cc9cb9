"""Which shares of its positions a stack of blocks may go on with."""

from zoo.layers.depth_router import check_capacity


def check_keep(keep: tuple[float, ...], n_layers: int) -> None:
    """Raises a ValueError unless these are shares behind each block but the last, none larger than the one before."""
    if len(keep) != n_layers - 1:
        raise ValueError(f"keep={keep}, expected a share for each block but the last, n_layers={n_layers}")
    if any(after > before for before, after in zip((1.0, *keep), keep, strict=False)) or min(keep, default=1) <= 0:
        raise ValueError(f"keep={keep}, expected shares from 1 down to more than 0")
    for share in keep:
        check_capacity(share)
