def check_beta(owner: str, beta: float) -> None:
    """Raise unless 0 < beta < 2."""
    if not 0 < beta < 2:
        raise ValueError(
            f"{owner}: beta must lie in (0, 2) (got {beta!r}); 1 takes g(x) whole, less damps"
        )
