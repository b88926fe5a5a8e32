"""The common look of the studies' pictures. Drawn without a display; the same figures give the same bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RED, BLUE, GREY = "#d1495b", "#00798c", "#8d96a3"
DPI = 110


@contextmanager
def picture(path: Path, *, columns: int = 1, size: tuple[float, float] = (5.0, 3.4)) -> Iterator[list[Any]]:
    """Axes side by side, each of `size` inches; a PNG at `path` when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.grid": True}):
        figure, axes = pyplot.subplots(1, columns, figsize=(size[0] * columns, size[1]), squeeze=False)
        try:
            for one in axes[0]:
                one.grid(alpha=0.25, linewidth=0.6)
            yield list(axes[0])
            figure.tight_layout()
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=DPI, metadata={"Software": None})
        finally:
            pyplot.close(figure)
